"""Fixtures of the tests of whole runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, until
from demo_run import ENDLESS, Start, hlrlhf, steps

from hlrlhf import runs
from hlrlhf.runs import Run

# What no file of a run may hold.
SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "MY_SECRET", "DB_PASSWORD")
SECRET = "hf_nobody-may-read-this"


@pytest.fixture
def start_demo(
    on_slurm: Cluster, demo_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Start]:
    """Start a run of one rank; unless it is not to wait, it has taken some steps by then."""
    monkeypatch.chdir(tmp_path)
    # One thread each, so that all runs add up in one order.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Jobs have the user's environment.
    for name in SECRETS:
        monkeypatch.setenv(name, SECRET)

    def start(tag: str, *flags: str, wait: bool = True) -> Run:
        every = (
            "slurm.requeue=true",
            f"base_out_path={tmp_path / 'runs'}",
            f"actor.model_path={demo_models / 'actor'}",
            f"critic.model_path={demo_models / 'reward'}",
            f"dataset.path={demo_models / 'prompts' / 'train.jsonl'}",
            f"environment.python={sys.executable}",
            *("devices_per_node=1", "gbs=16", "mbs=16", "epochs=99", f"run_steps={ENDLESS}"),
            *("evaluation.interval=0", f"tag={tag}", *flags),
        )
        hlrlhf("submit", "--preset", "demo", *(f"--set={flag}" for flag in every))
        run = runs.find(tag)
        until(lambda: not wait or len(steps(run)) > 2, "the first steps")
        return run

    yield start
    for file in (tmp_path / "runs").rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file
