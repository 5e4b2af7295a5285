"""What may happen to a run that saves checkpoints, and what it makes of it."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from ranks import Run
from test_resuming import TESTS, assert_same, ends

from hlrlhf.trainer.saving.retention import every

STEPS = 8
# No model scores, so that a start is short.
QUICK = {
    "run_steps": STEPS,
    "checkpoint__interval": 1,
    "checkpoint__keep": 10,
    "generation__max_new_tokens": 4,
    "generation__top_k": 0,
    "reward__function": "interrupted:score",
    "reward__model_weight": 0,
    "optimizer__lr_scheduler": "constant",
}


def train(directory: Path, count: int = 1, attempt: int = 0, interrupt: str = "") -> Run:
    """An attempt at a run."""
    own = {"HLRLHF_ATTEMPT": str(attempt), "INTERRUPT": interrupt, "PYTHONPATH": TESTS}
    return ranks.train(directory, count, **own)


def complete(directory: Path, count: int = 1, attempt: int = 0, interrupt: str = "") -> Run:
    run = train(directory, count, attempt, interrupt)
    assert run.codes == [0] * count, run.output
    return run


def files(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Everything in a run directory but what the ranks print: when it was written, and what."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".log" and path.parent.name != "logs"
    }


def flip(file: Path) -> None:
    """One bit, in the middle."""
    held = bytearray(file.read_bytes())
    held[len(held) // 2] ^= 1
    file.write_bytes(held)


@pytest.fixture(scope="module")
def through(demo_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing befell."""
    directory = tmp_path_factory.mktemp("through")
    ranks.prepare(directory, demo_models, **QUICK)
    complete(directory)
    return directory


