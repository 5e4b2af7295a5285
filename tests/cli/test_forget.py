"""`hlrlhf forget`"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hlrlhf import runs
from hlrlhf.runs import Job, Run

COMMAND = [sys.executable, "-c", "from hlrlhf.cli import main; main()", "forget"]


def forget(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60)


def make(folder: Path, name: str, days: int = 0) -> Run:
    run = runs.create(folder, name)
    run.record(Job("local", "1", None, 0))
    made = time.time() - 86400 * days
    os.utime(run.link or "", (made, made), follow_symlinks=False)
    return run


def test_a_run_is_forgotten_and_its_directory_stays(tmp_path: Path) -> None:
    run, other = make(tmp_path, "run"), make(tmp_path, "other")
    assert forget("run").returncode == 0
    assert [left.name for left in runs.every()] == ["other"]
    assert run.job_file.exists()
    # One that was deleted leaves nothing behind.
    shutil.rmtree(other.directory)
    assert [left.name for left in runs.every()] == ["other"]
    assert forget("other").returncode == 0
    assert runs.every() == []
    assert runs.create(tmp_path, "other").name == "other"


def test_what_runs_is_kept(tmp_path: Path) -> None:
    run = make(tmp_path, "run", days=9)
    make(tmp_path, "old", days=9)
    make(tmp_path, "new")
    with run.job_file.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = forget("run")
        assert done.returncode == 1
        assert "run: kept: waits or runs; cancel it first" in done.stderr
        done = forget("--before", "7d")
        assert done.returncode == 0
        assert "forgotten: 1, kept: 1" in done.stderr
    assert [left.name for left in runs.every()] == ["run", "new"]


def test_nothing_is_forgotten_where_the_queue_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "here")
    make(tmp_path, "job").record(Job("slurm", "1", None, 0))
    monkeypatch.setenv("PATH", "/nowhere")
    done = forget("--before", "2999-01-01")
    assert done.returncode == 3
    assert "squeue: not found" in done.stderr
    assert len(runs.every()) == 2


def test_wrong_usage(tmp_path: Path) -> None:
    make(tmp_path, "run")
    assert forget().returncode == 2
    assert forget("run", "--before", "7d").returncode == 2
    assert forget("--before", "soon").returncode == 2
    assert forget("nowhere").returncode == 2
    assert [left.name for left in runs.every()] == ["run"]
