"""Products of a few rows with large weights, by a kernel that is compiled where it runs.

General products bring weights into another order before they read them, which pays for many rows.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from torch.nn.functional import linear

# A product of rows with weights.
Product = Callable[[Tensor], Tensor]
# Makes one of weights [out, in] and a bias, for so many rows.
Maker = Callable[[Tensor, "Tensor | None", int], Product]

SOURCE = Path(__file__).with_name("skinny.cpp")
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-shared")
# Far more than a compiler needs, on a node that is not broken.
SECONDS = 120


def compiled(processor: str = "native") -> Maker:
    """Compile the kernel, which takes about a second, by ``CXX`` or ``c++``.

    Each process has its own: what another node has compiled may ask too much of this one.

    Args:
        processor: as the compiler calls it.

    Returns:
        What makes products of weights in fp32; they are without gradient. Of more rows, torch's.

    Raises:
        OSError: there is no compiler, or it cannot; says why.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "skinny.so")
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
        # torch's OpenMP is loaded already, so the kernel has the same threads.
        skinny = ctypes.CDLL(str(file)).skinny
    skinny.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 3
    skinny.restype = None

    def made(weight: Tensor, bias: Tensor | None, rows: int) -> Product:
        weight = weight.contiguous()
        width, read_width = weight.shape
        weight_at, bias_at = weight.data_ptr(), None if bias is None else bias.data_ptr()

        def product(read: Tensor) -> Tensor:
            count = read.numel() // read_width
            if count > rows:
                return linear(read, weight, bias)
            read = read.contiguous()
            into = read.new_empty(*read.shape[:-1], width)
            at = (read.data_ptr(), weight_at, bias_at, into.data_ptr())
            skinny(*at, count, read_width, width)
            return into

        return product

    return made
