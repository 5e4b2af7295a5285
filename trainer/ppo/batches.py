"""Micro batches: rows of like length whose texts begin together, as wide as the longest."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hlrlhf.settings import Settings
from hlrlhf.trainer.decoding.weights import Prepared
from hlrlhf.trainer.device import Device
from hlrlhf.trainer.models.engine import gathered
from hlrlhf.trainer.models.forwards import Placed
from hlrlhf.trainer.ranks import summed


@dataclass(frozen=True)
class MicroBatch:
    """Which part of a batch goes through a model at a time; its texts begin in the first column.

    Attributes:
        rows: [n], their places in the batch.
        sequences: [n, t], their texts, which begin together, and whatever after them.
        attention_mask: [n, t], 1 on the texts; None where a model does without.
        begins: [n], the columns where answers begin.
        answers: of [b, r], the longest answer.
    """

    rows: Tensor
    sequences: Tensor
    attention_mask: Tensor | None
    begins: Tensor
    answers: slice

    def through(self, model: Placed, *further: Any) -> Tensor:
        """What a model says of the answers, with further arguments of its ``forward``."""
        texts = (self.sequences, self.attention_mask, self.answers.stop)
        return model(*texts, *further, begins=self.begins)


def micro_batches(
    sequences: Tensor,
    attention_mask: Tensor,
    answer_width: int,
    settings: Settings,
    device: Device,
) -> list[MicroBatch]:
    """A batch in micro batches, which hold each row once; on all ranks they are as many.

    With ``ppo.trim`` the longest rows come first: what follows fits into the memory that they took,
    and a batch that does not fit at all fails at once. A micro batch is as wide as its longest
    text, and not as its longest prompt and its longest answer, which are rarely the same row's.

    Args:
        sequences, attention_mask: [b, l + r], prompts padded on the left, answers on the right.
        answer_width: r.
        device: the widths of texts and answers are multiples of its own.
    """
    trim, (_, full) = settings.ppo.trim, sequences.shape
    prompt_width = full - answer_width
    parts = (attention_mask[:, :prompt_width], attention_mask[:, prompt_width:], attention_mask)
    begins, _, ends = lengths = torch.stack([part.sum(-1) for part in parts])
    _, answers, texts = lengths.tolist()
    order = list(range(len(texts)))
    if trim:
        order.sort(key=lambda row: -texts[row])
    # ZeRO-3 gathers the head for each chunk of log-probs on all ranks, so they need as many chunks.
    in_step = settings.ppo.logprob_chunk > 0 and settings.actor.zero_stage == 3
    found = []
    for begin in range(0, len(order), settings.mbs):
        picked = order[begin : begin + settings.mbs]
        width, right = full, answer_width
        if trim:
            width = min(width, _rounded_up(max(texts[row] for row in picked), device.pad_to))
        if trim and not in_step:
            right = min(right, _rounded_up(max(answers[row] for row in picked), device.pad_to))
        rows = torch.tensor(picked, device=sequences.device)
        column = torch.arange(width, device=sequences.device)
        in_batch = (column + prompt_width - begins[rows, None]).clamp(max=full - 1)
        # Where widths are rounded up there may be more columns than places that a model knows:
        # with a mask, padding has none.
        mask = None
        if device.pad_to > 1:
            mask = (column < ends[rows, None]).to(attention_mask.dtype)
        found.append(
            MicroBatch(rows, sequences[rows].gather(1, in_batch), mask, begins[rows], slice(right))
        )
    return found


def _rounded_up(width: int, multiple: int) -> int:
    """To a multiple, and at least one: models have no answers of no columns."""
    return max(1, -(-width // multiple)) * multiple


@torch.no_grad()
def outputs(
    model: Placed,
    sequences: Tensor,
    attention_mask: Tensor,
    answer_width: int,
    settings: Settings,
    device: Device,
    *further: float,
) -> Tensor:
    """What a model says of a batch, micro batch by micro batch; all ranks have to call it.

    Args:
        model: an engine around a `forwards.Policy` or `forwards.Scorer`, or see `frozen`.
        sequences, attention_mask: [b, l + r].
        answer_width: r.
        device: to tell when a part of the work is complete.
        further: arguments of the model's ``forward``.

    Returns:
        What it says of answers of r columns, each row at its place; 0 in columns that were cut.
    """
    parts = micro_batches(sequences, attention_mask, answer_width, settings, device)
    found = []
    # Once for all micro batches: ready, which may mean to come to the device, or to switch the
    # adapters of a trained model off; under ZeRO-3 brought together; in fp32 with adapters added to
    # the weights. It takes as much memory as a rollout.
    ready = getattr(model, "ready", contextlib.nullcontext)
    prepared = Prepared(device)
    with ready(), gathered(model), prepared.of(model.module, settings.mbs):
        for part in parts:
            found.append(part.through(model, *further))
            device.step_done()
    return together(found, parts, answer_width)


def together(found: Sequence[Tensor], parts: Sequence[MicroBatch], answer_width: int) -> Tensor:
    """A batch of what was found for its micro batches.

    Args:
        found: of each micro batch, its rows by the columns of its answers, or by some more.
        answer_width: r.

    Returns:
        As wide for answers of r columns, each row at its place; 0 in columns that were cut.
    """
    wide = [
        pad(one, (0, answer_width - part.answers.stop))
        for one, part in zip(found, parts, strict=True)
    ]
    return torch.cat(wide)[torch.cat([part.rows for part in parts]).argsort()]


def token_share(answer_mask: Tensor, settings: Settings) -> Tensor:
    """What a token counts in the loss of a minibatch; all ranks have to call it.

    The same, however the rows are spread over micro batches and ranks. DeepSpeed divides by the
    ranks, so that is taken back.

    Args:
        answer_mask: [n, r], of this rank's rows.

    Returns:
        A scalar.
    """
    return settings.world_size / summed(answer_mask.sum().float())
