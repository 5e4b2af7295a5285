"""What must not change the gradient: how the same rows are laid out and computed.

With `tiny.DESCENT` weights move by a constant times the gradient, through the whole engine. `pytest
-rP tests/test_invariance.py` prints what was measured; tests/test_trainer.py has the same for whole
runs on one and two ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import PAD, one_rank  # noqa: F401
from torch.nn.functional import pad
from updates import TEXTS, made

from hlrlhf.trainer.data import reading
from hlrlhf.trainer.data.rows import Rows
from hlrlhf.trainer.models import chunks, engine, loading
from hlrlhf.trainer.ppo.experience import Experience
from hlrlhf.trainer.ppo.pretraining import Mix
from hlrlhf.trainer.ppo.update import update

pytestmark = pytest.mark.usefixtures("one_rank")

# Of each model's gradient, relative to its norm, and of each loss: in fp32 a hundred operations on
# either side, each off by up to 2^-24, make 1.2e-5, and the gradient's cancellations and the weight
# that it is read from some more.
TOLERANCE = 5e-5


def padded_more(left: int, right: int) -> Any:
    """More columns of padding on either side; what stands there is no number where that can be."""

    def change(found: Experience) -> Experience:
        values: dict[str, Any] = {"scores": found.scores}
        for name in ("sequences", "attention_mask"):
            fill = PAD if name == "sequences" else 0
            values[name] = pad(getattr(found, name), (left, right), value=fill)
        for name in ("logprobs", "values", "reference", "advantages", "returns"):
            values[name] = pad(getattr(found, name), (0, right), value=float("nan"))
        values["answer_mask"] = pad(found.answer_mask, (0, right), value=False)
        return Experience(**values)

    return change


def reordered(found: Experience) -> Experience:
    order = torch.tensor([2, 0, 3, 1])
    return Experience(**{name: value[order] for name, value in found.tensors().items()})


def with_rows_without_answer(found: Experience) -> Experience:
    """As many rows again, with prompts alone: all mask."""
    doubled = {name: torch.cat([value, value]) for name, value in found.tensors().items()}
    doubled["answer_mask"][len(found.scores) :] = False
    return Experience(**doubled)


def measured(
    folder: Path, architecture: str, change: Any, *flags: str, **options: Any
) -> tuple[dict[str, float], dict[str, Any]]:
    """Losses, and by how much each model's weights move, as one vector for each."""
    settings = tiny.settings(
        "mbs=4",
        *tiny.DESCENT,
        "pretraining.path=/texts",
        "pretraining.max_tokens=4",
        "pretraining.coefficient=0.3",
        *flags,
    )
    cpu = tiny.cpu(settings)
    policy = tiny.save_policy(folder / "a", architecture, **options)
    actor = loading.load_policy(str(policy), "fp32", 0.0, settings.ppo.logprob_chunk)
    critic = loading.load_scorer(str(tiny.save_classifier(folder / "c", architecture)), "fp32", 0.0)
    trained = []
    for model, own in ((actor, settings.actor), (critic, settings.critic)):
        if own.cp_act:
            model.inner.gradient_checkpointing_enable({"use_reentrant": False})
        trained.append(engine.trained(model, own, settings, cpu, updates=10))
    before = [engine.whole_weights(model) for model in trained]
    mix = Mix(reading.Prompts(Rows.of(TEXTS), seed=1), settings, cpu)
    told, whole = update(change(made(settings)), tiny.models(*trained), mix, settings)
    assert whole
    moved = {}
    for role, model, start in zip(("actor", "critic"), trained, before, strict=True):
        weights = engine.whole_weights(model)
        moved[role] = torch.cat([(weights[name] - start[name]).flatten() for name in start])
    return {name: float(total / weight) for name, (total, weight) in told.items()}, moved


def same(found: Experience) -> Experience:
    return found


CASES = {
    "micro batches of 1": (same, ["mbs=1"]),
    "micro batches of 2": (same, ["mbs=2"]),
    "micro batches of 1 as wide as all": (same, ["mbs=1", "ppo.trim=false"]),
    "micro batches of 2 as wide as all": (same, ["mbs=2", "ppo.trim=false"]),
    # One rank alone goes without these two, unless the optimizer's states lie elsewhere.
    "ZeRO 1": (same, ["actor.zero_stage=1", "critic.zero_stage=1", "optimizer.offload=1"]),
    "ZeRO 2": (same, ["actor.zero_stage=2", "critic.zero_stage=2", "optimizer.offload=1"]),
    "ZeRO 3": (same, ["actor.zero_stage=3", "critic.zero_stage=3"]),
    "7 columns more on the left": (padded_more(7, 0), ["ppo.trim=false"]),
    "5 columns more on the right": (padded_more(0, 5), ["ppo.trim=false"]),
    "12 columns more that are cut": (padded_more(7, 5), []),
    "another order of rows": (reordered, []),
    "rows without an answer": (with_rows_without_answer, ["mbs=8", "gbs=8"]),
    "activation checkpointing": (same, ["actor.cp_act=1", "critic.cp_act=1"]),
    "log-probs in chunks of 2": (same, ["ppo.logprob_chunk=2"]),
}


def furthest(found: Any, expected: Any) -> float:
    """The largest difference between what `measured` gave, relative."""
    (losses, moved), (expected_losses, expected_moved) = found, expected
    differences = [
        float((moved[role] - value).norm() / value.norm()) for role, value in expected_moved.items()
    ]
    differences += [
        abs(losses[name] - value) / abs(value) for name, value in expected_losses.items() if value
    ]
    return max(differences)


@pytest.mark.knob("actor.cp_act", "critic.cp_act", "actor.zero_stage", "critic.zero_stage")
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_does_not_change_with(tmp_path: Path, case: str, architecture: str) -> None:
    change, flags = CASES[case]
    expected = measured(tmp_path, architecture, same)

    found = measured(tmp_path, architecture, change, *flags)

    print(f"{case}, {architecture}: {furthest(found, expected):.1e}")
    assert furthest(found, expected) == pytest.approx(0, abs=TOLERANCE)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("flags", [[], ["actor.cp_act=1"]], ids=str)
def test_the_gradient_does_not_change_where_weights_are_brought_together(
    tmp_path: Path, flags: list[str], architecture: str
) -> None:
    """Of matrices that are large enough for ZeRO-3 to partition."""
    options = tiny.WIDE[architecture]
    expected = measured(tmp_path, architecture, same, **options)

    found = measured(tmp_path, architecture, same, "actor.zero_stage=3", *flags, **options)

    assert furthest(found, expected) == pytest.approx(0, abs=TOLERANCE)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_gradient_does_not_change_with_chunks_of_a_partitioned_head(
    tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of its weights, not of calls, which gather them.
    monkeypatch.delattr(chunks, "apply")
    flags, options = ("actor.zero_stage=3",), tiny.WIDE[architecture]
    expected = measured(tmp_path, architecture, same, *flags, **options)

    found = measured(tmp_path, architecture, same, *flags, "ppo.logprob_chunk=2", **options)

    assert furthest(found, expected) == pytest.approx(0, abs=TOLERANCE)
