"""Runs that are stopped, killed or out of time, and go on: on the real cluster, and here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, job_id, until
from ranks import read_lines
from safetensors.torch import load_file
from same_numbers import records

from hlrlhf import runs
from hlrlhf.jobs.states import look
from hlrlhf.runs import Run

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

STEPS = 40
Start = Callable[..., Run]


def hlrlhf(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hlrlhf", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def start(
    on_slurm: Cluster, demo_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Start:
    """Start a run of one rank; it has taken some steps when this returns, unless it has ended."""
    monkeypatch.chdir(tmp_path)
    # One thread each, so that all runs add up in one order.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def start(tag: str, *flags: str) -> Run:
        every = (
            "slurm.requeue=true",
            f"base_out_path={tmp_path / 'runs'}",
            f"actor.model_path={demo_models / 'actor'}",
            f"critic.model_path={demo_models / 'reward'}",
            f"dataset.path={demo_models / 'prompts' / 'train.jsonl'}",
            f"environment.python={sys.executable}",
            *("devices_per_node=1", "gbs=16", "mbs=16", "epochs=99", f"run_steps={STEPS}"),
            *("evaluation.interval=0", f"tag={tag}", *flags),
        )
        hlrlhf("submit", "--preset", "demo", *(f"--set={flag}" for flag in every))
        run = runs.find(tag)
        until(lambda: len(steps(run)) > 2, "the first steps", 120)
        return run

    return start


def steps(run: Run) -> list[int]:
    return [line["step"] for line in read_lines(run.metrics)] if run.metrics.exists() else []


def rank_of(run: Run) -> int:
    """The process id of the run's rank."""
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if words[1:4] == ["-m", "hlrlhf.trainer", str(run.directory)]:
            return int(folder.name)
    raise AssertionError("no rank runs")


def ends(run: Run) -> list[Any]:
    """What a run has recorded and learnt."""
    final = run.checkpoints / "final"
    weights = [load_file(final / role / "model.safetensors") for role in ("actor", "critic")]
    lists = [{name: value.tolist() for name, value in one.items()} for one in weights]
    return [records(run.metrics), records(run.samples), *lists]


def completed(on_slurm: Cluster, run: Run, last: int = STEPS) -> None:
    assert on_slurm.wait(job_id(run), "COMPLETED", "FAILED") == "COMPLETED"
    assert steps(run) == list(range(1, last + 1))


# More steps than any machine takes before a command has been heard.
ENDLESS = "run_steps=9999"


def shortened(run: Run) -> int:
    """Let a run that waits to be resumed have a few steps more; its last one."""
    last = len(steps(run)) + 3
    text = run.settings_file.read_text()
    assert text.count("run_steps: 9999") == 1
    run.settings_file.write_text(text.replace("run_steps: 9999", f"run_steps: {last}"))
    return last


def test_warned_and_requeued_a_run_ends_as_one_that_never_was(
    on_slurm: Cluster, start: Start
) -> None:
    """Twice: Slurm warns the script, and the rank saves and asks for more time."""
    through = start("through")
    run = start("warned")
    for attempt in range(2):
        on_slurm.run("scancel", "--batch", "--signal=USR1", job_id(run))
        until(lambda n=attempt: runs.Attempt(run, job_id(run), n).ended.exists(), "the stop")
        seen = len(steps(run))
        if attempt == 0:
            on_slurm.start_now(job_id(run))
            until(lambda n=seen: len(steps(run)) > n, "the next step", 120)
    (line,) = [row for row in hlrlhf("status", "warned").stdout.splitlines() if "warned" in row]
    assert f" {seen} " in line
    on_slurm.start_now(job_id(run))
    completed(on_slurm, run)
    on_slurm.wait(job_id(through), "COMPLETED")
    assert ends(run) == ends(through)
    said = [end.why for end in runs.attempts(run, run.job()).values() if end]  # type: ignore[arg-type]
    assert len(said) == 3
    assert all("stopped early by SIGUSR1" in why for why in said[:2])


def test_saved_and_cancelled_a_run_can_be_resumed(on_slurm: Cluster, start: Start) -> None:
    run = start("paused", ENDLESS)
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


def test_a_rank_that_is_killed_is_started_again(on_slurm: Cluster, start: Start) -> None:
    run = start("killed", "slurm.requeue_on_failure=true", "checkpoint.interval=2")
    until(lambda: (run.resume / "step-2").exists(), "a checkpoint")
    os.kill(rank_of(run), signal.SIGKILL)
    until(lambda: runs.Attempt(run, job_id(run), 0).ended.exists(), "the end of the attempt")
    on_slurm.start_now(job_id(run))
    completed(on_slurm, run)
    first = runs.Attempt(run, job_id(run), 0).heard()
    assert first is not None
    assert "SIGKILL" in first.why


def test_out_of_time_a_run_stops_by_itself_and_not_for_ever(
    on_slurm: Cluster, start: Start
) -> None:
    """Slurm ends it after a minute, and sends no signal before."""
    run = start("late", "slurm.time=1", "slurm.max_attempts=2", "run_steps=9999")
    for attempt in range(2):
        own = runs.Attempt(run, job_id(run), attempt)
        if attempt:
            on_slurm.start_now(job_id(run))
        until(own.ended.exists, "the stop", 90)
    on_slurm.wait(job_id(run), "FAILED")
    until(lambda: look([run])[0].finished, "accounting")
    (state,) = look([run])
    assert (state.state, state.exit_code) == ("STOPPED_EARLY", 75)
    assert "stopped before its job is out of time" in state.reason
    assert "not started again: it was attempt 2 of 2 (slurm.max_attempts)" in state.reason


def test_here_a_run_of_the_clusters_goes_on_and_after_ctrl_c_once_more(start: Start) -> None:
    run = start("here", ENDLESS)
    hlrlhf("cancel", "--save", "here")
    done = len(steps(run))
    command = [sys.executable, "-m", "hlrlhf", "resume", "--local", "here"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: len(steps(run)) > done, "the next step", 120)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 75
    again, last = len(steps(run)), shortened(run)
    assert again > done
    said = hlrlhf("resume", "--local", "here").stderr
    assert f"the run goes on after step {again}" in said
    assert steps(run) == list(range(1, last + 1))
    names = [path.name for path in sorted(run.logs.glob("local.*.exit"))]
    assert names == ["local.0.exit", "local.1.exit"]
