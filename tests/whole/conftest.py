"""Fixtures of the tests of whole runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cluster import Cluster, until
from demo_run import STEPS, Start, hlrlhf, steps

from hlrlhf import runs
from hlrlhf.runs import Run


@pytest.fixture
def start_demo(
    on_slurm: Cluster, demo_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Start:
    """Start a run of one rank; unless it is not to wait, it has taken some steps by then."""
    monkeypatch.chdir(tmp_path)
    # One thread each, so that all runs add up in one order.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def start(tag: str, *flags: str, wait: bool = True) -> Run:
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
        until(lambda: not wait or len(steps(run)) > 2, "the first steps", 120)
        return run

    return start
