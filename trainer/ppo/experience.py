"""Sequences → experience: what the four models say of a rollout, and what PPO makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from hlrlhf.settings import Settings
from hlrlhf.trainer import formulas
from hlrlhf.trainer.device import Device
from hlrlhf.trainer.models.forwards import Placed
from hlrlhf.trainer.models.roles import Models
from hlrlhf.trainer.ppo.batches import MicroBatch, micro_batches, outputs
from hlrlhf.trainer.ppo.critic import Learnt, values_learnt
from hlrlhf.trainer.ppo.rewards import Rewards
from hlrlhf.trainer.ppo.rollout import Rollout
from hlrlhf.trainer.ranks import summed


@dataclass(frozen=True)
class Experience:
    """A rollout with everything that the update needs; every tensor has b rows.

    Attributes:
        sequences, attention_mask: [b, l + r].
        answer_mask: [b, r].
        logprobs, values: [b, r], of the policy and critic that sampled.
        reference: [b, r], the reference's log-probs; both log-probs are 0 in padding.
        scores: [b], as they were given: not normalised, not clipped.
        advantages, returns: [b, r]; advantages are whitened over the global batch, if at all.
        recorded: whether `logprobs` were recorded while the actor sampled, see `reused`.
        learnt: what the critic has learnt from it already, if it has.
    """

    sequences: Tensor
    attention_mask: Tensor
    answer_mask: Tensor
    logprobs: Tensor
    values: Tensor
    reference: Tensor
    scores: Tensor
    advantages: Tensor
    returns: Tensor
    recorded: bool = False
    learnt: Learnt | None = None

    @property
    def answer_width(self) -> int:
        """r, the columns of the answers."""
        return self.answer_mask.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """By name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def split(self, size: int) -> Iterator[Experience]:
        """The rows in order, `size` at a time."""
        tensors = self.tensors()
        parts = (torch.split(value, size) for value in tensors.values())
        for part in zip(*parts, strict=True):
            yield replace(self, **dict(zip(tensors, part, strict=True)))

    def micro_batches(
        self, settings: Settings, device: Device
    ) -> list[tuple[MicroBatch, Experience]]:
        """Texts as models are given them, and what is known of their answers, as wide as these."""
        texts = (self.sequences, self.attention_mask, self.answer_width)
        found = []
        for part in micro_batches(*texts, settings, device):
            tensors: dict[str, Any] = {}
            for name, values in self.tensors().items():
                of_answers = values.shape == self.answer_mask.shape
                tensors[name] = values[(part.rows, part.answers) if of_answers else part.rows]
            found.append((part, replace(self, **tensors)))
        return found


def reused(rollout: Rollout, settings: Settings) -> Tensor | None:
    """The recorded log-probs of a rollout where they serve; None where the actor has to score it.

    A rounding in them would go into PPO's ratio, unless that is known to be 1.
    """
    serve = settings.ppo.reuse_logprobs and settings.trains_on_policy
    return rollout.logprobs if serve else None


@torch.no_grad()
def score(
    rollout: Rollout,
    models: Models,
    rewards: Rewards,
    settings: Settings,
    kl_coefficient: float,
    learn: bool = False,
) -> Experience:
    """What models and rewards say of a rollout; dropout is off, as it was when the actor sampled.

    Args:
        rollout: this rank's.
        models: actor, critic and reference.
        rewards: what scores the answers.
        kl_coefficient: weight of the KL penalty.
        learn: whether the critic learns meanwhile, see `critic.values_learnt`.
    """
    actor, critic, reference, device = (
        models.actor,
        models.critic,
        models.reference,
        models.device,
    )
    actor.module.eval()
    reference_logprobs = answer_logprobs(reference, rollout, settings, device)
    logprobs = recorded = reused(rollout, settings)
    if logprobs is None:
        logprobs = answer_logprobs(actor, rollout, settings, device)
    scores = rewards.scores(rollout)
    rewarded = token_rewards(
        rollout, logprobs, reference_logprobs, scores, rewards, settings, kl_coefficient
    )
    learnt = None
    if learn:
        values, learnt = values_learnt(critic, rollout, rewarded, settings, device)
    else:
        critic.module.eval()
        texts = (rollout.sequences, rollout.attention_mask, rollout.answer_width)
        values = outputs(critic, *texts, settings, device)[:, :-1]
    found = assemble(rollout, logprobs, reference_logprobs, values, scores, rewarded, settings)
    return replace(found, recorded=recorded is not None, learnt=learnt)


