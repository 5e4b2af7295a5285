"""Run directories, the index, and what runs write down."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cluster import until
from hypothesis import given
from hypothesis import strategies as st

from hlrlhf import runs
from hlrlhf.runs import Job, Run, RunError

SLURM = Job("slurm", "42", "main", 1_700_000_000)


def index() -> Path:
    return Path(os.environ["XDG_STATE_HOME"]) / "hlrlhf" / "runs"


def test_a_run_never_takes_the_place_of_another(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "run-2").mkdir()
    first = runs.create(tmp_path / "a", "run")
    second = runs.create(tmp_path / "a", "run")
    elsewhere = runs.create(tmp_path / "b", "run")
    assert [run.name for run in (first, second, elsewhere)] == ["run", "run-3", "run-2"]
    assert elsewhere.directory == tmp_path / "b" / "run-2"
    assert elsewhere.logs.is_dir()
    assert [run.name for run in runs.every()] == ["run", "run-3", "run-2"]


def _make(base: Path) -> str:
    return runs.create(base, "run").name


def test_runs_made_at_the_same_time_get_names_of_their_own(tmp_path: Path) -> None:
    # Not forks of this process, which the tests before may have made a large one.
    apart = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(4, apart) as pool:
        names = list(pool.map(_make, [tmp_path / "a", tmp_path / "b"] * 6))
    assert sorted(names) == sorted(["run", *(f"run-{n}" for n in range(2, 13))])


def test_a_deleted_run_is_forgotten_and_its_name_free(tmp_path: Path) -> None:
    run = runs.create(tmp_path, "run")
    run.logs.rmdir()
    run.directory.rmdir()
    assert runs.every() == []
    with pytest.raises(RunError, match="no such run"):
        runs.find("run")
    again = runs.create(tmp_path / "other", "run")
    assert again.name == "run"
    assert runs.find("run").directory == tmp_path / "other" / "run"


@pytest.mark.parametrize("blocked", ["base", "index"])
def test_a_run_that_cannot_be_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocked: str
) -> None:
    (tmp_path / "file").touch()
    if blocked == "base":
        base = tmp_path / "file" / "runs"
    else:
        base = tmp_path / "new" / "runs"
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(RunError, match="file"):
        runs.create(base, "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert runs.every() == []


@pytest.mark.parametrize("name", ["x" * 300, "run"])
def test_a_run_that_is_half_made_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # A long name fails before there is a directory, a full disk after.
    monkeypatch.setattr(Path, "symlink_to", full)
    with pytest.raises(RunError, match=r"too long|No space"):
        runs.create(tmp_path / "new" / "runs", name)
    assert list(tmp_path.iterdir()) == []


def test_a_discarded_run_leaves_nothing(tmp_path: Path) -> None:
    kept = runs.create(tmp_path / "a", "run")
    run = runs.create(tmp_path / "new" / "runs", "run")
    run.script.touch()
    run.discard()
    assert not (tmp_path / "new").exists()
    another = runs.create(tmp_path / "a", "run")
    another.discard()
    assert runs.every() == [runs.find("run")]
    assert kept.directory.is_dir()
    assert [path.name for path in index().iterdir()] == ["run"]


def test_a_run_is_found_by_name_directory_and_job_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.create(tmp_path, "run")
    run.record(SLURM)
    runs.create(tmp_path, "other")
    (tmp_path / "link").symlink_to(run.directory)
    monkeypatch.chdir(tmp_path)
    for name in ("run", "42", str(run.directory), "./run", "../" + tmp_path.name + "/link"):
        assert runs.find(name).directory == run.directory, name
    monkeypatch.chdir(run.directory)
    assert runs.find(".").directory == run.directory


def test_a_run_of_another_user_is_found_by_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.create(tmp_path / "out", "theirs")
    run.record(SLURM)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "mine"))
    assert runs.every() == []
    assert runs.find(str(run.directory)).job() == SLURM
    monkeypatch.chdir(tmp_path / "out")
    assert runs.find("theirs").job() == SLURM


def test_what_is_no_run_or_several_is_an_error(tmp_path: Path) -> None:
    runs.create(tmp_path, "42")
    runs.create(tmp_path, "run").record(SLURM)
    with pytest.raises(RunError, match="more than one run"):
        runs.find("42")
    with pytest.raises(RunError, match=r"did you mean run\?"):
        runs.find("rum")
    with pytest.raises(RunError, match="not a run directory"):
        runs.find(str(tmp_path))


def test_a_job_is_recorded_as_it_was(tmp_path: Path) -> None:
    run = runs.create(tmp_path, "run")
    assert run.job() is None
    run.record(SLURM)
    assert json.loads(run.job_file.read_text()) == {
        "kind": "slurm",
        "id": "42",
        "cluster": "main",
        "submitted": 1_700_000_000,
    }
    assert run.job() == SLURM


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"kind": "slurm"}',
        '{"kind": "slurm", "id": "--user=root", "cluster": null, "submitted": 1}',
        '{"kind": "slurm", "id": "1", "cluster": null, "submitted": "now"}',
        '{"kind": "slurm", "id": "1", "cluster": "a b", "submitted": 1}',
        '{"kind": "local", "id": "../1", "cluster": null, "submitted": 1}',
        '{"kind": "lsf", "id": "1", "cluster": null, "submitted": 1}',
    ],
)
def test_a_record_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    run = runs.create(tmp_path, "run")
    run.job_file.write_text(text)
    with pytest.raises(RunError, match="not a job's record"):
        run.job()


LAUNCHER = """
import fcntl, sys, time
with open(sys.argv[1]) as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("up", flush=True)
    time.sleep(60)
