"""Attention in a rollout: by our kernel the same numbers, and only where it fits."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny
import torch
from tiny import one_rank  # noqa: F401
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hlrlhf.trainer import kernels
from hlrlhf.trainer.decoding import attention
from hlrlhf.trainer.decoding import cache as caches
from hlrlhf.trainer.decoding.attention import attending
from hlrlhf.trainer.decoding.fastest import Fastest
from hlrlhf.trainer.device import Cpu
from hlrlhf.trainer.kernels import Kernels
from hlrlhf.trainer.models import forwards, loading

pytestmark = [pytest.mark.usefixtures("one_rank"), tiny.compiles]

PROMPTS = torch.tensor([[0, 0, 7, 8], [5, 6, 7, 8], [0, 9, 3, 4]])
MASK = (PROMPTS != 0).long()
FURTHER = torch.tensor([[11, 12, 13], [21, 22, 23], [31, 32, 33]])
# What makes the width of a head, under the names of configurations.
WIDTHS = {"hidden_size", "n_embd", "d_model", "head_dim", "word_embed_proj_dim"}
# Those that attend in a way of their own.
OTHERS = {"bloom", "mpt", "gpt_neo", "gptj", "gemma2", "falcon", "falcon-40b", "falcon-alibi"}
# Of logits up to about 10; fp32 sums in another order.
TOLERANCE = {"rtol": 0, "atol": 1e-4}


@cache
def cpu() -> Cpu:
    """One for all: each compiles for itself."""
    return tiny.cpu(tiny.settings())


def chosen(way: str) -> Fastest:
    fastest = Fastest(cpu())
    fastest.restore({"attention": way})
    return fastest


def logits_of(policy: Any, way: str) -> list[Tensor]:
    """What follows the prompts, and each of some further tokens."""
    layers = forwards.unwrapped(policy.lm).config.get_text_config().num_hidden_layers
    held = caches.Growing(layers, 7)
    made = []
    with torch.no_grad(), attending(cpu(), chosen(way), policy.lm, 3):
        for width in range(4, 8):
            tokens = PROMPTS if width == 4 else FURTHER[:, width - 5 : width - 4]
            mask = torch.cat([MASK, torch.ones(3, width - 4, dtype=torch.long)], dim=1)
            made.append(policy.next_logits(tokens, mask, held))
    return made


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the queries that came to the kernel."""
    shapes: list[torch.Size] = []
    own = Kernels.attention
    monkeypatch.setattr(
        Kernels, "attention", lambda *given: (shapes.append(given[1].shape), own(*given))[1]
    )
    return shapes


