"""Our own loop over tokens where shapes must not change: one step, again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hlrlhf.trainer.decoding import cache as caches
from hlrlhf.trainer.decoding.base import Loop
from hlrlhf.trainer.decoding.decoder import Decoded, Sampling, Witness
from hlrlhf.trainer.decoding.draw import Draw
from hlrlhf.trainer.device import Device, Step
from hlrlhf.trainer.models import forwards
from hlrlhf.trainer.models.forwards import Placed

# Attention reads so many columns more at a time: each number of columns is a shape of its own.
BUCKET = 128
# Tokens between two looks at whether all answers have ended, for which the device is waited for.
LOOK = 16


class Fixed(Loop):
    """A `Decoder`: the whole batch at once until its longest answer ends, on memory that stays.

    A step asks for nothing that the device alone knows, so that the device can capture it. An
    answer that has ended goes on meanwhile; what follows its end is not read.
    """

    def _sampled(
        self, policy: Placed, ids: Tensor, prompt_mask: Tensor, witness: Witness | None
    ) -> Decoded:
        config = self.sampling.config
        prompt_width = ids.shape[1]
        stops = self._stops(prompt_width)
        answers = _Answers(policy, ids, prompt_mask, self.sampling, self.device)
        repeated = self._repeated()
        steps: dict[int, Step] = {}
        for written in range(1, config.max_new_tokens + 1):
            end = prompt_width + written
            if written == 1:
                answers.draw()
            else:
                columns = min(answers.width, -(-end // BUCKET) * BUCKET)
                if columns not in steps:
                    steps[columns] = repeated(answers.step(columns))
                steps[columns]()
            self.device.step_done()
            if witness is not None:
                witness(answers.logits)
            if self.warned():
                break
            if stops is not None:
                answers.ended.logical_or_(stops(answers.sequences[:, :end], None))
            if (stops is not None or written % LOOK == 0) and bool(answers.ended.all()):
                break
        end = min(end, prompt_width + 1 + int(answers.goes_on.sum()))
        sequences, logprobs = answers.sequences[:, :end], answers.logprobs[:, prompt_width:end]
        return Decoded(sequences, prompt_mask, self._ends(stops), logprobs)

    def _repeated(self) -> Callable[[Step], Step]:
        """What makes the steps of a rollout cheap to take again and again."""
        return self.device.capturing()


class Compiled(Fixed):
    """A `Decoder`: the same, its step compiled by torch's inductor, which needs a C++ compiler.

    What is some hundred operations from Python becomes a few kernels and the matrix products, which
    takes a fraction of the time in small models. Compiled once for all widths of prompts, and once
    more for what sees all columns; a single row is a case of its own.
    """

    name = "generation.decoder = compiled"
    compiled = True

    def _repeated(self) -> Callable[[Step], Step]:
        # The random numbers are torch's own, as without it; and no process stays to compile more.
        options: dict[str, Any] = {"fallback_random": True, "compile_threads": 1}
        return torch.compile(fullgraph=True, dynamic=True, options=options)


class _Answers:
    """The memory that a step reads and writes.

    Attributes:
        width: l + r.
        sequences: [b, l + r], padded.
        logprobs: [b, l + r], of the answers' tokens.
        ended: [b].
        goes_on: [l + r], whether there was an answer that did not end with this column's token.
        logits: [b, v], what the last token was drawn from.
    """

    def __init__(
        self, policy: Placed, ids: Tensor, prompt_mask: Tensor, sampling: Sampling, device: Device
    ):
        config = sampling.config
        batch, self._prompt_width = ids.shape
        self.width = self._prompt_width + config.max_new_tokens
        more = (batch, config.max_new_tokens)
        self._policy = policy
        self._draw = Draw(sampling, device)
        self._end_tokens = torch.tensor(config.eos_token_id, device=ids.device)
        self.sequences = torch.cat([ids, ids.new_full(more, config.pad_token_id)], dim=1)
        # Columns to come are not attended to.
        self._mask = torch.cat([prompt_mask, prompt_mask.new_zeros(more)], dim=1)
        self.logprobs = torch.zeros(batch, self.width, device=ids.device)
        self.ended = torch.zeros(batch, dtype=torch.bool, device=ids.device)
        self.goes_on = torch.zeros(self.width, dtype=torch.bool, device=ids.device)
        # Of the token that is drawn, then read.
        self._column = torch.full((1,), self._prompt_width, device=ids.device)
        layers = forwards.unwrapped(policy.module.lm).config.get_text_config().num_hidden_layers
        self._cache = caches.Fixed(layers, self.width, self._column)
        first: Tensor = policy.module.next_logits(ids, prompt_mask, self._cache)
        self.logits = first.float().clone()

    def draw(self) -> None:
        """The next token of each answer, from the logits."""
        column = self._column
        drawn, logprobs = self._draw(self.logits, column - self._prompt_width)
        self.sequences.index_copy_(1, column, drawn[:, None])
        self.logprobs.index_copy_(1, column, logprobs[:, None])
        self._mask.index_fill_(1, column, 1)
        self.ended.logical_or_((drawn[:, None] == self._end_tokens).any(-1))
        self.goes_on.index_copy_(0, column, ~self.ended.all(0, keepdim=True))

    def step(self, columns: int) -> Step:
        """Reads the last token, in sight of so many columns, and draws the next one."""

        def take() -> None:
            self._cache.show(columns)
            tokens = self.sequences.index_select(1, self._column)
            seen = self._mask[:, :columns]
            self.logits.copy_(
                self._policy.module.next_logits(tokens, seen, self._cache, self._column)
            )
            self._column.add_(1)
            self.draw()

        return take
