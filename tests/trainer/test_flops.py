"""Operations counted from the shapes of the weights, against torch's own counter of what runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from architectures import CONFIGS
from tiny import one_rank  # noqa: F401
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hlrlhf.trainer import flops, measures
from hlrlhf.trainer.models import engine, forwards, loading, lora

PROMPT, ANSWER = 9, 6
architectures = pytest.mark.parametrize("architecture", CONFIGS)


def load(folder: Path, architecture: str) -> tuple[forwards.Policy, forwards.Scorer]:
    policy = loading.load_policy(str(tiny.save_policy(folder / "a", architecture)), "fp32", 0.0)
    scorer = loading.load_scorer(str(tiny.save_classifier(folder / "c", architecture)), "fp32", 0.0)
    for model in (policy, scorer):
        # Written out, so that the counter sees the experts' products.
        model.inner.set_experts_implementation("eager")
    return policy, scorer


def counted(model: Any, backward: bool) -> int:
    """What torch counts in a pass over one row."""
    tokens = torch.randint(3, tiny.VOCABULARY, (1, PROMPT + ANSWER))
    width = (ANSWER, 1.0) if isinstance(model, forwards.Policy) else (ANSWER,)
    # The counter knows no products that are added in place.
    named = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}  # their shapes
    counter = FlopCounterMode(display=False, custom_mapping=named)
    # Attention written out likewise; it forms all pairs, masked or not.
    with sdpa_kernel(SDPBackend.MATH), counter:
        out = model(tokens, torch.ones_like(tokens), *width)
        if backward:
            out.sum().backward()
    return int(counter.get_total_flops())


def expected(cost: flops.Cost, backward: bool) -> float:
    """Ours, for what the eager model does: all pairs, and one column of logits too many."""
    length = PROMPT + ANSWER
    numbers = torch.tensor([float(length), float(length**2), float(ANSWER + 1)])
    return float((cost.training if backward else cost.forward)(*numbers))


@architectures
@pytest.mark.parametrize("backward", [False, True])
def test_what_torch_counts(tmp_path: Path, architecture: str, backward: bool) -> None:
    for model in load(tmp_path, architecture):
        found = expected(flops.cost(model), backward)

        # Of what is looked up nothing is multiplied; the first layer's input needs no gradient.
        assert found == pytest.approx(counted(model, backward), rel=0.02)


@pytest.mark.parametrize("only", [False, True])
def test_weights_that_do_not_train_have_no_gradient_to_compute(tmp_path: Path, only: bool) -> None:
    policy, _ = load(tmp_path, "llama")
    settings = tiny.settings("lora.dim=4", f"only_optimize_lora={str(only).lower()}")
    lora.add_adapters(policy, settings)

    cost = flops.cost(policy)

    # The first of two layers has nothing below it that needs a gradient; we count it as any other.
    assert expected(cost, True) == pytest.approx(counted(policy, True), rel=0.06)
    # The adapters; the matrices that they stand beside are frozen either way.
    adapters = [p for name, p in policy.named_parameters() if lora.is_adapter(name)]
    assert cost.trainable == sum(parameter.numel() for parameter in adapters)
    assert cost.head_trainable == (not only)


@pytest.mark.usefixtures("one_rank")
def test_partitioned_weights_count_as_whole_ones(tmp_path: Path) -> None:
    policy, _ = load(tmp_path, "bloom")
    settings = tiny.settings("actor.zero_stage=3")
    expected = flops.cost(policy)

    trained = engine.trained(policy, settings.actor, settings, tiny.cpu(settings), 1)

    assert flops.cost(trained.module) == expected


def test_a_step_by_hand() -> None:
    model = flops.Cost(weights=100, trainable=100, head=10, head_trainable=True, attention=1000)
    scorer = flops.Cost(weights=50, trainable=50, head=0, head_trainable=False, attention=500)
    prompts, answers = torch.tensor([2, 1]), torch.tensor([1, 3])

    found = flops.of_step(prompts, answers, model, scorer, scorer, epochs=2)

    # Rows of 3 and 4 tokens: 7 tokens, 6 + 10 pairs, 4 logits; generation reads 2 and 3 tokens.
    generation = 2 * 100 * 5 + 1000 * (3 + 6) + 2 * 10 * 4
    policy = 2 * 100 * 7 + 1000 * 16 + 2 * 10 * 4
    score = 2 * 50 * 7 + 500 * 16
    assert float(found) == generation + 2 * policy + 2 * score + 2 * 3 * (policy + score)
    costs = (prompts, answers, model, scorer, scorer)
    assert float(found - flops.of_step(*costs, epochs=2, recorded=True)) == policy
    assert float(found - flops.of_step(*costs, epochs=2, learns_at_once=True)) == score


def test_without_a_reward_model_a_step_costs_less() -> None:
    model = flops.Cost(weights=100, trainable=0, head=0, head_trainable=False, attention=0)
    one = torch.tensor([1])

    both = [flops.of_step(one, one, model, model, reward, 1) for reward in (model, None)]

    assert float(both[0] - both[1]) == 2 * 100 * 2


def test_texts_cost_what_torch_counts(tmp_path: Path) -> None:
    policy, _ = load(tmp_path, "llama")
    tokens = torch.randint(3, tiny.VOCABULARY, (3, 20))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        policy(tokens, torch.ones_like(tokens), 19, 1.0).sum().backward()

    # Written out, attention computes all pairs, and one column of logits too many.
    found = float(flops.of_texts(3, 20, flops.cost(policy)))
    assert found == pytest.approx(counter.get_total_flops(), rel=0.15)
    assert found < counter.get_total_flops()


@pytest.mark.usefixtures("one_rank")
def test_a_step_counts_the_texts_beside_its_answers(tmp_path: Path) -> None:
    model = flops.cost(load(tmp_path, "llama")[0])
    answered = tiny.rolled_out([[1, 5], [1, 6, 7]], [[8, 9, tiny.EOS], [8, tiny.EOS]])
    flags = ("gbs=4", "ppo.epochs=2")

    plain, mixed = (
        measures.Pace(tiny.settings(*flags, *more), model, model, None)(answered, seconds=2)
        for more in ((), ("pretraining.path=/texts", "pretraining.max_tokens=20"))
    )

    assert plain["tokens_per_second"] == mixed["tokens_per_second"] == 10 / 2
    assert plain["samples_per_second"] == 4 / 2
    texts = float(flops.of_texts(8, 20, model)) / 2 / 1e12
    more = mixed["tflops_per_device"] - plain["tflops_per_device"]
    assert more == pytest.approx(texts, rel=1e-5)
