"""`hlrlhf logs`"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster, job_id

from hlrlhf import runs
from hlrlhf.runs import Job, Run

COMMAND = [sys.executable, "-c", "from hlrlhf.cli import main; main()", "logs"]


def logs(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = runs.create(tmp_path, "run")
    run.record(Job("slurm", "42", None, 0))
    return run


def test_all_attempts_in_order(run: Run) -> None:
    (run.logs / "42.10.log").write_text("third\n")
    (run.logs / "42.0.log").write_bytes(b"first \xff\xfe\n")
    (run.logs / "42.2.log").write_text("second\n")
    (run.logs / "42.batch.log").write_text("shell\n")
    (run.logs / "7.0.log").write_text("job before\n")
    for number in (0, 2, 10):
        (run.logs / f"42.{number}.began").write_text("1000\n")
    done = subprocess.run([*COMMAND, "42"], capture_output=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout == b"job before\nfirst \xff\xfe\nsecond\nthird\nshell\n"
    assert b"42.2.log" in done.stderr


def test_logs_of_several_runs(run: Run, tmp_path: Path) -> None:
    other = runs.create(tmp_path, "other")
    other.record(Job("slurm", "43", None, 0))
    (run.logs / "42.0.log").write_text("one\n")
    (other.logs / "43.0.log").write_text("two\n")
    done = logs("other", "42")
    assert done.stdout == "two\none\n"
    assert [line.split("/")[-1] for line in done.stderr.splitlines()] == [
        "43.0.log <==",
        "42.0.log <==",
    ]


def test_logs_of_all_runs_leave_out_those_that_were_not_submitted(run: Run, tmp_path: Path) -> None:
    runs.create(tmp_path, "not-submitted")
    other = runs.create(tmp_path, "other")
    other.record(Job("slurm", "43", None, 0))
    (run.logs / "42.0.log").write_text("one\n")
    (other.logs / "43.0.log").write_text("two\n")
    assert logs("--all").stdout == "one\ntwo\n"
    assert logs().returncode == logs("--all", "run").returncode == 2


def test_a_log_file_of_ones_own(run: Run, tmp_path: Path) -> None:
    own = tmp_path / "my own.log"
    own.write_text("ranks\n")
    (run.logs / "42.batch.log").write_text("shell\n")
    run.settings_file.write_text(
        f"tag: run\nbase_out_path: {tmp_path}\nlog_file: {own}\n"
        "actor.model_path: a\ncritic.model_path: b\ndataset.path: [c]\n"
    )
    assert logs("run").stdout == "ranks\nshell\n"


def test_no_log_is_said(run: Run, tmp_path: Path) -> None:
    done = logs("run")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("run: no log yet: UNKNOWN")
    runs.create(tmp_path, "other")
    done = logs("other")
    assert (done.returncode, done.stdout) == (2, "")
    assert "was not submitted" in done.stderr


@pytest.mark.slurm
def test_an_ended_job_without_a_log(on_slurm: Cluster, submit: Callable[..., Run]) -> None:
    run = submit("true", "--output=/nowhere/at/all/log")
    on_slurm.wait(job_id(run), "FAILED")
    for done in (logs("run"), logs("-f", "run")):
        assert (done.returncode, done.stdout) == (0, "")
        assert "run: ended without a log: FAILED" in done.stderr
        assert "HL_BASE_OUT_PATH" in done.stderr
        assert f"sacct -j {job_id(run)}" in done.stderr


@pytest.mark.slurm
@pytest.mark.slow
def test_following_across_a_requeue(on_slurm: Cluster, submit: Callable[..., Run]) -> None:
    run = submit(
        "attempt=${SLURM_RESTART_COUNT:-0}\n"
        'exec >"logs/$SLURM_JOB_ID.$attempt.log"\n'
        "echo attempt $attempt\n"
        "until [ -e go.$attempt ]; do sleep 0.1; done\n"
        "echo end $attempt\n",
        "--requeue",
    )
    with subprocess.Popen(
        [*COMMAND, "-f", "run"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as follow:
        assert follow.stdout is not None
        assert follow.stderr is not None
        assert follow.stdout.readline() == "attempt 0\n"
        on_slurm.run("scontrol", "requeue", job_id(run))
        on_slurm.start_now(job_id(run))
        # The shell's log of the first attempt, where Slurm says why it ended, comes in between.
        while (line := follow.stdout.readline()) != "attempt 1\n":
            assert "JOB REQUEUE" in line
        assert follow.poll() is None
        (run.directory / "go.1").touch()
        assert "end 1\n" in follow.stdout.read()
        assert "run: COMPLETED" in follow.stderr.read()
    assert follow.returncode == 0


@pytest.mark.slurm
def test_following_a_job_that_has_ended_prints_it_and_ends(
    on_slurm: Cluster, submit: Callable[..., Run]
) -> None:
    run = submit("echo from the shell; exit 3")
    on_slurm.wait(job_id(run), "FAILED")
    done = logs("-f", "run")
    assert (done.returncode, done.stdout) == (0, "from the shell\n")
    assert "run: FAILED" in done.stderr
