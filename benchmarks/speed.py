"""How long a PPO step takes beside TRL's, and beside our own in other ways.

    .venv/bin/pip install -c constraints.txt -r benchmarks/requirements.txt
    .venv/bin/python benchmarks/speed.py FOLDER [WORKLOAD...] [--steps N] [--pairs N]

Makes models of the shapes below with random weights, a tokenizer and prompts in FOLDER, which must
be new. Each workload is two sides that train in turn, for `pairs` times `steps` steps; the first
step of each run does not count. Prints the medians of their steps, how far they spread, and the
ratio of the second side to the first, in Markdown, and writes all to FOLDER/speed.json. Ratios of
one run are what can be compared: machines differ from day to day. Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    BloomForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from hlrlhf.runs import Run
from hlrlhf.settings import layers

ROOT = Path(__file__).parents[1]
HLRLHF = Path(sys.executable).with_name("hlrlhf")
PROMPTS, SHORTEST, LONGEST, ANSWER = 256, 62, 120, 128
# As in chats: a prompt may be twenty times as long as another, and most are short.
VARIED = 12, 250
PHASES = ("generate_seconds", "score_seconds", "update_seconds")


def llama(hidden: int, layers: int, heads: int, intermediate: int, vocabulary: int) -> LlamaConfig:
    """A shape of Llama's, untied."""
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )


SHAPES = {
    "llama-512": llama(512, 8, 8, 1376, 32_000),
    "bloom-250k": BloomConfig(hidden_size=256, n_layer=4, n_head=4, vocab_size=250_880),
    "llama-64": llama(64, 2, 2, 172, 2048),
}
KINDS = {
    "llama": (LlamaForCausalLM, LlamaForSequenceClassification),
    "bloom": (BloomForCausalLM, BloomForSequenceClassification),
}


@dataclass(frozen=True)
class Side:
    """One way to train.

    Attributes:
        name: as the table has it.
        flags: settings of ours.
        trl: words for `trl_ppo.py` where TRL trains, with the same settings; None: ours does.
    """

    name: str
    flags: dict[str, Any] = field(default_factory=dict)
    trl: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Workload:
    """Two sides on one shape, with `micro` rows a micro batch and so many of them accumulated."""

    shape: str
    micro: int
    accumulation: int
    first: Side
    second: Side


OURS, TRL = Side("hlrlhf"), Side("TRL", trl=())
COMPILED = Side("hlrlhf, compiled step", {"generation.decoder": "compiled"})
UNCOLLECTED = Side("TRL without gc.collect", trl=("--without-collections",))
# 500 of 32,000 words end an answer: after 55 on average, of at most 128.
EARLY = Side("ended early", {"actor.model_path": "early"})
# TRL's has one end token and samples to the limit, as a batch does in which one answer gets there.
DIFFERENT = {
    "actor.model_path": "early",
    "dataset.path": "varied.jsonl",
    "dataset.max_prompt_tokens": VARIED[1],
}
ALONE = Side("adapters alone", {"lora.dim": 64, "only_optimize_lora": True})
HALF = Side("bf16", {"dtype": "bf16"})
TWO = {"devices_per_node": 2}
WORKLOADS = {
    "llama-512-2x4": Workload("llama-512", 2, 4, OURS, TRL),
    "bloom-250k-2x4": Workload("bloom-250k", 2, 4, OURS, TRL),
    "llama-512-4x1": Workload("llama-512", 4, 1, OURS, TRL),
    "llama-64-4x1": Workload("llama-64", 4, 1, OURS, UNCOLLECTED),
    "llama-512-varied": Workload(
        "llama-512", 4, 4, Side("hlrlhf", DIFFERENT), Side("TRL", DIFFERENT, trl=())
    ),
    "llama-512-2x4-compiled": Workload("llama-512", 2, 4, COMPILED, TRL),
    "llama-512-4x1-compiled": Workload("llama-512", 4, 1, COMPILED, TRL),
    "llama-64-4x1-compiled": Workload("llama-64", 4, 1, COMPILED, UNCOLLECTED),
    "llama-512-early": Workload("llama-512", 2, 4, EARLY, OURS),
    "llama-512-adapters": Workload("llama-512", 2, 4, ALONE, OURS),
    "llama-512-bf16": Workload("llama-512", 2, 4, HALF, OURS),
    "llama-64-zero3": Workload(
        "llama-64",
        4,
        1,
        Side("ZeRO 3", TWO | {"actor.zero_stage": 3, "critic.zero_stage": 3}),
        Side("ZeRO 1", TWO),
    ),
}


