"""A run on the demo's models as a job of the cluster's: started, watched and compared."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster import Cluster, job_id
from ranks import read_lines
from safetensors.torch import load_file
from same_numbers import records

from hlrlhf.runs import Run

# More steps than any machine takes before a command has been heard.
ENDLESS = 9999
Start = Callable[..., Run]


def hlrlhf(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hlrlhf", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stderr
    return done


def steps(run: Run) -> list[int]:
    return [line["step"] for line in read_lines(run.metrics)] if run.metrics.exists() else []


def shortened(run: Run) -> int:
    """Let a run that waits to be resumed have a few steps more; its last one."""
    last = steps(run)[-1] + 3
    text, endless = run.settings_file.read_text(), f"run_steps: {ENDLESS}"
    assert text.count(endless) == 1
    run.settings_file.write_text(text.replace(endless, f"run_steps: {last}"))
    return last


def rank_of(run: Run, rank: int = 0) -> int:
    """The process id of a rank of the run's."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            environ = (folder / "environ").read_bytes().decode().split("\0")
        except OSError:
            continue
        ours = words[1:4] == ["-m", "hlrlhf.trainer", str(run.directory)]
        if ours and f"RANK={rank}" in environ:
            return int(folder.name)
    raise AssertionError(f"no rank {rank} runs")


def ends(run: Run) -> list[Any]:
    """What a run has recorded and learnt, whatever it was to have as its last step at first."""
    final = run.checkpoints / "final"
    metrics = [{**line, "total_steps": None} for line in records(run.metrics)]
    weights = [load_file(final / role / "model.safetensors") for role in ("actor", "critic")]
    lists = [{name: value.tolist() for name, value in one.items()} for one in weights]
    return [metrics, records(run.samples), *lists]


def completed(on_slurm: Cluster, run: Run, last: int) -> None:
    assert on_slurm.wait(job_id(run), "COMPLETED", "FAILED") == "COMPLETED"
    assert steps(run) == list(range(1, last + 1))
