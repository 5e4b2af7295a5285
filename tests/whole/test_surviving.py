"""Runs that are stopped, killed or out of time, and go on: on the real cluster, and here."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

import pytest
from cluster import Cluster, job_id, until, whole
from demo_run import Start, completed, ends, hlrlhf, rank_of, shortened, steps

from hlrlhf import runs
from hlrlhf.jobs.states import look

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_warned_and_requeued_a_run_ends_as_one_that_never_was(
    on_slurm: Cluster, start_demo: Start
) -> None:
    """Twice: Slurm warns the script, and the rank saves and asks for more time."""
    steady = "optimizer.lr_scheduler=constant"  # the others know of the last step
    run = start_demo("warned", steady)
    for attempt in range(2):
        on_slurm.run("scancel", "--batch", "--signal=USR1", job_id(run))
        until(whole(runs.Attempt(run, job_id(run), attempt).ended), "the stop")
        seen = len(steps(run))
        if attempt == 0:
            on_slurm.start_now(job_id(run))
            until(lambda n=seen: len(steps(run)) > n, "the next step")
    (line,) = [row for row in hlrlhf("status", "warned").stdout.splitlines() if "warned" in row]
    assert f" {seen} " in line
    last = shortened(run)
    on_slurm.start_now(job_id(run))
    through = start_demo("through", f"run_steps={last}", steady)
    completed(on_slurm, run, last)
    completed(on_slurm, through, last)
    assert ends(run) == ends(through)
    names = [folder.name for folder in run.checkpoints.iterdir()]
    assert names == ["final"], "it went on, so that nobody needs its models of before"
    said = [end.why for end in runs.attempts(run, run.job()).values() if end]  # type: ignore[arg-type]
    assert len(said) == 3
    assert all("stopped early by SIGUSR1" in why for why in said[:2])


def test_saved_and_cancelled_a_run_can_be_resumed(on_slurm: Cluster, start_demo: Start) -> None:
    run = start_demo("paused")
    assert "has not ended" in hlrlhf("resume", "paused", code=2).stderr
    first = job_id(run)
    said = hlrlhf("cancel", "--save", "paused").stderr
    assert "STOPPED_EARLY" in said
    assert on_slurm.job(first)["JobState"] == "FAILED", "not requeued: it was asked to stop"
    done, last = len(steps(run)), shortened(run)
    second = hlrlhf("resume", "paused").stdout.strip()
    assert second != first
    assert job_id(run) == second
    completed(on_slurm, run, last)
    log = (run.logs / f"{second}.0.log").read_text()
    assert f"the run goes on after step {done}" in log
    assert "complete" in hlrlhf("resume", "paused").stderr


def test_a_rank_that_is_killed_is_started_again(on_slurm: Cluster, start_demo: Start) -> None:
    run = start_demo("killed", "slurm.requeue_on_failure=true", "checkpoint.interval=2")
    until(lambda: runs.saved(run), "a checkpoint")
    os.kill(rank_of(run), signal.SIGKILL)
    until(whole(runs.Attempt(run, job_id(run), 0).ended), "the end of the attempt")
    last = shortened(run)
    on_slurm.start_now(job_id(run))
    completed(on_slurm, run, last)
    first = runs.Attempt(run, job_id(run), 0).heard()
    assert first is not None
    assert "SIGKILL" in first.why


def test_out_of_time_a_run_stops_by_itself_and_not_for_ever(
    on_slurm: Cluster, start_demo: Start
) -> None:
    """Slurm ends it after two minutes, and sends no signal before."""
    run = start_demo("late", "slurm.time=2", "slurm.max_attempts=2", wait=False)
    for attempt in range(2):
        own = runs.Attempt(run, job_id(run), attempt)
        if attempt:
            on_slurm.start_now(job_id(run))
        until(whole(own.ended), "the stop")
    on_slurm.wait(job_id(run), "FAILED")
    until(lambda: look([run])[0].finished, "accounting")
    (state,) = look([run])
    assert (state.state, state.exit_code) == ("STOPPED_EARLY", 75)
    assert "stopped before its job is out of time" in state.reason
    assert "not started again: it was attempt 2 of 2 (slurm.max_attempts)" in state.reason


def test_here_a_run_of_the_clusters_goes_on_after_ctrl_c_and_a_killed_launcher_too(
    start_demo: Start,
) -> None:
    run = start_demo("here")
    hlrlhf("cancel", "--save", "here")
    done = len(steps(run))
    command = [sys.executable, "-m", "hlrlhf", "resume", "--local", "here"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: len(steps(run)) > done, "the next step")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 75
    again = len(steps(run))
    assert again > done
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: len(steps(run)) > again, "the next step")
        rank = os.pidfd_open(rank_of(run))
        process.kill()
    until(lambda: select.select([rank], [], [], 0)[0], "the rank's end")
    os.close(rank)
    assert look([run])[0].reason == "the launcher was killed"
    last = shortened(run)
    said = hlrlhf("resume", "--local", "here").stderr
    assert f"the run goes on after step {again}" in said
    assert steps(run) == list(range(1, last + 1))
    names = [path.name for path in sorted(run.logs.glob("local.*.exit"))]
    assert names == ["local.0.exit", "local.2.exit"], "the one that was killed has no word"