def make(folder: Path, name: str) -> None:
    """Models of a shape with random weights, their tokenizer, and prompts of its words."""
    folder.mkdir(parents=True)
    config = SHAPES[name]
    vocabulary = {f"w{number}": number for number in range(config.vocab_size)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    end, padding = f"w{config.vocab_size - 1}", f"w{config.vocab_size - 2}"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token=end, bos_token=end, pad_token=padding, unk_token="w0"
    )
    config.eos_token_id = config.bos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(1)
    causal, classifier = KINDS[config.model_type]
    for role, kind, more in (("actor", causal, {}), ("critic", classifier, {"num_labels": 1})):
        own = type(config).from_dict(config.to_dict() | more)
        model = kind(own)
        model.save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
        if role == "actor":
            model.generation_config.eos_token_id = [*range(500), tokenizer.eos_token_id]
            model.save_pretrained(folder / "early")
            tokenizer.save_pretrained(folder / "early")
    draw = random.Random(1)
    alike = [draw.randint(SHORTEST, LONGEST) for _ in range(PROMPTS)]
    varied = [round(math.exp(draw.uniform(*map(math.log, VARIED)))) for _ in range(PROMPTS)]
    for file, lengths in (("prompts.jsonl", alike), ("varied.jsonl", varied)):
        with (folder / file).open("w", encoding="utf-8") as lines:
            for length in lengths:
                words = (f"w{draw.randrange(config.vocab_size - 2)}" for _ in range(length))
                lines.write(json.dumps({"prompt": " ".join(words)}) + "\n")


def given(workload: Workload, side: Side, folder: Path, tag: str, steps: int) -> list[str]:
    """The settings of a run, of which both trainers have all but `side.flags`."""
    models, micro = folder / "models" / workload.shape, workload.micro
    values = {
        "tag": tag,
        "base_out_path": folder / "runs",
        "device": "cpu",
        "dtype": "fp32",
        "devices_per_node": 1,
        "seed": 1,
        "mbs": micro,
        "epochs": 99,
        "run_steps": steps,
        "num_warmup_steps": 0,
        "checkpoint.minutes": 0,
        "optimizer.gradient_clipping": 0,
        "actor.learning_rate": 1e-6,
        "critic.learning_rate": 1e-6,
        "actor.model_path": "actor",
        "critic.model_path": models / "critic",
        "dataset.path": "prompts.jsonl",
        "dataset.max_prompt_tokens": LONGEST,
        "generation.max_new_tokens": ANSWER,
    } | side.flags
    for name in ("actor.model_path", "dataset.path"):
        values[name] = models / values[name]
    values["gbs"] = micro * workload.accumulation * values["devices_per_node"]
    return [f"{name}={value}" for name, value in values.items()]


