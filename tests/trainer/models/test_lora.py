"""Adapters: where they sit, what trains, and what merging gives."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    LlamaConfig,
    MixtralConfig,
)
from transformers.pytorch_utils import Conv1D

from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.models import forwards, loading, lora

ROWS = [[1, 5, 6, 7, 8, 9], [1, 30, 2]]

# GPT-2 stores its matrices the other way round, in layers of a class of its own.
architectures = pytest.mark.parametrize("architecture", tiny.WITH_POSITIONS)
kinds = pytest.mark.parametrize("kind", ["policy", "scorer"])


def load(folder: Path, architecture: str, kind: str) -> forwards.Policy | forwards.Scorer:
    if kind == "policy":
        return loading.load_policy(str(tiny.save_policy(folder, architecture)), "fp32", 0.0)
    return loading.load_scorer(str(tiny.save_classifier(folder, architecture)), "fp32", 0.0)


def inner(model: Any) -> Any:
    return model.lm if isinstance(model, forwards.Policy) else model.classifier


def adapted(folder: Path, architecture: str, kind: str, *flags: str) -> Any:
    """A model with adapters that do something: as after some training, none is zero."""
    model = load(folder, architecture, kind)
    lora.add_adapters(model, tiny.settings("lora.dim=3", "lora.alpha=6", *flags))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if lora.is_adapter(name):
                parameter.normal_(std=0.2)
    return model.eval()


def outputs(model: Any) -> Any:
    arguments = (*tiny.padded(ROWS), 2)
    with torch.no_grad():
        return model(*arguments, 1.0) if isinstance(model, forwards.Policy) else model(*arguments)


@pytest.mark.knob("lora.dim", "lora.alpha")
@architectures
@kinds
def test_every_linear_layer_of_the_backbone_has_an_adapter_and_the_head_has_none(
    tmp_path: Path, architecture: str, kind: str
) -> None:
    plain = inner(load(tmp_path / "plain", architecture, kind))
    matrices = nn.Linear | Conv1D
    linear = {name for name, module in plain.named_modules() if isinstance(module, matrices)}
    heads = {"lm_head", "score"} & linear
    assert len(heads) == 1
    # Per layer: q, k, v, o, gate, up, down; query_key_value, dense, h_to_4h, 4h_to_h; or c_attn,
    # c_proj, c_fc, c_proj.
    assert len(linear - heads) == 2 * (7 if architecture == "llama" else 4)

    model = adapted(tmp_path / "model", architecture, kind)

    down = {
        name.split("base_model.model.", 1)[1].removesuffix(".lora_A.default.weight"): parameter
        for name, parameter in model.named_parameters()
        if name.endswith(".lora_A.default.weight")
    }
    assert set(down) == linear - heads
    assert {parameter.shape[0] for parameter in down.values()} == {3}
    layer = inner(model).get_submodule(f"base_model.model.{min(down)}")
    assert layer.scaling == {"default": 6 / 3}


@pytest.mark.knob("only_optimize_lora")
@architectures
@kinds
@pytest.mark.parametrize("only", [False, True])
def test_what_trains(tmp_path: Path, architecture: str, kind: str, only: bool) -> None:
    model = adapted(tmp_path, architecture, kind, f"only_optimize_lora={str(only).lower()}")

    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    everything = {name for name, _ in model.named_parameters()}
    adapters = {name for name in everything if ".lora_" in name}
    head = {name for name in everything if name.endswith(".score.weight")}
    assert len(head) == (kind == "scorer")
    # What a matrix has an adapter for stays as it is; its bias is no matrix.
    wrapped = {name.partition(".lora_")[0] for name in adapters}
    frozen = {name for name in everything if name.removesuffix(".base_layer.weight") in wrapped}
    beside = everything - frozen
    assert {name.rpartition(".")[2] for name in frozen} == {"weight"}
    assert any("embed" in name or "wte" in name for name in beside)
    assert any("norm" in name or "ln_" in name for name in beside)
    if architecture != "llama":
        assert any(name.endswith(".base_layer.bias") for name in beside)
    assert trains == (adapters | head if only else beside)
    outputs_with_gradient = (
        model(*tiny.padded(ROWS), 2, 1.0) if kind == "policy" else model(*tiny.padded(ROWS), 2)
    )
    outputs_with_gradient.square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trains


@architectures
@kinds
def test_new_adapters_change_nothing_yet(tmp_path: Path, architecture: str, kind: str) -> None:
    model = load(tmp_path, architecture, kind).eval()
    before = outputs(model)

    lora.add_adapters(model, tiny.settings("lora.dim=3"))

    torch.testing.assert_close(outputs(model.eval()), before)


@architectures
@kinds
def test_merged_weights_are_those_of_pefts_own_merge(
    tmp_path: Path, architecture: str, kind: str
) -> None:
    """Tolerance: 1e-5, fp32 products in another order."""
    model = adapted(tmp_path, architecture, kind)
    before = outputs(model)
    weights = dict(inner(model).state_dict())

    merged = lora.merged(inner(model), weights)

    assert outputs(model).equal(before)
    expected = copy.deepcopy(inner(model)).merge_and_unload().state_dict()
    assert set(merged) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-5)
    plain = load(tmp_path / "again", architecture, kind).eval()
    assert any(not merged[name].equal(value) for name, value in inner(plain).state_dict().items())
    inner(plain).load_state_dict(merged)
    torch.testing.assert_close(outputs(plain), before, rtol=1e-4, atol=1e-4)


def test_merging_keeps_the_precision_of_the_weights(tmp_path: Path) -> None:
    model = adapted(tmp_path, "llama", "policy")
    weights = {
        name: value if lora.is_adapter(name) else value.bfloat16()
        for name, value in inner(model).state_dict().items()
    }

    merged = lora.merged(inner(model), weights)

    assert {value.dtype for value in merged.values()} == {torch.bfloat16}
    name = "model.layers.0.mlp.up_proj"
    layer = inner(model).get_submodule(f"base_model.model.{name}")
    exact = layer.base_layer.weight.bfloat16().float() + layer.get_delta_weight("default")
    # Added in fp32 and rounded once.
    assert merged[f"{name}.weight"].equal(exact.bfloat16())


def test_adapters_of_the_actor_do_not_touch_the_reference(tmp_path: Path) -> None:
    folder = str(tiny.save_policy(tmp_path, "llama"))
    actor, reference = (loading.load_policy(folder, "fp32", 0.0).eval() for _ in range(2))
    before = outputs(reference)

    lora.add_adapters(actor, tiny.settings("lora.dim=3"))
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.add_(0.1)

    assert outputs(reference).equal(before)
    assert not any(".lora_" in name for name, _ in reference.named_parameters())
    assert not outputs(actor).equal(before)


def test_adapters_start_as_strong_as_the_references(tmp_path: Path) -> None:
    """Uniform up to 1 / sqrt(r), whatever the width of the layer; the other factor is 0."""
    model = load(tmp_path, "llama", "policy")

    lora.add_adapters(model, tiny.settings("lora.dim=4"))

    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            # None of 128 draws in the outer tenth: once in 700,000 times, and the seed is fixed.
            assert 0.45 < parameter.abs().max() <= 0.5, name
        if ".lora_B." in name:
            assert not parameter.any(), name


def test_experts_that_are_fused_into_one_tensor_are_refused_by_name() -> None:
    config = MixtralConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    model = forwards.Policy(AutoModelForCausalLM.from_config(config))

    with pytest.raises(
        TrainerError, match=r"MixtralForCausalLM .* take no adapter: model\.layers.*HL_LORA_DIM=0"
    ):
        lora.add_adapters(model, tiny.settings("lora.dim=3"))


def llama() -> tuple[int, int, int, int]:
    """Of Llama 2 7B: adapters, matrices, an embedding, norms."""
    layers, hidden, between, rank = 32, 4096, 11008, 64
    adapters = layers * rank * (4 * (hidden + hidden) + 3 * (hidden + between))
    matrices = layers * (4 * hidden * hidden + 3 * hidden * between)
    return adapters, matrices, 32000 * hidden, (2 * layers + 1) * hidden


def bloom(hidden: int) -> tuple[int, int, int, int]:
    """Of a BLOOM with 24 layers: adapters, matrices, an embedding, norms and biases."""
    layers, rank = 24, 64
    # Inputs and outputs, in widths, of query_key_value, dense, h_to_4h and 4h_to_h.
    adapters = layers * rank * hidden * ((1 + 3) + (1 + 1) + (1 + 4) + (4 + 1))
    matrices = layers * hidden * hidden * (3 + 1 + 4 + 4)
    norms = 2 * (2 * layers + 2) * hidden
    return adapters, matrices, 250880 * hidden, norms + layers * hidden * (3 + 1 + 4 + 1)


LLAMA_7B = LlamaConfig(num_labels=1)  # its defaults are those of Llama 7B, 1 and 2
BLOOM = {"vocab_size": 250880, "n_layer": 24, "n_head": 16, "num_labels": 1}


@pytest.mark.parametrize("only", [False, True])
@pytest.mark.parametrize("kind", ["policy", "scorer"])
@pytest.mark.parametrize(
    ("config", "by_hand"),
    [
        pytest.param(LLAMA_7B, llama(), id="Llama 2 7B"),
        pytest.param(BloomConfig(hidden_size=1536, **BLOOM), bloom(1536), id="BLOOM 1.1B"),
        pytest.param(BloomConfig(hidden_size=1024, **BLOOM), bloom(1024), id="BLOOM 560M"),
    ],
)
def test_parameters_of_the_presets_models_that_train(
    config: Any, by_hand: tuple[int, int, int, int], kind: str, only: bool
) -> None:
    adapters, matrices, embedding, others = by_hand
    tied = config.model_type == "bloom"
    head = config.hidden_size if kind == "scorer" else 0 if tied else embedding
    with torch.device("meta"):
        model = (
            forwards.Scorer(AutoModelForSequenceClassification.from_config(config))
            if kind == "scorer"
            else forwards.Policy(AutoModelForCausalLM.from_config(config))
        )
        lora.add_adapters(model, tiny.settings("lora.dim=64", f"only_optimize_lora={only}"))

    trainable, total = forwards.parameters(model)

    assert total == adapters + matrices + embedding + others + head
    if only:
        assert trainable == adapters + (head if kind == "scorer" else 0)
    else:
        assert trainable == adapters + embedding + others + head
    if config is LLAMA_7B and kind == "policy" and not only:
        assert (round(trainable / 1e9, 2), round(total / 1e9, 1)) == (0.42, 6.9)
