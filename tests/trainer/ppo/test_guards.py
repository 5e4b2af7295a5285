"""Numbers that go wrong: skipped steps, the batch for study, warnings."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny import one_rank  # noqa: F401
from updates import load, made, settings_with

from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.models import engine, loading
from hlrlhf.trainer.ppo import experience
from hlrlhf.trainer.ppo.guards import Guard
from hlrlhf.trainer.ppo.update import update

pytestmark = pytest.mark.usefixtures("one_rank")


def guard(run: Path, *flags: str) -> Guard:
    settings = tiny.settings(*flags)
    return Guard(settings, tiny.attempt(run), tiny.cpu(settings))


def with_a(number: float, field: str, place: tuple[int, ...]) -> experience.Experience:
    """An experience with one number in it replaced."""
    found = made(settings_with())
    changed = getattr(found, field).clone()
    changed[place] = number
    return dataclasses.replace(found, **{field: changed})


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("field", "place"),
    [("scores", (1,)), ("logprobs", (0, 2)), ("reference", (0, 0)), ("values", (2, 4))],
)
def test_a_number_that_is_not_finite_spoils_a_batch(
    tmp_path: Path, field: str, place: tuple[int, ...], number: float
) -> None:
    assert guard(tmp_path).usable(made(settings_with()))
    assert not guard(tmp_path).usable(with_a(number, field, place))


def test_what_stands_in_padding_spoils_nothing(tmp_path: Path) -> None:
    assert guard(tmp_path).usable(with_a(math.nan, "values", (1, 3)))


@pytest.mark.parametrize(
    ("dtype", "flags"),
    [
        ("fp32", []),
        ("bf16", []),
        pytest.param("bf16", ["optimizer.grad_accum_dtype=fp32"], id="bf16 added up in fp32"),
    ],
)
@pytest.mark.parametrize(
    ("stage", "offload"), [(stage, False) for stage in range(4)] + [(s, True) for s in (1, 2, 3)]
)
def test_a_gradient_that_is_not_finite_moves_nothing(
    tmp_path: Path, stage: int, offload: bool, dtype: str, flags: list[str]
) -> None:
    """Neither weights nor the optimizer's moments nor the schedule; the next step is as ever."""
    settings = settings_with(
        f"actor.zero_stage={stage}",
        f"critic.zero_stage={stage}",
        f"dtype={dtype}",
        "mbs=2",
        "optimizer.gradient_clipping=1",
        f"optimizer.offload={offload}",
        # Without ZeRO, and beside offloaded states below ZeRO 3, there is no choice.
        *(flags if stage == 3 or (stage and not offload) else []),
    )
    cpu = tiny.cpu(settings)

    def trained() -> list[Any]:
        return [
            engine.trained(model.to(dtype=models_dtype), own, settings, cpu, updates=10)
            for model, own in zip(load(tmp_path), (settings.actor, settings.critic), strict=True)
        ]

    models_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    good = made(settings)
    spoiled = dataclasses.replace(
        good,
        advantages=good.advantages.index_fill(0, torch.tensor([3]), math.inf),
        returns=good.returns.index_fill(0, torch.tensor([0]), math.nan),
    )

    models = trained()
    before = [engine.whole_weights(model) for model in models]
    _, whole = update(spoiled, tiny.models(*models), None, settings)
    assert not whole
    for model, weights in zip(models, before, strict=True):
        for name, value in engine.whole_weights(model).items():
            assert value.equal(weights[name]), name
    _, whole = update(good, tiny.models(*models), None, settings)
    assert whole

    fresh = trained()
    update(good, tiny.models(*fresh), None, settings)
    for model, other in zip(models, fresh, strict=True):
        expected = engine.whole_weights(other)
        for name, value in engine.whole_weights(model).items():
            torch.testing.assert_close(value, expected[name], msg=name)


