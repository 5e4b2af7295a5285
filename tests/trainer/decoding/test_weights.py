"""Layers as rollouts compute them: the same numbers from prepared weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft.tuners.lora import Linear as LoraLinear
from tiny import EOS, PAD, one_rank  # noqa: F401
from torch import nn

from hlrlhf.trainer.decoding import choice, weights
from hlrlhf.trainer.decoding.decoder import sampling
from hlrlhf.trainer.decoding.shrinking import Shrinking
from hlrlhf.trainer.decoding.weights import Prepared
from hlrlhf.trainer.models import loading, lora
from hlrlhf.trainer.models.adapted import Adapted

pytestmark = pytest.mark.usefixtures("one_rank")

IDS = torch.tensor([[1, 5, 6, 7], [1, 30, 8, 9]])
# Of logits up to about 10; fp32 sums in another order.
TOLERANCE = {"rtol": 0, "atol": 1e-4}
HEAD = "600x512"


def logits_of(policy: Any) -> Any:
    with torch.no_grad():
        return policy.lm(input_ids=IDS).logits


def adapted(folder: Path, dtype: str = "fp32") -> Any:
    """A policy whose adapters say something."""
    policy = loading.load_policy(str(tiny.save_policy(folder, "llama")), dtype, 0.0)
    lora.add_adapters(policy, tiny.settings("lora.dim=2"))
    tiny.draw_adapters(policy)
    return policy.eval()


def forwards_of_their_own(policy: Any) -> list[nn.Module]:
    return [layer for layer in policy.modules() if "forward" in vars(layer)]


def test_adapters_are_added_to_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = adapted(tmp_path)
    before, states = logits_of(policy), {k: v.clone() for k, v in policy.state_dict().items()}
    with policy.lm.disable_adapter():
        without = logits_of(policy)

    with Prepared(tiny.cpu(tiny.settings()), True).of(policy.lm, 2), monkeypatch.context() as patch:
        beside = "an adapter was computed beside its layer"
        patch.setattr(Adapted, "forward", lambda *_: pytest.fail(beside))
        during = logits_of(policy)
    with policy.lm.disable_adapter(), Prepared(tiny.cpu(tiny.settings()), True).of(policy.lm, 2):
        torch.testing.assert_close(logits_of(policy), without, **TOLERANCE)

    assert (before - without).abs().max() > 0.1
    torch.testing.assert_close(during, before, **TOLERANCE)
    assert forwards_of_their_own(policy) == []
    assert all(states[name].equal(value) for name, value in policy.state_dict().items())
    assert logits_of(policy).equal(before)


def test_in_bf16_adapters_stay_beside_their_layers(tmp_path: Path) -> None:
    policy = adapted(tmp_path, "bf16")

    with Prepared(tiny.cpu(tiny.settings()), True).of(policy.lm, 2):
        assert forwards_of_their_own(policy) == []


def test_every_rollout_reads_the_weights_as_they_are(tmp_path: Path) -> None:
    policy, prepared = adapted(tmp_path), Prepared(tiny.cpu(tiny.settings()), True)
    with prepared.of(policy.lm, 2):
        logits_of(policy)
    layer = next(part for part in policy.modules() if isinstance(part, LoraLinear))
    with torch.no_grad():
        layer.lora_B["default"].weight.add_(1)

    with prepared.of(policy.lm, 2):
        torch.testing.assert_close(logits_of(policy), _outside(policy, prepared), **TOLERANCE)


def _outside(policy: Any, prepared: Prepared) -> Any:
    """What the policy says of itself, from within a rollout."""
    kept = {layer: vars(layer).pop("forward") for layer in forwards_of_their_own(policy)}
    made = logits_of(policy)
    for layer, own in kept.items():
        layer.forward = own
    return made


# Packing.


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy with a head and layers that are large enough."""
    folder = tmp_path_factory.mktemp("wide")
    return tiny.save_policy(
        folder, "llama", vocabulary=600, hidden_size=512, initializer_range=0.04
    )


def packed_in(prepared: Prepared, policy: Any) -> list[str]:
    """Shapes that are computed from packed weights; what is computed is what it was."""
    before = logits_of(policy)
    with prepared.of(policy.lm, 2):
        shapes = ["x".join(map(str, layer.weight.shape)) for layer in forwards_of_their_own(policy)]
        torch.testing.assert_close(logits_of(policy), before, **TOLERANCE)
    return shapes


def test_packed_weights_give_what_others_give_and_are_those_of_the_state(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = loading.load_policy(str(wide), "fp32", 0.0).eval()
    cpu = tiny.cpu(tiny.settings())
    measured = Prepared(cpu, True)
    packed_in(measured, policy)
    shapes = {
        "x".join(map(str, layer.weight.shape))
        for layer in policy.modules()
        if isinstance(layer, nn.Linear) and layer.weight.numel() >= weights.PACKED_FROM
    }
    assert set(measured.state()) == shapes, "each large shape was measured"
    assert HEAD in shapes

    # Nothing is measured again.
    monkeypatch.setattr(time, "perf_counter", lambda: pytest.fail("measured"))
    for state in (dict.fromkeys(shapes, True), dict.fromkeys(shapes, False)):
        resumed = Prepared(cpu, True)
        resumed.restore(state)
        assert set(packed_in(resumed, policy)) == {shape for shape in shapes if state[shape]}
        assert resumed.state() == state


def test_what_is_measured_to_be_faster_is_taken(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = loading.load_policy(str(wide), "fp32", 0.0).eval()
    clock = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    prepared = Prepared(tiny.cpu(tiny.settings()), True)
    assert packed_in(prepared, policy) == [], "both took as long"

    slow = weights.linear
    monkeypatch.setattr(weights, "linear", lambda *a, **b: (next(clock), slow(*a, **b))[1])
    assert HEAD in packed_in(Prepared(tiny.cpu(tiny.settings()), True), policy)


def packs(folder: Path, *flags: str) -> bool:
    settings = tiny.settings(*flags)
    policy = loading.load_policy(str(folder), "fp32", 0.0)
    device = tiny.cpu(settings)
    decoder = choice.decoder(settings, policy, tiny.tokenizer(), device, lambda: False)
    decoder.restore({"place": 0, "decoder": {HEAD: True}})
    asked: list[int] = []
    packed = device.packed
    device.packed = lambda *given: (asked.append(1), packed(*given))[1]  # type: ignore[method-assign]
    decoder(tiny.Engine(policy), [[1, 5]])
    return bool(asked)


@pytest.mark.knob("generation.pack_weights")
def test_weights_are_packed_if_they_may_be(wide: Path) -> None:
    assert packs(wide)
    assert not packs(wide, "generation.pack_weights=false")


def test_a_run_samples_with_what_its_decoder_has_found(wide: Path) -> None:
    settings = tiny.settings()
    device = tiny.cpu(settings)
    how = sampling(settings, None, [EOS], PAD, device)
    first, second = Shrinking(how, device), Shrinking(how, device)
    first(tiny.Engine(loading.load_policy(str(wide), "fp32", 0.0)), [[1, 5]])

    second.restore(first.state())

    assert HEAD in first.state()
    assert second.state() == first.state()
