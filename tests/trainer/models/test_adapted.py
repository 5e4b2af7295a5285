"""A layer and its adapter as one function, against peft's own forward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from storages import Made
from tiny import one_rank  # noqa: F401
from torch import nn

from hlrlhf.trainer.models import engine, loading, lora

ROWS = [[1, 5, 6, 7, 8, 9], [1, 30, 2]]
ONLY = "only_optimize_lora=true"


def adapted(folder: Path, architecture: str, *flags: str) -> Any:
    """A policy whose adapters and biases say something; the scaling is 2."""
    policy = loading.load_policy(str(tiny.save_policy(folder, architecture)), "fp32", 0.0)
    lora.add_adapters(policy, tiny.settings("lora.dim=3", "lora.alpha=6", *flags))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if lora.is_adapter(name) or name.endswith(".base_layer.bias"):
                parameter.normal_(std=0.2)
    return policy.train()


def layers(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, LoraLinear)]


def as_peft_has_it(model: Any) -> Any:
    """A copy whose layers have the class that peft gave them."""
    model = copy.deepcopy(model)
    for layer in layers(model):
        layer.__class__ = LoraLinear
    return model


@contextmanager
def without_pefts_forward() -> Iterator[None]:
    """Fail where a layer's forward is peft's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoraLinear, "forward", lambda *_, **__: pytest.fail("peft's forward"))
        yield


def asked_of_peft(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Gets an entry for each layer that peft's forward computes."""
    asked: list[Any] = []
    pefts = LoraLinear.forward
    monkeypatch.setattr(LoraLinear, "forward", lambda *given: (asked.append(1), pefts(*given))[1])
    return asked


def logprobs(policy: Any) -> Any:
    return policy(*tiny.padded(ROWS), 2, 1.0)


def gradients(policy: Any) -> tuple[Any, dict[str, Any]]:
    """Log-probs of the policy, and the gradient of each weight that trains."""
    made = logprobs(policy)
    made.square().sum().backward()
    named = policy.named_parameters()
    return made.detach(), {name: p.grad for name, p in named if p.requires_grad}


@pytest.mark.parametrize("flags", [(), (ONLY,)], ids=["beside others", "alone"])
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_log_probs_and_gradients_are_those_of_peft(
    tmp_path: Path, architecture: str, recomputed: bool, flags: tuple[str, ...]
) -> None:
    """Tolerance: of sums of fp32 numbers in another order, through two layers."""
    ours = adapted(tmp_path, architecture, *flags)
    pefts = as_peft_has_it(ours)
    expected, expected_gradients = gradients(pefts)
    if recomputed:
        ours.inner.gradient_checkpointing_enable({"use_reentrant": False})
    called = []
    for layer in layers(ours):
        layer.register_forward_pre_hook(lambda *_: called.append(1))

    with without_pefts_forward():
        found, found_gradients = gradients(ours)

    # Two layers of q, k, v, o, gate, up, down; or query_key_value, dense, h_to_4h, 4h_to_h.
    count = 2 * (7 if architecture == "llama" else 4)
    assert len(called) == count * (1 + recomputed)
    biases = {name for name in expected_gradients if name.endswith(".base_layer.bias")}
    assert bool(biases) == (architecture == "bloom" and not flags)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert all(gradient.any() for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        atol = 5e-5 * float(gradient.abs().max())
        torch.testing.assert_close(found_gradients[name], gradient, rtol=5e-5, atol=atol, msg=name)


def test_what_is_scored_is_what_trains(tmp_path: Path) -> None:
    """PPO's first ratio is exactly 1."""
    policy = adapted(tmp_path, "llama", ONLY)

    with torch.no_grad(), without_pefts_forward():
        scored = logprobs(policy)

    assert scored.equal(logprobs(policy).detach())


def disabled(policy: Any) -> None:
    for layer in layers(policy):
        layer.enable_adapters(False)


def merged(policy: Any) -> None:
    policy.inner.merge_adapter()


def another(policy: Any) -> None:
    policy.inner.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "dense"]))
    for layer in layers(policy):
        if "other" in layer.lora_B:
            nn.init.normal_(layer.lora_B["other"].weight)
    policy.inner.base_model.set_adapter(["default", "other"])


def dropping(policy: Any) -> None:
    for layer in layers(policy):
        layer.lora_dropout["default"] = nn.Dropout(0.5)


def in_two_types(policy: Any) -> None:
    for name, parameter in policy.named_parameters():
        parameter.data = parameter.data if lora.is_adapter(name) else parameter.data.bfloat16()


def partitioned(policy: Any) -> None:
    """By their mark alone; an engine has them below."""
    for parameter in policy.parameters():
        parameter.ds_id = 0


