"""How the speed of a PPO step goes with the batch, the answers' length, the vocabulary, the ranks.

    .venv/bin/pip install -c constraints.txt -r benchmarks/requirements.txt
    .venv/bin/python benchmarks/curves.py FOLDER [CURVE...] [--steps N] [--pairs N]

Makes models with random weights in FOLDER, which must be new, and trains them beside TRL, or with
ZeRO 3 beside ZeRO 1 where ranks are what changes, as speed.py does. Draws FOLDER/curves.png, in
answer tokens per second, and writes FOLDER/curves.json. Nothing else may run meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import speed
from speed import OURS, TRL, Side, Workload

mpl.use("agg")
from matplotlib import pyplot as plt

VOCABULARIES = (2048, 32_000, 250_880)
speed.SHAPES |= {f"words-{size}": speed.llama(64, 2, 2, 172, size) for size in VOCABULARIES}
BASE = Workload("llama-64", 4, 1, OURS, TRL)


@dataclass(frozen=True)
class Point:
    """A workload at a place of a curve."""

    place: int
    workload: Workload


def both(workload: Workload, **flags: Any) -> Workload:
    """The same for both sides, with further settings."""
    named = {name.replace("__", "."): value for name, value in flags.items()}
    first, second = (
        replace(side, flags=side.flags | named) for side in (workload.first, workload.second)
    )
    return replace(workload, first=first, second=second)


def on(ranks: int) -> Workload:
    """ZeRO 3 beside ZeRO 1 on so many ranks."""
    stages = [
        Side(f"ZeRO {stage}", {"actor.zero_stage": stage, "critic.zero_stage": stage})
        for stage in (3, 1)
    ]
    return both(replace(BASE, first=stages[0], second=stages[1]), devices_per_node=ranks)


CURVES = {
    "rows in a step": [Point(n, replace(BASE, accumulation=n // 4)) for n in (4, 8, 16, 32)],
    "tokens of an answer": [
        Point(n, both(BASE, generation__max_new_tokens=n)) for n in (32, 64, 128, 256)
    ],
    "words of the vocabulary": [Point(n, replace(BASE, shape=f"words-{n}")) for n in VOCABULARIES],
    "ranks": [Point(n, on(n)) for n in (1, 2)],
}


def tokens(workload: Workload) -> int:
    """Of the answers of a step, all of which are as long as they may be."""
    flags = workload.first.flags
    length = flags.get("generation.max_new_tokens", speed.ANSWER)
    rows = workload.micro * workload.accumulation * flags.get("devices_per_node", 1)
    return int(rows * length)


def draw(measured: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """A panel for each curve, a line for each side."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    count = len(measured)
    figure, panels = plt.subplots(
        1, count, figsize=(3.4 * count, 2.8), layout="constrained", squeeze=False
    )
    for axes, (name, points) in zip(panels[0], measured.items(), strict=True):
        places = [point["place"] for point in points]
        for number in (0, 1):
            sides = [point["sides"][number] for point in points]
            made = [
                point["tokens"] / side["seconds"] for point, side in zip(points, sides, strict=True)
            ]
            axes.plot(places, made, marker="o", label=sides[0]["side"])
        axes.set(xlabel=name, ylabel="answer tokens / s", xscale="log", ylim=(0, None))
        axes.set_xticks(places, [f"{place:,}" for place in places])
        axes.minorticks_off()
        axes.legend(frameon=False)
    figure.savefig(file, dpi=90)


def main() -> None:
    """Make the models, measure, draw."""
    asked = speed.arguments(__doc__, "curve", CURVES, steps=5, pairs=2)
    curves = {name: CURVES[name] for name in asked.curves or CURVES}
    asked.folder.mkdir(parents=True)
    shapes = [point.workload.shape for points in curves.values() for point in points]
    for shape in dict.fromkeys(shapes):
        speed.make(asked.folder / "models" / shape, shape)
    measured: dict[str, list[dict[str, Any]]] = {}
    for number, (name, points) in enumerate(curves.items()):
        measured[name] = []
        for place, workload in ((point.place, point.workload) for point in points):
            tag = f"curve-{number}-{place}"
            found = speed.measure(tag, workload, asked.folder, asked.steps, asked.pairs)
            measured[name].append({"place": place, "tokens": tokens(workload)} | found)
            speed.write(asked.folder / "curves.json", {"measured": measured})
    draw(measured, asked.folder / "curves.png")
    print(speed.where())


if __name__ == "__main__":
    main()
