"""Kernels of our own for the few rows of a token, compiled where they run.

General ones bring what they read into another order first, which pays for many rows.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

# Computes a layer [..., out] of what it reads [..., in].
Layer = Callable[[Tensor], Tensor]

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-shared")
# Far more than a compiler needs, on a node that is not broken.
SECONDS = 120
# What they read, and what the source calls it.
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# The floats that a processor computes with at a time, or a multiple of them.
LANES = 16


class Kernels:
    """Those of this processor, for `DTYPES` and without gradient.

    In bf16 what they read is summed up in fp32, and the sum is rounded once.

    Args:
        library: of the compiled source.
    """

    def __init__(self, library: ctypes.CDLL):
        self._multiply, self._attend = (
            {dtype: getattr(library, f"{kernel}_{name}") for dtype, name in DTYPES.items()}
            for kernel in ("multiply", "attend")
        )
        for multiply in self._multiply.values():
            multiply.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 3
            multiply.restype = None
        for attend in self._attend.values():
            attend.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_long] * 10 + [ctypes.c_float]
            attend.restype = None

    def product(self, weight: Tensor, bias: Tensor | None, rows: int) -> Layer:
        """Makes a product with weights [out, in] and a bias; of more rows, it is torch's."""
        weight = weight.contiguous()
        width, read_width = weight.shape
        added = None if bias is None else bias.float()
        multiply = self._multiply[weight.dtype]

        def product(read: Tensor) -> Tensor:
            count = read.numel() // read_width
            if count > rows:
                return linear(read, weight, bias)
            floats = read.float().contiguous()
            into = floats.new_empty(*read.shape[:-1], width)
            multiply(*_places(floats, weight, added, into), count, read_width, width)
            return into.to(read.dtype)

        return product

    def attention(
        self, query: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, scale: float
    ) -> Tensor:
        """Scaled dot-product attention of one token in each row.

        Args:
            query: [b, heads, 1, width], a width that `LANES` divides; all in one of `DTYPES`.
            keys, values: [b, heads or a divisor, n, width].
            seen: bool [b, n], which tokens a row attends to; None: all.

        Returns:
            [b, 1, heads, width].
        """
        floats = query.float().contiguous()
        # Rows and heads may lie apart, as those of a cache with room for more tokens do.
        keys, values = (held if _is_dense(held) else held.contiguous() for held in (keys, values))
        seen = None if seen is None else seen.contiguous()
        rows, heads, _, width = query.shape
        length = keys.shape[2]
        room = -(-length // LANES) * LANES
        weights = floats.new_empty(rows, heads, room)
        into = floats.new_empty(rows, 1, heads, width)
        self._attend[keys.dtype](
            *_places(floats, keys, values, seen, weights, into),
            *(rows, heads, heads // keys.shape[1], length, width, room),
            *(*keys.stride()[:2], *values.stride()[:2], scale),
        )
        return into.to(query.dtype)


def _places(*held: Tensor | None) -> list[int | None]:
    """Where tensors lie in memory, for as long as the caller holds them."""
    return [None if one is None else one.data_ptr() for one in held]


def _is_dense(held: Tensor) -> bool:
    """Whether the tokens [..., n, width] of a head lie one after the other."""
    return held.stride()[2:] == (held.shape[3], 1)


def compiled(processor: str = "native") -> Kernels:
    """Compile the kernels, which takes about a second, by ``CXX`` or ``c++``.

    Each process has its own: what another node has compiled may ask too much of this one.

    Args:
        processor: as the compiler calls it.

    Raises:
        OSError: there is no compiler, or it cannot; says why.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernels.so")
        try:
            compiler = shlex.split(os.environ.get("CXX") or "c++")
            command = [*compiler, *FLAGS, f"-march={processor}", str(SOURCE), "-o", str(file)]
            subprocess.run(
                command,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                check=True,
                timeout=SECONDS,
            )
        except subprocess.CalledProcessError as error:
            raise OSError(f"{shlex.join(command)}: {error.stderr.strip()}") from error
        except (subprocess.TimeoutExpired, ValueError) as error:  # too slow, or an open quote
            raise OSError(str(error)) from error
        # torch's OpenMP is loaded already, so the kernels have the same threads.
        return Kernels(ctypes.CDLL(str(file)))