"""


def test_a_launcher_is_signalled_only_while_it_holds_the_run(tmp_path: Path) -> None:
    run = runs.create(tmp_path, "run")
    assert not run.is_held()
    # A bystander that has the launcher's process id, as after the launcher's end.
    with subprocess.Popen(["sleep", "60"]) as bystander:
        run.record(Job("local", str(bystander.pid), None, 0))
        assert not run.terminate()
        with run.job_file.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(RunError, match="another machine"):
                run.terminate()
        assert bystander.poll() is None
        bystander.kill()
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(run.job_file)], stdout=subprocess.PIPE
    ) as launcher:
        run.job_file.write_text(
            json.dumps({"kind": "local", "id": launcher.pid, "cluster": None, "submitted": 0})
        )
        assert launcher.stdout
        launcher.stdout.readline()
        assert run.is_held()
        assert run.terminate()
        assert launcher.wait(10) == -signal.SIGTERM
    until(lambda: not run.is_held(), "the lock to fall")
    assert not run.terminate()


def test_the_last_whole_line_of_metrics_counts(tmp_path: Path) -> None:
    run = runs.create(tmp_path, "run")
    assert runs.progress(run) is None
    line = {"step": 3, "total_steps": 10, "attempt": 1, "reward": 0.5, "seconds_left": 70.5}
    with run.metrics.open("w") as file:
        for step in range(2000):
            file.write(json.dumps({"step": step, "padding": "x" * 100}) + "\n")
        file.write(json.dumps(line) + "\n")
        file.write('{"step": 4, "rew')
    found = runs.progress(run)
    assert found == runs.Progress(3, 10, 1, 0.5, 70.5, run.metrics.stat().st_mtime)
    run.metrics.write_text('{"step": 1, "reward": NaN, "total_steps": "ten"}\n[]\nnull\n')
    found = runs.progress(run)
    assert found == runs.Progress(1, None, 0, None, None, run.metrics.stat().st_mtime)


@given(st.lists(st.binary(max_size=40) | st.just(b'{"step": 7}') | st.just(b'{"step": 1e999}')))
def test_no_content_of_metrics_is_an_error(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    run = Run(tmp_path_factory.mktemp("run"))
    run.metrics.write_bytes(b"\n".join(lines))
    progress = runs.progress(run)
    assert progress is None or (math.isfinite(progress.step) and progress.attempt >= 0)


def test_the_ranks_word_counts_where_nobody_could_repeat_it(tmp_path: Path) -> None:
    run = runs.create(tmp_path, "run")
    (run.logs / "42.0.rank").write_text("75\nwarned\n")
    assert runs.attempts(run, SLURM) == {0: runs.Outcome(75, "warned")}


def test_a_directory_that_cannot_be_reached_hides_no_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.create(tmp_path / "closed", "run").record(SLURM)
    runs.create(tmp_path, "other")
    inside = str(tmp_path / "closed")
    real = os.stat

    def stat(path: Any, **more: Any) -> os.stat_result:
        if str(path).startswith(inside):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **more)

    # root, as whom these tests may run, reaches everything.
    monkeypatch.setattr(os, "stat", stat)
    found = runs.every()
    assert [run.name for run in found] == ["run", "other"]
    assert found[0].job() == SLURM


def test_attempts_and_logs_are_in_the_order_of_time(tmp_path: Path) -> None:
    run = runs.create(tmp_path, "run")
    for name in ("42.10.log", "42.2.log", "42.2.exit", "42.batch.log", "421.0.log", "42.x.log"):
        (run.logs / name).write_text("75\n")
    (run.logs / "421.0.began").write_text("1000\nn1\n0\n")
    for number in (2, 10):
        (run.logs / f"42.{number}.began").write_text(f"{2000 + number}\nn1\n0\n")
    assert runs.attempts(run, SLURM) == {2: runs.Outcome(75), 10: None}
    names = [path.name for path in runs.log_files(run, SLURM)]
    assert names == ["421.0.log", "42.2.log", "42.10.log", "42.batch.log"]


def test_a_job_that_was_set_aside_comes_back_or_leaves_no_trace(tmp_path: Path) -> None:
    run, first = Run(tmp_path), Job("slurm", "7", None, 1)
    run.record(first)
    run.set_job_aside()
    assert run.job() is None
    run.take_job_back()
    assert run.job() == first
    run.set_job_aside()
    run.record(Job("slurm", "8", None, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["job.json"]
