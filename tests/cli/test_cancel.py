"""`hlrlhf cancel`"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster, job_id, until

from hlrlhf import runs
from hlrlhf.jobs.states import look
from hlrlhf.runs import Job, Run

COMMAND = [sys.executable, "-c", "from hlrlhf.cli import main; main()", "cancel"]

LAUNCHER = """
import fcntl, sys, time
with open(sys.argv[1]) as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("up", flush=True)
    time.sleep(60)
"""


def cancel(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.slurm
def test_one_several_and_all(on_slurm: Cluster, submit: Callable[..., Run]) -> None:
    one, two, three = (submit("sleep 600", tag=tag) for tag in ("one", "two", "three"))
    ended = submit("true", tag="ended")
    for run in (one, two, three):
        on_slurm.wait(job_id(run), "RUNNING")
    on_slurm.wait(job_id(ended), "COMPLETED")

    done = cancel("one", job_id(ended))
    assert (done.returncode, done.stdout) == (0, "")
    assert f"one: asked Slurm to cancel job {job_id(one)}" in done.stderr
    assert "ended: has ended already: COMPLETED" in done.stderr
    on_slurm.wait(job_id(one), "CANCELLED")
    assert on_slurm.job(job_id(two))["JobState"] == "RUNNING"

    done = cancel("--all")
    assert done.returncode == 0
    assert "one" not in done.stderr
    on_slurm.wait(job_id(two), "CANCELLED")
    on_slurm.wait(job_id(three), "CANCELLED")


@pytest.mark.slurm
def test_a_job_that_slurm_does_not_know_is_not_said_to_be_cancelled(
    on_slurm: Cluster, tmp_path: Path
) -> None:
    run = runs.create(tmp_path, "lost")
    run.record(Job("slurm", "999999", None, 0))
    done = cancel("lost")
    assert done.returncode == 1
    assert "neither queue nor accounting know it" in done.stderr
    assert "asked Slurm" not in done.stderr
    assert cancel("--all").returncode == 0


@pytest.mark.slurm
def test_an_unknown_name_does_not_keep_the_others(
    on_slurm: Cluster, submit: Callable[..., Run]
) -> None:
    run = submit("sleep 600")
    on_slurm.wait(job_id(run), "RUNNING")
    done = cancel("nowhere", "run")
    assert done.returncode == 1
    assert "nowhere: no such run" in done.stderr
    on_slurm.wait(job_id(run), "CANCELLED")


@pytest.mark.slurm
def test_a_run_whose_directory_was_deleted(on_slurm: Cluster, submit: Callable[..., Run]) -> None:
    run = submit("echo up; sleep 600")
    log = run.batch_log(job_id(run))
    # Before that Slurm would not find what it needs there.
    until(lambda: log.exists() and "up" in log.read_text(), "the script's first word")
    shutil.rmtree(run.directory)
    (seen,) = look([runs.find("run")])
    assert (seen.state, seen.reason.split(":")[0]) == ("RUNNING", "its directory is not there")
    for name in (job_id(run), str(run.directory)):
        assert runs.find(name).name == "run"
    # Its name stays taken, or a new run would hide it.
    assert runs.create(run.directory.parent, "run").name == "run-2"
    assert cancel("run").returncode == 0
    on_slurm.wait(job_id(run), "CANCELLED")


@pytest.mark.slurm
def test_another_job_with_the_same_id_is_left_alone(
    on_slurm: Cluster, submit: Callable[..., Run]
) -> None:
    run = submit("sleep 600")
    job = run.job()
    assert job is not None
    run.record(Job("slurm", job.id, None, job.submitted + 7200))
    on_slurm.wait(job.id, "RUNNING")
    assert cancel("run").returncode == 1
    assert cancel("--all").returncode == 0
    assert on_slurm.job(job.id)["JobState"] == "RUNNING"
    on_slurm.run("scancel", job.id)


@pytest.mark.slurm
def test_what_cannot_save_is_left_alone_and_what_has_nothing_to_save_is_cancelled(
    on_slurm: Cluster, submit: Callable[..., Run]
) -> None:
    still, early = submit("sleep 600", tag="still"), submit("sleep 600", tag="early")
    for run in (still, early):
        on_slurm.wait(job_id(run), "RUNNING")
    runs.Attempt(still, job_id(still), 0).begin()
    on_slurm.run("scontrol", "suspend", job_id(still))
    done = cancel("--save", "still", "early")
    assert done.returncode == 1
    assert f"still: cannot save: job {job_id(still)} is SUSPENDED" in done.stderr
    assert f"early: asked Slurm to cancel job {job_id(early)}" in done.stderr
    on_slurm.wait(job_id(early), "CANCELLED")
    assert on_slurm.job(job_id(still))["JobState"] == "SUSPENDED"
    on_slurm.run("scontrol", "resume", job_id(still))
    on_slurm.run("scancel", job_id(still))


def test_a_run_on_this_machine_is_asked_to_stop(tmp_path: Path) -> None:
    run = runs.create(tmp_path, "here")
    run.job_file.touch()
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(run.job_file)], stdout=subprocess.PIPE
    ) as launcher:
        run.job_file.write_text(
            f'{{"kind": "local", "id": "{launcher.pid}", "cluster": null, "submitted": 0}}'
        )
        assert launcher.stdout
        launcher.stdout.readline()
        assert "here: asked to stop" in cancel("here").stderr
        assert launcher.wait(10) == -signal.SIGTERM
    done = cancel("here")
    assert done.returncode == 0
    assert "here: has ended already: FAILED" in done.stderr


def test_wrong_usage(tmp_path: Path) -> None:
    runs.create(tmp_path, "run")
    assert cancel().returncode == 2
    assert cancel("run", "--all").returncode == 2
    assert cancel("nowhere").returncode == 2
