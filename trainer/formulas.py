"""PPO on tensors: pure functions, each with its shapes and the source of its formula.

Shapes: ``b`` rows, ``r`` answer tokens (the answer's columns only, padded on the right), ``v`` the
vocabulary. Masks are boolean, true on the answer's own tokens, its end-of-sequence token included;
they come from the generated lengths, never from comparing ids with the padding token.

Sums, not means, are returned for the losses: the caller divides by the number of valid tokens of
the *global* batch, so the gradient does not depend on how the batch is cut into micro batches and
ranks.

The formulas follow "Proximal Policy Optimization Algorithms" (arXiv 1707.06347), "High-Dimensional
Continuous Control Using Generalized Advantage Estimation" (arXiv 1506.02438) and, for their use in
RLHF, "The N+ Implementation Details of RLHF with PPO" (arXiv 2403.17031).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

# Beyond exp(20) a ratio says nothing more, and in fp32 it soon overflows.
MAX_LOG_RATIO = 20.0

# Bytes of logits in fp32 that a processor works on at a time: about what its own cache holds.
BLOCK = 2**21


def token_logprobs(
    logits: Tensor, tokens: Tensor, temperature: float, in_place: bool = False
) -> Tensor:
    """Log-probabilities of the given tokens under softmax(logits / temperature), in fp32.

    On processors nothing of the size of the logits is made but their gradient, which has their
    type. It can be taken once, and not be differentiated again.

    Args:
        logits: [b, r, v], the logits that predict each token.
        tokens: [b, r], integer.
        temperature: the one that the tokens were sampled with.
        in_place: whether the gradient may overwrite the logits: nobody else reads them. Where an
            operation has kept them for its own gradient after all, autograd refuses.

    Returns:
        [b, r], fp32; fp64 where the logits are.
    """
    apply: Callable[..., Tensor] = _TokenLogprobs.apply
    return apply(logits, tokens, temperature, in_place)


class _TokenLogprobs(torch.autograd.Function):
    """log p = x_token / T - log sum exp(x / T), and d log p / dx = (onehot - softmax(x / T)) / T.

    Written out, because autograd would pass some ten times over tensors of the logits' size, which
    on processors takes as long as the matrix product that they come from.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, temperature: float, in_place: bool
    ) -> Tensor:
        chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        chosen = _scaled(chosen, temperature)
        normalizers = torch.empty_like(chosen)
        for block in _blocks(logits, tokens):
            normalizers[block] = _scaled(logits[block], temperature).logsumexp(-1)
        ctx.save_for_backward(logits, tokens, normalizers)
        ctx.temperature, ctx.in_place = temperature, in_place
        return chosen - normalizers

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor, None, None, None]:
        # After a gradient in place, this refuses to be done again: the logits have changed.
        logits, tokens, normalizers = ctx.saved_tensors
        gradient = logits.detach() if ctx.in_place else torch.empty_like(logits)
        temperature, direct = ctx.temperature, gradient.dtype == normalizers.dtype
        slopes, normalizers, chosen = (
            part.unsqueeze(-1) for part in (slopes / temperature, normalizers * temperature, tokens)
        )
        for block in _blocks(logits, tokens):
            into = gradient[block] if direct else None
            part = torch.sub(logits[block], normalizers[block], out=into)
            if temperature != 1:
                part.div_(temperature)
            part.exp_().mul_(-slopes[block]).scatter_add_(-1, chosen[block], slopes[block])
            if not direct:
                gradient[block] = part
        return gradient, None, None, None


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1 else logits / temperature


