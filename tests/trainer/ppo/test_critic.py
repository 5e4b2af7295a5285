"""A critic that learns in the pass that gives its values: what it does in another one after it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import one_rank  # noqa: F401
from updates import ANSWERS, PROMPTS

from hlrlhf.trainer.models import engine, frozen, loading
from hlrlhf.trainer.ppo import experience
from hlrlhf.trainer.ppo.experience import Experience
from hlrlhf.trainer.ppo.rewards import Rewards
from hlrlhf.trainer.ppo.update import update

pytestmark = pytest.mark.usefixtures("one_rank")

# Relative; fp32 sums of some hundred numbers, the gradient's in another order.
TOLERANCE = {"rtol": 0, "atol": 5e-5}
SCORES = torch.tensor([1.0, -2.0, 0.5, 3.0])


class Case:
    """Real engines, of which a step moves weights in proportion to their gradient."""

    def __init__(self, folder: Path, *flags: str):
        self.settings = tiny.settings(
            "mbs=2",
            *tiny.DESCENT,
            "ppo.kl_coefficient=0.3",
            "ppo.gae_lambda=0.9",
            *flags,
        )
        cpu = tiny.cpu(self.settings)
        actor = loading.load_policy(str(tiny.save_policy(folder / "a", "llama")), "fp32", 0.0)
        critic = loading.load_scorer(str(tiny.save_classifier(folder / "c", "llama")), "fp32", 0.0)
        reference = str(tiny.save_policy(folder / "r", "llama", seed=4))
        self.runs: list[Any] = []
        critic.register_forward_hook(lambda *_: self.runs.append(None))
        if self.settings.critic.cp_act:
            critic.inner.gradient_checkpointing_enable({"use_reentrant": False})
        self.actor, self.critic = (
            engine.trained(model, own, self.settings, cpu, updates=10)
            for model, own in ((actor, self.settings.actor), (critic, self.settings.critic))
        )
        copy = frozen.Copy(loading.load_policy(reference, "fp32", 0.0).eval())
        self.models = tiny.models(self.actor, self.critic, copy)

    def step(self, learn: bool, scores: torch.Tensor = SCORES) -> tuple[Experience, Any, bool]:
        """The experience, what the update tells, and whether all of it was applied."""
        rewards = Rewards([(1.0, lambda _: scores)], self.settings)
        found = experience.score(
            tiny.rolled_out(PROMPTS, ANSWERS), self.models, rewards, self.settings, 0.3, learn
        )
        return found, *update(found, self.models, None, self.settings)

    def weights(self) -> Any:
        models = (self.actor, self.critic)
        return [torch.cat([v.flatten() for v in engine.whole_weights(m).values()]) for m in models]


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["mbs=1"],
        ["mbs=4", "ppo.trim=false"],
        ["critic.cp_act=1"],
        ["critic.zero_stage=3", "mbs=1"],
        ["ppo.value_clip_range=0.001"],
        ["ppo.whiten_advantages=false", "ppo.gamma=0.9"],
    ],
    ids=" ".join,
)
def test_it_learns_what_it_would_in_another_pass(tmp_path: Path, flags: list[str]) -> None:
    case = Case(tmp_path / "1", *flags)
    before = case.weights()
    expected, expected_told, _ = case.step(learn=False)
    expected_moved = [after - start for after, start in zip(case.weights(), before, strict=True)]
    micros = len(PROMPTS) // case.settings.mbs
    assert len(case.runs) == 2 * micros

    case = Case(tmp_path / "2", *flags)
    found, told, applied = case.step(learn=True)

    assert applied
    assert len(case.runs) == micros
    mask = expected.answer_mask
    for name, value in expected.tensors().items():
        other = found.tensors()[name]
        if value.shape == mask.shape:
            value, other = value[mask], other[mask]
        torch.testing.assert_close(other, value, msg=name, **TOLERANCE)
    moved = [after - start for after, start in zip(case.weights(), before, strict=True)]
    for one, other in zip(moved, expected_moved, strict=True):
        assert float((one - other).norm() / other.norm()) == pytest.approx(0, abs=5e-5)
    for name, (total, weight) in expected_told.items():
        assert float(told[name][0] / told[name][1]) == pytest.approx(
            float(total / weight), rel=5e-5, abs=1e-6
        )


@pytest.mark.parametrize("score", [math.nan, math.inf])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_it_learns_nothing_where_a_number_is_not_finite(
    tmp_path: Path, score: float, stage: int
) -> None:
    case = Case(tmp_path, f"critic.zero_stage={stage}")
    before = case.weights()[1]

    found, _, applied = case.step(True, SCORES.index_fill(0, torch.tensor([2]), score))

    assert found.learnt is not None
    assert not found.learnt.applied
    assert not applied
    assert case.weights()[1].equal(before)
    assert case.step(True)[2], "the next step is none the worse"
    assert not case.weights()[1].equal(before)


@pytest.mark.knob("ppo.reuse_values")
def test_it_does_in_one_optimizer_step_without_dropout() -> None:
    def learns(*flags: str) -> bool:
        at_once: bool = tiny.settings(*flags).critic_learns_at_once
        return at_once

    assert learns()
    assert learns("actor.dropout=0.1")
    others = ("ppo.reuse_values=false", "ppo.epochs=2", "ppo.minibatches=2", "critic.dropout=0.1")
    assert not any(map(learns, others))
