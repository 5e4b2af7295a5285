"""PPO's functions against the papers' formulas, written token by token in float64."""

from __future__ import annotations

import math
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from storages import Made

from hlrlhf.trainer import formulas

Rows = list[list[float]]


def given(*strategies: Any) -> Any:
    """Hypothesis, with fewer examples than usual."""
    few = hypothesis.settings(max_examples=50)
    return lambda test: few(hypothesis.given(*strategies)(test))


@st.composite
def batches(draw: Any, tensors: int) -> tuple[list[int], list[Any]]:
    """Answers' lengths (0 among them), and float64 tensors [b, r] with NaN right of each answer."""
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    width = max([1, *lengths]) + draw(st.integers(0, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    made = []
    for _ in range(tensors):
        tensor = torch.randn(len(lengths), width, generator=generator, dtype=torch.float64) * 2
        tensor[~mask_of(lengths, width)] = math.nan
        made.append(tensor)
    return lengths, made


def mask_of(lengths: list[int], width: int) -> Any:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def same(tensor: Any, rows: Rows) -> bool:
    """Whether a tensor holds these rows, and zeros right of them."""
    expected = torch.zeros_like(tensor)
    for i, row in enumerate(rows):
        expected[i, : len(row)] = torch.tensor(row, dtype=tensor.dtype)
    return torch.allclose(tensor, expected, rtol=1e-10, atol=1e-10)


# 1. Log-probs.


def slow_logprob(logits: list[float], token: int, temperature: float) -> float:
    weights = [math.exp(logit / temperature) for logit in logits]
    return math.log(weights[token] / sum(weights))


@given(st.integers(1, 3), st.integers(1, 4), st.integers(2, 7), st.sampled_from([0.3, 1.0, 1.7]))
def test_token_logprobs(b: int, r: int, v: int, temperature: float) -> None:
    logits, tokens = torch.randn(b, r, v) * 3, torch.randint(v, (b, r))

    found = formulas.token_logprobs(logits, tokens, temperature)

    assert found.dtype == torch.float32
    for i in range(b):
        for t in range(r):
            slow = slow_logprob(logits[i, t].tolist(), int(tokens[i, t]), temperature)
            assert float(found[i, t]) == pytest.approx(slow, abs=2e-5)


def test_token_logprobs_of_a_fair_and_of_a_loaded_coin() -> None:
    logits = torch.tensor([[[0.0, 0.0], [math.log(3.0), 0.0]]])

    found = formulas.token_logprobs(logits, torch.tensor([[0, 1]]), 1.0)

    assert found.tolist() == [pytest.approx([math.log(1 / 2), math.log(1 / 4)])]


def test_a_temperature_of_a_half_squares_the_odds() -> None:
    logits = torch.tensor([[[math.log(3.0), 0.0]]])

    found = formulas.token_logprobs(logits, torch.tensor([[0]]), 0.5)

    assert found.item() == pytest.approx(math.log(9 / 10))


def test_token_logprobs_are_fp32_from_bf16_logits_and_survive_large_ones() -> None:
    logits = torch.tensor([[[19968.0, 19840.0, -30000.0]]], dtype=torch.bfloat16)

    found = formulas.token_logprobs(logits, torch.tensor([[0]]), 1.0)

    assert found.dtype == torch.float32
    # exp(-128) is lost in fp32, and nothing overflows.
    assert found.item() == 0.0


def plain_logprobs(logits: Any, tokens: Any, temperature: float) -> Any:
    """The formula, left to autograd."""
    return (logits / temperature).log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks of two tokens, where the vocabulary has 40 words; how many numbers that makes."""
    monkeypatch.setattr(formulas, "BLOCK", 2 * 40 * 4)
    return 2 * 40 * torch.get_num_threads()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(2, 5, 40), (3, 1, 40), (1, 1, 40), (7, 2, 3)])
@pytest.mark.usefixtures("small_blocks")
def test_the_gradient_of_log_probs_is_that_of_their_differences(
    shape: tuple[int, ...], temperature: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(shape[-1], shape[:2], generator=generator)

    def logprobs(x: Any) -> Any:
        return formulas.token_logprobs(x, tokens, temperature)

    assert torch.autograd.gradcheck(logprobs, logits)
    torch.testing.assert_close(logprobs(logits), plain_logprobs(logits, tokens, temperature))


# Exponents lie within 32 of 0, so that fp32 rounds them, what they are normalised by and what is
# divided by the temperature by 2^-20 each; where p is near 1, 1 - p is as far off as p. bf16 rounds
# the result once more, by 2^-8.
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2**-18), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.usefixtures("small_blocks")
def test_the_gradient_of_log_probs_is_that_of_the_plain_formula(
    temperature: float, in_place: bool, dtype: Any, rtol: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    wide = (torch.randn(4, 40, 9, generator=generator) * 3).to(dtype)
    # Not contiguous, and with impossible words.
    given = wide.transpose(1, 2)
    given[:, :, 7] = -math.inf
    tokens = torch.randint(8, 40, (4, 9), generator=generator)
    slopes = torch.randn(4, 9, generator=generator)
    exact = given.double().requires_grad_()
    plain_logprobs(exact, tokens, temperature).backward(slopes.double())
    leaf = given.clone().requires_grad_()

    # As it is to be expected of a head's logits, which are nobody's leaf.
    logits = leaf * 1
    found = formulas.token_logprobs(logits, tokens, temperature, in_place)
    found.backward(slopes)

    assert leaf.grad.dtype == dtype
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=rtol, atol=2**-18)
    assert (leaf.grad[:, :, 7] == 0).all()
    # Logits of somebody else are as they were; one's own have become the gradient.
    assert logits.equal(leaf.grad if in_place else leaf)


def test_a_gradient_in_place_is_taken_once_and_not_from_logits_that_are_still_needed() -> None:
    leaf, tokens = torch.randn(1, 2, 5, requires_grad=True), torch.tensor([[1, 3]])

    found = formulas.token_logprobs(leaf * 1, tokens, 1.0, in_place=True).sum()
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()

    # The hyperbolic tangent keeps its result: its gradient is made of it.
    found = formulas.token_logprobs(leaf.tanh(), tokens, 1.0, in_place=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_make_nothing_as_large_as_the_logits_but_the_gradient(
    small_blocks: int, temperature: float, dtype: Any
) -> None:
    threads = torch.get_num_threads()
    logits = torch.randn(3, 20 * threads, 40).to(dtype)
    tokens = torch.randint(40, logits.shape[:2])

    with Made() as scoring, torch.no_grad():
        formulas.token_logprobs(logits, tokens, temperature)
    assert max(scoring.sizes) <= small_blocks

    for in_place, gradients in ((False, 1), (True, 0)):
        given = logits.clone().requires_grad_()
        of_model = given * 1
        with Made(of_model) as training:
            found = formulas.token_logprobs(of_model, tokens, temperature, in_place)
            torch.autograd.grad(found.sum(), of_model)
        large = [size for size in training.sizes if size > small_blocks]
        assert large == [logits.numel()] * gradients


# 2. Divergence from the reference, and rewards.


@given(batches(2), st.sampled_from(["k1", "k2", "k3"]))
def test_kl_estimates(batch: tuple[list[int], list[Any]], estimator: str) -> None:
    lengths, (logprobs, reference) = batch

    found = formulas.kl_estimate(logprobs, reference, estimator)

    for i, length in enumerate(lengths):
        for t in range(length):
            p, q = math.exp(logprobs[i, t]), math.exp(reference[i, t])
            slow = {
                "k1": math.log(p / q),
                "k2": math.log(p / q) ** 2 / 2,
                "k3": q / p - 1 - math.log(q / p),
            }[estimator]
            assert float(found[i, t]) == pytest.approx(slow, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("estimator", "bias"), [("k1", 0.0), ("k2", 0.02), ("k3", 0.0)])
def test_estimates_average_to_the_divergence(estimator: str, bias: float) -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.4, 0.4, 0.2]).double()
    divergence = float((p * (p / q).log()).sum())

    # The mean over what p samples, exactly.
    found = float((p * formulas.kl_estimate(p.log(), q.log(), estimator)).sum())

    assert found == pytest.approx(divergence, abs=1e-12 + bias * divergence)


def test_an_estimate_beyond_all_bounds_stays_finite() -> None:
    found = formulas.kl_estimate(torch.tensor([[-500.0]]), torch.tensor([[0.0]]), "k3")

    assert torch.isfinite(found).all()


@pytest.mark.knob("ppo.kl_controller", "ppo.kl_target", "ppo.kl_horizon")
def test_the_controller_by_hand() -> None:
    fixed = formulas.KlController(0.1, None, 100)
    fixed.update(1000.0, 100)
    assert fixed.coefficient == 0.1

    adaptive = formulas.KlController(0.1, 6.0, 100)
    adaptive.update(6.6, 50)  # a tenth above: 5 % of a horizon of 10 %
    assert adaptive.coefficient == pytest.approx(0.1 * 1.05)
    adaptive.update(60.0, 50)  # far above: clipped to 20 %
    assert adaptive.coefficient == pytest.approx(0.1 * 1.05 * 1.1)
    adaptive.update(-1.0, 100)  # far below
    assert adaptive.coefficient == pytest.approx(0.1 * 1.05 * 1.1 * 0.8)


def slow_rewards(score: float, kl: list[float], kl_coefficient: float, column: int) -> list[float]:
    rewards = [-kl_coefficient * value for value in kl]
    if rewards:
        rewards[column] += score
    return rewards


@given(batches(2), st.floats(0, 1), st.integers(0, 2))
def test_token_rewards(
    batch: tuple[list[int], list[Any]], kl_coefficient: float, before_last: int
) -> None:
    lengths, (logprobs, reference) = batch
    scores = torch.linspace(-4, 4, len(lengths), dtype=torch.float64)
    kl = formulas.kl_estimate(logprobs, reference)
    mask = mask_of(lengths, kl.shape[1])
    columns = [max(0, length - 1 - before_last) for length in lengths]

    found = formulas.token_rewards(scores, kl, mask, kl_coefficient, torch.tensor(columns))

    rows = []
    for i, length in enumerate(lengths):
        k1 = [float(logprobs[i, t]) - float(reference[i, t]) for t in range(length)]
        rows.append(slow_rewards(float(scores[i]), k1, kl_coefficient, columns[i]))
    assert same(found, rows)


def test_the_score_stands_on_one_token_with_its_kl() -> None:
    kl = torch.tensor([[1.0, -2.0, 9.0], [3.0, 2.0, 9.0], [9.0, 9.0, 9.0]])
    mask = mask_of([2, 2, 0], 3)
    columns = torch.tensor([1, 0, 0])

    found = formulas.token_rewards(torch.tensor([7.0, -6.0, 4.0]), kl, mask, 0.1, columns)

    torch.testing.assert_close(
        found, torch.tensor([[-0.1, 0.2 + 7, 0.0], [-0.3 - 6, -0.2, 0.0], [0.0, 0.0, 0.0]])
    )


# 3. Advantages.


def slow_advantages(
    rewards: list[float], values: list[float], gamma: float, gae_lambda: float
) -> list[float]:
    """Equation 16 of arXiv 1506.02438: the sum over l of (gamma lambda)^l delta_{t+l}."""
    length = len(rewards)
    deltas = [
        rewards[t] + gamma * (values[t + 1] if t + 1 < length else 0.0) - values[t]
        for t in range(length)
    ]
    return [
        sum((gamma * gae_lambda) ** ahead * deltas[t + ahead] for ahead in range(length - t))
        for t in range(length)
    ]


@given(batches(2), st.floats(0, 1), st.floats(0, 1))
def test_advantages_and_returns(
    batch: tuple[list[int], list[Any]], gamma: float, gae_lambda: float
) -> None:
    lengths, (rewards, values) = batch

    advantages, returns = formulas.advantages_and_returns(
        rewards, values, mask_of(lengths, rewards.shape[1]), gamma, gae_lambda
    )

    slow, sums = [], []
    for i, length in enumerate(lengths):
        row_values = values[i, :length].tolist()
        row = slow_advantages(rewards[i, :length].tolist(), row_values, gamma, gae_lambda)
        slow.append(row)
        sums.append([a + v for a, v in zip(row, row_values, strict=True)])
    assert same(advantages, slow)
    assert same(returns, sums)


def test_advantages_by_hand() -> None:
    # delta_2 = 4 - 2 = 2; delta_1 = 1 + 2/2 - 3 = -1; A_1 = -1 + 1/4 * 2 = -1/2.
    advantages, returns = formulas.advantages_and_returns(
        torch.tensor([[1.0, 4.0]]), torch.tensor([[3.0, 2.0]]), mask_of([2], 2), 0.5, 0.5
    )

    assert advantages.tolist() == [[-0.5, 2.0]]
    assert returns.tolist() == [[2.5, 4.0]]


@given(batches(2), st.floats(0, 1))
def test_with_lambda_one_the_returns_are_the_discounted_rewards(
    batch: tuple[list[int], list[Any]], gamma: float
) -> None:
    lengths, (rewards, values) = batch

    _, returns = formulas.advantages_and_returns(
        rewards, values, mask_of(lengths, rewards.shape[1]), gamma, 1.0
    )

    assert same(
        returns,
        [
            [
                sum(gamma ** (s - t) * float(rewards[i, s]) for s in range(t, length))
                for t in range(length)
            ]
            for i, length in enumerate(lengths)
        ],
    )


# 4. Losses.


def slow_policy_loss(
    new: list[float], old: list[float], advantages: list[float], clip_range: float
) -> tuple[float, int]:
    """Equation 7 of arXiv 1707.06347, the objective turned into a loss."""
    objective, clipped = 0.0, 0
    for p, q, advantage in zip(new, old, advantages, strict=True):
        rho = math.exp(p) / math.exp(q)
        bounded = max(1 - clip_range, min(1 + clip_range, rho))
        objective += min(rho * advantage, bounded * advantage)
        clipped += bounded * advantage < rho * advantage
    return -objective, clipped


@given(batches(3), st.floats(0.01, 0.9))
def test_policy_loss(batch: tuple[list[int], list[Any]], clip_range: float) -> None:
    lengths, (new, old, advantages) = batch

    loss, clipped, ratio, kl = formulas.policy_loss(
        new, old, advantages, mask_of(lengths, new.shape[1]), clip_range
    )

    slow = [
        slow_policy_loss(
            new[i, :n].tolist(), old[i, :n].tolist(), advantages[i, :n].tolist(), clip_range
        )
        for i, n in enumerate(lengths)
    ]
    assert float(loss) == pytest.approx(sum(part for part, _ in slow), rel=1e-9, abs=1e-9)
    assert int(clipped) == sum(count for _, count in slow)
    ratios = [
        math.exp(max(-20, min(20, float(new[i, t] - old[i, t]))))
        for i, n in enumerate(lengths)
        for t in range(n)
    ]
    assert float(ratio) == pytest.approx(sum(ratios), rel=1e-9, abs=1e-9)
    divergence = sum(each - 1 - math.log(each) for each in ratios)
    assert float(kl) == pytest.approx(divergence, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped", "slope"),
    [
        (1.0, 2.0, -2.0, 0, -2.0),
        (1.5, 2.0, -2.4, 1, 0.0),  # already too likely: no more of it
        (0.5, 2.0, -1.0, 0, -1.0),
        (1.5, -2.0, 3.0, 0, 3.0),
        (0.5, -2.0, 1.6, 1, 0.0),  # already too unlikely
    ],
)
def test_policy_loss_by_hand(
    ratio: float, advantage: float, loss: float, clipped: int, slope: float
) -> None:
    new = torch.tensor([[math.log(ratio)]], requires_grad=True)

    found, count, moved, _ = formulas.policy_loss(
        new, torch.zeros(1, 1), torch.tensor([[advantage]]), mask_of([1], 1), 0.2
    )
    found.backward()

    assert found.item() == pytest.approx(loss)
    assert int(count) == clipped
    assert moved.item() == pytest.approx(ratio)
    assert new.grad.item() == pytest.approx(slope, abs=1e-6)


def test_clipping_is_counted_in_answers_only() -> None:
    new = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])

    found = formulas.policy_loss(new, torch.zeros(2, 3), torch.ones(2, 3), mask_of([2, 0], 3), 0.2)

    assert int(found.clipped) == 2
    assert found.ratio.item() == pytest.approx(2 * math.e)


def test_a_ratio_beyond_all_bounds_stays_finite() -> None:
    new = torch.tensor([[0.0]], requires_grad=True)

    loss = formulas.policy_loss(
        new, torch.tensor([[-500.0]]), torch.tensor([[-1.0]]), mask_of([1], 1), 0.2
    ).loss
    loss.backward()

    assert loss.item() == pytest.approx(math.exp(20), rel=1e-5)
    assert torch.isfinite(new.grad).all()


def slow_value_loss(
    new: list[float], old: list[float], returns: list[float], clip_range: float
) -> float:
    loss = 0.0
    for v, v_old, target in zip(new, old, returns, strict=True):
        near = max(v_old - clip_range, min(v_old + clip_range, v))
        loss += 0.5 * max((v - target) ** 2, (near - target) ** 2)
    return loss


@given(batches(3), st.floats(0.01, 2))
def test_value_loss(batch: tuple[list[int], list[Any]], clip_range: float) -> None:
    lengths, (new, old, returns) = batch

    found = formulas.value_loss(new, old, returns, mask_of(lengths, new.shape[1]), clip_range)

    slow = [
        slow_value_loss(
            new[i, :n].tolist(), old[i, :n].tolist(), returns[i, :n].tolist(), clip_range
        )
        for i, n in enumerate(lengths)
    ]
    assert float(found) == pytest.approx(sum(slow), rel=1e-9, abs=1e-9)


def test_value_loss_by_hand() -> None:
    # Moved by 1 towards its return, but counted as moved by 0.2: (0.2 - 2)^2 / 2.
    found = formulas.value_loss(
        torch.tensor([[1.0, 9.0]]),
        torch.tensor([[0.0, 9.0]]),
        torch.tensor([[2.0, -9.0]]),
        mask_of([1], 2),
        0.2,
    )

    assert found.item() == pytest.approx(1.62)


# 5. Properties of all.


@given(batches(3))
def test_padding_gets_no_gradient_and_spoils_none(batch: tuple[list[int], list[Any]]) -> None:
    lengths, tensors = batch
    mask = mask_of(lengths, tensors[0].shape[1])
    new, old, target = (torch.where(mask, tensor, 1e3) for tensor in tensors)
    impossible = torch.where(mask, tensors[0], -math.inf)
    for start, loss_of in (
        (new, lambda x: formulas.policy_loss(x, old, target, mask, 0.2).loss),
        (new, lambda x: formulas.value_loss(x, old, target, mask, 0.2)),
        # Some models give the padding token a logit of minus infinity.
        (impossible, lambda x: formulas.policy_loss(x, impossible, target, mask, 0.2).loss),
    ):
        leaf = start.clone().requires_grad_()

        loss_of(leaf).backward()

        assert torch.isfinite(leaf.grad).all()
        assert (leaf.grad[~mask] == 0).all()


@given(batches(3), st.integers(1, 3))
def test_losses_are_sums_so_micro_batches_add_up(
    batch: tuple[list[int], list[Any]], size: int
) -> None:
    lengths, tensors = batch
    mask = mask_of(lengths, tensors[0].shape[1])
    for loss_of in (
        lambda *inputs: formulas.policy_loss(*inputs, 0.2).loss,
        lambda *inputs: formulas.value_loss(*inputs, 0.2),
    ):
        whole = loss_of(*tensors, mask)
        parts = [
            loss_of(*micro)
            for micro in zip(*(x.split(size) for x in (*tensors, mask)), strict=True)
        ]

        torch.testing.assert_close(sum(parts), whole)


@given(batches(1))
def test_whitened_advantages_have_mean_0_and_variance_1(
    batch: tuple[list[int], list[Any]],
) -> None:
    lengths, (advantages,) = batch
    mask = mask_of(lengths, advantages.shape[1])
    valid = advantages[mask]
    if len(valid) < 2:
        return

    found = formulas.whiten(advantages, mask, valid.mean(), valid.var(correction=0))

    assert (found[~mask] == 0).all()
    assert float(found[mask].mean()) == pytest.approx(0, abs=1e-9)
    variance = float(valid.var(correction=0))
    # 1, but for what keeps the division from one by 0.
    whitened = variance / (variance + 1e-8)
    assert float(found[mask].var(correction=0)) == pytest.approx(whitened, rel=1e-9)


def test_whitening_equal_advantages_does_not_divide_by_zero() -> None:
    found = formulas.whiten(
        torch.full((1, 2), 3.0), mask_of([2], 2), torch.tensor(3.0), torch.zeros(())
    )

    assert found.tolist() == [[0.0, 0.0]]
