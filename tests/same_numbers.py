"""Same seed, same numbers: ``python tests/same_numbers.py COMMIT``

Trains the demo, and smaller runs that take other ways through the trainer, at a commit and as the
working tree stands, and compares what they recorded and saved: metrics, samples and evaluations
are equal to the last digit but for times, models to the last bit. So is a change shown to be one of
form alone. It takes about two minutes for each side on two cores; what ran is left in the folder
that it names, and exits with 1 where something differs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TREE = Path(__file__).parents[1]
# What follows from the clock, the machine or the folder.
OF_THE_DAY = re.compile(r"seconds|_per_second|tflops|mfu|peak_memory|^attempt$")
SHORT = ("run_steps=4", "mbs=8", "gbs=32", "evaluation.interval=2", "evaluation.prompts=16")
TEXTS = "demo/models/prompts/train.jsonl"
RUNS = {
    "demo": (),
    "zero-3": (
        *SHORT,
        *("actor.zero_stage=3", "critic.zero_stage=3", "ema.enabled=true", "save_interval=2"),
        *("ppo.epochs=2", "ppo.minibatches=2", "ppo.kl_controller=adaptive"),
        *("reward.normalize=true", "generation.top_p=0.9", "generation.stop=['.']"),
    ),
    "adapters": (*SHORT, "lora.dim=8", "only_optimize_lora=true", "ppo.logprob_chunk=4"),
    "texts": (
        *SHORT,
        *("devices_per_node=1", "lora.dim=8", f"pretraining.path=./{TEXTS}"),
        *("pretraining.column=prompt", "pretraining.max_tokens=32", "dtype=bf16"),
        *("optimizer.grad_accum_dtype=fp32", "reference.offload=true", "actor.cp_act=true"),
    ),
}


def package(tree: Path, folder: Path) -> Path:
    """A folder in which the package lies as it is installed, in links to a tree."""
    whole = folder / "hlrlhf"
    whole.mkdir(parents=True)
    parts = [*(tree / "hlrlhf").iterdir(), *(tree / n for n in ("trainer", "templates", "presets"))]
    for part in parts:
        (whole / part.name).symlink_to(part)
    return folder


def train(installed: Path, folder: Path) -> None:
    """Make all runs with the package in a folder.

    Raises:
        SystemExit: one failed; with its words.
    """
    folder.mkdir()
    environ = {name: value for name, value in os.environ.items() if not name.startswith("HL_")}
    environ |= {"PYTHONPATH": str(installed), "XDG_STATE_HOME": str(folder / "state")}
    environ["PYTHONHASHSEED"] = "0"  # adapters list their layers in the order of a set
    for name, flags in RUNS.items():
        every = [f"--set={flag}" for flag in (f"tag={name}", *flags)]
        command = [sys.executable, "-m", "hlrlhf", "submit", "--preset", "demo", "--local", *every]
        done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{folder.name}, {name}: exit code {done.returncode}\n{done.stderr}")
        print(f"{folder.name}: trained {name}", flush=True)


def records(file: Path) -> list[dict[str, Any]]:
    """Lines of JSON without what changes from day to day."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if not OF_THE_DAY.search(k)} for line in lines]


def contents(run: Path) -> dict[str, Any]:
    """What a run recorded and saved, by the name of the file."""
    # When and where the run was attempted is of the day.
    files = [file for file in run.glob("*.jsonl") if file.name != "attempts.jsonl"]
    found: dict[str, Any] = {file.name: records(file) for file in files}
    for file in (run / "checkpoints").rglob("*"):
        if file.is_file():
            # Adapters name the folder of their base.
            here = str(run.parents[2]).encode()
            found[str(file.relative_to(run))] = file.read_bytes().replace(here, b"")
    return found


def differences(old: Path, new: Path) -> list[str]:
    """What differs between two runs, in words."""
    was, now = contents(old), contents(new)
    words = [
        f"only {where} has {name}"
        for name in was.keys() ^ now.keys()
        for where in ["the commit" if name in was else "the tree"]
    ]
    for name in sorted(was.keys() & now.keys()):
        if was[name] == now[name]:
            continue
        if isinstance(was[name], bytes):
            words.append(f"{name} differs")
            continue
        pairs = zip(was[name], now[name], strict=False)
        at = next((i for i, (one, other) in enumerate(pairs, 1) if one != other), None)
        words.append(f"{name} differs, first in line {at or 'that only one has'}")
    return words


def main() -> None:
    """Train on both sides and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", help="to compare the working tree with")
    commit = parser.parse_args().commit
    folder = Path(tempfile.mkdtemp(prefix="same-numbers-"))
    source = folder / "source"
    source.mkdir()
    text = subprocess.run(["git", "archive", commit], cwd=TREE, check=True, capture_output=True)
    subprocess.run(["tar", "-x", "-C", str(source)], input=text.stdout, check=True)
    train(package(source, folder / "old-package"), folder / "old")
    train(package(TREE, folder / "new-package"), folder / "new")
    bad = False
    for name in RUNS:
        old, new = (folder / side / "demo" / "runs" / name for side in ("old", "new"))
        words = differences(old, new)
        files = len(contents(new))
        print(f"{name}: {'; '.join(words) if words else f'{files} files are equal'}")
        bad |= bool(words)
    print(f"the runs are in {folder}")
    sys.exit(bad)


if __name__ == "__main__":
    main()
