"""The real trainer on a real cluster that breaks."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster, job_id, until
from demo_run import rank_of
from ranks import read_lines

from hlrlhf import runs
from hlrlhf.jobs.states import look
from hlrlhf.runs import Run

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

QUIET = ("--output=/dev/null", "--wrap=true")
Start = Callable[..., Run]


@pytest.fixture
def start(
    on_slurm: Cluster, demo_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Start:
    """Submit a run on the demo's models; it has taken a step when this returns."""
    monkeypatch.chdir(tmp_path)

    def start(*flags: str) -> Run:
        every = (
            f"base_out_path={tmp_path / 'runs'}",
            f"actor.model_path={demo_models / 'actor'}",
            f"critic.model_path={demo_models / 'reward'}",
            f"dataset.path={demo_models / 'prompts' / 'train.jsonl'}",
            f"environment.python={sys.executable}",
            "tag=run",
            "epochs=99",
            *flags,
        )
        submit = ["submit", "--preset", "demo", *(f"--set={flag}" for flag in every)]
        hlrlhf(*submit)
        run = runs.find("run")
        until(lambda: steps(run), "the first step")
        return run

    return start


def hlrlhf(*arguments: str) -> str:
    command = [sys.executable, "-m", "hlrlhf", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def steps(run: Run) -> list[tuple[int, int]]:
    """Attempt and step of each whole line of metrics."""
    if not run.metrics.exists():
        return []
    text = run.metrics.read_text()
    lines = run.metrics.with_name("whole")
    lines.write_text(text[: text.rfind("\n") + 1])
    return [(line["attempt"], line["step"]) for line in read_lines(lines)]


def process(run: Run, attempt: int = 0) -> int | None:
    """The process id of the first rank of an attempt, while it lives."""
    wanted = {"RANK=0", f"HLRLHF_ATTEMPT={attempt}", f"HLRLHF_JOB={job_id(run)}"}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes().split(b"\0")
            ours = [b"-m", b"hlrlhf.trainer", str(run.directory).encode()]
            if command[1:4] == ours and wanted <= set((folder / "environ").read_text().split("\0")):
                return int(folder.name)
    return None


def test_a_killed_rank_is_named(on_slurm: Cluster, start: Start) -> None:
    run = start("num_nodes=2", "devices_per_node=1", "mbs=16")
    os.kill(rank_of(run, 1), signal.SIGKILL)
    on_slurm.wait(job_id(run), "FAILED")
    until(lambda: look([run])[0].finished, "accounting")
    (state,) = look([run])
    assert (state.state, state.exit_code) == ("FAILED", 137)
    assert "rank 1 on" in state.reason
    assert "SIGKILL" in state.reason
    # The cause first, and what srun says of it behind it.
    log = hlrlhf("logs", "run")
    assert log.index("error: rank 1 on") < log.index("srun: error")


def test_an_attempt_on_a_node_that_was_taken_for_dead_leaves_the_run_to_the_next(
    on_slurm: Cluster, start: Start
) -> None:
    run = start("devices_per_node=1", "mbs=32", "slurm.requeue=true", "checkpoint.interval=1")
    job = job_id(run)
    with on_slurm.without(look([run])[0].node_list):
        on_slurm.start_now(job)
        assert process(run) is not None, "it lives on"
        until(lambda: process(run) is None, "the end of the older attempt")
        until(lambda: [n for n, _ in steps(run)].count(1) > 1, "two steps of the newer one")
        attempts = [attempt for attempt, _ in steps(run)]
        assert attempts == sorted(attempts), "the older one wrote nothing beside the newer"
        on_slurm.run("scancel", job)
        on_slurm.wait(job, "CANCELLED")
    said = runs.Attempt(run, job, 0).heard()
    assert said is not None
    assert "a newer attempt at this run has begun" in said.why
    until(lambda: process(run, attempt=1) is None, "the end of the newer attempt")
    saved = runs.saved(run)
    assert saved is not None
    assert (run.resume / f"step-{saved.step}").is_dir()
    # Of its last step, or of one at most two before where Slurm left it no time.
    assert 0 <= steps(run)[-1][1] - saved.step <= 2


def test_a_preempted_run_saves_within_its_grace(on_slurm: Cluster, start: Start) -> None:
    flags = ("slurm.partition=low", "slurm.exclusive=true", "devices_per_node=1", "mbs=32")
    run = start(*flags)
    on_slurm.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", *QUIET)
    on_slurm.wait(job_id(run), "FAILED")
    until(lambda: look([run])[0].finished, "accounting")
    (state,) = look([run])
    assert (state.state, state.exit_code) == ("STOPPED_EARLY", 75)
    assert "SIGTERM" in state.reason
    last = steps(run)[-1][1]
    assert (run.directory / "checkpoints" / f"step-{last}" / "actor").is_dir()
