"""Whole runs of the trainer, as processes, on the demo's models."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from ranks import Run, finish, meeting_port, prepare, read_lines, running, train, wait_for
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from hlrlhf import runs
from hlrlhf.jobs import local
from hlrlhf.runs import Attempt
from hlrlhf.settings import layers
from hlrlhf.trainer.models.loading import load_scorer, saved_as

pytestmark = pytest.mark.slow

# AdamW divides by a gradient's own size, so that a rounding of one near zero moves its weight by
# the whole rate. With an epsilon above nearly all gradients, which clipping keeps to a norm of 1,
# weights move in proportion to them: in three steps by some 1e-3 of their norm, and of this fp32
# rounds a share of 1e-5. The roundings of a weight itself, two in each step, add 6 * 2^-24 = 4e-7.
GENTLE = {"optimizer__epsilon": 1e-2}
# Of each weight tensor, relative to its norm.
SAME_WEIGHTS = 2e-6
COMPARED = ("reward", "kl", "length", "entropy", "value", "return", "critic_loss")
ADAPTERS: dict[str, Any] = {"lora__dim": 4, "lora__actor_lr": 1e-2, "lora__critic_lr": 1e-2}
ADAPTERS |= {"optimizer__epsilon": 1e-3}  # their gradients are smaller, as one factor starts at 0

Trained = Callable[..., Run]


@pytest.fixture(scope="session")
def trained(demo_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Runs to their end, each made once however many tests look at it."""
    done: dict[str, Run] = {}

    def run(ranks: int = 1, **changes: Any) -> Run:
        key = repr((ranks, sorted(changes.items())))
        if key not in done:
            directory = tmp_path_factory.mktemp("run")
            prepare(directory, demo_models, devices_per_node=ranks, **GENTLE | changes)
            done[key] = train(directory, ranks)
        assert done[key].codes == [0] * ranks, done[key].output
        return done[key]

    return run


def zero(stage: int) -> dict[str, int]:
    return {"actor__zero_stage": stage, "critic__zero_stage": stage}


def assert_same(run: Run, other: Run) -> None:
    # The KL divergence is a sum over 16 tokens of differences of log-probs, in which logits of some
    # 10, rounded after a hundred operations, leave up to 5e-6 each.
    for step, expected in zip(run.metrics, other.metrics, strict=True):
        for name in COMPARED:
            assert step[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-4), name
    for role in ("actor", "critic"):
        expected = other.weights(role)
        weights = run.weights(role)
        assert weights.keys() == expected.keys()
        for name, value in weights.items():
            difference = float((value - expected[name]).norm() / expected[name].norm())
            assert difference == pytest.approx(0, abs=SAME_WEIGHTS), f"{role} {name}"


@pytest.mark.knob("seed")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_seed_fixes_every_number_to_the_last_digit(trained: Trained, ranks: int) -> None:
    sampled = {"mbs": 4, "generation__top_k": 0, "actor__dropout": 0.1, "critic__dropout": 0.1}

    def numbers(run: Run) -> list[dict[str, Any]]:
        # Clocks and what follows from them apart.
        timed = ("second", "tflops", "memory")
        return [{k: v for k, v in m.items() if not any(t in k for t in timed)} for m in run.metrics]

    one, same = (trained(ranks, tag=tag, **sampled) for tag in ("one", "same"))
    assert numbers(one) == numbers(same)
    for name, value in one.weights("actor").items():
        assert value.equal(same.weights("actor")[name])
    if ranks == 1:
        other = trained(ranks, seed=2, **sampled)
        assert one.metrics[-1]["kl"] != other.metrics[-1]["kl"]


@pytest.mark.knob("devices_per_node", "actor.zero_stage", "critic.zero_stage")
@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        pytest.param(1, {"mbs": 2}, id="accumulation"),
        pytest.param(1, {"actor__cp_act": 1, "critic__cp_act": 1}, id="activation checkpointing"),
        *(
            pytest.param(2, {"mbs": 2} | zero(stage), id=f"2 ranks, ZeRO {stage}")
            for stage in range(4)
        ),
    ],
)
def test_a_run_does_not_depend_on_how_it_is_spread(
    trained: Trained, ranks: int, changes: dict[str, Any]
) -> None:
    assert_same(trained(ranks, **changes), trained())