def _blocks(logits: Tensor, tokens: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of the tokens, a block of them at a time.

    Processors have caches: what is made of a small block is still there when it is read again.
    Other devices do best with few operations, which for some have to be compiled, on all at once.
    """
    (rows, columns), size = tokens.shape, logits.shape[-1] * 4
    if logits.device.type != "cpu":
        yield slice(rows), slice(columns)
        return
    at_once = max(1, BLOCK // size) * torch.get_num_threads()
    height, width = max(1, at_once // max(1, columns)), max(1, min(at_once, columns))
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            yield slice(row, row + height), slice(column, min(column + width, columns))


def kl_estimate(logprobs: Tensor, reference: Tensor, estimator: str = "k1") -> Tensor:
    """An estimate of the KL divergence from the reference, of each sampled token.

    With d = log p - log p_ref: k1 = d, k2 = d² / 2, k3 = exp(-d) - 1 + d. All see the sampled token
    only. k1 and k3 are unbiased and k1 may be negative; k2 has a small bias, and neither it nor k3
    is ever negative. (J. Schulman, "Approximating KL Divergence", 2020.)

    Args:
        logprobs, reference: [b, r].
        estimator: ``k1``, ``k2`` or ``k3``.

    Returns:
        [b, r].
    """
    difference = logprobs - reference
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference**2 / 2
    return (-difference).clamp(max=MAX_LOG_RATIO).exp() - 1 + difference


class KlController:
    """The coefficient of the KL penalty: fixed, or drawn towards a target.

    After each rollout of n answers the adaptive one is multiplied by
    1 + clip(KL / target - 1, ±0.2) * n / horizon, from "Fine-Tuning Language Models from Human
    Preferences" (arXiv 1909.08593).

    Args:
        coefficient: where it starts.
        target: KL divergence of a whole answer, in nats; None keeps the coefficient.
        horizon: in answers.
    """

    def __init__(self, coefficient: float, target: float | None, horizon: int):
        self.coefficient = coefficient
        self._target = target
        self._horizon = horizon

    def update(self, kl: float, answers: int) -> None:
        """Take a rollout into account.

        Args:
            kl: mean over its answers, in nats.
            answers: how many it has, of all ranks.
        """
        if self._target is not None:
            error = max(-0.2, min(0.2, kl / self._target - 1))
            self.coefficient *= 1 + error * answers / self._horizon

    def state(self) -> dict[str, float]:
        """What updates have changed."""
        return {"coefficient": self.coefficient} if self._target is not None else {}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from a state; a coefficient that is fixed stays as it was set."""
        if self._target is not None:
            self.coefficient = state.get("coefficient", self.coefficient)


def token_rewards(
    scores: Tensor, kl: Tensor, mask: Tensor, kl_coefficient: float, column: Tensor
) -> Tensor:
    """Rewards per token: -beta * kl everywhere, and the score on one of them.

    Args:
        scores: [b], one for each answer.
        kl: [b, r].
        mask: [b, r].
        kl_coefficient: beta.
        column: [b], integer, of the token that gets the score; usually the last valid one.

    Returns:
        [b, r], zero where the mask is false. A row without any valid token gets no score.
    """
    rewards = torch.where(mask, -kl_coefficient * kl, 0)
    given = torch.where(mask.any(-1), scores, 0).to(rewards.dtype)
    return rewards.scatter_add(-1, column.unsqueeze(-1), given.unsqueeze(-1))


def advantages_and_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the returns that the critic learns.

    delta_t = r_t + gamma * V_{t+1} - V_t and A_t = delta_t + gamma * lambda * A_{t+1}, with
    nothing after the last valid token; returns = A + V.

    Args:
        rewards, values: [b, r]; a value is the critic's estimate before its token.
        mask: [b, r], true on a prefix of each row.
        gamma: discount.
        gae_lambda: lambda.

    Returns:
        Advantages and returns, both [b, r], zero where the mask is false.
    """
    values = torch.where(mask, values, 0)
    advantages = torch.where(mask, rewards, 0) + gamma * _ahead(values, 1) - values
    # Each is the sum of its own delta and those that follow, of twice as many after each round: an
    # operation for a column each would take a device longer than what it computes.
    columns = 1
    while columns < values.shape[1]:
        advantages = advantages + (gamma * gae_lambda) ** columns * _ahead(advantages, columns)
        columns *= 2
    return advantages, advantages + values


def _ahead(rows: Tensor, columns: int) -> Tensor:
    """What stands so many columns to the right, [b, r]; zero beyond the end."""
    return pad(rows[:, columns:], (0, columns))


class PolicyLoss(NamedTuple):
    """Sums over valid tokens, scalars; all but the loss are without gradient.

    Attributes:
        loss: the clipped surrogate.
        clipped: tokens on which the clipping was active.
        ratio: rho.
        kl: k3 estimate of the divergence of the policy in training from the one that sampled.
    """

    loss: Tensor
    clipped: Tensor
    ratio: Tensor
    kl: Tensor


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> PolicyLoss:
    """The clipped surrogate: sum over valid tokens of max(-A * rho, -A * clip(rho, 1 ± eps)).

    Args:
        logprobs: [b, r], of the policy in training.
        old_logprobs, advantages: [b, r], of the rollout, without gradient.
        mask: [b, r].
        clip_range: eps.
    """
    log_ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    log_ratio = torch.where(mask, log_ratio, 0)
    ratio = log_ratio.exp()
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.where(mask, torch.maximum(free, clipped), 0).sum()
    with torch.no_grad():
        return PolicyLoss(
            loss,
            clipped=((clipped > free) & mask).sum(),
            ratio=(ratio * mask).sum(),
            kl=(ratio - 1 - log_ratio).sum(),
        )


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float
) -> Tensor:
    """Half the larger of the plain and the clipped squared error, summed over valid tokens.

    Args:
        values: [b, r], of the critic in training.
        old_values, returns: [b, r], of the rollout, without gradient.
        mask: [b, r].
        clip_range: how far a value may move from its old one before the error is clipped.

    Returns:
        A scalar.
    """
    # Masked first: where something is no number, its gradient times 0 would be none either.
    values, old_values, returns = (torch.where(mask, x, 0) for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    error = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * error.sum()


def whiten(advantages: Tensor, mask: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Advantages shifted and scaled to mean 0 and variance 1.

    Args:
        advantages: [b, r].
        mask: [b, r].
        mean, variance: scalars, over the valid tokens of the global batch.

    Returns:
        [b, r], zero where the mask is false.
    """
    return torch.where(mask, (advantages - mean) * torch.rsqrt(variance + 1e-8), 0)
