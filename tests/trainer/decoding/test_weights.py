"""Layers as rollouts compute them: the same numbers from prepared weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft.tuners.lora import Linear as LoraLinear
from tiny import EOS, PAD, one_rank  # noqa: F401
from torch import nn
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hlrlhf.trainer.decoding import choice, weights
from hlrlhf.trainer.decoding.attention import attending
from hlrlhf.trainer.decoding.decoder import sampling
from hlrlhf.trainer.decoding.fastest import Fastest
from hlrlhf.trainer.decoding.shrinking import Shrinking
from hlrlhf.trainer.decoding.weights import Prepared
from hlrlhf.trainer.device import Cpu
from hlrlhf.trainer.kernels import Layer
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

    with Prepared(tiny.cpu(tiny.settings())).of(policy.lm, 2), monkeypatch.context() as patch:
        beside = "an adapter was computed beside its layer"
        patch.setattr(Adapted, "forward", lambda *_: pytest.fail(beside))
        during = logits_of(policy)
    with policy.lm.disable_adapter(), Prepared(tiny.cpu(tiny.settings())).of(policy.lm, 2):
        torch.testing.assert_close(logits_of(policy), without, **TOLERANCE)

    assert (before - without).abs().max() > 0.1
    torch.testing.assert_close(during, before, **TOLERANCE)
    assert forwards_of_their_own(policy) == []
    assert all(states[name].equal(value) for name, value in policy.state_dict().items())
    assert logits_of(policy).equal(before)


def test_in_bf16_adapters_stay_beside_their_layers(tmp_path: Path) -> None:
    policy = adapted(tmp_path, "bf16")

    with Prepared(tiny.cpu(tiny.settings())).of(policy.lm, 2):
        assert forwards_of_their_own(policy) == []


def test_every_rollout_reads_the_weights_as_they_are(tmp_path: Path) -> None:
    policy, prepared = adapted(tmp_path), Prepared(tiny.cpu(tiny.settings()))
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


# Products.


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy with a head and layers that are large enough."""
    folder = tmp_path_factory.mktemp("wide")
    return tiny.save_policy(
        folder, "llama", vocabulary=600, hidden_size=512, initializer_range=0.04
    )


def others_in(prepared: Prepared, policy: Any) -> set[str]:
    """Shapes of which torch's own is not the product; what is computed is what it was."""
    before = logits_of(policy)
    with prepared.of(policy.lm, 2):
        shapes = {"x".join(map(str, layer.weight.shape)) for layer in forwards_of_their_own(policy)}
        torch.testing.assert_close(logits_of(policy), before, **TOLERANCE)
        last = policy.next_logits(IDS, torch.ones_like(IDS), DynamicCache())
        torch.testing.assert_close(last, before[:, -1], **TOLERANCE)
    return shapes


