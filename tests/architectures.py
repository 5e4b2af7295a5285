"""Tiny configurations of the architectures that the trainer is tried on."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING

# Shapes under the two families of names that configurations have for them.
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
# Windows shorter than the texts, in some layers where an architecture mixes them.
WINDOW = {"sliding_window": 4}
GEMMA = LLAMA | {"head_dim": 8}
GPT_DROPOUTS = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
ATTENTION = {"attention_dropout": 0.1}

# By transformers' own name of each: every dropout that it has is asked for.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA | ATTENTION,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.1} | ATTENTION,
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
        "dropout": 0.1,
        "layerdrop": 0.5,
    }
    | ATTENTION,
    "gpt2": GPT | GPT_DROPOUTS,
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
        "max_position_embeddings": 64,
        "resid_dropout": 0.1,
        "embed_dropout": 0.1,
    }
    | ATTENTION,
    "gpt_neox": LLAMA | {"hidden_dropout": 0.1} | ATTENTION,
    "gptj": GPT | {"rotary_dim": 4} | GPT_DROPOUTS,
    "qwen2": LLAMA | WINDOW | {"use_sliding_window": True, "max_window_layers": 1} | ATTENTION,
    "qwen3": GEMMA | ATTENTION,
    "gemma": GEMMA | ATTENTION,
    "gemma2": GEMMA | WINDOW | {"query_pre_attn_scalar": 8} | ATTENTION,
    "gemma3_text": GEMMA
    | WINDOW
    | {"query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]}
    | ATTENTION,
    "mistral": LLAMA | WINDOW | ATTENTION,
    "mixtral": LLAMA
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.1}
    | ATTENTION,
    "falcon": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "alibi": True,
        "hidden_dropout": 0.1,
    }
    | ATTENTION,
    "mpt": {
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "max_seq_len": 64,
    },
    "phi": LLAMA | {"resid_pdrop": 0.1, "embd_pdrop": 0.1} | ATTENTION,
    "phi3": LLAMA | WINDOW | {"resid_pdrop": 0.1, "embd_pdrop": 0.1} | ATTENTION,
    "starcoder2": LLAMA | WINDOW | {"residual_dropout": 0.1, "embedding_dropout": 0.1} | ATTENTION,
    "olmo2": LLAMA | ATTENTION,
}


def config(architecture: str, **options: Any) -> Any:
    """A configuration of some thousand weights."""
    return CONFIG_MAPPING[architecture](**CONFIGS[architecture] | options)
