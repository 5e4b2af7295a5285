"""Evaluation: its numbers against plain models, and that it leaves no trace in the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from ranks import Run, prepare, read_lines, train
from tiny import EOS, PAD, one_rank  # noqa: F401

from hlrlhf.trainer.data.rows import Rows
from hlrlhf.trainer.decoding.decoder import sampling
from hlrlhf.trainer.decoding.plain import Plain
from hlrlhf.trainer.models import forwards, frozen, loading, lora
from hlrlhf.trainer.ppo import rollout
from hlrlhf.trainer.ppo.evaluation import Evaluation

PROMPTS = [[1, 5, 6, 7, 8, 9], [1, 30], [1, 11, 12], [1, 4], [1, 40, 41]]
FLAGS = ("generation.max_new_tokens=6", "generation.temperature=0.7", "evaluation.interval=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    vocabulary = len(tiny.tokenizer())
    path = tmp_path_factory.mktemp("policy")
    return str(tiny.save_policy(path, "llama", vocabulary=vocabulary))


def evaluation(*flags: str, prompts: Any = PROMPTS) -> Evaluation:
    settings = tiny.settings(*FLAGS, *flags)
    device = tiny.cpu(settings)
    decoder = Plain(sampling(settings, tiny.tokenizer(), [EOS], PAD, device), device)
    return Evaluation(Rows.of(prompts), decoder, settings, device)


class Scores:
    """Scores that a test can do again, the sum of an answer's tokens, and the rollouts seen."""

    def __init__(self) -> None:
        self.seen: list[rollout.Rollout] = []

    def __call__(self, made: rollout.Rollout) -> Any:
        self.seen.append(made)
        return (made.sequences[:, -made.answer_width :] * made.answer_mask).sum(-1).float()

    def rows(self) -> list[tuple[list[int], list[int]]]:
        """Prompt and answer of every row."""
        found = []
        for made in self.seen:
            for row, attended, mask in zip(
                made.sequences, made.attention_mask.bool(), made.answer_mask, strict=True
            ):
                width = made.answer_width
                prompt = row[:-width][attended[:-width]].tolist()
                found.append((prompt, row[-width:][mask].tolist()))
        return found


