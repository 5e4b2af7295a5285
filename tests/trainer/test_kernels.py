"""Our own kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn.functional import linear

from hlrlhf.trainer import kernels

pytestmark = tiny.compiles

compiled = cache(kernels.compiled)


# In bf16 what is summed up in fp32 is rounded once more, by half an epsilon of itself.
ROUNDED = {torch.float32: 0.0, torch.bfloat16: torch.finfo(torch.bfloat16).eps / 2}
IN_BOTH = pytest.mark.parametrize("dtype", kernels.DTYPES)


def drawn(
    rows: int, width: int, out: int, bias: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows [rows, 1, width], weights [out, width] and a bias [out] or none."""
    generator = torch.Generator().manual_seed(rows * width + out)
    read = torch.randn(rows, 1, width, generator=generator).to(dtype)
    weight = torch.randn(out, width, generator=generator).to(dtype)
    return read, weight, torch.randn(out, generator=generator).to(dtype) if bias else None


def processors() -> list[str]:
    """This one, and what an older one of its kind would compile."""
    return ["native", "haswell"] if torch.cpu._is_avx2_supported() else ["native"]


def by_threads(compute: Callable[[], Tensor]) -> list[Tensor]:
    """What is computed by 1, 2 and 3 threads."""
    before = torch.get_num_threads()
    made = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            made.append(compute())
    finally:
        torch.set_num_threads(before)
    return made


@IN_BOTH
@pytest.mark.parametrize("processor", processors())
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 19])
def test_a_product(processor: str, rows: int, bias: bool, dtype: torch.dtype) -> None:
    """Of widths and outputs that are multiples of what the kernel takes at a time, and others."""
    make = compiled(processor).product
    for width, out in ((64, 96), (16, 1), (5, 7), (203, 58)):
        read, weight, offset = drawn(rows, width, out, bias, dtype)

        given = make(weight, offset, rows)(read)

        exact = linear(read.double(), weight.double(), None if offset is None else offset.double())
        # A sum of n products in any order rounds at most n + 1 times, each by half an epsilon of
        # what has been added up without signs; that itself is within twice of its own rounding.
        parts = (None if part is None else part.abs().float() for part in (read, weight, offset))
        bound = (width + 2) * torch.finfo(torch.float32).eps * linear(*parts)
        bound += ROUNDED[dtype] * (exact.abs() + bound)
        assert given.dtype == dtype
        assert given.shape == exact.shape
        assert bool(((given - exact).abs() <= bound).all())


@IN_BOTH
def test_a_row_is_the_same_whatever_is_beside_it(dtype: torch.dtype) -> None:
    """Alone, and for any number of threads: answers that leave a batch change no other."""
    make = compiled().product
    read, weight, bias = drawn(11, 203, 58, dtype=dtype)
    together = make(weight, bias, 11)(read)
    for made in by_threads(lambda: make(weight, bias, 11)(read)):
        assert made.equal(together)
    for row in range(11):
        assert make(weight, bias, 11)(read[row : row + 1]).equal(together[row : row + 1])


def test_rows_and_weights_that_lie_apart() -> None:
    read, weight, bias = drawn(4, 64, 32)
    apart = torch.stack([read, read], dim=-1)[..., 0]
    turned = weight.t().contiguous().t()
    assert not apart.is_contiguous()
    assert not turned.is_contiguous()

    make = compiled().product

    assert make(turned, bias, 4)(apart).equal(make(weight, bias, 4)(read))


def test_prompts_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    read, weight, bias = drawn(9, 64, 32)
    product = compiled().product(weight, bias, 8)
    counted: list[int] = []
    monkeypatch.setattr(
        kernels, "linear", lambda *given: (counted.append(len(given[0])), linear(*given))[1]
    )

    product(read[:8])
    assert product(read).equal(linear(read, weight, bias))

    assert counted == [9]


# Attention.


