"""Adapters: where they sit, what trains, and what merging gives."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import tiny  # noqa: E402
from torch import nn  # noqa: E402

from hlrlhf.trainer import loading, lora, models  # noqa: E402
from hlrlhf.trainer.errors import TrainerError  # noqa: E402

ROWS = [[1, 5, 6, 7, 8, 9], [1, 30, 2]]

architectures = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
kinds = pytest.mark.parametrize("kind", ["policy", "scorer"])


def load(folder: Path, architecture: str, kind: str) -> models.Policy | models.Scorer:
    if kind == "policy":
        return loading.load_policy(str(tiny.save_policy(folder, architecture)), "fp32", 0.0)
    return loading.load_scorer(str(tiny.save_classifier(folder, architecture)), "fp32", 0.0)


def inner(model: Any) -> Any:
    return model.lm if isinstance(model, models.Policy) else model.classifier


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
        return model(*arguments, 1.0) if isinstance(model, models.Policy) else model(*arguments)


@pytest.mark.knob("lora.dim", "lora.alpha")
@architectures
@kinds
def test_every_linear_layer_of_the_backbone_has_an_adapter_and_the_head_has_none(
    tmp_path: Path, architecture: str, kind: str
) -> None:
    plain = inner(load(tmp_path / "plain", architecture, kind))
    linear = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    heads = {"lm_head", "score"} & linear
    assert len(heads) == 1
    # Per layer: q, k, v, o, gate, up, down; or query_key_value, dense, h_to_4h, 4h_to_h.
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

    adapters = {name for name, _ in model.named_parameters() if ".lora_" in name}
    head = {name for name, _ in model.named_parameters() if name.endswith(".score.weight")}
    assert len(head) == (kind == "scorer")
    everything = {name for name, _ in model.named_parameters()}
    assert trains == (adapters | head if only else everything)
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


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    model = load(tmp_path, "gpt2", "policy")

    with pytest.raises(TrainerError, match=r"GPT2LMHeadModel has no linear layers.*HL_LORA_DIM=0"):
        lora.add_adapters(model, tiny.settings("lora.dim=3"))
