"""Metrics: weighted means, and files that a second attempt adds to."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tensorboard.backend.event_processing.event_accumulator import (
    EventAccumulator,
)
from tiny import one_rank  # noqa: F401

from hlrlhf.trainer.metrics import Recorder, means


def values(reward: float) -> dict[str, float]:
    return {
        "reward": reward,
        "kl": 0.25,
        "length": 12.0,
        "actor_loss": -0.5,
        "critic_loss": 0.125,
        "seconds": 1.5,
    }


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def record(
    run: Path,
    rewards: list[float],
    total: int | None = None,
    attempt: int = 0,
    done: int | None = None,
) -> str:
    own = tiny.attempt(run, attempt)
    recorder = Recorder(own, run / "tensorboard", total or len(rewards), done)
    for reward in rewards:
        recorder.step(values(reward))
        recorder.samples([{"prompt": "p", "answer": "ü\n", "score": reward}], aloud=False)
    return recorder.close()


@pytest.mark.usefixtures("one_rank")
def test_means_have_weights_of_their_own() -> None:
    found = means(
        {
            "reward": (torch.tensor(6.0), torch.tensor(4)),
            "length": (torch.tensor(30), torch.tensor(4)),
            "value": (torch.tensor(-3.0), torch.tensor(30)),
            "nothing": (torch.tensor(0.0), torch.tensor(0)),
        }
    )

    assert found == pytest.approx({"reward": 1.5, "length": 7.5, "value": -0.1, "nothing": 0.0})
    assert all(isinstance(value, float) for value in found.values())


def test_a_line_per_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, [0.5, 1.5], total=4)

    first, second = lines(tmp_path / "metrics.jsonl")
    assert (first["step"], first["total_steps"], first["attempt"]) == (1, 4, 0)
    assert {name: second[name] for name in values(1.5)} == values(1.5)
    assert second["step"] == 2
    assert 0 <= second["seconds_left"] < 60
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("step 1/4  reward 0.5  kl 0.25  length 12  actor_loss -0.5  ")
    assert "1.50 s/step" in out[0]
    assert len(out) == 2


def test_a_skipped_step_is_a_record_without_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder(tiny.attempt(tmp_path), tmp_path / "tensorboard", 3)
    recorder.step(values(1.0))
    skipped = values(math.nan)
    del skipped["actor_loss"]
    recorder.step(skipped)
    recorder.warn("look here")
    recorder.step(values(3.0))

    assert recorder.close() == (
        "mean reward 1.000 over the first step, 3.000 over the last step (+2.000)"
    )
    found = lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in found] == [1, 2, 3]
    assert found[1]["reward"] is None
    out = capsys.readouterr().out.splitlines()
    assert out[1].startswith("step 2/3  reward nan  kl 0.25  length 12  critic_loss ")
    assert out[2] == "warning: step 2: look here"


def test_the_time_left_is_that_of_the_steps_to_come(tmp_path: Path) -> None:
    recorder = Recorder(tiny.attempt(tmp_path), tmp_path / "tensorboard", 5)
    recorder._began -= 10.0

    recorder.step(values(1.0))
    recorder.step(values(1.0))
    recorder.close()

    # Ten seconds a step, then five on average.
    left = [line["seconds_left"] for line in lines(tmp_path / "metrics.jsonl")]
    assert left == pytest.approx([40.0, 15.0], abs=2.0)


def test_the_files_of_two_attempts_read_as_one_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No step twice, and none missing: the second one goes on after the first step."""
    record(tmp_path, [1.0, 2.0, 2.5])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')

    said = record(tmp_path, [3.0], total=2, attempt=1, done=1)

    for name in ("metrics.jsonl", "samples.jsonl"):
        found = [(line["attempt"], line["step"]) for line in lines(tmp_path / name)]
        assert found == [(0, 1), (1, 2)]
    assert "step 2/2" in capsys.readouterr().out
    assert said.startswith("mean reward 1.000 over the first step, 3.000 over the last step")
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("reward")] == [(1, 1.0), (2, 3.0)]
    # Whoever reads the file sees letters, not escapes.
    assert "ü" in (tmp_path / "samples.jsonl").read_text(encoding="utf-8")
    assert lines(tmp_path / "samples.jsonl")[1] == {
        "step": 2,
        "attempt": 1,
        "prompt": "p",
        "answer": "ü\n",
        "score": 3.0,
    }


def test_records_can_be_read_at_once(tmp_path: Path) -> None:
    recorder = Recorder(tiny.attempt(tmp_path), tmp_path / "tensorboard", 2)

    recorder.step(values(1.0))
    recorder.samples([{"prompt": "p", "answer": "a", "score": 1.0}], aloud=False)

    assert len(lines(tmp_path / "metrics.jsonl")) == len(lines(tmp_path / "samples.jsonl")) == 1
    recorder.close()


