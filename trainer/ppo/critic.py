"""The critic: the values that it gives a rollout, and what it learns from them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from hlrlhf.settings import Settings
from hlrlhf.trainer import formulas
from hlrlhf.trainer.device import Device
from hlrlhf.trainer.models import engine
from hlrlhf.trainer.ppo.batches import micro_batches, together, token_share
from hlrlhf.trainer.ppo.rollout import Rollout


class Learnt(NamedTuple):
    """What an update of the critic tells.

    Attributes:
        loss: a scalar, summed over this rank's tokens.
        applied: False when an optimizer step was skipped.
    """

    loss: Tensor
    applied: bool


def descend(
    critic: DeepSpeedEngine,
    values: Tensor,
    old: Tensor,
    returns: Tensor,
    mask: Tensor,
    share: Tensor,
    settings: Settings,
) -> Learnt:
    """Backward pass of a micro batch, and after the last of a minibatch the optimizer's step.

    Args:
        values: [n, r], with gradient.
        old, returns, mask: [n, r], see `formulas.value_loss`.
        share: what a token counts, see `token_share`.
    """
    loss = formulas.value_loss(values, old, returns, mask, settings.ppo.value_clip_range)
    return Learnt(loss.detach(), engine.descend(critic, loss * share))


@torch.enable_grad()
def values_learnt(
    critic: DeepSpeedEngine,
    rollout: Rollout,
    token_rewards: Tensor,
    settings: Settings,
    device: Device,
) -> tuple[Tensor, Learnt]:
    """The values of a rollout by a critic that learns from it in the same forward pass.

    In the one optimizer step that a rollout makes, without dropout, the critic that learns is the
    one that gave the values; and what it learns from a row, the returns, depends on no other row's.
    A number that is not finite makes its gradient so, and the step is skipped.

    Args:
        rollout: this rank's.
        token_rewards: [b, r].

    Returns:
        Values before each token [b, r], without gradient; 0 in columns that were cut.
    """
    critic.train()
    mask, width = rollout.answer_mask, rollout.answer_width
    share = token_share(mask, settings)
    total = torch.zeros((), device=device.torch)
    parts = micro_batches(rollout.sequences, rollout.attention_mask, width, settings, device)
    found, applied = [], True
    for part in parts:
        rows, answers = part.rows, part.answers
        values = part.through(critic)[:, :-1]
        old, valid = values.detach(), mask[rows, answers]
        _, returns = formulas.advantages_and_returns(
            token_rewards[rows, answers], old, valid, settings.ppo.gamma, settings.ppo.gae_lambda
        )
        learnt = descend(critic, values, old, returns, valid, share, settings)
        device.step_done()
        total += learnt.loss
        applied &= learnt.applied
        found.append(old)
    return together(found, parts, width), Learnt(total, applied)
