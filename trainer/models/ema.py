"""A moving average of the actor's weights, beside the training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor

from hlrlhf.trainer.models import engine
from hlrlhf.trainer.pieces import Piece


class Average:
    """The exponential moving average of what trains, in fp32 and in host memory.

    average ← decay · average + (1 - decay) · weight, after each optimizer step, from the weights at
    the start on; DeepSpeed-Chat's. Under ZeRO-3 each rank averages its own part of each weight,
    otherwise rank 0 does it alone. Of adapters, each factor has an average of its own.
    """

    def __init__(self, trained: DeepSpeedEngine, decay: float):
        """Start at the weights as they are.

        Args:
            trained: the engine.
            decay: in [0, 1).
        """
        self._engine = trained
        self._decay = decay
        self._partitioned = trained.zero_optimization_stage() == 3
        own = self._partitioned or dist.get_rank() == 0
        self._averages = {
            parameter: self._read(parameter).clone()
            for parameter in trained.module.parameters()
            if parameter.requires_grad and own
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of an optimizer step."""
        for parameter, average in self._averages.items():
            average.lerp_(self._read(parameter), 1 - self._decay)

    @torch.no_grad()
    def whole_weights(self) -> dict[str, Tensor]:
        """As `engine.whole_weights`, with the averages for weights; all ranks have to call it."""
        weights = engine.whole_weights(self._engine)
        for name, parameter in self._engine.module.named_parameters():
            if parameter in self._averages:
                whole = self._whole(parameter)
                if weights:
                    weights[name].copy_(whole)
        return weights

    def state(self) -> dict[str, Any]:
        """A piece of each average that this rank holds."""
        rank = dist.get_rank()
        pieces = {}
        for name, parameter in self._engine.module.named_parameters():
            if (average := self._averages.get(parameter)) is None:
                continue
            if not self._partitioned:
                pieces[name] = Piece.whole(average)
            elif (length := min(len(average), parameter.ds_numel - rank * len(average))) > 0:
                start, total = rank * len(average), parameter.ds_numel
                pieces[name] = Piece(average[:length], start, total)
        return pieces

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; without one, from the weights as they are now."""
        if not state:
            for parameter, average in self._averages.items():
                average.copy_(self._read(parameter))
            return
        for name, piece in self.state().items():
            piece.fill(state[name])

    def _read(self, parameter: Any) -> Tensor:
        """A weight, or this rank's part of it, as it is now."""
        value = parameter.ds_tensor if self._partitioned else parameter
        read: Tensor = value.detach().float().cpu()
        return read

    def _whole(self, parameter: Any) -> Tensor:
        average = self._averages[parameter]
        if not self._partitioned:
            return average
        # Equal parts of the flat weight, in the order of ranks; the last is padded.
        part = average.to(parameter.ds_tensor.device)
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part)
        return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape).cpu()
