"""transformers' own ``generate``: any architecture, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from hlrlhf.trainer.decoding.base import Base
from hlrlhf.trainer.decoding.decoder import Decoded, Witness
from hlrlhf.trainer.decoding.stopping import Warned
from hlrlhf.trainer.models import forwards
from hlrlhf.trainer.models.engine import gathered
from hlrlhf.trainer.models.forwards import Placed


class Plain(Base):
    """A `Decoder`: the whole batch at once, until its longest answer ends.

    Weights do not change inside a batch, so generating micro batch by micro batch would give the
    same samples at a fraction of the speed.
    """

    name = "generation.decoder = generate"

    @torch.no_grad()
    def __call__(
        self, policy: Placed, prompts: Sequence[list[int]], witness: Witness | None = None
    ) -> Decoded:
        config = self.sampling.config
        ids, mask = self._padded(prompts)
        criteria: list[Any] = [Warned(self.warned)]
        if (stops := self._stops(ids.shape[1])) is not None:
            criteria.append(stops)
        # Through the engines: the hybrid engine puts its inference kernels in for eval() and takes
        # them out for train(); all scoring is done without them.
        policy.eval()
        # generate() fills what a call leaves unset from the configuration of the model itself,
        # which peft's wrapper hides.
        plain = forwards.unwrapped(policy.module.lm)
        plain.generation_config = config
        with gathered(policy), self.device.generating(plain) as extra:
            sequences = policy.module.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([_Shown(witness)] if witness else []),
                stopping_criteria=StoppingCriteriaList(criteria),
                **extra,
            )
        policy.train()
        self.device.step_done()
        return Decoded(sequences, mask, self._ends(stops))


class _Shown(LogitsProcessor):  # type: ignore[misc]
    """Shows a witness the logits, as they are."""

    def __init__(self, witness: Witness):
        self._witness = witness

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._witness(scores)
        return scores
