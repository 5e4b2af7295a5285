"""The learning curve of one run, as it recorded itself.

    make demo
    .venv/bin/pip install -c constraints.txt 'matplotlib>=3.9'
    .venv/bin/python benchmarks/demo_curve.py demo/runs/demo docs/demo.png

Draws to a picture what metrics.jsonl in a run directory says of each step's reward and KL
divergence, with a moving average.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean

import matplotlib as mpl

mpl.use("agg")
from matplotlib import pyplot as plt

from hlrlhf.runs import Run

AROUND = 2  # steps before and after that a moving average takes in
PANELS = {"reward": "mean reward", "kl": "KL (nats per answer)"}


def read(run: Run, name: str) -> dict[int, float]:
    """A metric by step, of the last attempt that did it; what is no number is left out."""
    lines = map(json.loads, run.metrics.read_text(encoding="utf-8").splitlines())
    return {line["step"]: line[name] for line in lines if line.get(name) is not None}


def draw(run: Run, path: Path) -> None:
    """Each metric, step by step and averaged."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(1, len(PANELS), figsize=(11, 2.8), layout="constrained")
    for axes, (name, label) in zip(panels, PANELS.items(), strict=True):
        values = dict(sorted(read(run, name).items()))
        steps, told = list(values), list(values.values())
        averages = [fmean(told[max(0, i - AROUND) : i + AROUND + 1]) for i in range(len(told))]
        axes.plot(steps, told, color="tab:blue", alpha=0.35, lw=1, label="each step")
        axes.plot(steps, averages, color="tab:blue", label=f"mean of {2 * AROUND + 1} steps")
        axes.set(xlabel="step", ylabel=label)
        axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=90)


def main() -> None:
    """Draw the run that is named."""
    directory, picture = map(Path, sys.argv[1:])
    draw(Run(directory.absolute()), picture)


if __name__ == "__main__":
    main()
