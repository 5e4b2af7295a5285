"""The kernel for products of a few rows."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn.functional import linear

from hlrlhf.trainer import skinny

pytestmark = tiny.compiles

compiled = cache(skinny.compiled)


def drawn(
    rows: int, width: int, out: int, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows [rows, 1, width], weights [out, width] and a bias [out] or none."""
    generator = torch.Generator().manual_seed(rows * width + out)
    read = torch.randn(rows, 1, width, generator=generator)
    weight = torch.randn(out, width, generator=generator)
    return read, weight, torch.randn(out, generator=generator) if bias else None


def processors() -> list[str]:
    """This one, and what an older one of its kind would compile."""
    return ["native", "haswell"] if torch.cpu._is_avx2_supported() else ["native"]


@pytest.mark.parametrize("processor", processors())
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 19])
def test_it_is_the_product(processor: str, rows: int, bias: bool) -> None:
    """Of widths and outputs that are multiples of what the kernel takes at a time, and others."""
    make = compiled(processor)
    for width, out in ((64, 96), (16, 1), (5, 7), (203, 58)):
        read, weight, offset = drawn(rows, width, out, bias)

        given = make(weight, offset, rows)(read)

        exact = linear(read.double(), weight.double(), None if offset is None else offset.double())
        # A sum of n products in any order rounds at most n + 1 times, each by half an epsilon of
        # what has been added up without signs; that itself is within twice of its own rounding.
        size = linear(read.abs(), weight.abs(), None if offset is None else offset.abs())
        bound = (width + 2) * torch.finfo(torch.float32).eps * size
        assert given.shape == exact.shape
        assert bool(((given - exact).abs() <= bound).all())


def test_a_row_is_the_same_whatever_is_beside_it() -> None:
    """Alone, and for any number of threads: answers that leave a batch change no other."""
    make = compiled()
    read, weight, bias = drawn(11, 203, 58)
    together = make(weight, bias, 11)(read)
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert make(weight, bias, 11)(read).equal(together)
    finally:
        torch.set_num_threads(before)
    for row in range(11):
        assert make(weight, bias, 11)(read[row : row + 1]).equal(together[row : row + 1])


def test_rows_and_weights_that_lie_apart() -> None:
    read, weight, bias = drawn(4, 64, 32)
    apart = torch.stack([read, read], dim=-1)[..., 0]
    turned = weight.t().contiguous().t()
    assert not apart.is_contiguous()
    assert not turned.is_contiguous()

    make = compiled()

    assert make(turned, bias, 4)(apart).equal(make(weight, bias, 4)(read))


def test_prompts_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    read, weight, bias = drawn(9, 64, 32)
    product = compiled()(weight, bias, 8)
    counted: list[int] = []
    monkeypatch.setattr(
        skinny, "linear", lambda *given: (counted.append(len(given[0])), linear(*given))[1]
    )

    product(read[:8])
    assert product(read).equal(linear(read, weight, bias))

    assert counted == [9]


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        ("no-such-compiler", "no-such-compiler"),
        ("false", "false -std=c++17"),
        ("sh -c 'echo this cannot be >&2; exit 1'", "this cannot be"),
        ("sh -c 'echo nothing >{}; : '", "skinny.so"),
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
        skinny.compiled()
