"""Rows of token ids in two arrays; as lists of Python's numbers they take ten times as much."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor


class Rows:
    """Rows of token ids of any lengths, 4 bytes for an id and 8 for a row.

    Args:
        ids: of all rows, one after the other, int32.
        offsets: [n + 1] where each row begins, and after the last one where it ends, int64.
    """

    def __init__(self, ids: Tensor, offsets: Tensor):
        self.ids = ids
        self.offsets = offsets

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]]) -> Rows:
        """Of lists, which are taken one at a time."""
        ids, offsets = array("i"), array("q", [0])
        for row in rows:
            ids.extend(row)
            offsets.append(len(ids))
        return cls(torch.from_numpy(np.asarray(ids)), torch.from_numpy(np.asarray(offsets)))

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """All rows of all parts, in their order."""
        lengths = torch.cat([part.lengths for part in parts])
        return cls.with_lengths(torch.cat([part.ids for part in parts]), lengths)

    @classmethod
    def with_lengths(cls, ids: Tensor, lengths: Tensor) -> Rows:
        """Of all ids and the tokens of each row, [n] int64."""
        return cls(ids, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]))

    def picked(self, indices: Sequence[int]) -> Rows:
        """Some of the rows, in the order of their indices."""
        parts = [self._row(index) for index in indices]
        ids = torch.cat(parts) if parts else self.ids[:0]
        return Rows.with_lengths(ids, self.lengths[torch.tensor(indices, dtype=torch.long)])

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, [n] int64."""
        return self.offsets.diff()

    @property
    def longest(self) -> int:
        """Tokens of the longest row, 0 where there is none."""
        return int(self.lengths.max()) if len(self) else 0

    def key(self, index: int) -> bytes:
        """The same for rows with the same ids, and for no others."""
        return bytes(self._row(index).numpy().tobytes())

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> list[int]:
        ids: list[int] = self._row(index).tolist()
        return ids

    def __iter__(self) -> Iterator[list[int]]:
        return (self[index] for index in range(len(self)))

    def _row(self, index: int) -> Tensor:
        begin, end = self.offsets[index : index + 2].tolist()
        return self.ids[begin:end]