@pytest.mark.parametrize("change", [disabled, merged, another, dropping, in_two_types, partitioned])
def test_peft_computes_what_the_function_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]
) -> None:
    policy = adapted(tmp_path, "llama", ONLY)
    before = logprobs(policy)
    change(policy)
    torch.manual_seed(3)
    expected = logprobs(as_peft_has_it(policy))
    asked = asked_of_peft(monkeypatch)

    torch.manual_seed(3)
    found = logprobs(policy)

    assert len(asked) == len(layers(policy))
    assert found.equal(expected)
    if change not in (merged, partitioned):  # which change nothing but who computes
        assert not found.equal(before)


def test_layers_that_hold_their_weights_the_other_way_round_stay_pefts(tmp_path: Path) -> None:
    policy = adapted(tmp_path, "gpt2")

    assert {type(layer) for layer in layers(policy)} == {LoraLinear}


# One layer, that makes 48 numbers of 32, by an adapter of rank 3.
WIDE, NARROW, RANK, TOKENS = 48, 32, 3, 10


@pytest.fixture
def layer(tmp_path: Path) -> Any:
    policy = adapted(tmp_path, "llama", ONLY)
    (one, *_) = (part for name, part in policy.named_modules() if name.endswith("up_proj"))
    assert one.base_layer.weight.shape == (WIDE, NARROW)
    return one


def drawn() -> tuple[Any, Any]:
    """What the layer reads, and the gradient of what it makes."""
    x = torch.randn(2, TOKENS // 2, NARROW, requires_grad=True)
    return x, torch.randn(2, TOKENS // 2, WIDE)


def through(layer: Any, x: Any, dy: Any) -> list[Any]:
    """Outputs, and gradients of x and of the adapter's two factors."""
    y = layer(x)
    factors = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return [y.detach(), *torch.autograd.grad(y, [x, *factors], dy)]


def test_in_bf16_what_is_made_is_rounded_twice(layer: Any) -> None:
    """Within u = 2**-8 of an intermediate result and u of the sum, 1/20 more for their products.

    Either is no larger than the same sum of absolute values.
    """
    layer = layer.bfloat16()
    x, dy = (each.detach().bfloat16().requires_grad_() for each in drawn())
    exact = as_peft_has_it(nn.ModuleList([layer])).float()[0]
    expected = through(exact, x.float(), dy.float())
    for parameter in exact.parameters():
        parameter.data.abs_()
    largest = through(exact, x.abs().float(), dy.abs().float())

    with without_pefts_forward():
        found = through(layer, x, dy)

    for made, right, most in zip(found, expected, largest, strict=True):
        assert made.dtype == torch.bfloat16
        assert ((made.float() - right).abs() <= 2.1 * 2**-8 * most).all()


def test_a_layer_makes_nothing_to_add_or_scale(layer: Any) -> None:
    x, dy = drawn()

    with Made(x, dy, *layer.parameters()) as made:
        through(layer, x, dy)

    results = [TOKENS * WIDE, TOKENS * NARROW, RANK * NARROW, WIDE * RANK]
    assert sorted(made.sizes) == sorted([*results, TOKENS * RANK, TOKENS * RANK])


def test_a_layer_keeps_what_it_reads_and_what_lies_between_the_adapters_factors(layer: Any) -> None:
    x, _ = drawn()
    kept = {}

    def keep(tensor: Any) -> Any:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)

    for known in (x, *layer.parameters()):
        kept.pop(known.untyped_storage().data_ptr())
    assert [tensor.numel() for tensor in kept.values()] == [TOKENS * RANK]


def test_what_a_layer_makes_may_be_changed(layer: Any) -> None:
    """As by activations in place, and residual sums."""
    x, dy = drawn()
    expected = through(layer, x, 2 * dy)

    y = layer(x).mul_(2)

    assert y.equal(2 * expected[0])
    assert torch.autograd.grad(y, x, dy)[0].equal(expected[1])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.usefixtures("one_rank")
def test_in_an_engine_the_function_computes_but_under_zero_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, dtype: str
) -> None:
    settings = tiny.settings(f"actor.zero_stage={stage}", f"dtype={dtype}", ONLY, "lora.dim=3")
    policy = loading.load_policy(str(tiny.save_policy(tmp_path, "llama")), dtype, 0.0)
    lora.add_adapters(policy, settings)
    trained = engine.trained(policy, settings.actor, settings, tiny.cpu(settings), 2)
    asked = asked_of_peft(monkeypatch)

    for _ in range(2):  # mbs is half of gbs
        engine.descend(trained, logprobs(trained).sum())

    assert bool(asked) == (stage == 3)
    moved = [
        part.abs().max() > 0
        for name, part in engine.whole_weights(trained).items()
        if ".lora_B." in name
    ]
    assert len(moved) == 2 * 7
    assert all(moved), "each began at 0"
