"""The demo's models and data: real formats, and weights that mean something."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from conftest import DEMO_SEED
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from hlrlhf.jobs.demo import DemoError, prepare
from hlrlhf.settings import Resolved, resolve
from hlrlhf.trainer import demo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tokenizer(demo_models: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo_models / "actor")


@pytest.fixture(scope="module")
def held_out(demo_models: Path) -> list[dict[str, str]]:
    return read(demo_models / "prompts" / "eval.jsonl")


@pytest.fixture(scope="module")
def classifier(demo_models: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(demo_models / "reward-hf").eval()


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_maker(folder: Path) -> subprocess.Popen[bytes]:
    seed = f"--seed={DEMO_SEED}"
    return subprocess.Popen([sys.executable, "-m", demo.__name__, str(folder), seed])


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@torch.no_grad()
def scores_of(classifier: Any, tokenizer: Any, texts: list[str]) -> Any:
    batch = tokenizer(
        [text + tokenizer.eos_token for text in texts],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    mask = batch["attention_mask"]
    return classifier(batch["input_ids"], attention_mask=mask).logits.squeeze(-1)


def test_prompts_differ_and_held_out_ones_are_new(
    demo_models: Path, held_out: list[dict[str, str]]
) -> None:
    train = read(demo_models / "prompts" / "train.jsonl")
    prompts = [row["prompt"] for row in train + held_out]
    assert len(set(prompts)) == len(prompts) == demo.TRAIN_ROWS + demo.EVAL_ROWS
    assert all(row.keys() == {"prompt", "chosen", "rejected"} for row in train + held_out)


def test_tokenizer_gives_texts_back(tokenizer: Any, held_out: list[dict[str, str]]) -> None:
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert len(set(special)) == 3
    for text in ("Grüße, 日本\n\n  two  spaces", held_out[0]["prompt"] + held_out[0]["chosen"]):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_answers_do_not_merge_with_prompts(tokenizer: Any, held_out: list[dict[str, str]]) -> None:
    for row in held_out:
        apart = (
            tokenizer(row["prompt"])["input_ids"]
            + tokenizer(row["chosen"], add_special_tokens=False)["input_ids"]
        )
        assert tokenizer(row["prompt"] + row["chosen"])["input_ids"] == apart
        assert len(apart) <= 48


def test_actor_answers_in_both_manners_and_stops(
    demo_models: Path, tokenizer: Any, classifier: Any, held_out: list[dict[str, str]]
) -> None:
    actor = AutoModelForCausalLM.from_pretrained(demo_models / "actor")
    prompts = [row["prompt"] for row in held_out]
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    torch.manual_seed(0)
    sequences = actor.generate(
        batch["input_ids"], attention_mask=batch["attention_mask"], top_k=0, max_new_tokens=24
    )
    answers = sequences[:, batch["input_ids"].shape[1] :]
    assert (answers == tokenizer.eos_token_id).any(dim=1).float().mean() > 0.98
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    scores = scores_of(classifier, tokenizer, [p + t for p, t in zip(prompts, texts, strict=True)])
    # A coin's 256 tosses have a standard error of 0.03, and their mean score, with a deviation of
    # 2.3, one of 0.15; another seed's actor may lean to a side by as much again.
    assert 0.35 < (scores > 0).float().mean() < 0.65
    assert abs(scores.mean()) < 1
    # Most speak of the very thing that was asked about, where one in nine would by chance.
    asked = [next(thing for thing in demo.THINGS if f" a {thing}" in prompt) for prompt in prompts]
    assert sum(t in text for t, text in zip(asked, texts, strict=True)) > 0.8 * len(texts)


def test_reward_ranks_held_out_pairs(
    classifier: Any, tokenizer: Any, held_out: list[dict[str, str]]
) -> None:
    chosen, rejected = (
        scores_of(classifier, tokenizer, [row["prompt"] + row[answer] for row in held_out])
        for answer in ("chosen", "rejected")
    )
    assert (chosen > rejected).float().mean() > 0.95
    assert 2 < (chosen - rejected).mean() < 6
    # PPO clips at 5; a tail of single answers may be longer.
    assert (torch.cat([chosen, rejected]).abs() < 5).float().mean() > 0.97


def test_reward_folder_is_that_of_deepspeed_chat(demo_models: Path, classifier: Any) -> None:
    folder = demo_models / "reward"
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    expected = {
        name.replace("model.", "rwtransformer.", 1).replace("score.", "v_head."): weight
        for name, weight in classifier.state_dict().items()
    }
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    hidden = json.loads((folder / "config.json").read_text())["hidden_size"]
    assert weights["v_head.weight"].shape == (1, hidden)
    assert weights["rwtransformer.embed_tokens.weight"].shape[1] == hidden
    assert AutoTokenizer.from_pretrained(folder).eos_token == "</s>"


def test_made_again_it_is_the_same(demo_models: Path, tmp_path: Path) -> None:
    again = tmp_path / "parent" / "again"
    assert run_maker(again).wait() == 0
    assert bytes_of(again) == bytes_of(demo_models)
    assert [path.name for path in again.parent.iterdir()] == ["again"]


def test_a_complete_folder_is_left_alone(demo_models: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo_models.rglob("*")}
    demo.make(demo_models, DEMO_SEED)
    assert {path: path.stat().st_mtime_ns for path in demo_models.rglob("*")} == before


def test_a_folder_of_another_recipe_or_seed_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "write", lambda folder, _: (folder / "new").touch())
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "old").touch()
    (folder / demo.STAMP).write_text("of an older version")
    demo.make(folder)
    assert {path.name for path in folder.iterdir()} == {"new", demo.STAMP}
    (folder / "new").unlink()
    demo.make(folder)
    assert {path.name for path in folder.iterdir()} == {demo.STAMP}, "left alone"
    demo.make(folder, demo.SEED + 1)
    assert {path.name for path in folder.iterdir()} == {"new", demo.STAMP}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="not the demo's"):
        demo.make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_interrupted_it_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    maker = run_maker(folder)
    deadline = time.monotonic() + 240
    while not any(tmp_path.glob(".models-*/fresh/prompts/eval.jsonl")):
        assert maker.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(maker.pid, signal.SIGINT)
    assert maker.wait(timeout=240) != 0
    assert list(tmp_path.iterdir()) == []


def demo_settings(*flags: str) -> Resolved:
    return resolve("demo", flags=["environment.python=false", *flags])


def test_preset_needs_its_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DemoError, match="HL_ENVIRONMENT_PYTHON"):
        prepare(demo_settings())
    assert list(tmp_path.iterdir()) == []
    # Not names on the Hub, though nothing is there yet.
    assert demo_settings().settings.actor.model_path == str(tmp_path / "demo/models/actor")


def test_other_models_than_the_demos_are_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [f"{name}=./own" for name in ("actor.model_path", "critic.model_path", "dataset.path")]
    prepare(demo_settings(*paths))
    with pytest.raises(DemoError):
        prepare(demo_settings(*paths[1:]))
    own = ["tag=own", "base_out_path=runs", "environment.python=false", *paths]
    prepare(resolve("llama2-7b", flags=own))


def test_models_that_are_there_are_not_made_again(
    demo_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()
    Path("demo/models").symlink_to(demo_models)
    prepare(demo_settings())


@dataclass(frozen=True)
class Finished:
    """A demo run: its directory, and the mean reward of each step."""

    directory: Path
    rewards: list[float]

    @property
    def gain(self) -> float:
        """Of the last tenth of the steps, over four of the first."""
        return fmean(self.rewards[-len(self.rewards) // 10 :]) - fmean(self.rewards[:4])


def from_nothing(folder: Path, *flags: str) -> Finished:
    """``hlrlhf submit --preset demo --local`` in an empty folder."""
    settings = [part for flag in flags for part in ("--set", flag)]
    command = [sys.executable, "-m", "hlrlhf", "submit", "--preset", "demo", "--local", *settings]
    # Names of runs are unique in the index there.
    environ = os.environ | {"XDG_STATE_HOME": str(folder / "state")}
    subprocess.run(command, check=True, timeout=600, cwd=folder, env=environ)
    run = folder / "demo" / "runs" / "demo"
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return Finished(run, [json.loads(line)["reward"] for line in lines])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The demo as it is."""
    return from_nothing(tmp_path_factory.mktemp("demo"))


def test_from_nothing_to_a_kinder_actor(finished: Finished, held_out: list[dict[str, str]]) -> None:
    assert len(finished.rewards) == 40
    # benchmarks/demo_seeds.py has the gains of ten seeds, with a deviation of some 0.2.
    assert finished.gain > 2
    final = finished.directory / "checkpoints" / "final" / "actor"
    actor = AutoModelForCausalLM.from_pretrained(final)
    tokenizer = AutoTokenizer.from_pretrained(final)
    batch = tokenizer(held_out[0]["prompt"], return_tensors="pt")
    sequence = actor.generate(batch["input_ids"], do_sample=False, max_new_tokens=24)[0]
    assert sequence[-1] == tokenizer.eos_token_id


def test_adapters_alone_learn_as_much_in_twice_the_steps(
    finished: Finished, tmp_path: Path
) -> None:
    adapters = from_nothing(tmp_path, "lora.dim=64", "only_optimize_lora=true", "epochs=2")
    assert len(adapters.rewards) == 80
    assert adapters.gain > 0.8 * finished.gain
