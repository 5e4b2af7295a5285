"""Parts of tensors: how a state says which numbers of which tensor a rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class MismatchError(Exception):
    """A tensor is not the one that was asked for; says how."""


class Readable(Protocol):
    """A whole tensor, wherever its numbers are."""

    @property
    def name(self) -> str:
        """The tensor's."""

    @property
    def total(self) -> int:
        """Numbers in it."""

    def read(self, start: int, stop: int) -> Tensor:
        """Its flat values from `start` up to `stop`, [stop - start]."""


@dataclass(frozen=True)
class Piece:
    """Flat values of a tensor that this rank holds.

    Attributes:
        values: [n], the numbers themselves, not a copy: who writes here changes the state.
        start: place of the first in the flat tensor.
        total: numbers in the whole tensor.
        kept: whether this rank is the one to save them, where several hold the same.
    """

    values: Tensor
    start: int
    total: int
    kept: bool = True

    @classmethod
    def whole(cls, values: Tensor, *, kept: bool = True) -> Piece:
        """All of a tensor."""
        return cls(values.detach().view(-1), 0, values.numel(), kept)

    @torch.no_grad()
    def fill(self, source: Readable) -> None:
        """Take the values from a tensor that holds all of them.

        Raises:
            MismatchError: it has more or fewer than the one that this is a piece of.
        """
        if source.total != self.total:
            raise MismatchError(
                f"{source.name} has {source.total:,} numbers there and {self.total:,} here"
            )
        self.values.copy_(source.read(self.start, self.start + len(self.values)))
