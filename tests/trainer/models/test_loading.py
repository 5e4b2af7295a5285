"""Checkpoints that are something else, that are older, or whose configuration drops."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    CodeGenConfig,
    MambaConfig,
    T5ForConditionalGeneration,
)

from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.models import dropout, forwards, loading, probes

SPECIAL = {"vocab_size": tiny.VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
ENCODER_DECODER = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4}


def config(architecture: str, **options: Any) -> Any:
    wide = {"initializer_range": 0.2, **SPECIAL, **options}
    if architecture in architectures.CONFIGS:
        return architectures.config(architecture, **wide)
    if architecture == "codegen":
        return CodeGenConfig(**architectures.GPT, rotary_dim=4, **wide)
    return CONFIG_MAPPING[architecture](
        **(ENCODER_DECODER if architecture == "t5" else ENCODER) | wide
    )


def saved(folder: Path, kind: Any, architecture: str, **options: Any) -> Path:
    made = kind.from_config if hasattr(kind, "from_config") else kind
    torch.manual_seed(1)
    made(config(architecture, **options)).save_pretrained(folder)
    return folder


# 1. What it is.


@pytest.mark.parametrize(
    ("kind", "architecture", "options", "message"),
    [
        (
            AutoModelForCausalLM,
            "llama",
            {},
            r"is a causal language model \(LlamaForCausalLM\), without a head that scores; step 2 "
            "makes a reward model of it",
        ),
        (
            AutoModelForSequenceClassification,
            "llama",
            {"num_labels": 3},
            r"is a classifier with 3 labels \(LlamaForSequenceClassification\); a reward model has",
        ),
        (
            BertForSequenceClassification,
            "bert",
            {"num_labels": 1},
            r"is an encoder \(BertForSequenceClassification\), which reads both ways; a critic or",
        ),
        (
            AutoModelForTokenClassification,
            "llama",
            {"num_labels": 1},
            r"is a token classifier \(LlamaForTokenClassification\); a critic or reward model is a",
        ),
        (
            T5ForConditionalGeneration,
            "t5",
            {},
            r"is an encoder-decoder \(T5ForConditionalGeneration\), which reads prompts both ways;",
        ),
    ],
    ids=["causal", "labels", "encoder", "tokens", "encoder-decoder"],
)
def test_what_cannot_score_is_told_what_it_is_before_its_weights_are_read(
    tmp_path: Path, kind: Any, architecture: str, options: dict[str, Any], message: str
) -> None:
    folder = saved(tmp_path, kind, architecture, **options)
    if kind is not AutoModelForCausalLM:  # whose files may yet name a head
        (folder / "model.safetensors").write_bytes(b"")

    with pytest.raises(TrainerError, match=f"^{folder}: {message}"):
        loading.load_scorer(str(folder), "fp32", 0.0)


@pytest.mark.parametrize(
    ("kind", "architecture", "message"),
    [
        (
            AutoModelForSequenceClassification,
            "llama",
            r"is a sequence classifier \(LlamaForSequenceClassification\), which cannot write",
        ),
        (
            AutoModelForTokenClassification,
            "qwen2",
            r"is a token classifier \(Qwen2ForTokenClassification\), which cannot write",
        ),
        (BertForMaskedLM, "bert", r"is an encoder \(BertForMaskedLM\), which reads both ways"),
        (
            T5ForConditionalGeneration,
            "t5",
            r"is an encoder-decoder \(T5ForConditionalGeneration\), which reads prompts both ways",
        ),
    ],
    ids=["classifier", "tokens", "encoder", "encoder-decoder"],
)
def test_what_cannot_write_is_told_what_it_is_before_its_weights_are_read(
    tmp_path: Path, kind: Any, architecture: str, message: str
) -> None:
    folder = saved(tmp_path, kind, architecture)
    (folder / "model.safetensors").write_bytes(b"")

    with pytest.raises(
        TrainerError,
        match=rf"^{folder}: {message}; the actor is a causal language model \(HL_ACTOR_MODEL_PATH",
    ):
        loading.load_policy(str(folder), "fp32", 0.0)


def test_a_reward_model_of_step_2_is_no_actor(tmp_path: Path) -> None:
    folder = tiny.save_step2(tmp_path / "step2", "llama")

    with pytest.raises(TrainerError, match=r"is a reward model of step 2 \(v_head\.weight\)"):
        loading.load_policy(str(folder), "fp32", 0.0)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_step_2_may_name_the_language_model_that_it_started_from(
    tmp_path: Path, suffix: str
) -> None:
    folder = tiny.save_step2(tmp_path / "step2", "llama")
    named = tiny.config("llama", architectures=["LlamaForCausalLM"])
    named.save_pretrained(folder)
    if suffix == "safetensors":
        source = folder / "pytorch_model.bin"
        save_file(torch.load(source, weights_only=True), folder / "model.safetensors")
        source.unlink()

    loading.load_scorer(str(folder), "fp32", 0.0)


def test_a_decoder_that_is_told_to_read_both_ways_is_refused(tmp_path: Path) -> None:
    both = {"use_bidirectional_attention": True}
    policy = saved(tmp_path / "a", AutoModelForCausalLM, "gemma3_text", **both)
    scorer = saved(
        tmp_path / "c", AutoModelForSequenceClassification, "gemma3_text", num_labels=1, **both
    )

    with pytest.raises(TrainerError, match="Gemma3ForCausalLM as configured reads both ways"):
        loading.load_policy(str(policy), "fp32", 0.0)
    with pytest.raises(TrainerError, match="as configured reads both ways"):
        loading.load_scorer(str(scorer), "fp32", 0.0)


# 2. Buffers of older checkpoints.

MASK, FREQUENCIES = torch.ones(1, 1, 64, 64).tril().bool(), torch.ones(4)
BUFFERS = {
    "gpt2": {"h.0.attn.bias": MASK, "h.0.attn.masked_bias": torch.tensor(-1e4)},
    "gpt_neo": {
        "h.1.attn.attention.bias": MASK.to(torch.uint8),
        "h.1.attn.attention.masked_bias": torch.tensor(-1e9),
    },
    "gpt_neox": {
        "layers.0.attention.bias": MASK,
        "layers.0.attention.masked_bias": torch.tensor(-1e9),
        "layers.0.attention.rotary_emb.inv_freq": FREQUENCIES,
    },
    "gptj": {"h.0.attn.bias": MASK, "h.0.attn.masked_bias": torch.tensor(-1e9)},
    "codegen": {"h.0.attn.causal_mask": MASK, "h.0.attn.masked_bias": torch.tensor(-1e9)},
    "llama": {"layers.0.self_attn.rotary_emb.inv_freq": FREQUENCIES},
}


def formats(folder: Path, architecture: str) -> dict[str, Path]:
    """A model as policy, and as scorer in both formats; codegen has no classifier."""
    found = {"policy": saved(folder / "policy", AutoModelForCausalLM, architecture)}
    if architecture == "codegen":
        return found
    kind = AutoModelForSequenceClassification
    found["hf"] = saved(folder / "hf", kind, architecture, num_labels=1)
    torch.manual_seed(1)
    weights = tiny.step2_weights(kind.from_config(config(architecture, num_labels=1)))
    found["step2"] = folder / "step2"
    config(architecture).save_pretrained(found["step2"])
    torch.save(weights, found["step2"] / "pytorch_model.bin")
    return found


def load(kind: str, folder: Path, rate: float = 0.0) -> forwards.Policy | forwards.Scorer:
    if kind == "policy":
        return loading.load_policy(str(folder), "fp32", rate)
    return loading.load_scorer(str(folder), "fp32", rate)


def said(model: forwards.Policy | forwards.Scorer) -> Any:
    ids, mask = tiny.padded([[1, 5, 6, 7, 8, 9], [1, 30, 2]])
    arguments = (ids, mask, 2, 1.0)[: 4 if isinstance(model, forwards.Policy) else 3]
    with torch.no_grad():
        return model(*arguments)


def add(kind: str, folder: Path, prefix: str, more: dict[str, Any]) -> None:
    if kind == "step2":
        source = folder / "pytorch_model.bin"
        weights = torch.load(source, weights_only=True)
        weights |= {f"rwtransformer.{name}": value for name, value in more.items()}
        source.unlink()  # models that were loaded from it are still mapped there
        torch.save(weights, source)
    else:
        source = folder / "model.safetensors"
        weights = load_file(source)
        weights |= {f"{prefix}.{name}": value.clone() for name, value in more.items()}
        save_file(weights, source, {"format": "pt"})


@pytest.mark.parametrize("architecture", BUFFERS)
def test_buffers_of_older_checkpoints_are_no_weights(tmp_path: Path, architecture: str) -> None:
    for kind, folder in formats(tmp_path, architecture).items():
        plain = load(kind, folder).eval()
        add(kind, folder, plain.inner.base_model_prefix, BUFFERS[architecture])

        # Where numbers lie in a file decides how they are summed.
        torch.testing.assert_close(said(load(kind, folder).eval()), said(plain))


@pytest.mark.parametrize("architecture", ["gpt_neo", "gptj", "codegen", "llama"])
def test_a_learnt_bias_under_a_buffers_name_is_a_weight(tmp_path: Path, architecture: str) -> None:
    """GPT-2's and GPT-NeoX's are missing here: transformers itself lets all such names pass."""
    name = {
        "gpt_neo": "h.0.attn.attention.bias",
        "llama": "layers.0.self_attn.attention.bias",
    }.get(architecture, "h.0.attn.bias")
    for kind, folder in formats(tmp_path, architecture).items():
        prefix = load(kind, folder).inner.base_model_prefix
        add(kind, folder, prefix, {name: torch.ones(32)})

        with pytest.raises(TrainerError, match=rf"it has {prefix}\.{re.escape(name)}, which the"):
            load(kind, folder)


@pytest.mark.parametrize("kind", ["policy", "hf", "step2"])
def test_weights_stay_in_the_file_that_the_ranks_of_a_node_share(tmp_path: Path, kind: str) -> None:
    model = load(kind, formats(tmp_path, "llama")[kind])

    files = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        begin, end = (int(address, 16) for address in span.split("-"))
        files[range(begin, end)] = name
    for name, parameter in model.named_parameters():
        (file,) = [file for span, file in files.items() if parameter.data_ptr() in span]
        assert file.startswith(str(tmp_path)), name


# 3. Dropout.


def test_dropout_is_found_however_deep_and_whatever_its_name() -> None:
    found = config("llama", hidden_dropout_prob=0.1, resid_pdrop=0.1, classifier_dropout=None)
    found.text_config = config("starcoder2", use_dropout=True, drop_rate=0.1)
    found.attn_config = {"attn_pdrop": 0.1, "inner": {"dropout_p": 0.1, "norm_topk_prob": True}}
    found.moe = config("mixtral", input_jitter_noise=0.01, problem_type=None)
    found.opt = config("opt", rope_dropoff=0.5)

    dropout.set_dropout(found, 0.25)

    assert (found.hidden_dropout_prob, found.resid_pdrop, found.attention_dropout) == (0.25,) * 3
    assert found.classifier_dropout is None
    text = found.text_config
    assert (text.residual_dropout, text.embedding_dropout, text.drop_rate) == (0.25,) * 3
    assert text.use_dropout is True
    assert found.attn_config == {
        "attn_pdrop": 0.25,
        "inner": {"dropout_p": 0.25, "norm_topk_prob": True},
    }
    # Noise is none whatever was set.
    assert (found.moe.router_jitter_noise, found.moe.input_jitter_noise) == (0, 0)
    assert (found.opt.dropout, found.opt.layerdrop, found.opt.rope_dropoff) == (0.25, 0, 0.5)


@pytest.mark.parametrize("architecture", ["starcoder2", "phi", "gptj"])
def test_dropout_under_a_name_that_is_not_known_stops_the_load(
    tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = formats(tmp_path, architecture)
    monkeypatch.setattr(dropout, "DROPOUT", re.compile("^attention_dropout$"))

    for kind, folder in folders.items():
        with pytest.raises(TrainerError, match=r"though dropout is 0: something in its config"):
            load(kind, folder)


def test_noise_of_a_router_stops_the_load_as_dropout_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path, AutoModelForCausalLM, "mixtral")
    monkeypatch.setattr(dropout, "NOISE", re.compile("^never$"))

    with pytest.raises(TrainerError, match="though dropout is 0"):
        load("policy", folder)


@pytest.mark.knob("actor.dropout", "critic.dropout")
def test_dropout_for_an_architecture_without_any_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(
        MambaConfig(hidden_size=32, num_hidden_layers=1, state_size=4, **SPECIAL)
    )
    model.save_pretrained(tmp_path / "mamba")
    load("policy", tmp_path / "mamba")
    with pytest.raises(TrainerError, match="MambaForCausalLM has none to set; set HL_ACTOR_DROP"):
        load("policy", tmp_path / "mamba", 0.1)

    # MPT's configuration wants its rate to be an integer.
    mpt = saved(tmp_path / "mpt", AutoModelForCausalLM, "mpt")
    with pytest.raises(TrainerError, match=rf"^{mpt}: Mpt.*attn_pdrop = 0\.1.*HL_ACTOR_DROPOUT=0"):
        load("policy", mpt, 0.1)


def test_loading_draws_no_random_numbers_of_the_runs(tmp_path: Path) -> None:
    """OPT draws one for each layer, even where it leaves none out."""
    for kind, folder in formats(tmp_path, "opt").items():
        states = []
        for rate in (0.0, 0.5):
            torch.manual_seed(5)
            load(kind, folder, rate)
            states.append(torch.rand(1))
        assert states[0].equal(states[1])


def test_a_model_that_processors_cannot_run_is_loaded_untried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with Optimum for Gaudi, which gives some architectures forwards for Gaudi alone."""
    policy = loading.load_policy(str(tiny.save_policy(tmp_path, "llama")), "fp32", 0.0).train()

    def forward(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("for Gaudi alone")

    policy.lm.forward = forward
    probes.check(str(tmp_path), policy, 0.0)
    assert "not tried before training" in capsys.readouterr().out
    assert policy.training
