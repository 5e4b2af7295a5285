"""Prompts → sequences, with masks that say what of them is an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig

from hlrlhf.trainer.decoding.decoder import Decoder, Witness
from hlrlhf.trainer.models.forwards import Placed
from hlrlhf.trainer.ranks import agreed


class Abandoned(Exception):  # noqa: N818 - nothing is wrong
    """A rank was warned while all of them sampled: what they were at is not gone on with."""


@dataclass(frozen=True)
class Rollout:
    """Sampled answers to a batch of prompts.

    Attributes:
        sequences: [b, l + r], prompts padded on the left, answers on the right.
        attention_mask: [b, l + r], 1 on prompt and answer tokens.
        answer_mask: [b, r], true on the answer's tokens, those that end it included.
        ended: [b], whether an end token or a stop string ended the answer.
        has_end_token: [b], whether its last token is an end token.
        logprobs: [b, r] in fp32, of the answers' tokens as the decoder recorded them, 0 in padding;
            None, then on all ranks, where it did not.
    """

    sequences: Tensor
    attention_mask: Tensor
    answer_mask: Tensor
    ended: Tensor
    has_end_token: Tensor
    logprobs: Tensor | None = None

    @property
    def answer_width(self) -> int:
        """r, the columns of the answers."""
        return self.answer_mask.shape[1]

    @property
    def lengths(self) -> Tensor:
        """[b], tokens in each answer."""
        return self.answer_mask.sum(-1)


def generate(
    decoder: Decoder, policy: Placed, prompts: Sequence[list[int]], witness: Witness | None = None
) -> Rollout:
    """Sample one answer to each prompt; all ranks have to call it.

    Args:
        decoder: what samples.
        policy: an engine around a `forwards.Policy`, or see `frozen`.
        prompts: token ids, this rank's.
        witness: see `decoder.Decoder`.

    Raises:
        Abandoned: on all ranks, when one has been warned.
    """
    decoded = decoder(policy, prompts, witness)
    if agreed(decoder.warned(), decoder.device):
        raise Abandoned
    sampling, sequences = decoder.sampling, decoded.sequences
    if policy.module.logprob_chunk and policy.zero_optimization_stage() == 3:
        width = decoded.prompt_mask.shape[1]
        sequences = _as_long_as_any(sequences, width, sampling.config.pad_token_id)
    return from_sequences(
        sequences,
        decoded.prompt_mask,
        sampling.config,
        sampling.multiple,
        decoded.ends,
        decoded.logprobs,
    )


def _as_long_as_any(sequences: Tensor, prompt_width: int, padding: int) -> Tensor:
    """Answers padded to the longest of all ranks, which all have to call it.

    ZeRO-3 gathers the head for each chunk of log-probs: ranks with other numbers of chunks would
    wait for each other for ever. A rank whose answers are not the longest has ended all of them.
    """
    generated = sequences.shape[1] - prompt_width
    longest = torch.tensor(generated, device=sequences.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return pad(sequences, (0, int(longest) - generated), value=padding)


def from_sequences(
    sequences: Tensor,
    prompt_mask: Tensor,
    config: GenerationConfig,
    multiple: int = 1,
    ends: Tensor | None = None,
    logprobs: Tensor | None = None,
) -> Rollout:
    """A rollout from what ``generate`` returns.

    The first end token or stop string ends an answer, whatever follows; comparing with the padding
    token would lose end tokens where the two are one, and tokens where the policy samples the
    padding token.

    Args:
        sequences: [b, l + r].
        prompt_mask: [b, l].
        config: names the end tokens and the padding.
        multiple: the answers' width is rounded up to a multiple of this.
        ends: [b], position in the answer of the token that completed a stop string; -1 for none.
        logprobs: [b, r], of the sampled tokens; of fewer columns where the sequences were padded.
    """
    width = prompt_mask.shape[1]
    generated = sequences.shape[1] - width
    # Padded first: on a device that compiles for each shape, nothing below has a width of its own.
    answers = pad(sequences[:, width:], (0, -generated % multiple), value=config.pad_token_id)
    position = torch.arange(answers.shape[1], device=answers.device)
    written = position < generated
    end_tokens = torch.tensor(config.eos_token_id, device=answers.device)
    is_end_token = torch.isin(answers, end_tokens) & written
    is_end = is_end_token
    if ends is not None:
        is_end = is_end_token | (position == ends[:, None])
    # True up to and with the first end: none stands before the position.
    answer_mask = ((is_end.long().cumsum(-1) - is_end.long()) == 0) & written
    answers = answers.masked_fill(~answer_mask, config.pad_token_id)
    if logprobs is not None:
        logprobs = pad(logprobs, (0, answers.shape[1] - logprobs.shape[1]))
        logprobs = torch.where(answer_mask, logprobs, 0)
    return Rollout(
        sequences=torch.cat([sequences[:, :width], answers], dim=1),
        attention_mask=torch.cat([prompt_mask, answer_mask.to(prompt_mask.dtype)], dim=1),
        answer_mask=answer_mask,
        ended=is_end.any(-1),
        has_end_token=(is_end_token & answer_mask).any(-1),
        logprobs=logprobs,
    )
