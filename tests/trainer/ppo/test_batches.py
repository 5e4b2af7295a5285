"""Which rows share a micro batch, how wide it is, and that neither shows in what comes back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from ranks import together
from tiny import EOS, PAD, one_rank  # noqa: F401

from hlrlhf.trainer.models import engine, frozen, loading, lora
from hlrlhf.trainer.models.adapted import Adapted
from hlrlhf.trainer.ppo import batches, experience, rollout
from hlrlhf.trainer.ppo.rewards import Rewards
from hlrlhf.trainer.ppo.scores import ModelScores
from hlrlhf.trainer.ppo.update import update

pytestmark = pytest.mark.usefixtures("one_rank")

# fp32 sums in another order, on logits of about 10.
TOLERANCE = 2e-4

# The longest prompt, which has no padding, gets the shortest answer.
PROMPTS = [[1, 30], [1, 5, 6, 7, 8, 9, 10, 11], [1, 11, 12], [1, 4], [1, 20, 21, 22, 23], [1, 9]]
ANSWERS = [[7, 8, EOS], [EOS], [13, 14, 15, 16, EOS], [9, EOS], [20, 21, 22, 23, 24, 25], [8, EOS]]
# Of the sorted rows: 11 and 9 tokens, 8 and 5, 4 and 4; texts and answers as wide as the longest.
ROWS = [[4, 1], [2, 0], [3, 5]]
WIDTHS = [(11, 6), (8, 5), (4, 2)]


def cut(prompts: list[int], answers: list[int], *flags: str, multiple: int = 1) -> Any:
    """Rows, and widths of texts and answers, of each micro batch of texts of these lengths."""
    texts = [list(range(10, 10 + n)) for n in prompts]
    ended = [[*range(30, 29 + n), EOS] for n in answers]
    rolled_out = tiny.rolled_out(texts, ended)
    settings = tiny.settings(*flags)
    device = tiny.cpu(settings)
    device.pad_to = multiple
    whole = (rolled_out.sequences, rolled_out.attention_mask, rolled_out.answer_width)
    found = batches.micro_batches(*whole, settings, device)
    for part in found:
        rows = part.rows.tolist()
        assert part.begins.tolist() == [prompts[row] for row in rows]
        for row, tokens in zip(rows, part.sequences.tolist(), strict=True):
            text = texts[row] + ended[row]
            assert tokens[: len(text)] == text, "no token is cut off"
        # Columns without a place in the text have to be masked where there may be too many.
        ends = [prompts[row] + answers[row] for row in rows]
        mask = [[int(column < end) for column in range(part.sequences.shape[1])] for end in ends]
        given = part.attention_mask
        assert given is None if multiple == 1 else given.tolist() == mask
    return (
        [part.rows.tolist() for part in found],
        [(part.sequences.shape[1], part.answers.stop) for part in found],
    )


LENGTHS = ([len(prompt) for prompt in PROMPTS], [len(answer) for answer in ANSWERS])


def test_what_scores_has_its_adapters_in_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or none, where it stands for the model as it began."""
    settings = tiny.settings("mbs=2", "gbs=6", "lora.dim=2")
    policy = loading.load_policy(str(tiny.save_policy(tmp_path, "llama")), "fp32", 0.0)
    lora.add_adapters(policy, settings)
    tiny.draw_adapters(policy)
    called: list[str] = []
    own = Adapted.forward

    def noted(layer: Adapted, x: torch.Tensor) -> torch.Tensor:
        called.extend([] if layer.disable_adapters else ["beside"])
        return own(layer, x)

    monkeypatch.setattr(Adapted, "forward", noted)
    policy.eval()
    texts = tiny.rolled_out(PROMPTS, ANSWERS)
    inputs = (texts.sequences, texts.attention_mask, texts.answer_width)
    trained = tiny.Engine(policy)
    for model in (trained, frozen.WithoutAdapters(trained)):
        with torch.no_grad():
            expected = model(*inputs, 1.0)
        assert bool(called) is (model is trained)
        called.clear()

        found = batches.outputs(model, *inputs, settings, tiny.cpu(settings), 1.0)

        assert called == []
        mask = texts.answer_mask
        torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=TOLERANCE)