def test_answers_are_printed_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder(tiny.attempt(tmp_path), tmp_path / "tensorboard", 1)
    sample = {"prompt": "why?\n", "answer": "so", "score": 0.25}

    recorder.step(values(0.25))
    capsys.readouterr()
    recorder.samples([sample], aloud=False)
    assert capsys.readouterr().out == ""
    recorder.samples([sample], aloud=True)
    assert capsys.readouterr().out == "prompt: 'why?\\n'\nanswer: 'so'\nscore: 0.25\n"
    recorder.close()


@pytest.mark.parametrize(
    ("rewards", "sentence"),
    [
        ([1.0], "mean reward 1.000 over the first step, 1.000 over the last step (+0.000)"),
        ([1.0, 0.5], "mean reward 1.000 over the first step, 0.500 over the last step (-0.500)"),
        (
            [float(i) for i in range(20)],
            "mean reward 0.500 over the first 2 steps, 18.500 over the last 2 steps (+18.000)",
        ),
    ],
)
def test_the_last_sentence(tmp_path: Path, rewards: list[float], sentence: str) -> None:
    assert record(tmp_path, rewards) == sentence


def test_tensorboard_reads_the_event_files(tmp_path: Path) -> None:
    record(tmp_path, [0.5, 1.5])

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(values(0.0))
    found = [(event.step, event.value) for event in events.Scalars("reward")]
    assert found == [(1, 0.5), (2, 1.5)]


def test_evaluations_have_a_line_per_prompt_and_step_0_has_metrics_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder(tiny.attempt(tmp_path), tmp_path / "tensorboard", 1)
    answers = [{"prompt": "p", "answer": "a", "score": 0.5}, {"prompt": "q"}]
    recorder.evaluation(0, {"evaluation_reward": 0.25, "evaluation_kl": 0.0}, answers)
    assert capsys.readouterr().out == "evaluation before the first step  reward 0.25  kl 0\n"
    later = {"evaluation_reward": 0.75}
    recorder.evaluation(1, later, answers[:1])
    recorder.step(values(1.0) | later)
    recorder.close()

    written = [(line["step"], line["attempt"]) for line in lines(tmp_path / "evaluations.jsonl")]
    assert written == [(0, 0), (0, 0), (1, 0)]
    assert lines(tmp_path / "evaluations.jsonl")[0] == {"step": 0, "attempt": 0} | answers[0]
    before, first = lines(tmp_path / "metrics.jsonl")
    assert before == {
        "step": 0,
        "total_steps": 1,
        "attempt": 0,
        "evaluation_reward": 0.25,
        "evaluation_kl": 0.0,
    }
    assert (first["step"], first["evaluation_reward"]) == (1, 0.75)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = [(event.step, event.value) for event in board.Scalars("evaluation_reward")]
    assert shown == [(0, 0.25), (1, 0.75)]


@pytest.mark.parametrize("done", [0, 2])
def test_an_evaluation_that_comes_late_is_of_its_step(tmp_path: Path, done: int) -> None:
    """Given up by one attempt, made by two more: the first of these left no checkpoint of it."""
    record(tmp_path, [1.0, math.nan][:done], total=4)
    expected = lines(tmp_path / "metrics.jsonl") if done else []
    late = {"evaluation_reward": 0.25}
    for attempt in (1, 2):
        own = tiny.attempt(tmp_path, attempt)
        recorder = Recorder(own, tmp_path / "tensorboard", 4, done)
        recorder.evaluation(done, late, [{"prompt": "p"}, {"prompt": "q"}])
        recorder.close()
    Recorder(tiny.attempt(tmp_path, 3), tmp_path / "tensorboard", 4, done)

    found = lines(tmp_path / "metrics.jsonl")
    expected = expected or [{"step": 0, "total_steps": 4, "attempt": 1}]
    assert found == [*expected[:-1], expected[-1] | late]
    # The job script reads it there.
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[-1].startswith('{"step": ')
    written = [(line["step"], line["attempt"]) for line in lines(tmp_path / "evaluations.jsonl")]
    assert written == [(done, 2), (done, 2)]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = {(event.step, event.value) for event in board.Scalars("evaluation_reward")}
    assert shown == {(done, 0.25)}


def test_without_an_evaluation_there_is_no_file_of_one(tmp_path: Path) -> None:
    record(tmp_path, [0.5])

    assert not (tmp_path / "evaluations.jsonl").exists()
