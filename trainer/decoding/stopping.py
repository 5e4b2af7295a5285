"""What ends answers besides end tokens: texts, each its own; and a warning, all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


class StopStrings:
    """Ends an answer with the token that completes a stop string; serves one rollout.

    A stopping criterion of transformers' ``generate``.
    A text is looked for in what the answer's last tokens decode to. transformers' own criterion
    would find one that begins in the prompt; older releases' misses characters of several
    tokens; and it works through the whole vocabulary first.

    Args:
        strings: the texts, not empty.
        tokenizer: the actor's.
        prompt_width: l, the columns of the prompts.
        shortest: an answer does not end with fewer tokens.

    Attributes:
        ends: for each answer the position of the token that ended it, from 0; -1 where none did.
    """

    def __init__(
        self,
        strings: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        prompt_width: int,
        shortest: int,
    ):
        self.ends: list[int] = []
        self._strings = strings
        self._tokenizer = tokenizer
        self._prompt_width = prompt_width
        self._shortest = shortest
        # A token is a byte at least.
        self._window = max(len(text.encode()) for text in strings)
        # Many tokenizers drop the space that a text begins with: this stands in front of all.
        self._lead = tokenizer("a", add_special_tokens=False)["input_ids"]

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Any:
        """[b], whether each answer has ended; called after every token.

        Args:
            input_ids: [b, l + n], prompts and the n tokens so far.
            scores: not looked at.
            more: what Optimum for Gaudi says where it writes into tensors of one shape: the number
                of columns that are written, and whether it asks for one answer for all rows.
        """
        written = int(more.get("token_idx", input_ids.shape[1]))
        self.ends = self.ends or [-1] * len(input_ids)
        last = written - self._prompt_width - 1
        if last + 1 >= self._shortest:
            begin = max(self._prompt_width, written - self._window)
            # Picked out on the CPU: elsewhere, each place would be an operation to compile.
            for row, tokens in enumerate(input_ids.cpu()[:, begin:written].tolist()):
                if self.ends[row] < 0 and self._completed(tokens):
                    self.ends[row] = last
        ended = [end >= 0 for end in self.ends]
        if more.get("needs_tensor_output", True):
            return torch.tensor(ended, device=input_ids.device)
        return all(ended)

    def _completed(self, tokens: list[int]) -> bool:
        """Whether the last of the tokens completes a stop string."""
        text = self._text(tokens)
        if not any(string in text for string in self._strings):
            return False
        before = self._text(tokens[:-1])
        return any(text.rfind(string) > before.rfind(string) for string in self._strings)

    def _text(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(
            self._lead + tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text.partition("a")[2]


class Warned:
    """Ends all answers once this rank is warned; a stopping criterion as `StopStrings` is."""

    def __init__(self, warned: Callable[[], bool]):
        self._warned = warned

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Any:
        warned = self._warned()
        if more.get("needs_tensor_output", True):
            return torch.full((len(input_ids),), warned, device=input_ids.device)
        return warned
