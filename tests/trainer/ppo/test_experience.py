"""Experience: what four models say of a padded rollout, against plain models row by row."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import EOS, PAD, one_rank  # noqa: F401
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from hlrlhf.trainer.decoding.decoder import sampling
from hlrlhf.trainer.decoding.plain import Plain
from hlrlhf.trainer.models import frozen, loading
from hlrlhf.trainer.ppo import experience, rollout
from hlrlhf.trainer.ppo.rewards import Rewards
from hlrlhf.trainer.ppo.scores import ModelScores

pytestmark = pytest.mark.usefixtures("one_rank")

PROMPTS = [[1, 5, 6, 7, 8, 9], [1, 30], [1, 11, 12], [1, 4]]
# One ends at once, one never, one holds a padding token of the policy's own.
ANSWERS = [[7, 8, EOS], [EOS], [13, PAD, 14, 15, EOS], [20, 21, 22, 23, 24]]
TEMPERATURE = 0.7
# fp32 sums in another order, on logits of about 10.
TOLERANCE = 2e-4


@dataclass
class Case:
    """Folders of three models, and what they say of the rollout together."""

    actor: Path
    critic: Path
    reward: Path
    flags: tuple[str, ...]

    def load(self) -> tuple[Any, Any, Any, Any]:
        """The four models with dropout in those that train, as a run has them."""
        actor = loading.load_policy(str(self.actor), "fp32", 0.3)
        # As after some updates: no longer the reference.
        torch.manual_seed(8)
        with torch.no_grad():
            for parameter in actor.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        critic = loading.load_scorer(str(self.critic), "fp32", 0.3)
        reference = loading.load_policy(str(self.actor), "fp32", 0.0).eval()
        reward = loading.load_scorer(str(self.reward), "fp32", 0.0).eval()
        actor.train()
        critic.train()
        return actor, critic, frozen.Copy(reference), frozen.Copy(reward)


@pytest.fixture(scope="module", params=tiny.WITH_POSITIONS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("models")
    return Case(
        actor=tiny.save_policy(folder / "actor", request.param),
        critic=tiny.save_step2(folder / "critic", request.param, seed=5),
        reward=tiny.save_classifier(folder / "reward", request.param, seed=6),
        flags=(f"generation.temperature={TEMPERATURE}", "mbs=2", "reward.clip=1000"),
    )


def score(case: Case, prompts: Any = PROMPTS, answers: Any = ANSWERS) -> experience.Experience:
    return score_rollout(case, tiny.rolled_out(prompts, answers))[0]


def score_rollout(case: Case, rolled_out: Any, *flags: str) -> tuple[experience.Experience, int]:
    """The experience, and how often the actor ran."""
    actor, critic, reference, reward = case.load()
    settings = tiny.settings(*case.flags, *flags)
    device = tiny.cpu(settings)
    runs: list[Any] = []
    actor.register_forward_hook(lambda *_: runs.append(None))
    # Nothing is decoded here, so no tokenizer is needed.
    scores = ModelScores(reward, None, None, "end", settings, device)
    found = experience.score(
        rolled_out,
        tiny.models(tiny.Engine(actor), tiny.Engine(critic), reference),
        Rewards([(1.0, scores)], settings),
        settings,
        kl_coefficient=0.1,
    )
    return found, len(runs)


def valid(rows: Any, found: experience.Experience) -> list[list[float]]:
    return [row[mask].tolist() for row, mask in zip(rows, found.answer_mask, strict=True)]


def near(found: list[list[float]], expected: list[list[float]]) -> bool:
    return all(
        row == pytest.approx(slow, abs=TOLERANCE) for row, slow in zip(found, expected, strict=True)
    )


@torch.no_grad()
def slow_logprobs(lm: Any) -> list[list[float]]:
    lm.eval()
    rows = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        logits = lm(torch.tensor([prompt + answer])).logits[0].double() / TEMPERATURE
        logprobs = logits.log_softmax(-1)
        rows.append([float(logprobs[len(prompt) + t - 1, token]) for t, token in enumerate(answer)])
    return rows


def test_log_probs_of_actor_and_reference(case: Case) -> None:
    actor, *_ = case.load()

    found = score(case)

    assert near(valid(found.logprobs, found), slow_logprobs(actor.lm))
    reference = AutoModelForCausalLM.from_pretrained(case.actor)
    assert near(valid(found.reference, found), slow_logprobs(reference))
    assert not found.logprobs.equal(found.reference)


@pytest.mark.knob("ppo.reuse_logprobs")
@pytest.mark.parametrize(
    ("flags", "runs"),
    [
        ((), 0),
        (("ppo.reuse_logprobs=false",), 2),
        (("ppo.epochs=2",), 2),
        (("ppo.minibatches=2",), 2),
        (("actor.dropout=0.3",), 2),
    ],
    ids=str,
)
def test_recorded_log_probs_take_the_place_of_a_forward_where_an_update_is_one_step(
    case: Case, flags: tuple[str, ...], runs: int
) -> None:
    made = tiny.rolled_out(PROMPTS, ANSWERS)
    expected, scored = score_rollout(case, made)
    assert (scored, expected.recorded) == (2, False), "nothing was recorded"
    # So that one can tell which were taken.
    recorded = expected.logprobs - made.answer_mask * 1.0

    found, count = score_rollout(case, replace(made, logprobs=recorded), *flags)

    assert (count, found.recorded) == (runs, runs == 0)
    assert found.logprobs.equal(expected.logprobs if runs else recorded)
    # The KL penalty is of the log-probs that were taken.
    assert (found.returns.equal(expected.returns)) is (runs > 0)
    assert found.values.equal(expected.values)
    assert all(part.recorded == found.recorded for part in found.split(1))


@pytest.mark.knob("generation.temperature")
@pytest.mark.parametrize(
    ("flags", "truncated"),
    [
        ((), False),
        (("top_k=5",), True),
        (("top_k=9", "top_p=0.8", "min_new_tokens=3", "temperature=1.9"), True),
        (("min_new_tokens=6", "temperature=1.9"), True),
    ],
)
def test_log_probs_are_those_of_the_distribution_that_was_sampled_from(
    case: Case, flags: tuple[str, ...], truncated: bool
) -> None:
    """Against the scores that ``generate`` drew the very tokens from.

    Truncated, they are the whole policy's: above the sampler's by the log of the mass it kept.
    """
    actor, critic, reference, _ = case.load()
    flags = ("temperature=0.7", "max_new_tokens=8", *flags)
    settings = tiny.settings("mbs=2", *(f"generation.{flag}" for flag in flags))
    device = tiny.cpu(settings)
    steps: list[Any] = []

    def generate(**arguments: Any) -> Any:
        told = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
        made = actor.lm.generate(**arguments, **told)
        steps.extend(zip(made.scores, made.logits, strict=True))
        return made.sequences

    actor.generate = generate
    torch.manual_seed(5)
    decoder = Plain(sampling(settings, None, [EOS], PAD, device), device)
    made = rollout.generate(decoder, tiny.Engine(actor), PROMPTS * 4)
    engines = (tiny.Engine(actor), tiny.Engine(critic))
    rewards = Rewards([(1.0, lambda rollout: torch.zeros(len(rollout.ended)))], settings)
    found = experience.score(made, tiny.models(*engines, reference), rewards, settings, 0.1)

    mask = made.answer_mask
    scores, logits = (torch.stack(part, 1).double() for part in zip(*steps, strict=True))
    tokens = made.sequences[:, -made.answer_width :, None]
    sampler = scores.log_softmax(-1).gather(-1, tokens).squeeze(-1)
    whole = (logits / settings.generation.temperature).softmax(-1)
    kept = (whole * scores.isfinite()).sum(-1)
    assert bool((kept[mask] < 1 - 1e-6).any()) is truncated
    expected = (sampler + kept.log())[mask]
    torch.testing.assert_close(found.logprobs.double()[mask], expected, rtol=0, atol=TOLERANCE)
    assert mask.sum() > 50


def test_scores_are_the_classifiers_own_at_the_end_of_each_answer(case: Case) -> None:
    plain = AutoModelForSequenceClassification.from_pretrained(case.reward).eval()
    # Rows come one by one: without a padding token it reads each one's last token.
    plain.config.pad_token_id = None

    found = score(case)

    with torch.no_grad():
        expected = [
            float(plain(torch.tensor([prompt + answer])).logits)
            for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
        ]
    assert found.scores.tolist() == pytest.approx(expected, abs=TOLERANCE)


def test_values_are_the_critics_before_each_token(case: Case) -> None:
    plain = loading.load_scorer(str(case.critic), "fp32", 0.0).eval().classifier
    plain.config.pad_token_id = None

    found = score(case)

    expected = []
    with torch.no_grad():
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
            # The classifier's own score of everything before the token.
            prefixes = [prompt + answer[:t] for t in range(len(answer))]
            expected.append([float(plain(torch.tensor([some])).logits) for some in prefixes])
    assert near(valid(found.values, found), expected)


def test_a_row_does_not_depend_on_its_neighbours(case: Case) -> None:
    together = score(case)

    for i in range(len(PROMPTS)):
        alone = score(case, PROMPTS[i : i + 1], ANSWERS[i : i + 1])
        for name in ("logprobs", "reference", "values", "returns"):
            row = getattr(together, name)[i][together.answer_mask[i]]
            assert row.tolist() == pytest.approx(
                getattr(alone, name)[0].tolist(), abs=5 * TOLERANCE
            )
        assert float(together.scores[i]) == pytest.approx(float(alone.scores[0]), abs=TOLERANCE)


def test_answers_of_one_token_stay_and_padding_holds_nothing(case: Case) -> None:
    found = score(case)

    assert found.answer_mask.sum(-1).tolist() == [len(answer) for answer in ANSWERS]
    assert (found.advantages[~found.answer_mask] == 0).all()
    assert (found.returns[~found.answer_mask] == 0).all()
    for rows in (found.logprobs, found.values, found.advantages, found.returns):
        assert torch.isfinite(rows).all()
    assert float(found.advantages[found.answer_mask].mean()) == pytest.approx(0, abs=1e-5)
    deviation = found.advantages[found.answer_mask].std(correction=0)
    assert float(deviation) == pytest.approx(1, rel=1e-4)


# Without models.


def assembled(
    answers: list[list[int]],
    scores: list[float],
    *flags: str,
    values: float = 0.0,
    kl_coefficient: float = 0.0,
) -> experience.Experience:
    made = tiny.rolled_out([[1, 5]] * len(answers), answers)
    shape = made.answer_mask.shape
    settings = tiny.settings(*flags)
    said = (torch.full(shape, -1.0), torch.full(shape, -1.5))
    given, rewards = torch.tensor(scores), Rewards([], settings)
    rewarded = experience.token_rewards(made, *said, given, rewards, settings, kl_coefficient)
    return experience.assemble(made, *said, torch.full(shape, values), given, rewarded, settings)


def test_the_end_token_carries_the_score() -> None:
    flags = ("ppo.gae_lambda=0", "ppo.gamma=0", "reward.clip=5")

    # With lambda and gamma 0 and no value, returns are the rewards of single tokens.
    found = assembled([[7, 8, EOS], [EOS], [7, 8, 9]], [3.0, -9.0, 2.0], *flags, kl_coefficient=0.2)

    torch.testing.assert_close(
        found.returns,
        torch.tensor([[-0.1, -0.1, 2.9], [-5.1, 0.0, 0.0], [-0.1, -0.1, 1.9]]),
    )
    assert found.scores.tolist() == [3.0, -9.0, 2.0]


def test_to_end_gets_the_score_wherever_the_reward_model_is_read() -> None:
    """Else an end would cost what comes after it, and the policy learn never to end."""
    flags = ("ppo.gae_lambda=1", "ppo.gamma=1", "ppo.whiten_advantages=false")
    answers, scores = [[7, 8, EOS], [EOS], [7, 8, 9]], [3.0, 2.0, 2.0]

    found = assembled(answers, scores, *flags, "reward.score_at=before_end")

    expected = torch.tensor([[3.0, 3.0, 3.0], [2.0, 0.0, 0.0], [2.0, 2.0, 2.0]])
    torch.testing.assert_close(found.advantages, expected)


def test_whitening_is_over_all_tokens_of_the_batch_and_returns_come_before_it() -> None:
    found = assembled([[7, EOS], [EOS]], [1.0, 4.0], values=0.5)

    # lambda 0.95, gamma 1: A = [[0.95 * 0.5, 0.5], [3.5]].
    raw = torch.tensor([0.475, 0.5, 3.5])
    torch.testing.assert_close(found.returns, torch.tensor([[0.975, 1.0], [4.0, 0.0]]))
    expected = (raw - raw.mean()) / (raw.var(correction=0) + 1e-8).sqrt()
    torch.testing.assert_close(found.advantages[found.answer_mask], expected)


def test_a_small_spread_of_large_advantages_is_not_lost() -> None:
    flags = ("ppo.gae_lambda=0", "reward.clip=5000")

    found = assembled([[EOS]] * 4, [4000.0, 4000.5, 4001.0, 4001.5], *flags)

    assert float(found.advantages.std(correction=0)) == pytest.approx(1, rel=1e-3)


@pytest.mark.knob("ppo.whiten_advantages")
def test_without_whitening_advantages_are_left_as_they_are() -> None:
    found = assembled([[7, EOS], [EOS]], [1.0, 4.0], "ppo.whiten_advantages=false", values=0.5)

    torch.testing.assert_close(found.advantages, torch.tensor([[0.475, 0.5], [3.5, 0.0]]))


@pytest.mark.knob("ppo.gamma", "ppo.gae_lambda")
@pytest.mark.parametrize(
    ("flags", "advantages"),
    [
        # Rewards 0 and 4, values 1: deltas are gamma - 1 and 3.
        (("ppo.gamma=1", "ppo.gae_lambda=1"), [3.0, 3.0]),
        (("ppo.gamma=1", "ppo.gae_lambda=0.5"), [1.5, 3.0]),
        (("ppo.gamma=0.5", "ppo.gae_lambda=1"), [1.0, 3.0]),
        (("ppo.gamma=0.5", "ppo.gae_lambda=0"), [-0.5, 3.0]),
    ],
)
def test_discount_and_lambda(flags: tuple[str, ...], advantages: list[float]) -> None:
    found = assembled([[7, EOS]], [4.0], *flags, "ppo.whiten_advantages=false", values=1.0)

    torch.testing.assert_close(found.advantages, torch.tensor([advantages]))
    torch.testing.assert_close(found.returns, found.advantages + 1)


@pytest.mark.knob("ppo.kl_estimator")
@pytest.mark.parametrize(
    ("estimator", "kl"), [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) - 1 + 0.5)]
)
def test_the_penalty_is_the_coefficient_times_the_estimate(estimator: str, kl: float) -> None:
    flags = ("ppo.gae_lambda=0", "ppo.gamma=0", f"ppo.kl_estimator={estimator}")

    found = assembled([[7, EOS]], [1.0], *flags, kl_coefficient=0.2)

    torch.testing.assert_close(found.returns, torch.tensor([[-0.2 * kl, 1 - 0.2 * kl]]))


def test_moments_are_over_valid_tokens_and_leave_leading_dimensions() -> None:
    values = torch.tensor([[[1.0, 2.0], [6.0, math.nan]], [[0.0, 0.0], [3.0, 9.0]]])
    mask = torch.tensor([[True, True], [True, False]])

    mean, variance = experience.moments(values, mask)

    assert mean.tolist() == [3.0, 1.0]
    assert variance.tolist() == [pytest.approx(14 / 3), 2.0]


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_parts_are_the_rows_in_order(size: int) -> None:
    found = assembled([[7, EOS], [EOS], [8, 9], [4, 4], [EOS]], [1.0, 2.0, 3.0, 4.0, 5.0])

    parts = list(found.split(size))

    assert [len(part.scores) for part in parts[:-1]] == [size] * (len(parts) - 1)
    for name in ("sequences", "attention_mask", "answer_mask", "advantages", "returns", "scores"):
        assert torch.cat([getattr(part, name) for part in parts]).equal(getattr(found, name))
    assert {part.answer_width for part in parts} == {2}
