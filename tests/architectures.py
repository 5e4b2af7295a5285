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
    "max_position_embeddings": 128,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
# Windows shorter than the texts, in some layers where an architecture mixes them.
WINDOW = {"sliding_window": 4}
GEMMA = LLAMA | {"head_dim": 8}
GPT_DROPOUTS = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
ATTENTION = {"attention_dropout": 0.1}

OPT = {
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
    "dropout": 0.1,
    "layerdrop": 0.5,
}
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}

# By transformers' own name of each, perhaps with a variant's after a dash. Every dropout that an
# architecture has is asked for; MPT's configuration takes none but 0.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA | ATTENTION,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.1} | ATTENTION,
    "opt": OPT | ATTENTION,
    "opt-350m": OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False} | ATTENTION,
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
    "falcon": FALCON | {"hidden_dropout": 0.1} | ATTENTION,
    "falcon-40b": FALCON
    | {"new_decoder_architecture": True, "num_kv_heads": 2, "hidden_dropout": 0.1}
    | ATTENTION,
    "falcon-alibi": FALCON | {"alibi": True, "hidden_dropout": 0.1} | ATTENTION,
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
    """A configuration of some thousand weights, which asks for what the table says."""
    model_type = architecture.partition("-")[0]
    return CONFIG_MAPPING[model_type](**CONFIGS[architecture] | options)
