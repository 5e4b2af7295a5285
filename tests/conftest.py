"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from cluster import Cluster, missing


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


def _enter(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    for name in ("PATH", "SLURM_CONF", "HL_MASTER_ADDR"):
        monkeypatch.setenv(name, cluster.environ[name])
    return cluster
