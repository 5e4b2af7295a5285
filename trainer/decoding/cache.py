"""Keys and values of the tokens so far, in memory that is taken once."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class Layer(DynamicLayer):  # type: ignore[misc]
    """Of one layer: transformers' growing cache, without a copy of all that it holds at each token.

    What a model gets are views of the memory, of as many tokens and rows as there are, so it needs
    to know nothing. A layer with a window keeps all tokens too: its mask leaves out the old ones.

    Args:
        capacity: tokens that there is room for.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self._capacity = capacity
        self._memory: list[Tensor] = []
        self._length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in the next tokens' keys and values [b, heads, n, width]; all so far come back."""
        new = key_states, value_states
        if not self._memory:
            self._memory = [
                states.new_empty(*states.shape[:2], self._capacity, states.shape[3])
                for states in new
            ]
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
        begin, rows = self._length, len(key_states)
        self._length += key_states.shape[2]
        for memory, states in zip(self._memory, new, strict=True):
            memory[:rows, :, begin : self._length] = states
        self.keys, self.values = (memory[:rows, :, : self._length] for memory in self._memory)
        return self.keys, self.values

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Let rows take the places of others."""
        for memory in self._memory:
            written = memory[:, :, : self._length]
            written[targets] = written[sources]


class Kept(Cache):  # type: ignore[misc]
    """Of all layers.

    Args:
        layers: how many the model has.
        capacity: tokens that there is room for.
    """

    def __init__(self, layers: int, capacity: int):
        super().__init__(layers=[Layer(capacity) for _ in range(layers)])

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Let rows take the places of others."""
        for layer in self.layers:
            layer.move(sources, targets)
