"""The state of a model that trains: weights in fp32, the optimizer's moments, the schedule.

DeepSpeed's own checkpoints are pickles that only as many ranks can load as have saved them. Here
each rank says which part of which parameter it holds, under the parameter's name, so that any
number of ranks, with any ZeRO stage, can take it up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor

from hlrlhf.trainer.pieces import Piece

WEIGHT = "weight"
STEP = "step"


@dataclass(frozen=True)
class _Held:
    """What this rank optimizes of a parameter.

    Attributes:
        name: the parameter's.
        flat: the tensor that the optimizer knows, which may hold parts of several parameters.
        begin, end: where in `flat` the part of this one lies.
        start: where in the parameter that part begins.
        total: numbers in the parameter.
        kept: whether this rank saves the part, of those that hold it.
    """

    name: str
    flat: Tensor
    begin: int
    end: int
    start: int
    total: int
    kept: bool

    def piece(self, values: Tensor) -> Piece:
        """This part of the weights or of a moment: a tensor of the shape of `flat`, or a count."""
        if values.ndim == 0:
            return Piece.whole(values, kept=self.kept and self.start == 0)
        part = values.detach().view(-1)[self.begin : self.end]
        return Piece(part, self.start, self.total, self.kept)


class Optimizing:
    """What optimizer steps have made of a model.

    Args:
        engine: around it.
    """

    def __init__(self, engine: DeepSpeedEngine):
        self._engine = engine
        # What DeepSpeed has put its own optimizer around, if it has.
        self._optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)

    def state(self) -> dict[str, Any]:
        """Numbers; and pieces named by kind and parameter, as ``exp_avg/lm.lm_head.weight``."""
        state: dict[str, Any] = {"updates": self._engine.lr_scheduler.last_epoch}
        for held in self._held():
            kinds = {WEIGHT: held.flat, **self._optimizer.state.get(held.flat, {})}
            for kind, value in kinds.items():
                if isinstance(value, Tensor):
                    state[f"{kind}/{held.name}"] = held.piece(value)
        # Gaudi's AdamW counts its steps for a group of parameters, torch's for each.
        counts = [group.get(STEP) for group in self._optimizer.param_groups]
        return state | ({"group_steps": counts} if all(counts) else {})

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; all ranks have to call it."""
        kinds = sorted({name.partition("/")[0] for name in state if "/" in name} - {WEIGHT})
        for held in self._held():
            held.piece(held.flat).fill(state[f"{WEIGHT}/{held.name}"])
            for kind in kinds:
                # A parameter that no gradient has reached yet has none.
                if (stored := state.get(f"{kind}/{held.name}")) is not None:
                    own = self._optimizer.state[held.flat]
                    if kind not in own:
                        shape = () if kind == STEP else held.flat.shape
                        own[kind] = torch.zeros(shape, device=held.flat.device)
                    held.piece(own[kind]).fill(stored)
        for group, count in zip(
            self._optimizer.param_groups, state.get("group_steps", ()), strict=False
        ):
            group[STEP] = count
        self._spread()
        schedule = self._engine.lr_scheduler
        schedule.last_epoch = state["updates"]
        schedule._last_lr = schedule.get_lr()
        for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
            group["lr"] = rate

    def _held(self) -> Iterator[_Held]:
        """What this rank optimizes of each parameter, where it does."""
        outer, rank, ranks = self._engine.optimizer, dist.get_rank(), dist.get_world_size()
        trains = [(n, p) for n, p in self._engine.module.named_parameters() if p.requires_grad]
        masters = dict(self._copies())
        for number, (name, parameter) in enumerate(trains):
            if hasattr(parameter, "ds_id"):  # ZeRO-3: equal parts, the last one padded
                group, begin, size = outer.grad_position[parameter.ds_id]
                start, total = rank * size, parameter.ds_numel
                if (length := min(size, total - start)) > 0:
                    flat = outer.fp32_partitioned_groups_flat[group]
                    yield _Held(name, flat, begin, begin + length, start, total, True)
            elif hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2
                if (mapping := parameter._hp_mapping) is not None:
                    flat = self._optimizer.param_groups[mapping.param_group_index]["params"][0]
                    where = mapping.hp_fragment_address
                    end = where.start + where.numel
                    start, total = mapping.lp_fragment_address.start, parameter.numel()
                    yield _Held(name, flat, where.start, end, start, total, True)
            else:  # whole on every rank
                total = parameter.numel()
                flat = masters.get(parameter, parameter)
                yield _Held(name, flat, 0, total, 0, total, number % ranks == rank)

    def _copies(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter with its fp32 copy, in bf16 without ZeRO."""
        optimizer = self._engine.optimizer
        for groups in zip(
            getattr(optimizer, "fp16_groups", ()),
            getattr(optimizer, "fp32_groups", ()),
            strict=False,
        ):
            yield from zip(*groups, strict=True)

    def _spread(self) -> None:
        """Give every rank the weights that were filled in, in the precision that it trains in."""
        optimizer = self._engine.optimizer
        if self._engine.zero_optimization_stage() == 3:
            optimizer._partition_all_parameters()
            for group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            # Small parameters are whole on every rank between steps too.
            if persistent := optimizer.persistent_parameters:
                persistent[0].all_gather(persistent)
            optimizer.invalidate_secondary_tensor()
        elif hasattr(optimizer, "update_lp_params"):
            optimizer.update_lp_params()
        for parameter, copy in self._copies():
            parameter.copy_(copy)
