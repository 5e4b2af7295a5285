"""`hlrlhf status`"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cluster import Cluster, count_calls, job_id, until
from terminal import on_terminal

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
    assert [run["name"] for run in every] == ["failed", "running"], "the newest first"
    second, first = every
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
    assert (lines[2].split()[3], lines[2].split()[6]) == ("3/8", "0.250")
    assert "0:01:05" in lines[2]
    on_slurm.run("scancel", job_id(running))


@pytest.mark.slurm
def test_the_age_of_a_step_is_that_of_this_attempts_last_one(
    on_slurm: Cluster, submit: Callable[..., Run]
) -> None:
    run = submit("sleep 600")
    on_slurm.wait(job_id(run), "RUNNING")
    run.metrics.write_text('{"step": 3, "total_steps": 8, "seconds_left": 9}\n')
    os.utime(run.metrics, (1000, 1000))
    run.attempts.write_text('{"job": "1", "attempt": 0, "why": "its node was lost"}\n')
    (before,) = json.loads(status("run", "--json").stdout)
    run.metrics.touch()
    (after,) = json.loads(status("run", "--json").stdout)
    assert (before["step"], before["step_age"], before["seconds_left"]) == (3, None, None)
    assert before["attempt_before"] == "its node was lost"
    assert (after["step"], after["seconds_left"]) == (3, 9)
    assert after["step_age"] is not None, "a run that hangs shows by it"
    on_slurm.run("scancel", job_id(run))
    on_slurm.wait(job_id(run), "CANCELLED")
    (ended,) = json.loads(status("run", "--json").stdout)
    assert ended["step_age"] is None


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


def test_hostile_text_cannot_steer_the_terminal(tmp_path: Path) -> None:
    run = runs.create(tmp_path / "\x1b[31m[bold]", "run")
    run.record(Job("local", "1", None, 0))
    (run.logs / "local.0.exit").write_text("1\n\x1b[31m\n")
    bad = runs.create(tmp_path / "\x1b[31m[bold]", "bad")
    bad.job_file.write_text("{}")
    text = "\n".join(on_terminal("status", columns=200))
    assert "FAILED" in text
    assert "?[31m[bold]" in text
    assert "\x1b[31m" not in text


LONG = "a-name-" * 9 + "x"


def test_a_terminal_of_80_columns_holds_the_newest_runs_with_whole_names(tmp_path: Path) -> None:
    for number, tag in enumerate(["first", LONG, "llama2-7b-helpful"]):
        run = runs.create(tmp_path, tag)
        run.record(Job("local", str(number), None, 0))
        (run.logs / "local.0.exit").write_text(f"1\n{'no such model, ' * 12}\n")
        step = {"step": 1234, "total_steps": 4000, "attempt": 0, "reward": 0.25}
        run.metrics.write_text(json.dumps(step) + "\n")

    lines = on_terminal("status")
    assert max(map(len, lines)) <= 80
    heads = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert heads == ["RUN", "llama2-7b-helpful", LONG, "first"]
    assert "RESTARTS" not in lines[0], "the longest name leaves no room"
    assert "STATE" in lines[0]
    below = " ".join(line.strip() for line in lines[2:6])
    assert "no such model, no such model" in below
    assert "(exit code 1)" in below

    short = on_terminal("status", "first", "llama2-7b-helpful")
    assert max(map(len, short)) <= 80
    assert {"STATE", "STEP", "REWARD"} < set(short[0].split())
    wide = on_terminal("status", columns=300)
    assert {"STEP", "REWARD", "ELAPSED", "LEFT", "RESTARTS", "NODES"} < set(wide[0].split())


def test_watching_keeps_the_newest_in_sight(tmp_path: Path) -> None:
    for number in range(40):
        run = runs.create(tmp_path, f"run-{number}")
        run.record(Job("local", "1", None, 0))
        (run.logs / "local.0.exit").write_text("0\n")
    text = "\n".join(on_terminal("status", "--watch", "-n", "0", rows=12))
    assert "run-39 " in text
    assert "run-0 " not in text


def test_filters(tmp_path: Path) -> None:
    for number in range(30):
        run = runs.create(tmp_path, f"run-{number}")
        run.record(Job("local", "1", None, 0))
        (run.logs / "local.0.exit").write_text(f"{ {0: 1, 1: 75}.get(number, 0) }\n")
        long_ago = time.time() - 86400 * 3
        if number < 5:
            os.utime(run.link or "", (long_ago, long_ago), follow_symlinks=False)

    def shown(*arguments: str) -> list[str]:
        return [line["name"] for line in json.loads(status("--json", *arguments).stdout)]

    every = [f"run-{number}" for number in reversed(range(30))]
    assert shown() == every[:20]
    assert "10 older runs are left out" in status("--json").stderr
    assert shown("-n", "0") == every
    assert shown("-n", "2") == every[:2]
    assert shown("--since", "2d") == every[:25]
    assert shown("--since", "2000-01-01") == every
    assert shown("--failed") == ["run-1", "run-0"]
    assert shown("--running") == []
    oldest = runs.find("run-0")
    with oldest.job_file.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert shown("--running") == ["run-0"]
        assert shown() == [*every[:20], "run-0"], "what runs is never left out"
    wrong = status("--since", "yesterday")
    assert wrong.returncode == 2
    assert "'yesterday' is neither a time ago" in wrong.stderr


@pytest.mark.slurm
def test_20_000_runs(on_slurm: Cluster, tmp_path: Path, submit: Callable[..., Run]) -> None:
    run = submit("sleep 600", tag="oldest")
    on_slurm.wait(job_id(run), "RUNNING")
    for number in range(20_000):
        directory = tmp_path / f"{number}"
        directory.mkdir()
        link = run.link.with_name(f"run-{number}")  # type: ignore[union-attr]
        link.symlink_to(directory)
        Run(directory, link).record(Job("slurm", f"{10_000_000 + number}", None, 0))

    lines = json.loads(status("--json").stdout)
    assert len(lines) == 21
    assert lines[-1]["name"] == "oldest"
    assert [line["name"] for line in json.loads(status("--json", "--running").stdout)] == ["oldest"]
    done = subprocess.run(
        [*COMMAND[:-1], "forget", "--before", "2999-01-01"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "forgotten: 20000, kept: 1" in done.stderr
    assert [run.name for run in runs.every()] == ["oldest"]
    on_slurm.run("scancel", job_id(run))


@pytest.mark.slurm
def test_more_runs_are_no_more_questions_to_slurm(
    on_slurm: Cluster, tmp_path: Path, submit: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    oldest = submit("sleep 600", tag="oldest")
    on_slurm.wait(job_id(oldest), "RUNNING")
    path, calls = count_calls(tmp_path / "bin", os.environ["PATH"])
    monkeypatch.setenv("PATH", path)

    def asked(*arguments: str) -> list[str]:
        calls.write_text("")
        assert '"oldest"' in status("--json", *arguments).stdout
        return calls.read_text().split()

    for total in (10, 60):
        for number in range(len(runs.every()), total):
            run = runs.create(tmp_path / "runs", "run")
            run.record(Job("slurm", f"{10_000_000 + number}", None, int(time.time())))
        assert asked() == ["squeue", "sacct"]
        assert asked("-n", "0") == ["squeue", "sacct"]
        assert asked("--running") == ["squeue"], "the queue says all of a first attempt"
    on_slurm.run("scancel", job_id(oldest))


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