def test_rows_of_like_length_share_a_micro_batch_as_wide_as_their_texts() -> None:
    assert cut(*LENGTHS, "mbs=2", "gbs=6") == (ROWS, WIDTHS)


@pytest.mark.knob("ppo.trim")
def test_untrimmed_rows_come_in_order_and_as_wide_as_the_rollout() -> None:
    found = cut(*LENGTHS, "mbs=2", "gbs=6", "ppo.trim=false")

    assert found == ([[0, 1], [2, 3], [4, 5]], [(14, 6)] * 3)


def test_widths_are_multiples_of_the_devices_as_far_as_there_are_columns() -> None:
    _, widths = cut(*LENGTHS, "mbs=2", "gbs=6", multiple=4)

    assert widths == [(12, 6), (8, 6), (4, 4)]


def test_answers_are_not_cut_where_ranks_compute_their_chunks_together() -> None:
    flags = ("mbs=2", "gbs=6", "ppo.logprob_chunk=2")

    assert cut(*LENGTHS, *flags, "actor.zero_stage=3") == (ROWS, [(11, 6), (8, 6), (4, 6)])
    assert cut(*LENGTHS, *flags, "actor.zero_stage=2") == (ROWS, WIDTHS)


@hypothesis_settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=9),
    st.integers(1, 4),
    st.integers(1, 5),
)
def test_any_lengths(lengths: list[tuple[int, int]], size: int, multiple: int) -> None:
    prompts, answers = map(list, zip(*lengths, strict=True))

    rows, widths = cut(prompts, answers, f"mbs={size}", f"gbs={size}", multiple=multiple)

    assert sorted(row for some in rows for row in some) == list(range(len(lengths)))
    assert [len(some) for some in rows[:-1]] == [size] * (math.ceil(len(lengths) / size) - 1)
    whole = [sum(lengths[row]) for some in rows for row in some]
    assert whole == sorted(whole, reverse=True)
    texts = [sum(both) for both in lengths]
    most = (max(prompts) + max(answers), max(answers))
    for some, found in zip(rows, widths, strict=True):
        for width, every, full in zip(found, (texts, answers), most, strict=True):
            longest = max(every[row] for row in some)
            assert longest <= width <= full
            assert width < longest + multiple
            assert width % multiple == 0 or width == full


class Models:
    """Real models of one architecture, whose inputs' widths are recorded."""

    def __init__(self, folder: Path, architecture: str):
        actor = tiny.save_policy(folder / "a", architecture)
        self.actor = loading.load_policy(str(actor), "fp32", 0.0)
        critic = tiny.save_classifier(folder / "c", architecture)
        self.critic = loading.load_scorer(str(critic), "fp32", 0.0)
        reference = tiny.save_policy(folder / "r", architecture, seed=4)
        self.reference = loading.load_policy(str(reference), "fp32", 0.0).eval()
        reward = tiny.save_classifier(folder / "w", architecture, seed=6)
        self.reward = loading.load_scorer(str(reward), "fp32", 0.0).eval()
        self.seen: dict[str, list[Any]] = {}
        for name in ("actor", "critic", "reference", "reward"):
            getattr(self, name).register_forward_pre_hook(self._noting(name))

    def _noting(self, name: str) -> Any:
        def note(_: Any, inputs: Any) -> None:
            self.seen.setdefault(name, []).append((inputs[0].shape[1], inputs[2]))

        return note

    def score(self, rolled_out: Any, *flags: str) -> experience.Experience:
        settings = tiny.settings("mbs=2", "gbs=6", "ppo.whiten_advantages=false", *flags)
        device = tiny.cpu(settings)
        scores = ModelScores(frozen.Copy(self.reward), None, None, "before_end", settings, device)
        engines = (tiny.Engine(self.actor), tiny.Engine(self.critic))
        return experience.score(
            rolled_out,
            tiny.models(*engines, frozen.Copy(self.reference)),
            Rewards([(1.0, scores)], settings),
            settings,
            kl_coefficient=0.1,
        )