def loaded(folder: Path, architecture: str, dtype: str = "fp32") -> Any:
    """A policy of an architecture, its heads wide enough for the kernel."""
    shape = {
        name: 4 * size
        for name, size in architectures.CONFIGS[architecture].items()
        if name in WIDTHS
    }
    tiny.save_policy(folder, architecture, **shape)
    return loading.load_policy(str(folder), dtype, 0.0).eval()


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that may ask for the kernel."""
    return loaded(tmp_path_factory.mktemp("llama"), "llama").lm


@pytest.mark.parametrize("architecture", architectures.CONFIGS)
def test_the_same_numbers(tmp_path: Path, architecture: str, counted: list[torch.Size]) -> None:
    policy = loaded(tmp_path, architecture)

    own = logits_of(policy, "own")

    # Of each layer, for each token after the prompts.
    assert len(counted) == (0 if architecture in OTHERS else 2 * 3)
    assert all(shape[2] == 1 for shape in counted)
    counted.clear()
    plain = logits_of(policy, "torch")
    assert not counted
    for given, expected in zip(own, plain, strict=True):
        torch.testing.assert_close(given, expected, **TOLERANCE)


@pytest.mark.parametrize("unfit", ["fp64", "narrow heads", "a bias of positions", "a float mask"])
def test_what_does_not_fit_is_left_to_torch(unfit: str, counted: list[torch.Size], lm: Any) -> None:
    dtype = torch.float64 if unfit == "fp64" else torch.float32
    width = 12 if unfit == "narrow heads" else 16
    query = torch.randn(2, 4, 1, width, dtype=dtype)
    key, value = torch.randn(2, 2, 4, 5, width, dtype=dtype)
    mask = torch.zeros(2, 1, 1, 5) if unfit == "a float mask" else None
    more = {"position_bias": torch.randn(1, 4, 1, 5)} if unfit == "a bias of positions" else {}
    given = (torch.nn.Identity(), query, key, value, mask)
    expected = sdpa_attention_forward(*given, **more)[0]

    with attending(cpu(), chosen("own"), lm, 2):
        made = ALL_ATTENTION_FUNCTIONS["sdpa"](*given, **more)[0]

    assert made.equal(expected)
    assert not counted


def test_in_bf16_too(tmp_path: Path, counted: list[torch.Size]) -> None:
    policy = loaded(tmp_path, "llama", "bf16")
    query = torch.randn(3, 4, 1, 16).bfloat16()
    key, value = torch.randn(2, 3, 4, 50, 16).bfloat16()
    given = (torch.nn.Identity(), query, key, value, None)
    expected = sdpa_attention_forward(*given)[0]

    with attending(cpu(), chosen("own"), policy.lm, 3):
        made = ALL_ATTENTION_FUNCTIONS["sdpa"](*given)[0]

    assert len(counted) == 1
    assert made.dtype == torch.bfloat16
    # torch may round each weight to bf16, by half an epsilon, and both round what they have added
    # up: a mean of the values, so no larger than the largest of them.
    bound = 3 * torch.finfo(torch.bfloat16).eps / 2 * float(value.abs().max())
    torch.testing.assert_close(made, expected, rtol=0, atol=bound)


def test_dropout_is_left_to_torch(counted: list[torch.Size], lm: Any) -> None:
    query = torch.randn(1, 1, 1, 16)
    with attending(cpu(), chosen("own"), lm, 1):
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        attend(torch.nn.Identity(), query, query, query, None, dropout=1.0)
        assert not counted
        attend(torch.nn.Identity(), query, query, query, None, dropout=0.0)
        assert len(counted) == 1


def test_the_faster_one_is_taken(monkeypatch: pytest.MonkeyPatch, lm: Any) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))

    def taken() -> str:
        fastest = Fastest(cpu())
        with attending(cpu(), fastest, lm, 2):
            pass
        way: str = fastest.state()["attention"]
        return way

    torchs = attention.scaled_dot_product_attention
    own = Kernels.attention
    with monkeypatch.context() as patch:
        patch.setattr(Kernels, "attention", lambda *given: (next(clock), own(*given))[1])
        assert taken() == "torch"
    monkeypatch.setattr(
        attention,
        "scaled_dot_product_attention",
        lambda *given: (next(clock), torchs(*given))[1],
    )
    assert taken() == "own"


def test_after_a_rollout_that_failed_models_attend_as_before(lm: Any) -> None:
    def rollout() -> None:
        with attending(cpu(), chosen("own"), lm, 2):
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attention._attention
            raise ValueError("of the model")

    with pytest.raises(ValueError, match="of the model"):
        rollout()

    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def test_a_rank_without_a_compiler_takes_part_in_the_measurement(
    monkeypatch: pytest.MonkeyPatch, lm: Any
) -> None:
    """Or those that have one would wait for it."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    bare = tiny.cpu(tiny.settings())
    fastest = Fastest(bare)

    with attending(bare, fastest, lm, 2):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward

    assert fastest.state() == {"attention": "torch"}


@pytest.mark.parametrize("architecture", ["bloom", "narrow"])
def test_nothing_is_compiled_for_a_model_that_does_not_ask(
    tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if architecture == "narrow":
        policy = loading.load_policy(str(tiny.save_policy(tmp_path, "llama")), "fp32", 0.0)
    else:
        policy = loaded(tmp_path, architecture)
    monkeypatch.setattr(kernels, "compiled", lambda: pytest.fail("compiled"))
    device = tiny.cpu(tiny.settings())
    fastest = Fastest(device)

    with attending(device, fastest, policy.lm, 2):
        pass

    assert fastest.state() == {}
