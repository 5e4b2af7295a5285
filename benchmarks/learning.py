"""What the trainer learns: beside TRL's PPO trainer, where the best is known, by adapters alone.

    .venv/bin/pip install -c constraints.txt -r benchmarks/requirements.txt
    .venv/bin/python benchmarks/learning.py FOLDER [PICTURE]

Runs and models go to FOLDER, which must be new; tables of figures go to standard output, in
Markdown, and the learning curves to PICTURE. It takes a quarter of an hour on two cores, two runs
at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib as mpl

mpl.use("agg")
from matplotlib import pyplot as plt

from hlrlhf.runs import Run

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import echo  # noqa: E402

SEEDS = range(1, 6)
KL_COEFFICIENTS = (0.0, 0.1, 1.0)
HLRLHF = Path(sys.executable).with_name("hlrlhf")
# Where the two trainers are called so in tables and pictures.
OURS, TRL = "hlrlhf", "TRL"
WINDOW = 8  # steps in a row of the table

# The demo as it is, but for what TRL's trainer does not do: warm up from above zero, clip gradients
# and scores, accumulate without changing the loss.
DEMO = {
    "devices_per_node": 1,
    "mbs": 64,
    "num_warmup_steps": 0,
    "print_answers_interval": 0,
    "optimizer.gradient_clipping": 0,
    "reward.clip": 1e6,
}

# Adapters alone: scaling (alpha) and rate, in twice the steps of all weights; None is all weights.
ADAPTERS = (None, (1, 5e-4), (64, 5e-4), (256, 5e-4), (1, 1e-2))
ADAPTER_SEEDS = SEEDS[:3]

Metrics = list[dict[str, Any]]


def command(*words: Any) -> str:
    """Run a program to its end; it sees no settings of the caller's, and `echo`.

    Returns:
        Its standard output.

    Raises:
        SystemExit: it failed; with its standard error.
    """
    environ = {key: value for key, value in os.environ.items() if not key.startswith("HL_")}
    environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(list(map(str, words)), env=environ, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.args}: exit code {done.returncode}\n{done.stderr}")
    return done.stdout


def submit(flags: Iterable[str], *options: str) -> Run:
    """Train as a user would; returns the run."""
    sets = [word for flag in flags for word in ("--set", flag)]
    answer = command(HLRLHF, "submit", "--local", "--json", *options, *sets)
    return Run(Path(json.loads(answer)["directory"]))


def read(path: Path) -> Metrics:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def in_pairs(work: Callable[[Any], Any], keys: list[Any]) -> dict[Any, Any]:
    """The work done for each key, two at a time."""
    with ThreadPoolExecutor(2) as two:
        return dict(zip(keys, two.map(work, keys), strict=True))


def compare(folder: Path) -> dict[tuple[str, int], Metrics]:
    """Both trainers on the demo's models, each with the same seeds."""
    models = folder / "models"
    command(sys.executable, "-m", "hlrlhf.trainer.demo", models)
    values = DEMO | {
        "actor.model_path": models / "actor",
        "critic.model_path": models / "reward-hf",
        "dataset.path": models / "prompts" / "train.jsonl",
        "base_out_path": folder / "demo",
    }

    def train(seed: int) -> tuple[Metrics, Metrics]:
        own = values | {"seed": seed, "tag": f"seed-{seed}"}
        run = submit([f"{name}={value}" for name, value in own.items()], "--preset", "demo")
        command(sys.executable, ROOT / "benchmarks" / "trl_ppo.py", run.directory)
        return read(run.metrics), read(run.directory / "trl.jsonl")

    pairs = in_pairs(train, list(SEEDS))
    return {
        (who, seed): metrics
        for seed, pair in pairs.items()
        for who, metrics in zip((OURS, TRL), pair, strict=True)
    }


def known(folder: Path) -> dict[tuple[float, int], Metrics]:
    """Our trainer on the task whose best policy is known, with several KL coefficients."""
    models = folder / "echo-models"
    echo.make(models)

    def train(run: tuple[float, int]) -> Metrics:
        kl_coefficient, seed = run
        done = submit(echo.flags(models, folder / "echo", seed, kl_coefficient))
        return read(done.metrics)

    return in_pairs(train, [(beta, seed) for beta in KL_COEFFICIENTS for seed in SEEDS])


def alone(folder: Path) -> dict[tuple[Any, int], Metrics]:
    """The demo as it is, with all weights and with adapters alone."""
    models = folder / "models"
    values = {
        "devices_per_node": 1,
        "mbs": 64,
        "print_answers_interval": 0,
        "actor.model_path": models / "actor",
        "critic.model_path": models / "reward",
        "dataset.path": models / "prompts" / "train.jsonl",
        "base_out_path": folder / "adapters",
    }

    def train(run: tuple[Any, int]) -> Metrics:
        adapters, seed = run
        own: dict[str, Any] = values | {"seed": seed, "tag": f"all-{seed}"}
        if adapters is not None:
            alpha, rate = adapters
            own |= {"tag": f"{alpha}-{rate:g}-{seed}", "epochs": 2, "only_optimize_lora": True}
            own |= {"lora.dim": 64, "lora.alpha": alpha}
            own |= {"lora.actor_lr": rate, "lora.critic_lr": rate}
        done = submit([f"{name}={value}" for name, value in own.items()], "--preset", "demo")
        return read(done.metrics)

    return in_pairs(train, [(adapters, seed) for adapters in ADAPTERS for seed in ADAPTER_SEEDS])


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{fmean(values):.3f} ± {stdev(values):.3f}"


