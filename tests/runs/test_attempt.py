"""Attempts at a run: the first word counts, and the newest attempt has the directory."""

from __future__ import annotations

from pathlib import Path

import pytest
from disks import disk, fill

from hlrlhf.runs import Attempt, Job, Outcome, Run, RunError, SupersededError


def attempt(directory: Path, number: int = 0, job: str | None = "7") -> Attempt:
    (directory / "logs").mkdir(parents=True, exist_ok=True)
    return Attempt(Run(directory), job, number)


def test_the_first_word_counts(tmp_path: Path) -> None:
    own = attempt(tmp_path)
    assert own.heard() is None
    own.say(Outcome(1, "no such model"))
    own.say(Outcome(0))
    assert own.heard() == Outcome(1, "no such model")
    assert attempt(tmp_path, 1).heard() is None


def test_a_full_disk_has_room_for_the_code(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "64k") as room:
        own = attempt(room)
        fill(room)
        own.say(Outcome(75, "warned"))
        own.say(Outcome(1))
        heard = own.heard()
    assert heard is not None
    assert heard.code == 75


def test_an_older_attempt_stops_once_a_newer_one_has_begun(tmp_path: Path) -> None:
    older, newer = attempt(tmp_path, 0), attempt(tmp_path, 1)
    older.check()
    older.begin()
    older.check()
    newer.begin()
    newer.check()
    with pytest.raises(SupersededError, match=r"\(7, attempt 1\), so this one \(7, attempt 0\)"):
        older.check()
    # And one that comes late does not take the run from it.
    with pytest.raises(SupersededError):
        older.begin()
    newer.check()


def test_a_later_job_takes_the_run(tmp_path: Path) -> None:
    attempt(tmp_path, 5).begin()
    attempt(tmp_path, 0, "8").begin()
    attempt(tmp_path, 0, "8").check()


def test_a_directory_is_one_jobs(tmp_path: Path) -> None:
    own = attempt(tmp_path)
    own.check_job()
    own.run.record(Job("slurm", "7", None, 0))
    own.check_job()
    with pytest.raises(RunError, match="is the run of job 7, and this is job 8"):
        attempt(tmp_path, job="8").check_job()


def test_ranks_by_hand_take_no_run_from_a_job(tmp_path: Path) -> None:
    own, by_hand = attempt(tmp_path), attempt(tmp_path, job=None)
    own.run.record(Job("slurm", "7", None, 0))
    by_hand.check_job()
    own.begin()
    with pytest.raises(RunError, match="its job 7 runs, or has left no word of its end"):
        by_hand.check_job()
    own.ended.write_text("1\n")
    by_hand.check_job()
    by_hand.begin()
    by_hand.check()
    by_hand.say(Outcome(0))
    assert not (tmp_path / "logs" / "None.0.rank").exists()