@pytest.fixture(scope="module")
def killed(demo_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, killed in its seventh step."""
    directory = tmp_path_factory.mktemp("killed")
    ranks.prepare(directory, demo_models, **QUICK)
    run = train(directory, interrupt=f"7:0:kill:{directory}/resume/step-6")
    assert run.codes == [-9], run.output
    assert [path.name for path in every(directory / "resume")] == [
        f"step-{n}" for n in range(6, 0, -1)
    ]
    return directory


def damaged(directory: Path) -> list[str]:
    """Damage all checkpoints but the first, each in another way; what is to be said of each."""
    second, third, fourth, fifth, sixth = (directory / "resume" / f"step-{n}" for n in range(2, 7))
    tensors = "rank-0.0.safetensors"
    size = (sixth / tensors).stat().st_size
    os.truncate(sixth / tensors, size - 1)
    flip(fifth / tensors)
    flip(fourth / "numbers.json")
    (third / tensors).unlink()
    (second / "manifest.json").write_text('{"format": 1, "st')
    return [
        f"{sixth / tensors}: has {size - 1} bytes instead of {size}",
        f"{fifth / tensors}: is not what was written",
        f"{fourth / 'numbers.json'}: is not what was written",
        f"{third / tensors}: No such file or directory",
        f"{second / 'manifest.json'}: Unterminated string",
    ]


@pytest.mark.slow
def test_damaged_checkpoints_are_named_and_the_one_before_is_used(
    through: Path, killed: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(killed, directory)
    unfinished = directory / "resume" / ".step-7.0.unfinished"
    unfinished.mkdir()
    words = damaged(directory)

    (output,) = complete(directory, attempt=1).output

    for name in words:
        (said,) = [line for line in output.splitlines() if name in line]
        assert said.startswith("warning: ")
        assert said.endswith("; this checkpoint is damaged and is not used")
    assert f"{unfinished}: was left unfinished, and is removed" in output
    assert f"{directory / 'resume' / 'step-1'}: the run goes on after step 1" in output
    assert_same(ends(directory), ends(through))
    assert {path.name for path in (directory / "resume").iterdir()} == {
        f"step-{n}" for n in range(1, STEPS + 1)
    }


@pytest.mark.slow
def test_where_all_are_damaged_a_run_begins_anew(
    through: Path, killed: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(killed, directory)
    damaged(directory)
    flip(directory / "resume" / "step-1" / "manifest.json")

    (output,) = complete(directory, attempt=1).output

    assert f"{directory / 'resume'}: holds no whole checkpoint; the run begins anew" in output
    assert "the run goes on" not in output
    assert_same(ends(directory), ends(through))


@pytest.mark.slow
def test_a_finished_run_that_is_started_again_changes_nothing(through: Path) -> None:
    before = files(through)

    (output,) = complete(through, attempt=1).output

    final = through / "checkpoints" / "final"
    assert f"all {STEPS} steps are done, and actor and critic are in {final}" in output
    assert files(through) == before


@pytest.mark.slow
@pytest.mark.knob("resume_from")
def test_a_fork_takes_the_next_step_of_the_old_run_with_settings_of_its_own(
    through: Path, demo_models: Path, tmp_path: Path
) -> None:
    before = files(through)
    one, newest = tmp_path / "one", tmp_path / "newest"
    own = QUICK | {"actor__learning_rate": 1e-4, "ema__enabled": True}
    source = through / "resume" / "step-4"
    ranks.prepare(one, demo_models, **own | {"run_steps": 5, "resume_from": source})
    more: dict[str, Any] = {"run_steps": STEPS + 2, "evaluation__interval": 5}
    ranks.prepare(newest, demo_models, **own | more, resume_from=through)

    (step,) = complete(one).metrics
    evaluated = complete(newest)

    old = ranks.read_lines(through / "metrics.jsonl")[4]
    assert step["step"] == 5
    assert step["actor_learning_rate"] == 1e-4 < old["actor_learning_rate"]
    for name in ("reward", "kl", "length", "value", "return", "actor_loss", "critic_loss"):
        assert step[name] == old[name], name
    for name, value in ranks.Run(one, [], []).weights("actor").items():
        # The average, which the old run did not have, began at its weights and not at the model's.
        average = ranks.Run(one, [], []).weights("actor-ema")[name]
        torch.testing.assert_close(average, value, rtol=0, atol=2e-4)
    assert [line["step"] for line in evaluated.metrics] == [STEPS + 1, STEPS + 2]
    # The reference has answered, which the actor is no more.
    lines = ranks.read_lines(newest / "evaluations.jsonl")
    assert any(line["reference_answer"] != line["answer"] for line in lines)
    assert files(through) == before


@pytest.mark.slow
@pytest.mark.parametrize("interrupt", ["2:0:warn", "2:0:sample"])
def test_a_warned_run_always_leaves_a_checkpoint_and_goes_on_from_it(
    interrupt: str, through: Path, demo_models: Path, tmp_path: Path
) -> None:
    """Of the step in hand, or of the one before where that step was sampling."""
    unasked = {"checkpoint__interval": 0, "checkpoint__minutes": 0}
    ranks.prepare(tmp_path, demo_models, **QUICK | unasked)

    warned = train(tmp_path, interrupt=interrupt)

    assert warned.codes == [75], warned.output
    assert [path.name for path in (tmp_path / "resume").iterdir()] == ["step-2"]
    (output,) = complete(tmp_path, attempt=1).output
    assert f"{tmp_path / 'resume' / 'step-2'}: the run goes on after step 2" in output
    shutil.rmtree(tmp_path / "checkpoints" / "step-2")
    assert_same(ends(tmp_path), ends(through))


@pytest.mark.slow
def test_a_rank_that_cannot_write_costs_a_checkpoint_and_not_the_run(
    demo_models: Path, tmp_path: Path
) -> None:
    """Without memory for a copy, so that the limit falls on the saves of two steps."""
    few = {"checkpoint__memory": 0, "run_steps": 5, "checkpoint__keep": 2}
    ranks.prepare(tmp_path, demo_models, **QUICK | few, devices_per_node=2, mbs=4)

    output, _ = complete(tmp_path, count=2, interrupt="2:1:limit").output

    said = [line for line in output.splitlines() if "the checkpoint of step" in line]
    for step, line in zip((2, 3), said, strict=True):
        assert line.startswith(f"warning: {tmp_path / 'resume'}: the checkpoint of step {step} ")
        assert "cannot be written: " in line
        assert "File too large" in line
        assert line.endswith(" (rank 1); training goes on")
    assert {path.name for path in (tmp_path / "resume").iterdir()} == {"step-4", "step-5"}


@pytest.mark.slow
def test_killed_where_the_prompts_run_out(demo_models: Path, tmp_path: Path) -> None:
    """Two steps to a pass, killed at the end of the first and at that of the last."""
    found = []
    for name in ("through", "killed"):
        directory = tmp_path / name
        ranks.prepare(directory, demo_models)
        prompts = directory / "prompts.jsonl"
        prompts.write_text("".join(prompts.read_text().splitlines(keepends=True)[:16]))
        text = prompts.read_text()
        own = {"run_steps": 0, "epochs": 2, "checkpoint__interval": 2}
        ranks.prepare(directory, demo_models, **QUICK | own)
        prompts.write_text(text)
        if name == "killed":
            interrupt = f"3:0:kill:{directory}/resume/step-2"
            assert train(directory, interrupt=interrupt).codes == [-9]
            complete(directory, attempt=1)
            # As if killed once more, before the models were saved.
            shutil.rmtree(directory / "checkpoints")
            assert "goes on after step 4" in complete(directory, attempt=2).output[0]
        else:
            complete(directory)
        found.append(ends(directory))
    assert_same(found[1], found[0])
    assert [line["step"] for line in found[0]["metrics.jsonl"]] == [1, 2, 3, 4]


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_in_the_same_order(
    demo_models: Path, tmp_path: Path
) -> None:
    """One rank, two under ZeRO-3, one: within the order of additions."""
    greedy: dict[str, Any] = {
        **{"generation__top_k": 1, "optimizer__epsilon": 1e-2, "checkpoint__interval": 2},
        **{"optimizer__lr_scheduler": "constant", "save_interval": 4, "checkpoint__keep": 3},
        **{"mbs": 4, "ema__enabled": True},
    }
    one, two, again = (tmp_path / name for name in ("one", "two", "again"))
    ranks.prepare(one, demo_models, **greedy, run_steps=6)
    expected = complete(one)
    source = one / "resume" / "step-2"
    both = greedy | {"devices_per_node": 2, "actor__zero_stage": 3, "resume_from": source}
    ranks.prepare(two, demo_models, **both, run_steps=4)
    more = complete(two, 2)
    ranks.prepare(again, demo_models, **greedy, run_steps=6, resume_from=two)
    less = complete(again)

    for role in ("actor", "critic", "actor-ema"):
        for name, value in expected.weights(role, "step-4").items():
            torch.testing.assert_close(more.weights(role)[name], value, rtol=0, atol=1e-5)
        for name, value in expected.weights(role).items():
            torch.testing.assert_close(less.weights(role)[name], value, rtol=0, atol=1e-5)
    for run, steps in ((more, [3, 4]), (less, [5, 6])):
        assert [line["step"] for line in run.metrics] == steps
        for line in run.metrics:
            old = expected.metrics[line["step"] - 1]
            assert line["length"] == old["length"]
            assert line["reward"] == pytest.approx(old["reward"], abs=1e-4)


def killed_after_a_step(directory: Path, attempt: int, seconds: float) -> bool:
    """An attempt that does a step at least and ends so many seconds later; whether it was killed.

    Without the step, a run that is killed again and again would never end.
    """
    environ = {"HLRLHF_ATTEMPT": str(attempt), "PYTHONPATH": TESTS}
    resume = directory / "resume"
    before = set(every(resume))
    with ranks.running(directory, **environ) as (process,):
        ranks.wait_for(lambda: set(every(resume)) - before, [process])
        process.join(seconds)
    return process.exitcode != 0


@pytest.mark.slow
def test_killed_at_twenty_random_moments(demo_models: Path, tmp_path: Path) -> None:
    """Many of them in the middle of a save: each step saves, and takes little longer than that."""
    rng = random.Random(20)
    through, killed = tmp_path / "through", tmp_path / "killed"
    for directory in (through, killed):
        many = {"run_steps": 150, "epochs": 9, "checkpoint__keep": 2}
        ranks.prepare(directory, demo_models, **QUICK | many)
    complete(through)

    for attempt in range(20):
        assert killed_after_a_step(killed, attempt, rng.uniform(0, 0.1))

    complete(killed, attempt=20)
    assert_same(ends(killed), ends(through))
    log = (killed / "rank-0.log").read_text()
    assert "was left unfinished, and is removed" in log
    assert "is damaged" not in log
