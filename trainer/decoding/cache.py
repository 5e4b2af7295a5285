"""Keys and values of the tokens so far, in memory that is taken once."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicLayer


class _Layer(DynamicLayer):  # type: ignore[misc]
    """Of one layer, with room for all tokens from the first on.

    A layer with a window keeps all tokens too: its mask leaves out the old ones.

    Args:
        capacity: tokens that there is room for.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self._capacity = capacity
        self._memory: list[Tensor] = []  # of keys and of values, [b, heads, capacity, width]

    def _begin(self, *memory: Tensor) -> None:
        """Keep what is coming in this memory."""
        self._memory = list(memory)
        self.dtype, self.device = memory[0].dtype, memory[0].device
        self.is_initialized = True


class GrowingLayer(_Layer):
    """As transformers' growing one, without a copy of all that it holds at each token.

    What a model gets are views of the memory, of as many tokens and rows as there are, so it needs
    to know nothing.
    """

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self._length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in the next tokens' keys and values [b, heads, n, width]; all so far come back."""
        new = key_states, value_states
        if not self._memory:
            shapes = [(*states.shape[:2], self._capacity, states.shape[3]) for states in new]
            self._begin(*map(key_states.new_zeros, shapes))
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


class Growing(Cache):  # type: ignore[misc]
    """Of all layers, views of what there is so far.

    Args:
        layers: how many the model has.
        capacity: tokens that there is room for.
    """

    def __init__(self, layers: int, capacity: int):
        super().__init__(layers=[GrowingLayer(capacity) for _ in range(layers)])

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Let rows take the places of others."""
        for layer in self.layers:
            layer.move(sources, targets)


class FixedLayer(_Layer):
    """As transformers' static one, whose shape does not change.

    After the prompts a token is written at `column`, a number that the device alone knows. What a
    model gets are `columns` columns: the mask leaves out those to come.
    """

    def __init__(self, capacity: int, column: Tensor):
        super().__init__(capacity)
        self._column = column
        self.columns = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in the prompts', then one token's keys and values [b, heads, n, width]."""
        new = key_states, value_states
        # Nothing is written to a part of a tensor, which an HPU graph cannot hold.
        if not self._memory:
            to_come = self._capacity - key_states.shape[2]
            self._begin(*(pad(states, (0, 0, 0, to_come)) for states in new))
            return new
        for memory, states in zip(self._memory, new, strict=True):
            memory.index_copy_(2, self._column, states)
        self.keys, self.values = (memory[:, :, : self.columns] for memory in self._memory)
        return self.keys, self.values

    def get_seq_length(self, *_: Any) -> Any:
        """Tokens so far, which the device alone knows after the prompts."""
        return self._column if self.columns else 0

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Columns that the mask is of, and the first of them."""
        return self.columns or int(query_length), 0


class Fixed(Cache):  # type: ignore[misc]
    """Of all layers, in one shape.

    Args:
        layers: how many the model has.
        capacity: tokens that there is room for.
        column: [1], where the token stands that is read, after the prompts.
    """

    def __init__(self, layers: int, capacity: int, column: Tensor):
        super().__init__(layers=[FixedLayer(capacity, column) for _ in range(layers)])

    def show(self, columns: int) -> None:
        """Let models see so many columns from now on."""
        for layer in self.layers:
            layer.columns = columns
