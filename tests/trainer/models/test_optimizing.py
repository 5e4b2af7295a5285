"""The state of a model that trains: whole by name, whoever held the parts, and exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from ranks import together
from torch import Tensor

from hlrlhf.trainer.models import engine, loading, lora
from hlrlhf.trainer.models.optimizing import Optimizing
from hlrlhf.trainer.pieces import Piece

ROWS = [[1, 5, 6, 7, 8, 9], [1, 30, 31, 8]]


def make(folder: Path, stage: int, dtype: str, *flags: str) -> Any:
    """An engine around the policy in a folder; half of its schedule is the warm-up."""
    settings = tiny.settings(
        "mbs=1",
        "gbs=2",
        f"dtype={dtype}",
        f"devices_per_node={dist.get_world_size()}",
        f"actor.zero_stage={stage}",
        f"critic.zero_stage={stage}",
        "num_warmup_steps=3",
        "actor.learning_rate=0.01",
        *flags,
    )
    policy = loading.load_policy(str(folder), dtype, 0.0)
    if settings.lora.dim:
        torch.manual_seed(5)
        lora.add_adapters(policy, settings)
    return engine.trained(policy, settings.actor, settings, tiny.cpu(settings), 6)


def steps(trained: Any, numbers: range) -> None:
    rows = ROWS[dist.get_rank() :: dist.get_world_size()]
    for number in numbers:
        for row in rows:
            ids, mask = tiny.padded([[*row[:-1], number + 3]])
            engine.descend(trained, -trained(ids, mask, 3, 1.0).sum())


class Whole:
    """A tensor that the ranks' pieces were put together to; what no piece held is no number."""

    def __init__(self, name: str, total: int):
        self.name, self.total = name, total
        self.values = torch.full((total,), torch.nan)
        self.writers = torch.zeros(total)

    def read(self, start: int, stop: int) -> Tensor:
        return self.values[start:stop]


def put_together(state: dict[str, Any]) -> dict[str, Any]:
    """A state as whoever loads it sees it: each number written by one rank, and by one alone."""
    copied = {
        name: (value.values.clone(), value.start, value.total, value.kept)
        if isinstance(value, Piece)
        else value
        for name, value in state.items()
    }
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, copied)
    whole: dict[str, Any] = {}
    for held in every:
        for name, value in held.items():
            if not isinstance(value, tuple):
                whole[name] = value
                continue
            values, start, total, kept = value
            tensor = whole.setdefault(name, Whole(name, total))
            if kept:
                tensor.values[start : start + len(values)] = values
                tensor.writers[start : start + len(values)] += 1
    assert all((value.writers == 1).all() for value in whole.values() if isinstance(value, Whole))
    return whole


def go_on(
    folder: Path, before: int, after: int, dtype: str, flags: tuple[str, ...]
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Weights after six steps, in one go and by an engine that takes over after three."""
    first = make(folder, before, dtype, *flags)
    steps(first, range(3))
    state = put_together(Optimizing(first).state())
    steps(first, range(3, 6))
    second = make(folder, after, dtype, *flags)
    Optimizing(second).restore(state)
    steps(second, range(3, 6))
    rates = [group["lr"] for one in (first, second) for group in one.optimizer.param_groups]
    return engine.whole_weights(first), engine.whole_weights(second), rates


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("stage", "dtype", "flags"),
    [
        (0, "fp32", ()),
        (0, "bf16", ()),
        (1, "fp32", ("lora.dim=2",)),
        (1, "bf16", ("optimizer.grad_accum_dtype=fp32",)),
        (2, "fp32", ("optimizer.offload=true",)),
        (2, "bf16", ()),
        (3, "fp32", ("lora.dim=2", "only_optimize_lora=true")),
        (3, "fp32", ("optimizer.offload=true",)),
        (3, "bf16", ()),
    ],
)
def test_whoever_takes_over_ends_with_the_same_bits(
    tmp_path: Path, ranks: int, stage: int, dtype: str, flags: tuple[str, ...]
) -> None:
    folder = tiny.save_policy(tmp_path, "llama", **tiny.WIDE["llama"])

    (through, taken_over, rates), *_ = together(ranks, go_on, folder, stage, stage, dtype, flags)

    start = loading.load_policy(str(folder), dtype, 0.0).state_dict()
    assert any(not value.equal(start.get(name, value)) for name, value in through.items()) or flags
    for name, value in through.items():
        assert value.equal(taken_over[name]), name
    assert rates[: len(rates) // 2] == rates[len(rates) // 2 :]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(0, 3), (3, 1), (2, 0)])
def test_with_another_zero_stage_too(tmp_path: Path, before: int, after: int) -> None:
    """Within the order of additions, which a large epsilon does not make more of."""
    folder = tiny.save_policy(tmp_path, "llama", **tiny.WIDE["llama"])

    (through, taken_over, _), *_ = together(
        2, go_on, folder, before, after, "fp32", ("optimizer.epsilon=0.01",)
    )

    for name, value in through.items():
        torch.testing.assert_close(taken_over[name], value, rtol=0, atol=1e-5)
