"""`hlrlhf resume`, on a real cluster and on this machine; the ranks are lines of bash."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import disks
import pytest
from cluster import LEAVE, Cluster, job_id
from mandatory import MANDATORY

from hlrlhf import runs
from hlrlhf.runs import Run

Start = Callable[..., Run]
ENDED = '{"job": "%s", "attempt": 0, "at_fault": "n2"}\n'


def hlrlhf(*arguments: str, code: int = 0) -> str:
    command = [sys.executable, "-m", "hlrlhf", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def start(on_slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Submits a run that has failed when this returns."""
    rank = tmp_path / "rank"
    rank.write_text(f"#!/bin/bash\n{LEAVE}\nleave 1 broken\n")
    rank.chmod(0o755)
    own = {
        "HL_TAG": "run",
        "HL_BASE_OUT_PATH": str(tmp_path / "runs"),
        "HL_DEVICE": "cpu",
        "HL_ENVIRONMENT_PYTHON": str(rank),
    }
    for name, value in (MANDATORY | own).items():
        monkeypatch.setenv(name, value)

    def start(*flags: str) -> Run:
        hlrlhf("submit", "--wait", *(f"--set={flag}" for flag in flags), code=1)
        return runs.find("run")

    return start


@pytest.mark.slurm
def test_it_leaves_out_nodes_that_failed_and_waits_for_no_job_again(
    on_slurm: Cluster, start: Start
) -> None:
    first = on_slurm.run("sbatch", "--parsable", "--output=/dev/null", "--wrap=true").strip()
    run = start(f"slurm.dependency=afterany:{first}")
    job = job_id(run)
    run.attempts.write_text(ENDED % job + ENDED % (int(job) + 1))
    hlrlhf("resume", "run", "--wait", code=1)
    script = run.script.read_text()
    assert "#SBATCH --exclude=n2\n" in script
    assert "--dependency" not in script
    assert on_slurm.job(job_id(run))["NodeList"] == "n1"


@pytest.mark.slurm
def test_nodes_that_somebody_asked_for_stay(on_slurm: Cluster, start: Start) -> None:
    run = start("slurm.nodelist=n2")
    run.attempts.write_text(ENDED % job_id(run))
    hlrlhf("resume", "run", "--wait", code=1)
    assert "--exclude" not in run.script.read_text()


@pytest.mark.slurm
def test_where_there_are_too_few_other_nodes_it_takes_all(on_slurm: Cluster, start: Start) -> None:
    run = start("num_nodes=2", "devices_per_node=1")
    run.attempts.write_text(ENDED % job_id(run))
    hlrlhf("resume", "run", "--wait", code=1)
    assert "--exclude" not in run.script.read_text()
    assert on_slurm.job(job_id(run))["NumNodes"] == "2"


@pytest.mark.slurm
def test_a_job_that_only_slurm_knows_is_found_by_its_name(on_slurm: Cluster, start: Start) -> None:
    """A submission to which Slurm gave no answer leaves no record."""
    run = start()
    run.job_file.unlink()
    command = ("sbatch", "--parsable", "--hold", f"--job-name={run.name}", "--wrap=true")
    other = on_slurm.run(*command, "--output=/dev/null").strip()
    assert f"job {other} has its name" in hlrlhf("resume", "run", code=2)
    on_slurm.run("scancel", other)
    hlrlhf("resume", "run", "--wait", code=1)


@pytest.mark.slurm
def test_what_slurm_refuses_leaves_the_job_before_and_names_what_is_not_usual(
    on_slurm: Cluster, start: Start
) -> None:
    run = start()
    job = job_id(run)
    text = run.settings_file.read_text()
    run.settings_file.write_text(text.replace("  partition:", "  partition: nowhere #"))
    said = hlrlhf("resume", "run", code=2)
    assert "slurm.partition = 'nowhere'" in said
    assert "slurm.max_attempts" not in said
    assert job_id(run) == job


def test_of_two_at_a_time_one_is_refused(tmp_path: Path) -> None:
    run = runs.create(tmp_path, "run")
    run.settings_file.touch()
    with run.settings_file.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another command that starts it is under way" in hlrlhf("resume", "run", code=2)


def test_a_run_without_settings_is_refused(tmp_path: Path) -> None:
    run = runs.create(tmp_path, "run")
    said = hlrlhf("resume", "run", code=2)
    assert f"{run.settings_file}: {os.strerror(2)}" in said


def test_a_directory_that_cannot_be_written_stays_as_it_is(tmp_path: Path) -> None:
    with disks.disk(tmp_path / "disk", "1m") as disk:
        run = runs.create(disk, "run")
        run.settings_file.write_text("tag: run\n")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        said = hlrlhf("resume", "run", code=2)
    assert f"{run.settings_file}: {os.strerror(errno.EROFS)}" in said