def answer_logprobs(policy: Placed, rollout: Rollout, settings: Settings, device: Device) -> Tensor:
    """Log-probs of a rollout's answers.

    Args:
        policy: an engine or see `frozen`.
        rollout: this rank's.
        device: to tell when a part of the work is complete.

    Returns:
        [b, r], fp32; padding included.
    """
    texts = (rollout.sequences, rollout.attention_mask, rollout.answer_width)
    return outputs(policy, *texts, settings, device, settings.generation.temperature)


def token_rewards(
    rollout: Rollout,
    logprobs: Tensor,
    reference: Tensor,
    scores: Tensor,
    rewards: Rewards,
    settings: Settings,
    kl_coefficient: float,
) -> Tensor:
    """What each token is rewarded with: the KL penalty, and a whole answer's score on its last.

    Args:
        rollout: this rank's.
        logprobs, reference: [b, r].
        scores: [b].
        rewards: shapes the scores.
        settings: the PPO settings are read.
        kl_coefficient: weight of the KL penalty.

    Returns:
        [b, r].
    """
    kl = formulas.kl_estimate(logprobs, reference, settings.ppo.kl_estimator)
    shaped = rewards.shaped(scores, rollout.ended)
    # What is no number is not learnt from, whatever it was clipped to.
    shaped = torch.where(scores.isfinite(), shaped, torch.nan)
    # On the last token, wherever the reward model is read: to end was the last action that the
    # score is due to. On the token before, it would teach to go on, with a score yet to come.
    last = rollout.lengths - 1
    return formulas.token_rewards(shaped, kl, rollout.answer_mask, kl_coefficient, last)


def assemble(
    rollout: Rollout,
    logprobs: Tensor,
    reference: Tensor,
    values: Tensor,
    scores: Tensor,
    rewarded: Tensor,
    settings: Settings,
) -> Experience:
    """Advantages and returns from what models and rewards say.

    Args:
        rollout: this rank's.
        logprobs, reference, values: [b, r].
        scores: [b].
        rewarded: [b, r], see `token_rewards`.
        settings: the PPO settings are read.
    """
    mask = rollout.answer_mask
    # Padding may have the probability 0, and minus infinity times 0 is no number.
    logprobs = torch.where(mask, logprobs, 0)
    reference = torch.where(mask, reference, 0)
    advantages, returns = formulas.advantages_and_returns(
        rewarded, values, mask, settings.ppo.gamma, settings.ppo.gae_lambda
    )
    if settings.ppo.whiten_advantages:
        mean, variance = moments(advantages, mask)
        advantages = formulas.whiten(advantages, mask, mean, variance)
    return Experience(
        sequences=rollout.sequences,
        attention_mask=rollout.attention_mask,
        answer_mask=mask,
        logprobs=logprobs,
        values=values,
        reference=reference,
        scores=scores,
        advantages=advantages,
        returns=returns,
    )


def moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over the valid tokens of the global batch; all ranks have to call it.

    Args:
        values: [..., b, r].
        mask: [b, r].

    Returns:
        Both of the leading shape of `values`.
    """
    values = torch.where(mask, values, 0)
    count = mask.sum().to(values.dtype)
    # Two passes: in fp32, a mean of squares less a squared mean would lose a small variance.
    count, *_ = total = summed(torch.cat([count.view(1), values.sum((-2, -1)).view(-1)]))
    mean = (total[1:] / count).view(values.shape[:-2])
    squares = ((values - mean[..., None, None]) ** 2 * mask).sum((-2, -1))
    return mean, summed(squares) / count