@pytest.mark.knob("ppo.trim")
@pytest.mark.parametrize("architecture", tiny.WITH_POSITIONS)
def test_all_models_read_narrow_batches_and_say_the_same(tmp_path: Path, architecture: str) -> None:
    models = Models(tmp_path, architecture)
    rolled_out = tiny.rolled_out(PROMPTS, ANSWERS)
    expected = models.score(rolled_out, "ppo.trim=false")
    assert models.seen == dict.fromkeys(("reference", "actor", "critic", "reward"), [(14, 6)] * 3)
    models.seen.clear()

    found = models.score(rolled_out)

    assert models.seen == dict.fromkeys(("reference", "actor", "critic", "reward"), WIDTHS)
    mask = expected.answer_mask
    for name, value in expected.tensors().items():
        other = found.tensors()[name]
        if value.shape == mask.shape and name != "answer_mask":
            # Rows differ by far more, so each stands at its place.
            assert (value[:, 0].diff().abs() > 100 * TOLERANCE).all()
            assert value.isfinite().all()
            assert other.isfinite().all()
            value, other = value[mask], other[mask]
        torch.testing.assert_close(other, value, rtol=0, atol=5 * TOLERANCE, msg=name)


def test_an_update_takes_the_rows_of_a_minibatch_in_narrow_batches(tmp_path: Path) -> None:
    models = Models(tmp_path, "llama")
    found = models.score(tiny.rolled_out(PROMPTS, ANSWERS))
    settings = tiny.settings("mbs=1", "gbs=6", "ppo.minibatches=2")
    cpu = tiny.cpu(settings)
    actor, critic = (
        engine.trained(model, own, settings, cpu, updates=10)
        for model, own in ((models.actor, settings.actor), (models.critic, settings.critic))
    )
    models.seen.clear()

    update(found, tiny.models(actor, critic), None, settings)

    both = zip(PROMPTS, ANSWERS, strict=True)
    widths = [(len(prompt) + len(answer), len(answer)) for prompt, answer in both]
    # Three rows make a minibatch, whose longest comes first.
    expected = [widths[row] for row in (1, 2, 0, 4, 3, 5)]
    assert models.seen == {"actor": expected, "critic": expected}


def update_in_chunks(folder: Path) -> list[int]:
    """One of two ranks under ZeRO-3, the first with shorter answers.

    Returns how often the head had run after the scoring, and after the update.
    """
    settings = tiny.settings(
        "devices_per_node=2", "gbs=8", "actor.zero_stage=3", "ppo.logprob_chunk=2"
    )
    cpu = tiny.cpu(settings)
    policy = loading.load_policy(str(folder / "a"), "fp32", 0.0, settings.ppo.logprob_chunk)
    critic = loading.load_scorer(str(folder / "c"), "fp32", 0.0)
    actor = engine.trained(policy, settings.actor, settings, cpu, 10)
    models = tiny.models(actor, engine.trained(critic, settings.critic, settings, cpu, 10))
    lengths = [8, 5, 3, 3] if dist.get_rank() else [4, 2, 1, 1]
    # As wide as the longest of both ranks.
    answers = torch.tensor([[7] * (n - 1) + [EOS] + [PAD] * (8 - n) for n in lengths])
    ids, mask = tiny.padded(PROMPTS[:4])
    sequences = torch.cat([ids, answers], 1)
    rolled_out = rollout.from_sequences(sequences, mask, tiny.generation())
    runs = []
    policy.lm.get_output_embeddings().register_forward_hook(lambda *_: runs.append(None))
    with torch.no_grad():
        logprobs = experience.answer_logprobs(actor, rolled_out, settings, cpu)
    counts = [len(runs)]
    scores, values = torch.ones(4), torch.zeros_like(logprobs)
    found = experience.assemble(
        rolled_out, logprobs, logprobs, values, scores, torch.zeros_like(values), settings
    )
    _, whole = update(found, models, None, settings)
    assert whole
    return [*counts, len(runs)]


@pytest.mark.slow
def test_ranks_with_answers_of_other_lengths_compute_as_many_chunks(tmp_path: Path) -> None:
    tiny.save_policy(tmp_path / "a", "llama", **tiny.WIDE["llama"])
    tiny.save_classifier(tmp_path / "c", "llama", **tiny.WIDE["llama"])

    first, second = together(2, update_in_chunks, tmp_path)

    # Two micro batches in chunks of 2 of 8 tokens; the backward pass computes them again.
    assert first == second == [2 * 4, 2 * 4 + 2 * 2 * 4]
