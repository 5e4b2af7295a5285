"""Sources of random numbers that are no torch module, in the form of one.

Reward functions draw from Python's and NumPy's global ones; so these are seeded, kept and restored
like torch's. A state is a tensor of a fixed length: fractions are in it by their bits.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor


class Python:
    """The global state of `random`."""

    @staticmethod
    def manual_seed(seed: int) -> None:
        """Begin anew."""
        random.seed(seed)

    @staticmethod
    def get_rng_state() -> Tensor:
        """[627] int64: the generator's words and its place, and a second Gaussian if it has one."""
        _, words, gaussian = random.getstate()
        return torch.cat([torch.tensor(words), _optional(gaussian)])

    @staticmethod
    def set_rng_state(state: Tensor) -> None:
        """Go on from there."""
        version = random.getstate()[0]
        words = state[:-2].tolist()
        random.setstate((version, tuple(words), _read(state[-2:])))


class NumPy:
    """The global state of `numpy.random`, as its old functions use it."""

    @staticmethod
    def manual_seed(seed: int) -> None:
        """Begin anew; it takes no more than 32 bits."""
        np.random.seed(seed % 2**32)

    @staticmethod
    def get_rng_state() -> Tensor:
        """[627] int64, see `Python`."""
        _, words, place, has_gaussian, gaussian = np.random.get_state()
        kept = _optional(float(gaussian) if has_gaussian else None)
        return torch.cat([torch.tensor([*map(int, words), place]), kept])

    @staticmethod
    def set_rng_state(state: Tensor) -> None:
        """Go on from there."""
        *words, place = state[:-2].tolist()
        gaussian = _read(state[-2:])
        kept = (int(gaussian is not None), gaussian or 0.0)
        np.random.set_state(("MT19937", np.array(words, np.uint32), place, *kept))


def _optional(value: float | None) -> Tensor:
    there = torch.tensor([value is not None], dtype=torch.int64)
    bits = torch.tensor([value or 0.0], dtype=torch.float64).view(torch.int64)
    return torch.cat([there, bits])


def _read(state: Tensor) -> float | None:
    return float(state[1:].view(torch.float64)) if int(state[0]) else None
