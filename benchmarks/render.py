"""How long `hlrlhf render` takes, against the bare import of what it stands on.

    .venv/bin/python benchmarks/render.py [RUNS]

Each is a whole process, interpreter start included. The two take turns, so that a machine that is
busy for a while slows both; the medians are compared. The promise is a ratio of at most 1.5.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BASELINE = [sys.executable, "-c", "import typer, jinja2, yaml, pydantic"]
RENDER = [str(Path(sys.executable).with_name("hlrlhf")), "render", "--preset", "llama2-7b"]
MANDATORY = {
    "HL_TAG": "benchmark",
    "HL_BASE_OUT_PATH": "/runs",
    "HL_ACTOR_MODEL_PATH": "/models/actor",
    "HL_CRITIC_MODEL_PATH": "/models/critic",
    "HL_DATASET_PATH": "/data/prompts",
}


def measure(runs: int) -> tuple[list[float], list[float]]:
    """Seconds of each run, of the baseline and of `hlrlhf render`.

    Args:
        runs: of each of the two, after one that warms the caches and does not count.
    """
    environ = {key: value for key, value in os.environ.items() if not key.startswith("HL_")}
    environ |= MANDATORY
    baseline: list[float] = []
    render: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(runs + 1):
            for command, seconds in ((BASELINE, baseline), (RENDER, render)):
                start = time.perf_counter()
                subprocess.run(
                    command, cwd=folder, env=environ, stdout=subprocess.DEVNULL, check=True
                )
                seconds.append(time.perf_counter() - start)
    return baseline[1:], render[1:]


def main() -> None:
    """Measure, and print medians, spread and ratio."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 21
    baseline, render = measure(runs)
    for name, seconds in (("imports", baseline), ("render", render)):
        print(
            f"{name:8} median {statistics.median(seconds):.3f} s  "
            f"min {min(seconds):.3f} s  max {max(seconds):.3f} s"
        )
    print(f"ratio    {statistics.median(render) / statistics.median(baseline):.2f} ({runs} runs)")


if __name__ == "__main__":
    main()
