"""A moving average of the actor's weights, beside the training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor

from hlrlhf.trainer.models import engine
from hlrlhf.trainer.pieces import Piece


class Average:
    """The exponential moving average of what trains, in fp32, where the weights are.

    average ← decay · average + (1 - decay) · weight, after each optimizer step, from the weights at
    the start on; DeepSpeed-Chat's. Each rank averages a part of each weight, the one that it holds
    under ZeRO-3, so that a step sends nothing. Of adapters, each factor has an average of its own.
    """

    def __init__(self, trained: DeepSpeedEngine, decay: float):
        """Start at the weights as they are.

        Args:
            trained: the engine.
            decay: in [0, 1).
        """
        self._engine = trained
        self._decay = decay
        self._averages = {
            parameter: _own(parameter).values.float().clone()
            for parameter in trained.module.parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of an optimizer step."""
        for parameter, average in self._averages.items():
            average.lerp_(_own(parameter).values.float(), 1 - self._decay)

    @torch.no_grad()
    def whole_weights(self) -> dict[str, Tensor]:
        """As `engine.whole_weights`, with the averages for weights; all ranks have to call it."""
        weights = engine.whole_weights(self._engine)
        for name, parameter in self._engine.module.named_parameters():
            if parameter in self._averages:
                whole = self._whole(parameter)
                if weights:
                    weights[name].copy_(whole.view(weights[name].shape))
        return weights

    def state(self) -> dict[str, Any]:
        """A piece of each average that this rank holds a part of."""
        return {
            name: replace(_own(parameter), values=average)
            for name, parameter in self._engine.module.named_parameters()
            if (average := self._averages.get(parameter)) is not None and len(average)
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; without one, from the weights as they are now."""
        if not state:
            for parameter, average in self._averages.items():
                average.copy_(_own(parameter).values)
            return
        for name, piece in self.state().items():
            piece.fill(state[name])

    def _whole(self, parameter: Any) -> Tensor:
        """All of an average, flat, on every rank."""
        total, size = _size(parameter)
        part = torch.zeros(size, device=self._engine.device)
        part[: len(self._averages[parameter])] = self._averages[parameter]
        whole = part.new_empty(dist.get_world_size(), size)
        dist.all_gather(list(whole), part)
        return whole.view(-1)[:total]


def _size(parameter: Any) -> tuple[int, int]:
    """How many numbers a weight has, and how many of them each rank averages, but for the last."""
    if hasattr(parameter, "ds_id"):  # ZeRO-3's own parts, the last one padded
        return parameter.ds_numel, parameter.ds_tensor.numel()
    return parameter.numel(), math.ceil(parameter.numel() / dist.get_world_size())


def _own(parameter: Any) -> Piece:
    """What this rank averages of a weight, as it is now; of a small one that may be nothing."""
    total, size = _size(parameter)
    start = min(dist.get_rank() * size, total)
    held = parameter.ds_tensor if hasattr(parameter, "ds_id") else parameter.view(-1)[start:]
    return Piece(held.detach()[: min(size, total - start)], start, total)