@pytest.fixture(scope="session")
def wide_models(demo_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An actor and a reward model of matrices large enough for ZeRO-3 to partition, untrained."""
    folder = tmp_path_factory.mktemp("wide")
    tokenizer = AutoTokenizer.from_pretrained(demo_models / "actor")
    shape = tiny.WIDE["llama"] | {"vocabulary": len(tokenizer)}
    tiny.save_policy(folder / "actor", "llama", **shape)
    tiny.save_classifier(folder / "reward", "llama", **shape)
    for role in ("actor", "reward"):
        tokenizer.save_pretrained(folder / role)
    return folder


@pytest.mark.knob("actor.zero_stage", "critic.zero_stage", "lora.dim")
@pytest.mark.parametrize("changes", [{}, ADAPTERS, ADAPTERS | {"only_optimize_lora": 1}])
def test_nor_does_one_whose_weights_are_partitioned(
    trained: Trained, wide_models: Path, changes: dict[str, Any]
) -> None:
    """All weights, adapters beside the others, and adapters alone, which share their bases."""
    models = {
        "actor__model_path": wide_models / "actor",
        "critic__model_path": wide_models / "reward",
    }
    # Small steps: untrained models this wide are thrown far by larger ones.
    rates = {"actor__learning_rate": 1e-4, "critic__learning_rate": 1e-4}
    changes = models | rates | changes
    assert_same(trained(2, mbs=2, **changes, **zero(3)), trained(**changes, **zero(1)))


def test_both_formats_of_critic_and_reward_are_one_model(
    trained: Trained, demo_models: Path
) -> None:
    assert_same(trained(critic__model_path=demo_models / "reward-hf"), trained())


@pytest.fixture
def learning(demo_models: Path) -> dict[str, Any]:
    """Changes of a run that learns within ten steps, evaluated before the first and after the last.

    Each time the actor answers 256 held-out prompts, drawing the same random numbers. Scores of the
    demo's answers have a deviation of 2.3, so that the difference of two means has a standard error
    of 0.2. Most of the way from 0 to 3.5, where all answers are kind, is a rise by over 2.
    """
    return {
        "dataset__path": [str(demo_models / "prompts" / "train.jsonl")],
        "evaluation__path": demo_models / "prompts" / "eval.jsonl",
        "evaluation__prompts": 256,
        "evaluation__interval": 100,
        "generation__top_k": 0,
        "generation__max_new_tokens": 24,
        "gbs": 64,
        "mbs": 64,
        "run_steps": 10,
        "actor__learning_rate": 3e-3,
        "optimizer__epsilon": 1e-8,
    }


RISE = 1.5


def test_actor_and_critic_learn(
    trained: Trained, learning: dict[str, Any], demo_models: Path
) -> None:
    run = trained(**learning)
    before, first, *_, last = run.metrics
    assert before["step"] == 0
    assert last["evaluation_reward"] > before["evaluation_reward"] + RISE
    assert first["kl"] == pytest.approx(0, abs=1e-4)
    assert last["kl"] > 0.1
    for role, folder in (("actor", "actor"), ("critic", "reward-hf")):
        start = load_file(demo_models / folder / "model.safetensors")
        moved = [name for name, value in run.weights(role).items() if (value != start[name]).any()]
        assert len(moved) == len(start), role


def test_norms_of_gradients_are_told_with_and_without_zero(trained: Trained) -> None:
    alone = trained().metrics
    assert all(step["actor_gradient_norm"] > 0 for step in alone)
    for stage in (0, 1):
        for step, expected in zip(trained(2, mbs=2, **zero(stage)).metrics, alone, strict=True):
            for name in ("actor_gradient_norm", "critic_gradient_norm"):
                assert step[name] == pytest.approx(expected[name], rel=1e-3)


@pytest.mark.knob("actor.dropout", "critic.dropout")
def test_dropout_is_in_the_update_and_nowhere_else(trained: Trained) -> None:
    plain = trained().metrics[0]
    dropped = trained(actor__dropout=0.3, critic__dropout=0.3).metrics[0]
    for name in ("reward", "entropy", "value", "return"):
        assert dropped[name] == pytest.approx(plain[name], rel=1e-5), name
    # The first forward of the update is the policy that has sampled, but for dropout.
    assert plain["ratio"] == pytest.approx(1, abs=1e-4)
    assert abs(dropped["ratio"] - 1) > 1e-3
    assert dropped["critic_loss"] != pytest.approx(plain["critic_loss"], rel=1e-3)


@pytest.mark.knob("actor.model_path", "critic.model_path")
def test_a_run_goes_on_from_the_models_of_another(
    trained: Trained, learning: dict[str, Any], demo_models: Path
) -> None:
    first = trained(**learning)
    saved = first.directory / "checkpoints" / "final"
    models = {
        "actor__model_path": saved / "actor",
        "critic__model_path": saved / "critic",
        "reward__model_path": demo_models / "reward",
    }
    second = trained(**learning | models | {"run_steps": 1})
    before, after = first.metrics[-1], second.metrics[0]
    assert after["evaluation_reward"] > first.metrics[0]["evaluation_reward"] + RISE
    assert after["evaluation_reward"] == pytest.approx(before["evaluation_reward"], rel=1e-4)
    assert second.metrics[1]["value"] != pytest.approx(first.metrics[1]["value"], abs=0.01)
    assert second.metrics[1]["kl"] == pytest.approx(0, abs=1e-4), "the reference starts from it too"
    assert f"the reference is {saved / 'actor'}, which hlrlhf has trained" in second.output[0]
    assert saved_as(str(saved / "critic")) == "critic"


@pytest.mark.knob("reference.model_path")
@pytest.mark.parametrize("ranks", [1, 2])
def test_training_goes_on_against_the_reference_that_it_once_began_with(
    trained: Trained, learning: dict[str, Any], demo_models: Path, ranks: int
) -> None:
    """On two ranks with adapters alone under ZeRO-3, where the actor would be its own reference."""
    spread = {"only_optimize_lora": 1} | ADAPTERS | zero(3) if ranks == 2 else {}
    learning["mbs"] //= ranks
    first = trained(ranks, **learning)
    models = {
        "actor__model_path": first.directory / "checkpoints" / "final" / "actor",
        "reference__model_path": demo_models / "actor",
    }
    second = trained(ranks, **learning | models | spread | {"run_steps": 1})
    # What the actor has moved away already, on other prompts.
    start, *_, end = [step for step in first.metrics if "evaluation_kl" in step]
    again = next(step for step in second.metrics if "evaluation_kl" in step)
    assert end["evaluation_kl"] > 0.05
    for name in ("kl", "reward", "length", "reference_reward", "reference_length"):
        found, expected = again[f"evaluation_{name}"], end[f"evaluation_{name}"]
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3), name
    assert start["evaluation_reference_reward"] == start["evaluation_reward"]
    assert "which hlrlhf has trained" not in second.output[0]


@pytest.mark.knob("epochs", "run_steps", "gbs")
def test_steps_are_passes_over_the_prompts_and_count_on(trained: Trained) -> None:
    few = {"gbs": 128, "mbs": 64, "generation__max_new_tokens": 2}
    for changes, steps in (({"epochs": 3, "run_steps": 0}, 6), ({"epochs": 3, "run_steps": 2}, 2)):
        metrics = trained(**few, **changes).metrics  # 256 prompts
        assert [step["step"] for step in metrics] == list(range(1, steps + 1))
        assert {step["total_steps"] for step in metrics} == {steps}
        for step in metrics:
            assert step["samples_per_second"] * step["seconds"] == pytest.approx(128)


@pytest.mark.knob("ppo.kl_coefficient", "ppo.kl_controller", "ppo.kl_target", "ppo.kl_horizon")
def test_the_kl_coefficient_stays_or_follows_the_divergence(trained: Trained) -> None:
    assert {step["kl_coefficient"] for step in trained().metrics} == {0.1}
    adaptive = {"kl_controller": "adaptive", "kl_target": 0.5, "kl_horizon": 100}
    changes = {f"ppo__{name}": value for name, value in adaptive.items()}
    metrics = trained(**changes, ppo__kl_coefficient=0.3).metrics
    expected = 0.3
    for step in metrics:
        assert step["kl_coefficient"] == pytest.approx(expected)
        expected *= 1 + max(-0.2, min(0.2, step["kl"] / 0.5 - 1)) * 8 / 100
    assert expected != 0.3


def test_all_ranks_skip_a_step_with_a_reward_that_is_no_number(
    demo_models: Path, tmp_path: Path
) -> None:
    """The second score of rank 1 is NaN, and from the fourth on all of its scores are."""
    (tmp_path / "spoiled.py").write_text(
        "import itertools, math, os\n"
        "calls = itertools.count(1)\n"
        "def score(prompts, answers):\n"
        "    spoiled = os.environ['RANK'] == '1' and next(calls) in (2, 4, 5, 6, 7)\n"
        "    return [math.nan if spoiled else len(a) / 10 for a in answers]\n"
    )
    reward = {"reward__function": "spoiled:score", "reward__model_weight": 0}
    prepare(
        tmp_path,
        demo_models,
        devices_per_node=2,
        mbs=4,
        run_steps=7,
        guard__max_skipped=2,
        **reward,
    )
    run = train(tmp_path, 2, PYTHONPATH=str(tmp_path))
    assert run.codes == [1, 1]
    assert "2 steps in a row" in run.output[0]
    assert [step["skipped_steps"] for step in run.metrics] == [0, 1, 1, 2]
    assert [step["reward"] is None for step in run.metrics] == [False, True, False, True]
    assert [("actor_loss" in step) for step in run.metrics] == [True, False, True, False]
    names = ["step-5.rank-0.safetensors", "step-5.rank-1.safetensors"]
    assert sorted(path.name for path in (tmp_path / "skipped").iterdir()) == names
    scores = [load_file(tmp_path / "skipped" / name)["scores"] for name in names]
    assert [bool(score.isnan().any()) for score in scores] == [False, True]


@pytest.mark.knob("dtype")
def test_bf16_runs_and_saves_bf16(trained: Trained) -> None:
    run = trained(2, mbs=2, dtype="bf16")
    assert all(abs(step["reward"]) < 10 for step in run.metrics)
    assert {value.dtype for value in run.weights("actor").values()} == {torch.bfloat16}


@pytest.fixture(scope="session")
def adapters_only(trained: Trained) -> Run:
    """LoRA on 2 ranks under ZeRO-3, nothing else trained but the critic's head."""
    return trained(2, mbs=2, only_optimize_lora=1, **ADAPTERS, **zero(3))


def test_a_reward_model_that_the_critic_holds_is_the_one_of_its_own(
    trained: Trained, adapters_only: Run, demo_models: Path
) -> None:
    """On 2 ranks under ZeRO-3, against one rank that reads the same model in its other format."""
    apart = {"reward__model_path": demo_models / "reward-hf"}
    assert_same(adapters_only, trained(only_optimize_lora=1, **ADAPTERS, **apart))


@pytest.mark.knob("only_optimize_lora", "lora.dim", "lora.alpha")
def test_adapters_alone_leave_the_base_as_it_was(adapters_only: Run, demo_models: Path) -> None:
    merged = adapters_only.weights("actor")
    adapter = load_file(
        adapters_only.directory / "checkpoints/final/actor-adapter/adapter_model.safetensors"
    )
    adapted = 0
    for name, value in load_file(demo_models / "actor" / "model.safetensors").items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_B.weight" in adapter:
            adapted += 1
            value = value + 0.25 * (
                adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]
            )
            torch.testing.assert_close(merged[name], value, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(value, merged[name]), name
    assert adapted == 14, "7 linear layers in each of 2 blocks"
    start = load_file(demo_models / "reward-hf" / "model.safetensors")
    critic = adapters_only.weights("critic")
    assert not torch.equal(start["score.weight"], critic["score.weight"])
    assert torch.equal(start["model.embed_tokens.weight"], critic["model.embed_tokens.weight"])


def test_the_adapter_on_the_base_is_the_merged_actor(adapters_only: Run, demo_models: Path) -> None:
    saved = adapters_only.directory / "checkpoints" / "final"
    base = AutoModelForCausalLM.from_pretrained(demo_models / "actor")
    ids = torch.arange(3, 40).reshape(1, -1)
    with torch.no_grad():
        before = base(ids).logits
        loaded = PeftModel.from_pretrained(base, saved / "actor-adapter")(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(saved / "actor")(ids).logits
    # Logits of some 10, rounded after a hundred operations of 2^-24.
    assert torch.allclose(loaded, merged, rtol=0, atol=1e-4)
    assert not torch.allclose(before, merged, rtol=0, atol=1e-3), "the adapter does something"
    config = json.loads((saved / "actor-adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    head = load_file(saved / "critic-adapter" / "score.safetensors")["score.weight"]
    assert head.equal(adapters_only.weights("critic")["score.weight"])


def test_lora_trains_beside_all_weights_that_have_no_adapter(
    trained: Trained, demo_models: Path
) -> None:
    """On two ranks under ZeRO-3; frozen matrices move by their adapters alone."""
    run = trained(2, mbs=2, **ADAPTERS, **zero(3))
    saved = run.directory / "checkpoints" / "final"
    assert {path.name for path in saved.iterdir()} == {
        "actor",
        "actor-adapter",
        "critic",
        "critic-adapter",
    }
    for role, folder in (("actor", "actor"), ("critic", "reward-hf")):
        start = load_file(demo_models / folder / "model.safetensors")
        adapter = load_file(saved / f"{role}-adapter" / "adapter_model.safetensors")
        wrapped = 0
        for name, value in run.weights(role).items():
            assert not torch.equal(value, start[name]), name
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{stem}.lora_B.weight" in adapter:
                wrapped += 1
                product = adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]
                assert torch.equal(start[name] + 0.25 * product, value), name
        assert wrapped == 14, "7 linear layers in each of 2 blocks"
    counts = json.loads((run.directory / "parameters.json").read_text())
    for role, count in counts.items():
        matrices = sum(
            value.numel()
            for name, value in run.weights(role).items()
            if "layers." in name and value.ndim > 1
        )
        assert count["total"] - count["trainable"] == matrices
        said = f"{role}: {count['trainable']:,} of {count['total']:,} parameters train"
        assert said in run.output[0]
    assert counts.keys() == {"actor", "critic"}


def test_the_saved_models_load_anywhere(trained: Trained, demo_models: Path) -> None:
    saved = trained().directory / "checkpoints" / "final"
    script = """
import sys
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
actor, critic = (f"{sys.argv[1]}/{name}" for name in ("actor", "critic"))
tokenizer = AutoTokenizer.from_pretrained(actor)
ids = tokenizer("Human: Can you help me sell a lamp?\\n\\nAssistant:", return_tensors="pt")
model = AutoModelForCausalLM.from_pretrained(actor)
print(repr(tokenizer.decode(model.generate(**ids, max_new_tokens=20, do_sample=False)[0])))
_, report = AutoModelForSequenceClassification.from_pretrained(critic, output_loading_info=True)
print(report["missing_keys"], report["unexpected_keys"])
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(saved)], capture_output=True, text=True, check=True
    )
    answer, keys = done.stdout.splitlines()
    assert "Human: Can you help me sell a lamp?" in answer
    assert keys in ("[] []", "set() set()")
    original = GenerationConfig.from_pretrained(demo_models / "actor").to_diff_dict()
    assert GenerationConfig.from_pretrained(saved / "actor").to_diff_dict() == original
    text = "Ask me any time."
    tokenizers = [
        AutoTokenizer.from_pretrained(path) for path in (saved / "actor", demo_models / "actor")
    ]
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]


def test_the_saved_critic_is_one_that_a_run_can_start_from(trained: Trained) -> None:
    folder = trained().directory / "checkpoints" / "final" / "critic"
    ids = torch.arange(3, 30).reshape(1, -1)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        ours = load_scorer(str(folder), "fp32", 0.0).eval()(ids, mask, 1)[0, -1]
        theirs = AutoModelForSequenceClassification.from_pretrained(folder)(ids, mask).logits[0, 0]
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-4)


def test_what_a_run_writes(trained: Trained) -> None:
    run = trained(2, mbs=2, **zero(1))
    assert [step["step"] for step in run.metrics] == [1, 2, 3]
    for step in run.metrics:
        assert step["total_steps"] == 3
        assert step["attempt"] == 0
        assert step["seconds"] > 0
        assert step["samples_per_second"] == pytest.approx(8 / step["seconds"])
        assert set(COMPARED) <= step.keys()
        page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
        assert all(f"`{name}`" in page for name in step), "docs/metrics.md names every metric"
    assert run.metrics[-1]["seconds_left"] == 0
    samples = read_lines(run.directory / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [1, 2, 3]
    assert all("Human:" in sample["prompt"] and sample["answer"] for sample in samples)
    assert [path.name[:6] for path in (run.directory / "tensorboard").iterdir()] == ["events"]
    assert not list(run.directory.glob("checkpoints/.*")), "nothing half-made"


def test_the_log_of_a_run_is_plain_lines(trained: Trained) -> None:
    first, second = trained(2, mbs=2, **zero(1)).output
    assert "\r" not in first + second
    steps = [line for line in first.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["1/3", "2/3", "3/3"]
    assert re.search(r"^mean reward -?\d.* over the first step, ", first, re.MULTILINE)
    assert second == "", "rank 0 speaks for all"


@pytest.mark.knob("save_interval", "ema.enabled", "ema.decay")
def test_models_and_the_average_are_saved_on_the_way(trained: Trained, demo_models: Path) -> None:
    run = trained(save_interval=1, ema__enabled=1, ema__decay=0.9)
    folders = run.directory / "checkpoints"
    assert {folder.name for folder in folders.iterdir()} == {"step-1", "step-2", "final"}
    expected = load_file(demo_models / "actor" / "model.safetensors")
    for name in ("step-1", "step-2", "final"):
        own = run.weights("actor", name)
        expected = {key: 0.9 * value + 0.1 * own[key] for key, value in expected.items()}
        average = run.weights("actor-ema", name)
        assert average.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(average[key], value, rtol=1e-5, atol=1e-6)
            assert not average[key].equal(own[key]), key
        AutoModelForCausalLM.from_pretrained(folders / name / "actor-ema")
    plain = trained()
    assert_same(run, plain)
    saved = [path.relative_to(plain.directory) for path in plain.directory.glob("checkpoints/*/*")]
    assert {str(path) for path in saved} == {"checkpoints/final/actor", "checkpoints/final/critic"}


@pytest.mark.knob("save_interval")
def test_every_second_step_is_saved_and_a_first_save_is_not_the_last(trained: Trained) -> None:
    folders = trained(run_steps=5, save_interval=2).directory / "checkpoints"
    assert {folder.name for folder in folders.iterdir()} == {"step-2", "step-4", "final"}


@pytest.mark.knob("tensorboard_path", "checkpoint_path")
@pytest.mark.knob("print_answers_interval")
def test_a_second_attempt_goes_on_in_what_the_first_wrote(
    demo_models: Path, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    places = {"checkpoint_path": shared / "models", "tensorboard_path": shared / "boards"}
    prepare(tmp_path, demo_models, run_steps=3, print_answers_interval=2, **places)
    first = train(tmp_path)
    assert first.codes == [0], first.output
    assert first.output[0].count("prompt: ") == 1, "after the second of three steps"
    prepare(tmp_path, demo_models, run_steps=5, **places)
    assert train(tmp_path, HLRLHF_ATTEMPT="1").codes == [0]
    printed = (tmp_path / "rank-0.log").read_text()
    assert printed.count("prompt: ") == 1, "none in the second, which did not ask"
    for name in ("metrics.jsonl", "samples.jsonl"):
        written = [(line["attempt"], line["step"]) for line in read_lines(tmp_path / name)]
        assert written == [(0, 1), (0, 2), (0, 3), (1, 4), (1, 5)], name
    # Several runs may share these folders.
    assert (shared / "models" / tmp_path.name / "final" / "actor").is_dir()
    assert [*(shared / "boards" / tmp_path.name).iterdir()]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_warning_to_one_rank_stops_all_with_their_models_saved(
    demo_models: Path, tmp_path: Path, number: signal.Signals
) -> None:
    prepare(tmp_path, demo_models, devices_per_node=2, mbs=2, run_steps=9999, epochs=999)
    with running(tmp_path, ranks=2, HLRLHF_JOB="7") as processes:
        metrics = tmp_path / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.read_text(), processes)
        os.kill(processes[1].pid, number)
        run = finish(tmp_path, processes)
    assert run.codes == [75, 75], run.output
    code, why = (tmp_path / "logs" / "7.0.rank").read_text().splitlines()
    assert code == "75"
    assert why.startswith("stopped early by")
    last = len(run.metrics)
    assert last >= 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step-{last}"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoints" / f"step-{last}" / "actor")


def test_an_attempt_ends_where_a_newer_one_has_begun(demo_models: Path, tmp_path: Path) -> None:
    """As when Slurm took a node for dead, whose ranks live on."""
    prepare(tmp_path, demo_models, run_steps=9999, epochs=999)
    with running(tmp_path, HLRLHF_JOB="7") as processes:
        metrics = tmp_path / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.read_text(), processes)
        Attempt(runs.Run(tmp_path), "7", 1).begin()
        written = metrics.read_bytes()
        run = finish(tmp_path, processes)
    assert run.codes == [1]
    assert "a newer attempt at this run has begun (7, attempt 1)" in run.output[0]
    # But for a step whose line was being written just then.
    assert metrics.read_bytes().count(b"\n") <= written.count(b"\n") + 1
    assert not [*(tmp_path / "checkpoints").glob("*")]


def test_a_run_directory_belongs_to_one_job(demo_models: Path, tmp_path: Path) -> None:
    """Its script submitted again by hand, or as an array."""
    prepare(tmp_path, demo_models)
    runs.Run(tmp_path).record(runs.Job("slurm", "7", None, 0))
    run = train(tmp_path, HLRLHF_JOB="8")
    assert run.codes == [1]
    assert "is the run of job 7, and this is job 8" in run.output[0]
    assert "hlrlhf submit --config" in run.output[0]
    assert not (tmp_path / "metrics.jsonl").exists()


def test_success_is_said_by_the_ranks(demo_models: Path, tmp_path: Path) -> None:
    prepare(tmp_path, demo_models, devices_per_node=2, mbs=2, run_steps=1)
    assert train(tmp_path, ranks=2, HLRLHF_JOB="7").codes == [0, 0]
    assert (tmp_path / "logs" / "7.0.rank").read_text() == "0\n"


@pytest.mark.parametrize(
    ("act", "code", "why"),
    [
        ("os.kill(os.getpid(), 9)", 137, "rank 1 was ended by SIGKILL"),
        ("sys.exit(0)", 1, "reward.function = broken:score raised SystemExit: SystemExit: 0"),
        ("os._exit(0)", 1, "RuntimeError: "),
    ],
    ids=["killed", "exited", "gone"],
)
def test_a_rank_that_ends_in_the_middle_is_a_failure_by_its_own_name(
    demo_models: Path, tmp_path: Path, act: str, code: int, why: str
) -> None:
    """Not by that of the other rank, which fails too, for want of it."""
    (tmp_path / "broken.py").write_text(
        "import os, sys\n"
        "def score(prompts, answers):\n"
        f"    if os.environ['RANK'] == '1': {act}\n"
        "    return [0.0 for _ in answers]\n"
    )
    reward = {"reward__function": "broken:score", "reward__model_weight": 0}
    prepare(tmp_path, demo_models, devices_per_node=2, mbs=2, run_steps=2, **reward)
    (tmp_path / "logs").mkdir()
    runs.Run(tmp_path).record(runs.Job("local", str(os.getpid()), None, 0))
    resolved = layers.resolve(files=[tmp_path / "settings.yaml"])

    outcome = local.run(resolved, tmp_path, os.environ | {"PYTHONPATH": str(tmp_path)})

    assert outcome.code == code
    assert outcome.why.startswith(why)
    assert not (tmp_path / "checkpoints").exists()


def broken_critic(models: Path, folder: Path) -> dict[str, Any]:
    weights = torch.load(models / "reward" / "pytorch_model.bin")
    del weights["rwtransformer.norm.weight"]
    folder.mkdir()
    torch.save(weights | {"transformer.x": torch.zeros(1)}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text((models / "reward" / "config.json").read_text())
    return {"critic__model_path": folder}


def missing_data(models: Path, folder: Path) -> dict[str, Any]:
    return {"dataset__path": [str(folder / "none.jsonl")]}


def missing_critic(models: Path, folder: Path) -> dict[str, Any]:
    # Said before the actor is read, which would fail too.
    folder.mkdir()
    return {"actor__model_path": folder, "critic__model_path": folder / "gone"}


def wrong_column(models: Path, folder: Path) -> dict[str, Any]:
    return {"dataset__prompt_column": "question"}


def no_such_function(models: Path, folder: Path) -> dict[str, Any]:
    # Said before any model is looked into.
    folder.mkdir()
    return {"reward__function": "nowhere_at_all:score", "critic__model_path": folder}


def more_ranks(models: Path, folder: Path) -> dict[str, Any]:
    return {"devices_per_node": 2, "mbs": 2}


def too_large_a_batch(models: Path, folder: Path) -> dict[str, Any]:
    return {"gbs": 512}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            broken_critic,
            r"broken: .*lacks model\.norm\.weight; it has transformer\.x, which the model has not",
        ),
        (missing_data, r"none\.jsonl: does not exist on host .*HL_DATASET_PATH"),
        (missing_critic, r"gone: does not exist on host .*HL_CRITIC_MODEL_PATH"),
        (wrong_column, r"prompts\.jsonl: has no column question; it has .*prompt"),
        (
            no_such_function,
            r"reward\.function = nowhere_at_all:score: .*No module named .*PYTHONPATH",
        ),
        (more_ranks, r"WORLD_SIZE = 1, but .*num_nodes x devices_per_node = 2"),
        (too_large_a_batch, r"256 prompts make no global batch of 512 \(HL_GBS\)"),
    ],
)
def test_one_line_says_why_a_run_cannot_be(
    changes: Callable[[Path, Path], dict[str, Any]], words: str, demo_models: Path, tmp_path: Path
) -> None:
    prepare(tmp_path, demo_models, **changes(demo_models, tmp_path / "broken"))
    assert_one_error(train(tmp_path), words)


def test_without_settings_there_is_no_run(tmp_path: Path) -> None:
    assert_one_error(train(tmp_path), r"settings\.yaml")


def test_a_taken_port_is_an_error_of_its_own(demo_models: Path, tmp_path: Path) -> None:
    prepare(tmp_path, demo_models)
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as other:
        run = train(tmp_path, port=other.getsockname()[1])
    assert_one_error(run, r"port was taken .*EADDRINUSE.*HL_MASTER_PORT")


def assert_one_error(run: Run, words: str) -> None:
    assert run.codes == [1], run.output
    (line,) = [line for line in run.output[0].splitlines() if "error" in line.lower()]
    assert re.match(rf"error: .*{words}", line), line
    assert "Traceback" not in run.output[0]


def test_by_hand_under_torchrun_on_a_terminal_and_without_a_compiler(
    demo_models: Path, tmp_path: Path
) -> None:
    prepare(tmp_path, demo_models, devices_per_node=2, mbs=2, run_steps=2, **zero(2))
    home = tmp_path / "home"
    home.mkdir()
    terminal, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    with meeting_port() as port:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
        command += [f"--master-port={port}", "-m", "hlrlhf.trainer", str(tmp_path)]
        environ = {
            "PATH": "/nowhere",
            "HOME": str(home),
            "TORCH_EXTENSIONS_DIR": str(home / "extensions"),
            "TRITON_CACHE_DIR": str(home / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(home / "inductor"),
            "OMP_NUM_THREADS": "1",
        }
        process = subprocess.Popen(
            command, env=environ, stdout=subprocess.PIPE, stderr=side, text=True
        )
        os.close(side)
        shown = read_terminal(terminal)
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, shown + printed
    assert re.search(r"\r100%.*2/2 .*reward", shown), shown
    assert "step 1/2" not in printed, "a bar or lines, not both"
    assert "actor and critic are in" in printed
    built = [path for path in home.rglob("*") if path.suffix in (".so", ".o", ".ninja", ".cpp")]
    assert not built


def read_terminal(terminal: int) -> str:
    """All that is written there until the last writer has closed it."""
    text = b""
    while True:
        try:
            text += os.read(terminal, 4096)
        except OSError:
            os.close(terminal)
            return text.decode()


def test_large_tensors_lie_in_huge_pages_where_torch_can_take_them() -> None:
    """torch reads the variable when it first takes memory, so it has to be there before."""
    asked = (
        "import os, sys; import hlrlhf.trainer.__main__; "
        "print('torch' in sys.modules, os.environ['THP_MEM_ALLOC_ENABLE'])"
    )
    for given, expected in (({}, "1"), ({"THP_MEM_ALLOC_ENABLE": "0"}, "0")):
        environ = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"} | given
        words = [sys.executable, "-c", asked]
        done = subprocess.run(words, env=environ, capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["False", expected]


@pytest.mark.parametrize("quiet", [False, True])
def test_no_log_recommends_a_mask_for_padding_after_a_text(quiet: bool) -> None:
    """It does nothing there, but GPT-2 cannot know where texts end."""
    asked = (
        "import torch, transformers; from hlrlhf.trainer import __main__; "
        f"{quiet} and __main__._quieten(); "
        "shape = {'vocab_size': 8, 'n_embd': 4, 'n_layer': 1, 'n_head': 1, 'pad_token_id': 0}; "
        "model = transformers.GPT2Model(transformers.GPT2Config(**shape)); "
        "model(torch.zeros(1, 2, dtype=torch.long))"
    )
    words = [sys.executable, "-c", asked]

    done = subprocess.run(words, capture_output=True, text=True, check=True)

    assert ("recommend passing in an `attention_mask`" in done.stderr) is not quiet
