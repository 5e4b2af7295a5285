"""What answers were sampled from, held against what scores them.

Generation goes other ways through a model than scoring does: caches, kernels with copies of the
weights, graphs. PPO takes the two for one policy and is wrong, without a word, where they are not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from hlrlhf.settings import Settings
from hlrlhf.trainer.decoding.choice import Chosen
from hlrlhf.trainer.device import Device
from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.ppo import rollout as rollouts
from hlrlhf.trainer.ppo.rollout import Rollout
from hlrlhf.trainer.ranks import summed

# Nats per token, on average. bf16 has 8 bits: a logit near 30 is rounded by up to a sixteenth, on
# either way. In fp32 that is 2^16 times less.
MARGINS = {"bf16": 0.2, "fp32": 0.01}
# What is looked at of a micro batch: the logits of all would take up gigabytes.
ROWS, TOKENS = 4, 32


class Witness:
    """Keeps the logits that the first tokens of a rollout's first rows are sampled from."""

    def __init__(self, settings: Settings) -> None:
        self._rows = min(ROWS, settings.mbs)
        self._logits: list[Tensor] = []

    def __call__(self, logits: Tensor) -> None:
        """Take in the logits [b, v] of the next token, before temperature and truncation."""
        if len(self._logits) < TOKENS:
            # Copied, wherever it is: the decoder may write the next ones into the same memory.
            self._logits.append(logits[: self._rows].detach().to("cpu", copy=True))

    def logprobs(self, rollout: Rollout, temperature: float) -> Tensor:
        """Of the tokens that were sampled, [rows, tokens] in fp32 and on the CPU."""
        logits = torch.stack(self._logits, dim=1).float() / temperature
        answers = rollout.sequences[: len(logits), -rollout.answer_width :].cpu()
        logits = logits[:, : answers.shape[1]]
        sampled = answers[:, : logits.shape[1]].unsqueeze(-1)
        return logits.log_softmax(-1).gather(-1, sampled).squeeze(-1)


class Agreement:
    """Checks the first rollouts of an attempt, after whatever step it begins.

    One shows whether generation is the policy's own; a second, after an update, whether kernels
    with copies of the weights have learnt of it.
    """

    def __init__(self, settings: Settings, device: Device):
        self._settings = settings
        self._device = device
        self._left = 2 if settings.hybrid_engine else 1

    def rollout(
        self, decoder: Chosen, actor: DeepSpeedEngine, prompts: Sequence[list[int]]
    ) -> Rollout:
        """A rollout by the fastest decoder that agrees; all ranks have to call it.

        Args:
            decoder: what samples.
            actor: the engine around the policy.
            prompts: token ids, this rank's.

        Raises:
            Abandoned: see `rollout.generate`.
            TrainerError: see `check`, and no plainer decoder is left.
        """
        if self._left == 0:
            return rollouts.generate(decoder, actor, prompts)
        while True:
            witness = Witness(self._settings)
            rollout = rollouts.generate(decoder, actor, prompts, witness)
            try:
                check(witness, actor, rollout, self._settings, self._device)
            except TrainerError as error:
                if not decoder.fall_back(str(error)):
                    raise
            else:
                self._left -= 1
                return rollout


@torch.no_grad()
def check(
    witness: Witness, actor: DeepSpeedEngine, rollout: Rollout, settings: Settings, device: Device
) -> None:
    """Stop when a rollout was sampled from another distribution than scoring finds.

    All ranks have to call it.

    Args:
        witness: of the rollout.
        actor: the engine around the policy.
        rollout: this rank's.

    Raises:
        TrainerError: on all ranks, when log-probs are apart by more than `MARGINS` on average.
    """
    temperature = settings.generation.temperature
    sampled = witness.logprobs(rollout, temperature)
    rows, tokens = sampled.shape
    # Without dropout, and not through the engine: its eval() may put kernels in.
    actor.module.eval()
    # A whole micro batch: where shapes are compiled, one of those few that scoring has.
    sequences, mask = rollout.sequences[: settings.mbs], rollout.attention_mask[: settings.mbs]
    scored = actor(sequences, mask, rollout.answer_width, temperature)[:rows, :tokens].cpu()
    device.step_done()
    counted = rollout.answer_mask[:rows, :tokens].cpu().clone()
    # Before the shortest answer is reached, ends are taken out of what is sampled from.
    counted[:, : settings.generation.min_new_tokens] = False
    apart = torch.where(counted, (sampled - scored).abs(), 0)
    total, count = summed(torch.stack([apart.sum(), counted.sum()]).to(device.torch)).tolist()
    # A temperature below 1 stretches logits, and their roundings too.
    mean, margin = total / max(1, count), MARGINS[settings.dtype] / min(1.0, temperature)
    if mean <= margin:
        return
    model = type(actor.module.lm).__name__
    remedy = "its generation cannot be used here"
    if settings.hybrid_engine:
        remedy = "set HL_HYBRID_ENGINE=0"
    elif device.static_cache:
        remedy += ", with a static cache"
    raise TrainerError(
        f"the tokens of this rollout were sampled from other log-probs than the policy's own: "
        f"apart by {mean:.3g} nats on average, {margin:g} allowed ({model}); {remedy}"
    )
