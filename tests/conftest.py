"""Fixtures of all tests."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest
from cluster import Cluster, missing

from hlrlhf import runs
from hlrlhf.jobs import states
from hlrlhf.runs import Job, Run
from hlrlhf.slurm import client

# Where there is no torch, the tests that compute are left out.
NEED_TORCH = [
    "trainer/*",
    "whole/test_breakdowns.py",
    "whole/test_container.py",
    "whole/test_real.py",
]
collect_ignore_glob = [] if find_spec("torch") else NEED_TORCH

# In the background of a shell, or under nohup, these are ignored, and so they would be by every
# process of the tests, some of which are to be stopped by them. Handlers are not inherited.
for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda *_: None)

# What other machines have, see portable.py: threads of this process (ranks.py has those of ranks),
# which torch reads as it is imported, and the seed of the demo's models. More than one thread gains
# nothing on models this small, and loses much where the processors are busy.
os.environ["OMP_NUM_THREADS"] = os.environ.get("HLRLHF_TEST_THREADS", "1")
DEMO_SEED = int(os.environ.get("HLRLHF_TEST_DEMO_SEED", "1"))

# No test has a time limit for an example: machines are slow at times, and first calls always.
hypothesis.settings.register_profile("untimed", hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    words = "tell how narrowly comparisons of numbers hold"
    parser.addoption("--margins", action="store_true", help=words)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--margins"):
        import margins

        config.pluginmanager.register(margins)


@pytest.fixture(autouse=True)
def _apart(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the tests away from the user's own settings, runs and Slurm."""
    for name in list(os.environ):
        if name.startswith(("HL_", "HLRLHF_", "SLURM_", "SBATCH_", "SQUEUE_", "SACCT_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))


def _cluster(**options: object) -> Iterator[Cluster]:
    lacking = missing()
    if lacking:
        words = f"no Slurm cluster here: missing {', '.join(lacking)}"
        if os.environ.get("CI") == "true":
            pytest.fail(words)
        pytest.skip(words)
    with Cluster(**options) as cluster:  # type: ignore[arg-type]
        yield cluster


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A two-node cluster with accounting."""
    yield from _cluster()


@pytest.fixture(scope="session")
def slurm_without_accounting() -> Iterator[Cluster]:
    """A two-node cluster without accounting, whose controller soon forgets an ended job."""
    yield from _cluster(accounting=False, min_job_age=2)


@pytest.fixture
def on_slurm(slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, with this process's environment that of a user there."""
    return _enter(slurm, monkeypatch)


@pytest.fixture
def on_slurm_without_accounting(
    slurm_without_accounting: Cluster, monkeypatch: pytest.MonkeyPatch
) -> Cluster:
    """The same on the cluster without accounting."""
    return _enter(slurm_without_accounting, monkeypatch)


@pytest.fixture
def submit(tmp_path: Path) -> Callable[..., Run]:
    """Makes a run of a few shell lines and submits it to the cluster of this test."""

    def submit(body: str, *directives: str, tag: str = "run") -> Run:
        run = runs.create(tmp_path / "runs", tag)
        options = (f"--chdir={run.directory}", "--output=logs/%j.batch.log", *directives)
        lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options), body]
        run.script.write_text("\n".join(lines) + "\n")
        now = int(time.time())
        job_id, cluster = client.submit(run.script)
        submitted = states.submitted(job_id, cluster) or now
        run.record(Job("slurm", job_id, cluster, submitted))
        return run

    return submit


def _enter(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    for name in ("PATH", "SLURM_CONF", "HL_MASTER_ADDR"):
        monkeypatch.setenv(name, cluster.environ[name])
    return cluster


@pytest.fixture(scope="session")
def demo_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's folder: actor, reward, reward-hf and prompts."""
    from hlrlhf.trainer import demo

    folder = tmp_path_factory.mktemp("demo") / "models"
    demo.make(folder, DEMO_SEED)
    return folder
