"""Experience → update: the optimizer steps on actor and critic."""

from __future__ import annotations

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from hlrlhf.settings import Settings
from hlrlhf.trainer import formulas
from hlrlhf.trainer.models import engine
from hlrlhf.trainer.models.roles import Models
from hlrlhf.trainer.ppo import critic as critics
from hlrlhf.trainer.ppo.batches import MicroBatch, token_share
from hlrlhf.trainer.ppo.experience import Experience
from hlrlhf.trainer.ppo.pretraining import Mix


def update(
    experience: Experience, models: Models, mix: Mix | None, settings: Settings
) -> tuple[dict[str, tuple[Tensor, Tensor]], bool]:
    """All optimizer steps on a rollout, gradients accumulated over micro batches.

    Args:
        experience: this rank's.
        models: of which the actor is updated, the average after each of its steps, and the critic
            unless it has learnt already.
        mix: of the language-modelling loss beside the actor's, or None.

    Returns:
        This rank's sums and weights of what the update shows, for `metrics.means`; and whether
        every step was taken, none skipped because of a gradient that is not finite.
    """
    actor, critic, device = models.actor, models.critic, models.device
    actor.train()
    critic.train()
    policy = torch.zeros(4, device=device.torch)
    values, applied = torch.zeros((), device=device.torch), True
    if experience.learnt is not None:
        values, applied = experience.learnt
    texts = torch.zeros(2, device=device.torch)
    for _ in range(settings.ppo.epochs):
        for minibatch in experience.split(len(experience.scores) // settings.ppo.minibatches):
            share = token_share(minibatch.answer_mask, settings)
            micros = minibatch.micro_batches(settings, device)
            # One model after the other, so that the gradients of one at a time take up memory.
            for part, micro in micros:
                parts = _policy_loss(actor, part, micro, settings)
                applied &= engine.descend(actor, parts.loss * share)
                device.step_done()
                policy += torch.stack(parts).detach()
                if mix is not None:
                    loss, seen = mix.loss(actor)
                    applied &= engine.descend(actor, loss)
                    device.step_done()
                    texts += seen
            if models.average is not None and actor.was_step_applied():
                models.average.update()
            for part, micro in micros if experience.learnt is None else ():
                learnt = _teach(critic, part, micro, share, settings)
                device.step_done()
                values += learnt.loss
                applied &= learnt.applied
    tokens = experience.answer_mask.sum() * settings.ppo.epochs
    names = ("actor_loss", "clip_fraction", "ratio", "update_kl")
    totals = {name: (total, tokens) for name, total in zip(names, policy, strict=True)}
    totals["critic_loss"] = (values, tokens)
    if mix is not None:
        totals["pretraining_loss"] = (texts[0], texts[1])
    return totals, applied


def _policy_loss(
    actor: DeepSpeedEngine, part: MicroBatch, micro: Experience, settings: Settings
) -> formulas.PolicyLoss:
    def loss(logprobs: Tensor, columns: slice) -> Tensor:
        old, advantages, mask = (
            part[:, columns] for part in (micro.logprobs, micro.advantages, micro.answer_mask)
        )
        rest = (advantages, mask, settings.ppo.clip_range)
        if not micro.recorded:
            return torch.stack(formulas.policy_loss(logprobs, old, *rest))
        # What trains is what sampled, so the ratio is 1. By how much the two forwards round apart
        # is not to be learnt from, but shown: it says whether the log-probs were recorded well.
        sums = formulas.policy_loss(logprobs, logprobs.detach(), *rest)
        apart = formulas.policy_loss(logprobs.detach(), old, *rest)
        return torch.stack(sums._replace(ratio=apart.ratio, kl=apart.kl))

    return formulas.PolicyLoss(*part.through(actor, settings.generation.temperature, loss))


def _teach(
    critic: DeepSpeedEngine,
    part: MicroBatch,
    micro: Experience,
    share: Tensor,
    settings: Settings,
) -> critics.Learnt:
    values = part.through(critic)[:, :-1]
    known = (micro.values, micro.returns, micro.answer_mask)
    return critics.descend(critic, values, *known, share, settings)
