"""Records on disks that take none or a part of one: whole lines, few words, no end of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from disks import disk, fill, no_file_longer_than
from tensorboard.backend.event_processing.event_accumulator import (
    EventAccumulator,
)

from hlrlhf.trainer import records
from hlrlhf.trainer.metrics import Recorder
from hlrlhf.trainer.models.forwards import Parameters


def lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_no_part_of_a_line_stays_and_what_is_lost_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    file = records.Lines(path)
    file.write([{"step": 1}])
    with no_file_longer_than(path.stat().st_size + 5):
        file.write([{"step": 2}])
        file.write([{"step": 3}, {"step": 4}])
        assert lines(path) == [{"step": 1}]
    file.write([{"step": 5}])
    file.write([{"step": 6}])
    file.close()

    assert lines(path) == [{"step": 1}, {"step": 5}, {"step": 6}]
    assert capsys.readouterr().out.splitlines() == [
        f"warning: {path}: cannot be written: File too large; training goes on, records are lost "
        "until it can be",
        f"warning: {path}: can be written again; records lost: 3",
    ]


def test_records_that_were_lost_to_the_end_are_counted_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = records.Lines(tmp_path / "lines")
    with no_file_longer_than(3):
        for step in range(4):
            file.write([{"step": step}])
        file.close()

    assert (tmp_path / "lines").read_text() == ""
    _, last = capsys.readouterr().out.splitlines()
    assert last == f"warning: {tmp_path / 'lines'}: records lost at the end: 4"


def test_a_part_that_a_killed_attempt_left_is_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text('{"step": 1}\n{"ste')
    file = records.Lines(path)
    file.write([{"step": 2}])

    assert lines(path) == [{"step": 1}, {"step": 2}]


def test_tensorboard_reads_what_was_written_before_and_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    board = records.Board(tmp_path, tmp_path, 0)
    with no_file_longer_than(3):
        board.scalars({"reward": 0.0, "kl": 0.0}, 1)
    board.scalars({"reward": 0.5}, 2)
    (path,) = tmp_path.iterdir()
    with no_file_longer_than(path.stat().st_size + 9):
        board.scalars({"reward": 1.0}, 3)
    board.scalars({"reward": 1.5}, 4)

    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.file_version == 2.0
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(2, 0.5), (4, 1.5)]
    said = [line.partition(f"{path}: ")[2] for line in capsys.readouterr().out.splitlines()]
    assert said[1::2] == ["can be written again; records lost: 1"] * 2


def test_a_run_directory_that_was_deleted_is_not_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    records.Lines(run / "metrics.jsonl").write([{"step": 1}])
    records.Board(run / "tensorboard", run, 0).scalars({"reward": 0.5}, 1)
    assert not run.exists()
    assert capsys.readouterr().out.count("cannot be written: No such file or directory") == 2


def test_a_full_disk_ends_no_run_and_takes_records_when_there_is_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with disk(tmp_path / "disk", "256k") as run:
        filler = fill(run)
        recorder = Recorder(tiny.attempt(run), run / "tensorboard", 4)
        recorder.models({"actor": Parameters(1, 2)})
        for step in range(1, 5):
            if step == 3:
                filler.unlink()
            recorder.step({"reward": float(step), "seconds": 1.0})
            recorder.samples([{"prompt": "p", "answer": "a" * 9000, "score": 1.0}], aloud=False)
            recorder.evaluation(step, {"evaluation_reward": 1.0}, [{"prompt": "p"}] * 2)
        recorder.close()

        for name in ("metrics", "samples"):
            assert [line["step"] for line in lines(run / f"{name}.jsonl")] == [3, 4]
        assert [line["step"] for line in lines(run / "evaluations.jsonl")] == [3, 3, 4, 4]
        assert {path.name for path in run.iterdir()} == {
            *(f"{name}.jsonl" for name in ("metrics", "samples", "evaluations")),
            "tensorboard",
        }, "no part of parameters.json"
        events = EventAccumulator(str(run / "tensorboard")).Reload()
        assert [event.step for event in events.Scalars("reward")] == [3, 4]
    said = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert sum("No space left on device" in line for line in said) == 5
    assert sum("can be written again; " in line for line in said) == 4
    assert len(said) == 9


def test_a_file_that_is_written_whole_keeps_its_old_text_where_it_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "parameters.json"
    records.put(path, "old")
    with no_file_longer_than(2):
        records.put(path, "new text")

    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]
    assert f"warning: {path}: cannot be written: File too large; " in capsys.readouterr().out
