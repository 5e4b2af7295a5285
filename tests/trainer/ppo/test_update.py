"""The update with DeepSpeed's engines against plain torch, the formulas written row by row."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import one_rank  # noqa: F401
from updates import ANSWERS, PROMPTS, TEXTS, load, made, settings_with

from hlrlhf.trainer.data import reading
from hlrlhf.trainer.data.rows import Rows
from hlrlhf.trainer.models import engine
from hlrlhf.trainer.models.ema import Average
from hlrlhf.trainer.ppo.pretraining import Mix
from hlrlhf.trainer.ppo.update import update

pytestmark = pytest.mark.usefixtures("one_rank")

# AdamW divides small gradients by their own size, so rounding shows.
TOLERANCE = {"rtol": 1e-3, "atol": 2e-5}


def updated(
    folder: Path, *flags: str, change: Callable[[Any, Any], Any] = lambda found, actor: found
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights after an update, and what it told of itself."""
    settings = settings_with(*flags)
    cpu = tiny.cpu(settings)
    actor, critic = (
        engine.trained(model, own, settings, cpu, updates=10)
        for model, own in zip(load(folder), (settings.actor, settings.critic), strict=True)
    )
    mix = (
        Mix(reading.Prompts(Rows.of(TEXTS), seed=1), settings, cpu)
        if settings.pretraining.path
        else None
    )
    found = change(made(settings), actor)
    told, whole = update(found, tiny.models(actor, critic), mix, settings)
    assert whole
    weights = {f"actor.{name}": value for name, value in engine.whole_weights(actor).items()}
    weights |= {f"critic.{name}": value for name, value in engine.whole_weights(critic).items()}
    return weights, {name: float(total / weight) for name, (total, weight) in told.items()}


def slowly_updated(folder: Path, *flags: str) -> dict[str, Any]:
    """The same with plain AdamW, every sequence alone and without padding."""
    settings = settings_with(*flags)
    ppo, found = settings.ppo, made(settings)
    actor, critic = load(folder)
    optimizers = [
        torch.optim.AdamW(model.parameters(), own.learning_rate, (0.9, 0.95), 1e-3, weight_decay=0)
        for model, own in ((actor, settings.actor), (critic, settings.critic))
    ]
    order = [TEXTS[i] for i in reading.Prompts(Rows.of(TEXTS), seed=1).batch(0, 4 * ppo.epochs)]
    rows = len(PROMPTS) // ppo.minibatches
    for start in [*range(0, len(PROMPTS), rows)] * ppo.epochs:
        losses, errors, count = [], [], 0
        for i in range(start, start + rows):
            tokens = torch.tensor([PROMPTS[i] + ANSWERS[i]])
            first, n = len(PROMPTS[i]), len(ANSWERS[i])
            logits = actor.lm(tokens).logits[0] / settings.generation.temperature
            hidden = critic.classifier.model(tokens).last_hidden_state
            values = critic.classifier.score(hidden)[0, :, 0]
            for t in range(n):
                logprob = logits[first + t - 1].log_softmax(-1)[ANSWERS[i][t]]
                ratio = (logprob - found.logprobs[i, t]).exp()
                clipped = ratio.clamp(1 - ppo.clip_range, 1 + ppo.clip_range)
                advantage, target = found.advantages[i, t], found.returns[i, t]
                losses.append(torch.maximum(-advantage * ratio, -advantage * clipped))
                value, old = values[first + t - 1], found.values[i, t]
                near = old + (value - old).clamp(-ppo.value_clip_range, ppo.value_clip_range)
                errors.append(torch.maximum((value - target) ** 2, (near - target) ** 2) / 2)
                count += 1
        loss = sum(losses) / count
        if settings.pretraining.path:
            taken, order = order[:rows], order[rows:]
            texts = [actor.lm(torch.tensor([text])).logits[0].log_softmax(-1) for text in taken]
            nll = [
                -logprobs[t, text[t + 1]]
                for logprobs, text in zip(texts, taken, strict=True)
                for t in range(3)
            ]
            loss = loss + settings.pretraining.coefficient * sum(nll) / len(nll)
        for optimizer, each in zip(optimizers, (loss, sum(errors) / count), strict=True):
            optimizer.zero_grad()
            each.backward()
            optimizer.step()
    weights = {f"actor.{name}": value for name, value in actor.state_dict().items()}
    return weights | {f"critic.{name}": value for name, value in critic.state_dict().items()}


CHANGES = [
    (),
    ("ppo.epochs=2",),
    ("ppo.minibatches=2",),
    ("ppo.epochs=2", "ppo.minibatches=4"),
    ("ppo.clip_range=0.9",),
    ("ppo.value_clip_range=1.5",),
    ("pretraining.path=/texts", "pretraining.coefficient=0.5"),
    ("pretraining.path=/texts", "pretraining.coefficient=2", "ppo.minibatches=2", "ppo.epochs=2"),
]


@pytest.mark.knob(
    "ppo.epochs",
    "ppo.minibatches",
    "ppo.clip_range",
    "ppo.value_clip_range",
    "pretraining.path",
    "pretraining.coefficient",
)
@pytest.mark.parametrize("flags", CHANGES, ids=" ".join)
def test_an_update_is_that_of_plain_torch(tmp_path: Path, flags: tuple[str, ...]) -> None:
    found, _ = updated(tmp_path, *flags)

    expected = slowly_updated(tmp_path, *flags)

    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach(), msg=name, **TOLERANCE)
    if flags:
        plain, _ = updated(tmp_path)
        moved = [float((found[name] - plain[name]).abs().max()) for name in plain]
        assert max(moved) > 10 * TOLERANCE["atol"]