def row(*cells: Any) -> None:
    print("|", *(f"{cell} |" for cell in cells))


def window(metrics: Metrics, name: str, end: int, length: int) -> float:
    """Mean over the steps before `end`, counted from 1, or from the end when negative."""
    return fmean(values[name] for values in metrics[:end][-length:])


def tell_comparison(runs: dict[tuple[str, int], Metrics]) -> None:
    """The table of `compare`'s runs."""
    row("samples", *(f"{name}, {who}" for name in ("reward", "KL") for who in (OURS, TRL)))
    row(*["---:"] * 5)
    steps = len(runs[OURS, SEEDS[0]])
    rows = int(DEMO["mbs"])
    spans = [(end, WINDOW) for end in range(WINDOW, steps + 1, WINDOW)]
    for end, length in [*spans, (steps, steps)]:
        cells = [
            spread([window(runs[who, seed], name, end, length) for seed in SEEDS])
            for name in ("reward", "kl")
            for who in (OURS, TRL)
        ]
        row(f"{(end - length) * rows + 1}-{end * rows}", *cells)


def tell_known(runs: dict[tuple[float, int], Metrics]) -> None:
    """The table of `known`'s runs, over the last ten steps."""
    row("KL coefficient", "reward", "best", "KL", "best", "objective", "best", "explained variance")
    row(*["---:"] * 8)
    for beta in KL_COEFFICIENTS:
        best = echo.best(beta)
        reward, kl, explained = (
            [window(runs[beta, seed], name, echo.STEPS, 10) for seed in SEEDS]
            for name in ("reward", "kl", "explained_variance")
        )
        objective = [r - beta * k for r, k in zip(reward, kl, strict=True)]
        row(
            f"{beta:g}",
            *(spread(reward), f"{best.reward:.3f}"),
            *(spread(kl), f"{best.kl:.3f}"),
            *(spread(objective), f"{best.reward - beta * best.kl:.3f}"),
            spread(explained),
        )


def tell_alone(runs: dict[tuple[Any, int], Metrics]) -> None:
    """The table of `alone`'s runs: the first four steps against the last tenth."""
    row("what trains", "alpha", "rate", "steps", "reward at first", "in the end", "KL in the end")
    row(*["---:"] * 7)
    for adapters in ADAPTERS:
        metrics = [runs[adapters, seed] for seed in ADAPTER_SEEDS]
        steps = len(metrics[0])
        what = ("all weights", "", "1e-3") if adapters is None else ("adapters", *adapters)
        row(
            *what,
            steps,
            spread([window(each, "reward", 4, 4) for each in metrics]),
            spread([window(each, "reward", steps, steps // 10) for each in metrics]),
            spread([window(each, "kl", steps, steps // 10) for each in metrics]),
        )


def draw(
    compared: dict[tuple[str, int], Metrics], echoed: dict[tuple[float, int], Metrics], path: Path
) -> None:
    """Reward and KL divergence of both trainers, and each seed's reward where the best is known."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for axes, name, label in ((left, "reward", "reward"), (middle, "kl", "KL (nats per answer)")):
        for who, colour in ((OURS, "tab:blue"), (TRL, "tab:orange")):
            curves = [[step[name] for step in compared[who, seed]] for seed in SEEDS]
            columns = list(zip(*curves, strict=True))
            samples = [(i + 1) * int(DEMO["mbs"]) for i in range(len(columns))]
            mean = [fmean(column) for column in columns]
            axes.plot(samples, mean, color=colour, label=who)
            lowest, highest = map(min, columns), map(max, columns)
            axes.fill_between(samples, [*lowest], [*highest], color=colour, alpha=0.2, lw=0)
        axes.set(xlabel="samples", ylabel=label)
        axes.set_title(f"demo: mean and range of {len(SEEDS)} seeds", fontsize=9)
        axes.legend(frameon=False)
    beta = KL_COEFFICIENTS[1]
    for seed in SEEDS:
        rewards = [step["reward"] for step in echoed[beta, seed]]
        samples = [(i + 1) * echo.BATCH for i in range(len(rewards))]
        right.plot(samples, rewards, lw=1, label=f"seed {seed}")
    right.axhline(echo.best(beta).reward, color="black", ls="--", lw=1, label="best policy")
    right.set(xlabel="samples", ylabel="reward", ylim=(0, 1))
    right.set_title(f"echo task, KL coefficient {beta:g}", fontsize=9)
    right.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=90)


def main() -> None:
    """Run all, tell and draw."""
    folder = Path(sys.argv[1]).absolute()
    folder.mkdir(parents=True)
    echoed = known(folder)
    compared = compare(folder)
    adapters = alone(folder)
    tell_comparison(compared)
    print()
    tell_known(echoed)
    print()
    tell_alone(adapters)
    if sys.argv[2:]:
        draw(compared, echoed, Path(sys.argv[2]))


if __name__ == "__main__":
    main()
