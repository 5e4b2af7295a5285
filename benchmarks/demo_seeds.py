"""Does the demo's reward rise, whatever the seed and the processor?

    .venv/bin/python benchmarks/demo_seeds.py FOLDER [PROFILE...]

Submits the demo preset with seeds 1 to 10 under each profile of tests/portable.py, or those named,
and prints a table in Markdown: the mean reward of the first tenth of the steps, of the last, and
the gain, as the least of all seeds and as their mean. Models and runs go to FOLDER; a run that is
there already is not made again. It takes about a minute a run on two cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from portable import PROFILES, lacking

from hlrlhf.runs import Run

SEEDS = range(1, 11)
SUBMIT = [Path(sys.executable).with_name("hlrlhf"), "submit", "--preset", "demo", "--local"]


def rewards(folder: Path, profile: str, seed: int) -> tuple[float, float]:
    """Mean reward of the first and of the last tenth of a run's steps.

    Raises:
        SystemExit: the run failed; with its standard error.
    """
    metrics = Run(folder / "demo" / "runs" / f"seed-{seed}").metrics
    if not metrics.exists():
        folder.mkdir(parents=True, exist_ok=True)
        environ = {key: value for key, value in os.environ.items() if not key.startswith("HL_")}
        # Names of runs are unique in the index there.
        environ["XDG_STATE_HOME"] = str(folder / "state")
        command = [*SUBMIT, "--set", f"seed={seed}", "--set", f"tag=seed-{seed}"]
        done = subprocess.run(
            command, cwd=folder, env=environ | PROFILES[profile], capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{done.args}: exit code {done.returncode}\n{done.stderr}")
    steps = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    told = [step["reward"] for step in steps]
    tenth = len(told) // 10
    return fmean(told[:tenth]), fmean(told[-tenth:])


def main() -> None:
    """Run all and tell."""
    folder, *chosen = sys.argv[1:]
    print("| profile | first tenth | last tenth | gain | least gain |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for profile in chosen or PROFILES:
        if lacking(profile):
            print(f"| {profile} | this processor has no {profile} |", flush=True)
            continue
        pairs = [rewards(Path(folder, profile).absolute(), profile, seed) for seed in SEEDS]
        first, last = (fmean(part) for part in zip(*pairs, strict=True))
        least = min(after - before for before, after in pairs)
        cells = (f"{value:.2f}" for value in (first, last, last - first, least))
        print("|", profile, "|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
