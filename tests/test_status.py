"""`hlrlhf status`"""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cluster import Cluster, job_id, until

from hlrlhf import runs
from hlrlhf.runs import Job, Run

COMMAND = [sys.executable, "-c", "from hlrlhf.cli import main; main()", "status"]


def status(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.slurm
def test_one_several_and_all_runs(on_slurm: Cluster, submit: Callable[..., Run]) -> None:
    running = submit("sleep 600", tag="running")
    failed = submit("exit 3", tag="failed")
    on_slurm.wait(job_id(running), "RUNNING")
    on_slurm.wait(job_id(failed), "FAILED")
    step = {"step": 3, "total_steps": 8, "attempt": 0, "reward": 0.25, "seconds_left": 65.0}
    running.metrics.write_text(json.dumps(step) + "\n")
    until(lambda: '"exit_code": 3' in status("failed", "--json").stdout, "accounting")

    every = json.loads(status("--json").stdout)
    assert [run["name"] for run in every] == ["running", "failed"]
    first, second = every
    assert first["id"] == job_id(running)
    assert first["directory"] == str(running.directory)
    assert (first["state"], first["ended"], first["kind"]) == ("RUNNING", False, "slurm")
    assert (first["step"], first["total_steps"]) == (3, 8)
    assert (first["reward"], first["seconds_left"]) == (0.25, 65.0)
    assert (second["state"], second["exit_code"], second["step"]) == ("FAILED", 3, None)
    (one,) = json.loads(status(job_id(failed), "--json").stdout)
    assert one["name"] == "failed"

    lines = status("failed", str(running.directory)).stdout.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["RUN", "JOB", "STATE"],
        ["failed", job_id(failed), "FAILED"],
        ["running", job_id(running), "RUNNING"],
    ]
    assert "(exit code 3)" in lines[1]
    assert lines[2].split()[3:5] == ["3/8", "0.250"]
    assert "0:01:05" in lines[2]
    on_slurm.run("scancel", job_id(running))


@pytest.mark.slurm
def test_steps_of_an_attempt_before_do_not_count(
    on_slurm: Cluster, submit: Callable[..., Run]
) -> None:
    run = submit("sleep 600")
    on_slurm.wait(job_id(run), "RUNNING")
    run.metrics.write_text('{"step": 3, "total_steps": 8, "attempt": 0}\n')
    (run.logs / f"{job_id(run)}.1.log").touch()
    (before,) = json.loads(status("run", "--json").stdout)
    run.metrics.write_text('{"step": 1, "total_steps": 8, "attempt": 1}\n')
    (after,) = json.loads(status("run", "--json").stdout)
    assert (before["restarts"], before["step"], after["step"]) == (1, None, 1)
    on_slurm.run("scancel", job_id(run))


@pytest.mark.slurm
def test_watching_ends_when_the_runs_have(on_slurm: Cluster, submit: Callable[..., Run]) -> None:
    run = submit("until [ -e go ]; do sleep 0.1; done")
    on_slurm.wait(job_id(run), "RUNNING")
    watch = subprocess.Popen([*COMMAND, "--watch"], stdout=subprocess.PIPE, text=True)
    assert watch.stdout is not None
    while "RUNNING" not in watch.stdout.readline():
        pass
    (run.directory / "go").touch()
    assert "COMPLETED" in watch.stdout.read()
    assert watch.wait(60) == 0


def test_on_a_terminal_it_is_a_table_that_hostile_text_cannot_steer(tmp_path: Path) -> None:
    run = runs.create(tmp_path / "\x1b[31m[bold]", "run")
    run.record(Job("local", "1", None, 0))
    bad = runs.create(tmp_path / "\x1b[31m[bold]", "bad")
    bad.job_file.write_text("{}")
    parent, child = pty.openpty()
    environ = os.environ | {"COLUMNS": "200", "TERM": "xterm"}
    with subprocess.Popen(COMMAND, stdout=child, stderr=child, env=environ) as process:
        os.close(child)
        shown = b""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if select.select([parent], [], [], 1)[0]:
                try:
                    shown += os.read(parent, 4096)
                except OSError:  # the other side is closed
                    break
    os.close(parent)
    assert process.returncode == 0
    text = shown.decode()
    assert "FAILED" in text
    assert "?[31m[bold]" in text
    assert "\x1b[31m" not in text


def test_runs_on_this_machine_need_no_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.create(tmp_path, "here")
    job = Job("local", "1", None, int(time.time()))
    run.record(job)
    (run.logs / "local.0.exit").write_text("0\n")
    monkeypatch.setenv("PATH", "/nowhere")
    assert status().stdout.splitlines()[1].split()[:3] == ["here", "local", "COMPLETED"]
    run.record(replace(job, kind="slurm"))
    done = status()
    assert done.returncode == 3
    assert "squeue: not found" in done.stderr


def test_words_go_to_standard_error(tmp_path: Path) -> None:
    nothing = status()
    assert (nothing.returncode, nothing.stdout, nothing.stderr) == (0, "", "no runs\n")
    assert json.loads(status("--json").stdout) == []
    wrong = status("nowhere")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "nowhere: no such run" in wrong.stderr
    assert status("--json", "--watch").returncode == 2