@tiny.compiles
def test_each_product_gives_what_others_give_and_is_that_of_the_state(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = loading.load_policy(str(wide), "fp32", 0.0).eval()
    cpu = tiny.cpu(tiny.settings())
    measured = Fastest(cpu)
    others_in(Prepared(cpu, measured), policy)
    shapes = {
        "x".join(map(str, layer.weight.shape))
        for layer in policy.modules()
        if isinstance(layer, nn.Linear) and layer.weight.numel() >= weights.LARGE
    }
    assert set(measured.state()) == shapes, "each large shape was measured"
    assert HEAD in shapes

    # Nothing is measured again.
    monkeypatch.setattr(time, "perf_counter", lambda: pytest.fail("measured"))
    assert list(cpu.products(torch.ones(9, 9), None, 2)) == ["packed", "own"]
    for name in ("torch", "packed", "own"):
        resumed = Fastest(cpu)
        resumed.restore(dict.fromkeys(shapes, name))
        others = others_in(Prepared(cpu, resumed), policy)
        assert others == (set() if name == "torch" else shapes)
        assert resumed.state() == dict.fromkeys(shapes, name)


@tiny.compiles
@pytest.mark.parametrize("name", ["packed", "own"])
def test_in_bf16_a_product_is_rounded_once(wide: Path, name: str) -> None:
    policy = loading.load_policy(str(wide), "bf16", 0.0).eval()
    cpu = tiny.cpu(tiny.settings())
    if name not in cpu.products(policy.lm.lm_head.weight, None, 2):
        pytest.skip("oneDNN has no products in bf16 for this processor")
    fastest = Fastest(cpu)
    fastest.restore({HEAD: name})
    read = torch.randn(2, 1, 512).bfloat16()
    weight = policy.lm.lm_head.weight.detach()
    exact = nn.functional.linear(read.double(), weight.double())
    size = nn.functional.linear(read.double().abs(), weight.double().abs())

    with Prepared(cpu, fastest).of(policy.lm, 2):
        assert policy.lm.lm_head in forwards_of_their_own(policy)
        given = policy.lm.lm_head(read).detach()

    assert given.dtype == torch.bfloat16
    # 512 products are added up in fp32, in twos maybe, which rounds twice for each.
    off = 2 * 512 * torch.finfo(torch.float32).eps * size
    off += torch.finfo(torch.bfloat16).eps / 2 * (exact.abs() + off)
    assert bool(((given - exact).abs() <= off).all())


@tiny.compiles
def test_in_bf16_the_layers_under_adapters_have_a_product_of_their_own(wide: Path) -> None:
    policy = loading.load_policy(str(wide), "bf16", 0.0)
    lora.add_adapters(policy, tiny.settings("lora.dim=2"))
    policy.bfloat16()  # as DeepSpeed does; peft's are in fp32
    adapted = [layer for layer in policy.modules() if isinstance(layer, LoraLinear)]
    shapes = {"x".join(map(str, layer.base_layer.weight.shape)) for layer in adapted}
    cpu = tiny.cpu(tiny.settings())
    fastest = Fastest(cpu)
    fastest.restore(dict.fromkeys(shapes, "own"))

    called = []

    with Prepared(cpu, fastest).of(policy.lm, 2):
        own = forwards_of_their_own(policy)
        for layer in adapted:
            product = layer.base_layer.forward
            layer.base_layer.forward = lambda read, product=product: (
                called.append(product),
                product(read),
            )[1]
        logits_of(policy)

    assert {layer.base_layer for layer in adapted} <= set(own)
    assert not set(adapted) & set(own)
    assert len(called) == len(adapted), "no layer computes with the weights alone"


def test_a_rank_without_other_products_takes_part_in_the_measurement(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or those that have some would wait for it."""
    policy = loading.load_policy(str(wide), "bf16", 0.0).eval()
    device = tiny.cpu(tiny.settings())
    monkeypatch.setattr(device, "products", lambda *_: {})
    fastest = Fastest(device)

    with Prepared(device, fastest).of(policy.lm, 2):
        assert forwards_of_their_own(policy) == []

    assert fastest.state()[HEAD] == "torch"


@tiny.compiles
def test_what_is_measured_to_be_the_fastest_is_taken(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = loading.load_policy(str(wide), "fp32", 0.0).eval()
    clock = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))

    def chosen(slow: str) -> str:
        device = tiny.cpu(tiny.settings())
        made = device.products

        def products(*given: Any) -> dict[str, Callable[[], Layer]]:
            found = made(*given)
            if slow in found:
                product = found[slow]()
                found[slow] = lambda: lambda read: (next(clock), product(read))[1]
            return found

        monkeypatch.setattr(device, "products", products)
        fastest = Fastest(device)
        others_in(Prepared(device, fastest), policy)
        return fastest.state()[HEAD]

    assert chosen("none") == "torch", "all took as long"
    torchs = weights.linear
    monkeypatch.setattr(weights, "linear", lambda *a, **b: (next(clock), torchs(*a, **b))[1])
    assert chosen("packed") == "own"
    assert chosen("own") == "packed"


def test_without_a_compiler_it_goes_on_with_a_word(
    wide: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = loading.load_policy(str(wide), "fp32", 0.0).eval()
    monkeypatch.setenv("CXX", "no-such-compiler")
    cpu = tiny.cpu(tiny.settings())
    fastest = Fastest(cpu)
    # As a run that could compile has it, which is resumed on a node that cannot.
    fastest.restore({HEAD: "own", "attention": "own"})

    assert HEAD not in others_in(Prepared(cpu, fastest), policy)
    with attending(cpu, fastest, policy.lm, 2):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward

    assert set(fastest.state().values()) <= {"torch", "packed", "own"}
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1, "once"
    assert told[0].startswith("warning: answers are sampled more slowly")
    assert "no-such-compiler" in told[0]
    # Once for a node.
    assert "own" not in Cpu(tiny.settings(), 1).products(torch.ones(9, 9), None, 2)
    assert capsys.readouterr().out == ""


def asks(folder: Path, *flags: str) -> bool:
    """Whether a rollout asks for other products than torch's."""
    settings = tiny.settings(*flags)
    policy = loading.load_policy(str(folder), "fp32", 0.0)
    device = tiny.cpu(settings)
    decoder = choice.decoder(settings, policy, tiny.tokenizer(), device, lambda: False)
    asked: list[int] = []
    products = device.products
    device.products = lambda *given: (asked.append(1), products(*given))[1]  # type: ignore[method-assign]
    decoder(tiny.Engine(policy), [[1, 5]])
    return bool(asked)


@pytest.mark.knob("generation.fast_kernels")
def test_other_products_are_taken_if_they_may_be(wide: Path) -> None:
    assert asks(wide)
    assert not asks(wide, "generation.fast_kernels=false")


def test_a_run_samples_with_what_its_decoder_has_found(wide: Path) -> None:
    settings = tiny.settings()
    device = tiny.cpu(settings)
    how = sampling(settings, None, [EOS], PAD, device)
    first, second = Shrinking(how, device), Shrinking(how, device)
    first(tiny.Engine(loading.load_policy(str(wide), "fp32", 0.0)), [[1, 5]])

    second.restore(first.state())

    assert HEAD in first.state()
    assert second.state() == first.state()