def spoiled_on_the_second(folder: Path, stages: list[int]) -> list[tuple[bool, bool, bool]]:
    """For each ZeRO stage whether a step was taken that one rank spoils, whether it has moved a
    weight, and whether the next one is taken."""
    found = []
    for stage in stages:
        settings = tiny.settings(
            *("mbs=1", "gbs=2", "devices_per_node=2", "optimizer.gradient_clipping=1"),
            *(f"actor.zero_stage={stage}", f"critic.zero_stage={stage}"),
        )
        policy = loading.load_policy(str(folder), "fp32", 0.0)
        actor = engine.trained(policy, settings.actor, settings, tiny.cpu(settings), 10)
        before = engine.whole_weights(actor)
        ids, mask = tiny.padded([[1, 5, 6, 7]])
        share = math.inf if dist.get_rank() else 1.0
        taken = engine.descend(actor, actor(ids, mask, 2, 1.0).sum() * share)
        after = engine.whole_weights(actor)
        moved = any(not value.equal(before[name]) for name, value in after.items())
        found.append((taken, moved, engine.descend(actor, actor(ids, mask, 2, 1.0).sum())))
    return found


def test_nor_does_one_of_another_rank(tmp_path: Path) -> None:
    """In fp32, where a lone rank goes without ZeRO 1 and 2."""
    tiny.save_policy(tmp_path, "llama")

    found = ranks.together(2, spoiled_on_the_second, tmp_path, [0, 1, 2, 3])

    assert found == [[(False, False, True)] * 4] * 2


@pytest.mark.knob("guard.max_skipped")
def test_the_run_stops_after_so_many_in_a_row_and_leaves_the_batch(tmp_path: Path) -> None:
    judge = guard(tmp_path, "guard.max_skipped=2")
    spoiled = with_a(math.nan, "scores", (1,))

    judge.judge(1, False, spoiled)
    judge.judge(2, True, spoiled)
    judge.judge(3, False, spoiled)
    assert judge.skipped == 2
    assert not list(tmp_path.iterdir())
    with pytest.raises(TrainerError, match=r"2 steps in a row .*HL_GUARD_MAX_SKIPPED"):
        judge.judge(4, False, spoiled)

    (file,) = (tmp_path / "skipped").iterdir()
    assert file.name == "step-4.rank-0.safetensors"
    saved = load_file(file)
    assert saved.keys() == spoiled.tensors().keys()
    assert saved["sequences"].equal(spoiled.sequences)
    assert saved["scores"].isnan().tolist() == [False, True, False, False]


def test_a_batch_that_cannot_be_written_does_not_hide_why_the_run_stops(tmp_path: Path) -> None:
    (tmp_path / "skipped").touch()
    judge = guard(tmp_path, "guard.max_skipped=1")
    with pytest.raises(TrainerError, match=r"1 steps in a row .* could not be written to"):
        judge.judge(1, False, with_a(math.nan, "scores", (1,)))


@pytest.mark.knob("guard.ratio", "guard.kl", "guard.entropy")
@pytest.mark.parametrize(
    ("flag", "off", "name", "fine", "passed", "words"),
    [
        ("guard.ratio=0.3", "guard.ratio=0", "ratio", 1.2, 1.4, "ratio is 1.4, .* 1 than 0.3"),
        ("guard.ratio=0.3", "guard.ratio=0", "ratio", 0.8, 0.6, "ratio is 0.6, .* 1 than 0.3"),
        ("guard.kl=7", "guard.kl=0", "kl", 6.9, 7.1, "is 7.1 nats per answer, over 7"),
        ("guard.entropy=0.4", "guard.entropy=0", "entropy", 0.5, 0.3, "0.3 nats .*, under 0.4"),
    ],
)
def test_limits_warn_once_until_a_metric_has_been_back(
    tmp_path: Path, flag: str, off: str, name: str, fine: float, passed: float, words: str
) -> None:
    def warned(judge: Guard, value: float) -> list[str]:
        return list(judge.warnings({"ratio": 1.0, "kl": 1.0, "entropy": 1.0} | {name: value}))

    judge = guard(tmp_path, flag)
    assert warned(judge, fine) == []
    (said,) = warned(judge, passed)
    assert re.search(words, said)
    assert warned(judge, passed) == []
    assert warned(judge, fine) == []
    assert len(warned(judge, passed)) == 1
    assert warned(guard(tmp_path, off), passed) == []


def test_a_skipped_step_has_no_ratio_and_warns_of_nothing(tmp_path: Path) -> None:
    assert list(guard(tmp_path).warnings({"kl": math.nan, "entropy": math.nan})) == []
