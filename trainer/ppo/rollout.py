"""Prompts → sequences: the actor answers a whole per-device batch at once.

Weights do not change inside a batch, so generating micro batch by micro batch would give the same
samples at a fraction of the speed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from hlrlhf.settings import Settings
from hlrlhf.trainer.data import reading
from hlrlhf.trainer.decoding.stopping import StopStrings
from hlrlhf.trainer.device import Device
from hlrlhf.trainer.models import forwards
from hlrlhf.trainer.models.engine import gathered


@dataclass(frozen=True)
class Rollout:
    """Sampled answers to a batch of prompts.

    Attributes:
        sequences: [b, l + r], prompts padded on the left, answers on the right.
        attention_mask: [b, l + r], 1 on prompt and answer tokens.
        answer_mask: [b, r], true on the answer's tokens, those that end it included.
        ended: [b], whether an end token or a stop string ended the answer.
        has_end_token: [b], whether its last token is an end token.
    """

    sequences: Tensor
    attention_mask: Tensor
    answer_mask: Tensor
    ended: Tensor
    has_end_token: Tensor

    @property
    def answer_width(self) -> int:
        """r, the columns of the answers."""
        return self.answer_mask.shape[1]

    @property
    def lengths(self) -> Tensor:
        """[b], tokens in each answer."""
        return self.answer_mask.sum(-1)


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled, complete: nothing is left to a checkpoint's own defaults.

    A checkpoint's generation_config.json may ask for greedy decoding, a low temperature or a
    repetition penalty; PPO needs samples of the policy itself.

    Attributes:
        config: for transformers' ``generate``.
        stop: texts that end an answer.
        tokenizer: what they are found with.
    """

    config: GenerationConfig
    stop: list[str]
    tokenizer: Any


def sampling(
    settings: Settings, tokenizer: Any, end_tokens: list[int], padding: int, device: Device
) -> Sampling:
    """How a run samples its answers."""
    # Left alone, transformers compiles the model on some devices when the cache is static.
    static = {"cache_implementation": "static", "disable_compile": True}
    config = GenerationConfig(
        do_sample=True,
        temperature=settings.generation.temperature,
        top_p=settings.generation.top_p,
        top_k=settings.generation.top_k,
        min_new_tokens=settings.generation.min_new_tokens or None,
        max_new_tokens=settings.generation.max_new_tokens,
        eos_token_id=end_tokens,
        pad_token_id=padding,
        use_cache=True,
        **(static if device.static_cache else {}),
    )
    return Sampling(config, settings.generation.stop, tokenizer)


@torch.no_grad()
def generate(
    actor: Any,
    prompts: list[list[int]],
    sampling: Sampling,
    device: Device,
    witness: LogitsProcessor | None = None,
) -> Rollout:
    """Sample one answer to each prompt.

    Args:
        actor: the engine around the policy.
        prompts: token ids, this rank's.
        sampling: how.
        device: the rank's.
        witness: sees the logits [b, v] of every token before temperature and truncation.
    """
    config = sampling.config
    ids, mask = reading.pad_left(prompts, config.pad_token_id, device.pad_to)
    stops = None
    if sampling.stop:
        stops = StopStrings(
            sampling.stop, sampling.tokenizer, ids.shape[1], config.min_new_tokens or 0
        )
    policy = actor.module
    # Through the engines: the hybrid engine puts its inference kernels in for eval() and takes them
    # out for train(); all scoring is done without them.
    actor.eval()
    # generate() fills what a call leaves unset from the configuration of the model itself, which
    # peft's wrapper hides.
    plain = forwards.unwrapped(policy.lm)
    plain.generation_config = config
    with gathered(actor), device.generating(plain) as extra:
        sequences = policy.generate(
            input_ids=ids.to(device.torch),
            attention_mask=mask.to(device.torch),
            generation_config=config,
            logits_processor=LogitsProcessorList([witness] if witness else []),
            stopping_criteria=StoppingCriteriaList([stops] if stops else []),
            **extra,
        )
    actor.train()
    device.step_done()
    if policy.logprob_chunk and actor.zero_optimization_stage() == 3:
        sequences = _as_long_as_any(sequences, ids.shape[1], config.pad_token_id)
    ends = torch.tensor(stops.ends, device=device.torch) if stops else None
    return from_sequences(sequences, mask.to(device.torch), config, device.pad_to, ends)


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
    return Rollout(
        sequences=torch.cat([sequences[:, :width], answers], dim=1),
        attention_mask=torch.cat([prompt_mask, answer_mask.to(prompt_mask.dtype)], dim=1),
        answer_mask=answer_mask,
        ended=is_end.any(-1),
        has_end_token=(is_end_token & answer_mask).any(-1),
    )