def tokens(
    rows: int,
    heads: int,
    group: int,
    length: int,
    width: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A query, keys and values in memory with room for more tokens, and which of them are seen."""
    generator = torch.Generator().manual_seed(rows * heads * length + width)
    query = torch.randn(rows, heads, 1, width, generator=generator).to(dtype)
    shape = (2, rows + 1, heads // group, length + 3, width)
    keys, values = torch.randn(shape, generator=generator).to(dtype)[:, :rows, :, :length]
    seen = torch.rand(rows, length, generator=generator) < 0.7
    seen[:, -1] = True
    return query, keys, values, seen


@IN_BOTH
@pytest.mark.parametrize("processor", processors())
@pytest.mark.parametrize("width", [16, 64, 80, 256])
@pytest.mark.parametrize(("rows", "heads", "group"), [(1, 1, 1), (3, 4, 1), (2, 6, 3), (2, 4, 4)])
def test_attention(
    processor: str, rows: int, heads: int, group: int, width: int, dtype: torch.dtype
) -> None:
    attention = compiled(processor).attention
    for length in (1, 15, 16, 17, 200):
        query, keys, values, seen = tokens(rows, heads, group, length, width, dtype)
        wide = [held.double().repeat_interleave(group, 1) for held in (keys, values)]
        for sight in (seen, None):
            for scale in (width**-0.5, 3.0):
                given = attention(query, keys, values, sight, scale)

                scores = scale * query.double() @ wide[0].transpose(2, 3)
                if sight is not None:
                    scores = scores.masked_fill(~sight[:, None, None], -torch.inf)
                weights = scores.softmax(-1)
                exact = (weights @ wide[1]).transpose(1, 2)
                assert given.shape == exact.shape
                # As a product's, the error of a score; a weight is off by the factor e to the power
                # of that, above and below the line, by those of the exponential, which are 16
                # epsilons at most, and of sums over all tokens.
                epsilon = torch.finfo(torch.float32).eps
                size = scale * query.double().abs() @ wide[0].abs().transpose(2, 3)
                off = 2 * (width + 4) * epsilon * size.max() + (2 * length + 32) * epsilon
                bound = off * (weights @ wide[1].abs()).transpose(1, 2)
                bound += ROUNDED[dtype] * (exact.abs() + bound)
                assert given.dtype == dtype
                assert bool(((given - exact).abs() <= bound).all())


def test_a_token_that_is_not_seen_is_not_read() -> None:
    query, keys, values, seen = tokens(3, 4, 2, 33, 32)
    attention = compiled().attention
    expected = attention(query, keys, values, seen, 0.2)
    for held in (keys, values):
        held.masked_fill_(~seen[:, None, :, None], torch.nan)

    assert attention(query, keys, values, seen, 0.2).equal(expected)


def test_scores_that_lie_far_apart_leave_nothing_to_the_lower_ones() -> None:
    """Their weights would be no normal floats, with which processors compute slowly."""
    query = torch.ones(1, 1, 1, 16)
    keys, values = (
        torch.ones(1, 1, 40, 16),
        torch.arange(40.0).view(1, 1, 40, 1).repeat(1, 1, 1, 16),
    )
    for far in (90.0, 300.0, 1e30, torch.inf):
        keys[:, :, :39] = -far / 16

        given = compiled().attention(query, keys, values, None, 1.0)

        assert given.equal(torch.full((1, 1, 1, 16), 39.0))


@IN_BOTH
def test_attention_of_a_row_is_the_same_whatever_is_beside_it(dtype: torch.dtype) -> None:
    query, keys, values, seen = tokens(5, 6, 2, 50, 48, dtype)
    attention = compiled().attention
    together = attention(query, keys, values, seen, 0.2)
    for made in by_threads(lambda: attention(query, keys, values, seen, 0.2)):
        assert made.equal(together)
    for row in range(5):
        alone = [held[row : row + 1] for held in (query, keys, values, seen)]
        assert attention(*alone, 0.2).equal(together[row : row + 1])


def test_what_lies_apart_within_a_head() -> None:
    query, keys, values, seen = tokens(2, 4, 2, 20, 32)
    expected = compiled().attention(query, keys, values, seen, 0.2)
    apart = [torch.stack([held, held], dim=-1)[..., 0] for held in (query, keys, values, seen)]
    assert not any(held.is_contiguous() for held in apart)

    assert compiled().attention(*apart, 0.2).equal(expected)


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        ("no-such-compiler", "no-such-compiler"),
        ("false", "false -std=c++17"),
        ("sh -c 'echo this cannot be >&2; exit 1'", "this cannot be"),
        ("sh -c 'echo nothing >{}; : '", "kernels.so"),
        ("c++ '", "No closing quotation"),
        ("sh -c 'printf \"no \\377\" >&2; exit 1'", "no \ufffd"),
    ],
    ids=["none", "fails", "says why", "makes nothing", "an open quote", "bytes that are no text"],
)
def test_without_a_compiler_that_can(
    compiler: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler.format(tmp_path / "made"))

    with pytest.raises(OSError, match=words.replace("+", r"\+")):
        kernels.compiled()