def train(side: Side, flags: list[str], folder: Path) -> list[dict[str, Any]]:
    """The records of a run's steps but the first."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("HL_")}
    # Runs have names that are taken once: not those of an earlier measurement.
    environ["XDG_STATE_HOME"] = str(folder.parent)
    if side.trl is not None:
        folder.mkdir(parents=True)
        resolved = layers.resolve(flags=flags)
        Run(folder).settings_file.write_text(layers.dump(resolved), encoding="utf-8")
        words = [sys.executable, ROOT / "benchmarks" / "trl_ppo.py", folder, *side.trl]
        environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
        file = folder / "trl.jsonl"
    else:
        words = [HLRLHF, "submit", "--local", *(f"--set={flag}" for flag in flags)]
        file = Run(folder).metrics
    done = subprocess.run(words, env=environ, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{words}: exit code {done.returncode}\n{done.stderr}")
    lines = file.read_text(encoding="utf-8").splitlines()
    return [record for line in lines if (record := json.loads(line))["step"] > 1]


def measure(name: str, workload: Workload, folder: Path, steps: int, pairs: int) -> dict[str, Any]:
    """Both sides of a workload, in turn, so that neither has the quieter half of the time."""
    sides = (workload.first, workload.second)
    steps_of: list[list[dict[str, Any]]] = [[], []]
    for pair in range(pairs):
        for number, side in enumerate(sides):
            tag = f"{name}-{number}-{pair}"
            flags = given(workload, side, folder, tag, steps + 1)
            steps_of[number] += train(side, flags, folder / "runs" / tag)
    return {"workload": name, "sides": [told(*both) for both in zip(sides, steps_of, strict=True)]}


def told(side: Side, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """What is said of a side: medians over steps, and the quartiles of their seconds."""
    seconds = [step["seconds"] for step in steps]
    low, _, high = quantiles(seconds, n=4, method="inclusive")
    phases = {name: median(step[name] for step in steps) for name in PHASES if name in steps[0]}
    return {
        "side": side.name,
        "seconds": median(seconds),
        "quartiles": [low, high],
        "peak_memory_bytes": max(step["peak_memory_bytes"] for step in steps),
        **phases,
        "steps": seconds,
    }


def table(measured: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Markdown, a line for each side."""
    head = "workload", "", "s/step", "quartiles", "generate / score / update", "peak GB"
    yield "| " + " | ".join((*head, "speed of the first", "its memory")) + " |"
    yield "| --- | --- |" + " ---: |" * 6
    for one in measured:
        first, second = one["sides"]
        for side in one["sides"]:
            phases = " / ".join(f"{side[name]:.2f}" for name in PHASES if name in side)
            ratios = ["", ""]
            if side is first:
                speed = second["seconds"] / first["seconds"]
                memory = first["peak_memory_bytes"] / second["peak_memory_bytes"]
                ratios = [f"{speed:.2f}x", f"{memory:.2f}x"]
            low, high = side["quartiles"]
            cells = (
                one["workload"] if side is first else "",
                side["side"],
                f"{side['seconds']:.2f}",
                f"{low:.2f}-{high:.2f}",
                phases,
                f"{side['peak_memory_bytes'] / 1e9:.2f}",
                *ratios,
            )
            yield "| " + " | ".join(cells) + " |"


def processor() -> str:
    """The name that Linux has for it."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def where() -> str:
    """What was measured on."""
    return f"{len(os.sched_getaffinity(0))} cores of {processor()}, torch {torch.__version__}"


def write(file: Path, report: dict[str, Any]) -> None:
    """A report as JSON, with what it was measured on."""
    file.write_text(json.dumps({"machine": where()} | report, indent=1) + "\n", encoding="utf-8")


def arguments(
    description: str | None, chosen: str, choices: Iterable[str], steps: int, pairs: int
) -> argparse.Namespace:
    """What a measurement is asked for.

    Args:
        chosen: the name of what is measured, of which none is all of `choices`.
        steps, pairs: unless others are asked for.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=lambda text: Path(text).absolute())
    parser.add_argument(f"{chosen}s", nargs="*", metavar=chosen.upper(), help=", ".join(choices))
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--pairs", type=int, default=pairs)
    return parser.parse_args()


def main() -> None:
    """Make the models, measure, tell."""
    asked = arguments(__doc__, "workload", WORKLOADS, steps=3, pairs=3)
    names = asked.workloads or list(WORKLOADS)
    asked.folder.mkdir(parents=True)
    for shape in dict.fromkeys(WORKLOADS[name].shape for name in names):
        make(asked.folder / "models" / shape, shape)
    measured = []
    for name in names:
        measured.append(measure(name, WORKLOADS[name], asked.folder, asked.steps, asked.pairs))
        write(asked.folder / "speed.json", {"measured": measured})
    print(f"{where()}\n")
    print("\n".join(table(measured)))


if __name__ == "__main__":
    main()
