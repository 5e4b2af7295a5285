"""The loss of answers with the logits of a few tokens in memory at a time, none computed twice.

A loss that is a sum over tokens is known for a chunk of them as soon as their log-probs are. So the
gradients of hidden states and head are made in the forward pass, while the logits are still there,
and wait for the backward pass; which is how "Liger Kernel: Efficient Triton Kernels for LLM
Training" (arXiv 2410.10989) makes the cross entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from hlrlhf.trainer import formulas

# Of log-probs [b, n] and the columns of the answers that they belong to, [m] sums over tokens: the
# first is the loss, the others have no gradient.
Loss = Callable[[Tensor, slice], Tensor]


def fits(head: nn.Module) -> bool:
    """Whether a head is no more than its weights, and these lie on this rank.

    ZeRO-3 brings them for a call of the head; read here, they would stay for the whole model's.
    """
    return type(head) is nn.Linear and not hasattr(head.weight, "ds_id")


def apply(
    loss: Loss, hidden: Tensor, head: nn.Linear, tokens: Tensor, temperature: float, size: int
) -> Tensor:
    """What a loss says of the answers, chunk by chunk; its gradient can be taken once.

    Each chunk costs a pass over the head's weights for two of its products and over their gradient
    for the third, which adds it up in its own type, as that of micro batches is.

    Args:
        loss: see `Loss`.
        hidden: [b, r, h], the states that predict each token.
        head: see `fits`.
        tokens: [b, r], integer.
        temperature: the one that the tokens were sampled with.
        size: tokens of each answer whose logits are in memory at a time.

    Returns:
        [m], summed over the chunks.
    """
    applied: Callable[..., Tensor] = _Chunks.apply
    return applied(hidden, head.weight, head.bias, tokens, temperature, size, loss)


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        size: int,
        loss: Loss,
    ) -> Tensor:
        of_hidden = torch.empty_like(hidden)
        of_weight = torch.empty_like(weight) if weight.requires_grad else None
        of_bias = torch.zeros_like(bias) if bias is not None and bias.requires_grad else None
        sums = []
        for start in range(0, tokens.shape[1], size):
            columns = slice(start, start + size)
            states, rows = hidden[:, columns], hidden[:, columns].flatten(0, 1)
            logits = linear(rows, weight, bias).view(*states.shape[:2], -1).requires_grad_()
            with torch.enable_grad():
                logprobs = formulas.token_logprobs(
                    logits, tokens[:, columns], temperature, in_place=True
                )
                told = loss(logprobs, columns)
                (slopes,) = torch.autograd.grad(told[0], logits)
            sums.append(told.detach())
            slopes = slopes.flatten(0, 1)
            of_hidden[:, columns] = (slopes @ weight).view_as(states)
            if of_weight is not None:
                # What lay there before the first chunk does not count.
                of_weight.addmm_(slopes.T, rows, beta=float(start > 0))
            if of_bias is not None:
                of_bias += slopes.sum(0)
            del logits, logprobs, slopes  # or two chunks would be in memory
        ctx.gradients = (of_hidden, of_weight, of_bias)
        return torch.stack(sums).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradient of a loss in chunks can be taken once")
        # Nothing here holds them any longer, so that they need not be copied to be added up.
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(slopes[0])
        return (*gradients, None, None, None, None)