@pytest.mark.knob("mbs")
@pytest.mark.parametrize(
    "flags",
    [("mbs=4",), ("mbs=2",), ("actor.zero_stage=3", "critic.zero_stage=2", "mbs=2")],
    ids=" ".join,
)
def test_micro_batches_and_stages_do_not_show(tmp_path: Path, flags: tuple[str, ...]) -> None:
    common = ("pretraining.path=/texts", "pretraining.coefficient=0.5")
    expected, told = updated(tmp_path, *common)

    found, same = updated(tmp_path, *common, *flags)

    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name, **TOLERANCE)
    assert same == pytest.approx(told, rel=1e-4)


def test_what_an_update_tells(tmp_path: Path) -> None:
    _, told = updated(tmp_path, "pretraining.path=/texts", "actor.learning_rate=1e-30")

    actor, _ = load(tmp_path)
    found = made(settings_with())
    mask = found.answer_mask
    with torch.no_grad():
        logprobs = actor(found.sequences, found.attention_mask, found.answer_width, 1.0)
        texts = actor(torch.tensor(TEXTS), torch.ones(4, 4, dtype=torch.long), 3, 1.0)
    ratio = (logprobs - found.logprobs)[mask].exp()
    free, held = -found.advantages[mask] * ratio, -found.advantages[mask] * ratio.clamp(0.8, 1.2)
    assert told["ratio"] == pytest.approx(float(ratio.mean()), rel=1e-4)
    assert told["update_kl"] == pytest.approx(float((ratio - 1 - ratio.log()).mean()), rel=1e-4)
    assert told["actor_loss"] == pytest.approx(float(torch.maximum(free, held).mean()), rel=1e-4)
    assert told["clip_fraction"] == pytest.approx(float((held > free).float().mean()))
    assert told["pretraining_loss"] == pytest.approx(-float(texts.mean()), rel=1e-4)


def sampled(recorded: bool, off: float = 0.0) -> Callable[[Any, Any], Any]:
    """Experience with the log-probs of the actor itself, off by so much on every other token."""

    def change(found: Any, actor: Any) -> Any:
        with torch.no_grad():
            own = actor(found.sequences, found.attention_mask, found.answer_width, 1.0)
        shift = off * (torch.arange(own.shape[1]) % 2)
        logprobs = torch.where(found.answer_mask, own + shift, 0)
        return dataclasses.replace(found, logprobs=logprobs, recorded=recorded)

    return change


def test_recorded_log_probs_teach_what_scored_ones_do(tmp_path: Path) -> None:
    expected, scored = updated(tmp_path, change=sampled(recorded=False))

    found, told = updated(tmp_path, change=sampled(recorded=True))

    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name, **TOLERANCE)
    # The actor's loss is 0 but for the ratio, in which two forwards round a log-prob of up to about
    # 10 apart: by some 10 epsilons of it, 1e-5.
    assert told.pop("actor_loss") == pytest.approx(scored.pop("actor_loss"), abs=2e-5)
    assert told == pytest.approx(scored, rel=1e-4, abs=1e-6)


def test_how_recorded_log_probs_are_off_is_shown_and_not_learnt(tmp_path: Path) -> None:
    """0.3 is more than the clip range: the tokens would give no gradient, or another one."""
    expected, scored = updated(tmp_path, change=sampled(recorded=True))

    found, told = updated(tmp_path, change=sampled(recorded=True, off=0.3))

    for name, value in expected.items():
        assert found[name].equal(value), name
    assert told["actor_loss"] == scored["actor_loss"]
    assert told["clip_fraction"] == 0
    tokens = [t % 2 for answer in ANSWERS for t in range(len(answer))]
    share = sum(tokens) / len(tokens)
    assert told["ratio"] == pytest.approx(1 + share * (math.exp(-0.3) - 1), rel=1e-4)
    assert told["update_kl"] == pytest.approx(share * (math.exp(-0.3) - 1 + 0.3), rel=1e-3)
    learnt, _ = updated(tmp_path, change=sampled(recorded=False, off=0.3))
    moved = max(float((learnt[name] - expected[name]).abs().max()) for name in learnt)
    assert moved > 10 * TOLERANCE["atol"]


def test_an_average_takes_in_each_step_that_was_taken(tmp_path: Path) -> None:
    settings = settings_with("mbs=2", "ppo.epochs=2", "ppo.minibatches=2")
    cpu = tiny.cpu(settings)
    actor, critic = (
        engine.trained(model, own, settings, cpu, updates=10)
        for model, own in zip(load(tmp_path), (settings.actor, settings.critic), strict=True)
    )
    taken = []

    class Recorded(Average):
        def update(self) -> None:
            taken.append(engine.whole_weights(actor)["lm.lm_head.weight"])

    found = made(settings)
    models = tiny.models(actor, critic, average=Recorded(actor, 0.5))
    _, whole = update(found, models, None, settings)
    assert whole
    assert len(taken) == 4
    assert all(not one.equal(next_) for one, next_ in itertools.pairwise(taken))
    taken.clear()

    spoiled = found.advantages.index_fill(0, torch.tensor([3]), math.inf)
    spoiled = dataclasses.replace(found, advantages=spoiled)
    _, whole = update(spoiled, models, None, settings)
    assert not whole
    assert len(taken) == 2, "the first half of the rows, twice"
