"""A linear layer and its adapter as one function.

peft's own forward is made of several: each passes over a tensor as large as the layer's output, or
as its input's gradient, to scale it or to add it to another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


def fuse(layer: LoraLayer) -> None:
    """Give a layer that peft has made the forward of `Adapted`, if that knows its kind."""
    if type(layer) is Linear and type(layer.base_layer) is nn.Linear and not layer.fan_in_fan_out:
        # The layer that is there, weights and all, with another forward.
        layer.__class__ = Adapted


class Adapted(Linear):  # type: ignore[misc]
    """peft's layer, whose forward is one function wherever that gives the same.

    The modules inside hold the weights, but are not called: hooks of theirs do not run.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., o] of x [..., i]."""
        if args or kwargs or not self._fits(x):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        base = self.base_layer
        down, up = self.lora_A["default"].weight, self.lora_B["default"].weight
        # Here rather than in the function: a view that it gave could not be changed in place.
        rows = x.reshape(-1, x.shape[-1])
        applied: Callable[..., Tensor] = _Sum.apply
        y = applied(rows, base.weight, base.bias, down, up, self.scaling["default"])
        return y.view(*x.shape[:-1], y.shape[-1])

    def _fits(self, x: Tensor) -> bool:
        """Whether one adapter is added to the layer, of weights that are here and of one type."""
        if self.disable_adapters or self.merged or self.active_adapters != ["default"]:
            return False
        if not isinstance(self.lora_dropout["default"], nn.Identity):
            return False
        parts = self.base_layer, self.lora_A["default"], self.lora_B["default"]
        # Where answers are sampled a part may have a faster product.
        if any("forward" in vars(part) for part in parts):
            return False
        # ZeRO-3 brings the weights of a module together when that is called, and not before.
        return all(
            part.weight.dtype == x.dtype and not hasattr(part.weight, "ds_id") for part in parts
        )


class _Sum(torch.autograd.Function):
    """y = x Wᵀ + b + s x Aᵀ Bᵀ, and for the backward pass x and s x Aᵀ beside the weights.

    With h = s x Aᵀ and g = s dy B: dx = dy W + g A, dA = gᵀ x, dB = dyᵀ h. What is added is added
    by the product that makes it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, s: float
    ) -> Tensor:
        """[n, o] of x [n, i], weight [o, i], bias [o], down [r, i] and up [o, r]."""
        h = linear(x, down).mul_(s)
        y = linear(x, weight, bias).addmm_(h, up.t())
        ctx.save_for_backward(x, h, weight, down, up)
        ctx.s = s
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of what needs one."""
        x, h, weight, down, up = ctx.saved_tensors
        of_x, of_weight, of_bias, of_down, of_up, _ = ctx.needs_input_grad
        g = (dy @ up).mul_(ctx.s)
        return (
            (dy @ weight).addmm_(g, down) if of_x else None,
            dy.t() @ x if of_weight else None,
            dy.sum(0) if of_bias else None,
            g.t() @ x if of_down else None,
            dy.t() @ h if of_up else None,
            None,
        )