@torch.no_grad()
def logprob(module: forwards.Policy, prompt: list[int], answer: list[int]) -> float:
    """Of a whole answer, by the plain model without padding."""
    logits = module.lm(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
    logprobs = (logits / 0.7).log_softmax(-1)
    return float(logprobs.gather(-1, torch.tensor(answer)[:, None]).sum())


def policy(folder: str) -> forwards.Policy:
    return loading.load_policy(folder, "fp32", 0.3)


def reference(folder: str) -> frozen.Copy:
    return frozen.Copy(policy(folder).eval())


def moved(module: forwards.Policy) -> forwards.Policy:
    """As after some updates."""
    torch.manual_seed(8)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return module


@pytest.mark.usefixtures("one_rank")
def test_the_numbers_by_plain_models(folder: str) -> None:
    tokenizer = tiny.tokenizer()
    actor, plain = policy(folder), policy(folder).eval()
    # Three rollouts, the last of one row.
    evaluate = evaluation("gbs=2", "mbs=1")
    first, scores = Scores(), Scores()

    start, before = evaluate(0, tiny.Engine(actor), frozen.Copy(plain), first)
    moved(actor)
    found, records = evaluate(2, tiny.Engine(actor), frozen.Copy(plain), scores)

    assert [len(made.sequences) for made in scores.seen] == [2, 2, 1]
    assert [prompt for prompt, _ in scores.rows()] == PROMPTS
    actor.eval()
    for numbers, shown, kept, module in (
        (start, before, first.rows(), plain),
        (found, records, scores.rows(), actor),
    ):
        kl = [logprob(module, *row) - logprob(plain, *row) for row in kept]
        sums = [sum(answer) for _, answer in kept]
        assert numbers["evaluation_kl"] == pytest.approx(sum(kl) / 5, abs=1e-3)
        assert numbers["evaluation_reward"] == pytest.approx(sum(sums) / 5)
        length = sum(len(answer) for _, answer in kept) / 5
        assert numbers["evaluation_length"] == pytest.approx(length)
        ended = sum(answer[-1] == EOS for _, answer in kept) / 5
        assert numbers["evaluation_ended"] == pytest.approx(ended)
        assert [record["score"] for record in shown] == sums
        texts = [(tokenizer.decode(prompt), tokenizer.decode(answer)) for prompt, answer in kept]
        assert [(record["prompt"], record["answer"]) for record in shown] == texts
    assert abs(found["evaluation_kl"]) > 0.1

    # The reference's are those from before the actor moved, and stay.
    assert [r["answer"] for r in records] != [r["answer"] for r in before]
    for record, old in zip(records, before, strict=True):
        assert record["reference_answer"] == old["answer"] == old["reference_answer"]
        assert record["reference_score"] == old["score"]
    for name in ("reward", "length"):
        assert found[f"evaluation_reference_{name}"] == start[f"evaluation_{name}"]


@pytest.mark.usefixtures("one_rank")
def test_a_reference_that_is_the_actor_without_its_adapters(folder: str) -> None:
    def adapted() -> tiny.Engine:
        """The same each time; the base has moved too, so that the two differ by adapters alone."""
        torch.manual_seed(7)
        actor = policy(folder)
        lora.add_adapters(actor, tiny.settings("lora.dim=2", "only_optimize_lora=true"))
        return tiny.Engine(moved(actor))

    plain = forwards.Policy(adapted().module.lm.unload()).eval()
    actor = adapted()

    found, _ = evaluation()(0, actor, frozen.WithoutAdapters(actor), Scores())

    expected, _ = evaluation()(0, adapted(), frozen.Copy(plain), Scores())
    assert found["evaluation_kl"] == pytest.approx(expected["evaluation_kl"], abs=1e-4)
    assert abs(found["evaluation_kl"]) > 0.01


@pytest.mark.usefixtures("one_rank")
def test_the_same_random_numbers_each_time_and_none_taken_from_the_run(folder: str) -> None:
    actor = tiny.Engine(policy(folder))
    evaluate = evaluation()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    runs = [evaluate(step, actor, reference(folder), Scores()) for step in range(2)]
    assert torch.rand(4).equal(expected)
    assert runs[0] == runs[1]
    other = evaluation("seed=2")(0, actor, reference(folder), Scores())
    assert other[1] != runs[0][1]


@pytest.mark.knob("evaluation.interval")
def test_before_the_first_every_so_many_and_after_the_last() -> None:
    assert [step for step in range(6) if evaluation().due(step, 5)] == [0, 2, 4, 5]
    never = evaluation("evaluation.interval=0")
    assert not any(never.due(step, 5) for step in range(6))


TRAINING = ("reward", "kl", "length", "ended", "value", "return", "actor_loss", "critic_loss")


@pytest.mark.slow
def test_a_run_trains_the_same_with_and_without(demo_models: Path, tmp_path: Path) -> None:
    """To the last bit, sampling, on two ranks under ZeRO-3."""
    changes = {"devices_per_node": 2, "mbs": 2, "generation__top_k": 0}
    changes |= {"actor__zero_stage": 3, "critic__zero_stage": 3, "actor__dropout": 0.1}
    with_it = {"evaluation__interval": 2, "evaluation__path": held_out(tmp_path, 7)}
    runs = []
    for name, more in (("with", with_it), ("without", {})):
        prepare(tmp_path / name, demo_models, **changes, **more)
        runs.append(train(tmp_path / name, ranks=2))
        assert runs[-1].codes == [0, 0], runs[-1].output
    evaluated, plain = runs

    before, *steps = evaluated.metrics
    assert before["step"] == 0
    for step, expected in zip(steps, plain.metrics, strict=True):
        assert {name: step[name] for name in TRAINING} == {
            name: expected[name] for name in TRAINING
        }
        assert ("evaluation_reward" in step) is (step["step"] in (2, 3))
        assert "evaluation_reward" not in expected
    for role in ("actor", "critic"):
        weights = plain.weights(role)
        assert all(value.equal(weights[name]) for name, value in evaluated.weights(role).items())
    lines = read_lines(evaluated.directory / "evaluations.jsonl")
    assert [line["step"] for line in lines] == [0] * 7 + [2] * 7 + [3] * 7
    assert {line["prompt"] for line in lines[:7]} == {line["prompt"] for line in lines[7:14]}
    assert not (plain.directory / "evaluations.jsonl").exists()


@pytest.mark.slow
def test_the_numbers_do_not_depend_on_the_ranks(demo_models: Path, tmp_path: Path) -> None:
    """Seven prompts on two ranks, rollouts of four rows, ZeRO-3: one row stands in and is left out.

    The likeliest answers, as sampled ones would differ; out of the training prompts.
    """
    common: dict[str, Any] = {"evaluation__interval": 3, "evaluation__prompts": 7, "mbs": 2}
    # Above nearly all gradients: weights move in proportion to them, roundings included.
    common |= {"optimizer__epsilon": 1e-2}
    stages = {"actor__zero_stage": 3, "critic__zero_stage": 3}
    runs: list[Run] = []
    for ranks, more in ((1, {}), (2, stages | {"devices_per_node": 2, "gbs": 4})):
        directory = tmp_path / str(ranks)
        prepare(directory, demo_models, run_steps=1, **common, **more)
        runs.append(train(directory, ranks))
        assert runs[-1].codes == [0] * ranks, runs[-1].output
    alone, spread = (run.metrics[0] for run in runs)
    for name, value in alone.items():
        if name.startswith("evaluation_"):
            assert spread[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    texts = [
        [(line["prompt"], line["answer"]) for line in evaluations(run) if line["step"] == 0]
        for run in runs
    ]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 7


def evaluations(run: Run) -> list[dict[str, Any]]:
    return read_lines(run.directory / "evaluations.jsonl")


def held_out(folder: Path, count: int) -> Path:
    path = folder / "held-out.jsonl"
    rows = [{"prompt": f"Human: What is {i} and {i}?\n\nAssistant:"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
