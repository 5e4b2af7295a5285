"""Rollouts: where answers end, and that they are samples of the policy itself."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
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
from transformers import AutoModelForCausalLM, GenerationConfig

from hlrlhf.trainer.decoding.decoder import sampling
from hlrlhf.trainer.decoding.fixed import Fixed
from hlrlhf.trainer.decoding.plain import Plain
from hlrlhf.trainer.decoding.shrinking import Shrinking
from hlrlhf.trainer.models import engine, forwards, loading, lora
from hlrlhf.trainer.ppo import rollout

pytestmark = pytest.mark.usefixtures("one_rank")

PROMPTS = [[1, 5, 6, 7, 8, 9], [1, 30], [1, 11, 12]]
BY_ANY = pytest.mark.parametrize("kind", [Plain, Shrinking, Fixed])


def ended_at(
    answers: list[list[int]],
    end_tokens: list[int],
    padding: int = PAD,
    multiple: int = 1,
    ends: list[int] | None = None,
    logprobs: Any = None,
) -> rollout.Rollout:
    """The rollout from answers to one-token prompts."""
    sequences = torch.tensor([[20, *answer] for answer in answers])
    config = GenerationConfig(eos_token_id=end_tokens, pad_token_id=padding)
    prompt_mask = torch.ones(len(answers), 1, dtype=torch.long)
    strings = None if ends is None else torch.tensor(ends)
    return rollout.from_sequences(sequences, prompt_mask, config, multiple, strings, logprobs)


def answers_of(found: rollout.Rollout) -> list[list[int]]:
    width = found.answer_width
    return [
        row[mask].tolist()
        for row, mask in zip(found.sequences[:, -width:], found.answer_mask, strict=True)
    ]


# 1. Where an answer ends.


def test_the_first_end_token_ends_an_answer_and_belongs_to_it() -> None:
    found = ended_at([[7, 2, 0, 0], [2, 0, 0, 0], [7, 8, 9, 10]], [2])

    assert answers_of(found) == [[7, 2], [2], [7, 8, 9, 10]]
    assert found.lengths.tolist() == [2, 1, 4]
    assert found.ended.tolist() == [True, True, False]
    assert found.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]


def test_what_follows_an_end_token_becomes_padding() -> None:
    found = ended_at([[7, 2, 8, 2]], [2])

    assert found.sequences.tolist() == [[20, 7, 2, 0, 0]]
    assert answers_of(found) == [[7, 2]]


def test_any_of_several_end_tokens_ends_an_answer() -> None:
    found = ended_at([[7, 5, 2, 0], [7, 8, 2, 5], [3, 0, 0, 0]], [2, 5, 3])

    assert answers_of(found) == [[7, 5], [7, 8, 2], [3]]


def test_an_end_token_that_is_also_the_padding_is_kept_once() -> None:
    found = ended_at([[7, 2, 2, 2], [7, 8, 9, 2], [7, 8, 9, 10]], [2], padding=2)

    assert answers_of(found) == [[7, 2], [7, 8, 9, 2], [7, 8, 9, 10]]
    assert found.ended.tolist() == [True, True, False]


def test_a_padding_token_that_the_policy_sampled_is_part_of_the_answer() -> None:
    found = ended_at([[7, 0, 8, 2], [0, 0, 0, 0]], [2])

    assert answers_of(found) == [[7, 0, 8, 2], [0, 0, 0, 0]]
    assert found.ended.tolist() == [True, False]


def test_an_end_token_in_the_prompt_ends_nothing() -> None:
    config = GenerationConfig(eos_token_id=[2], pad_token_id=2)

    found = rollout.from_sequences(
        torch.tensor([[2, 2, 9, 7, 2]]), torch.tensor([[0, 1, 1]]), config
    )

    assert answers_of(found) == [[7, 2]]
    assert found.attention_mask.tolist() == [[0, 1, 1, 1, 1]]


def test_a_stop_string_ends_an_answer_as_an_end_token_does() -> None:
    answers = [[7, 8, 9, 10], [7, 2, 8, 0], [7, 8, 9, 2], [7, 8, 9, 10], [2, 7, 0, 0]]
    # The second's would follow its end token, the last has none.
    found = ended_at(answers, [2], multiple=3, ends=[1, 2, 3, -1, 0])

    assert answers_of(found) == [[7, 8], [7, 2], [7, 8, 9, 2], [7, 8, 9, 10], [2]]
    assert found.ended.tolist() == [True, True, True, False, True]
    assert found.answer_width == 6


def test_answers_are_widened_to_a_multiple() -> None:
    found = ended_at([[7, 8, 9], [7, 2, 0]], [2], multiple=4)

    assert found.sequences.tolist() == [[20, 7, 8, 9, 0], [20, 7, 2, 0, 0]]
    assert found.answer_mask.tolist() == [[True, True, True, False], [True, True, False, False]]
    assert found.attention_mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]


def test_recorded_log_probs_are_as_wide_as_the_answers_and_hold_nothing_in_padding() -> None:
    recorded = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -math.inf]])

    found = ended_at([[7, 8, 9], [7, 2, 0]], [2], multiple=4, logprobs=recorded)

    assert found.logprobs is not None
    assert found.logprobs.tolist() == [[-1.0, -2.0, -3.0, 0.0], [-4.0, -5.0, 0.0, 0.0]]
    assert ended_at([[7, 8, 9]], [2]).logprobs is None


@hypothesis_settings(max_examples=100)
@given(
    st.lists(st.lists(st.integers(0, 5), min_size=6, max_size=6), min_size=1, max_size=4),
    st.sets(st.integers(0, 5), min_size=1, max_size=3),
    st.integers(0, 5),
    st.integers(1, 5),
)
def test_any_answers(
    answers: list[list[int]], end_tokens: set[int], padding: int, multiple: int
) -> None:
    found = ended_at(answers, sorted(end_tokens), padding, multiple)

    slow = []
    for answer in answers:
        row: list[int] = []
        for token in answer:
            row.append(token)
            if token in end_tokens:
                break
        slow.append(row)
    assert answers_of(found) == slow
    assert found.answer_width % multiple == 0
    assert found.lengths.tolist() == [len(row) for row in slow]
    assert found.ended.tolist() == [row[-1] in end_tokens for row in slow]
    outside = found.sequences[:, 1:][~found.answer_mask]
    assert (outside == padding).all()


# 2. Sampling.


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def stubborn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose generation_config.json asks for everything that PPO must not do."""
    folder = tiny.save_policy(tmp_path_factory.mktemp("stubborn"), request.param)
    asked = {
        "do_sample": False,
        "temperature": 0.01,
        "top_k": 1,
        "top_p": 0.01,
        "repetition_penalty": 50.0,
        "no_repeat_ngram_size": 1,
        "min_new_tokens": 8,
        "suppress_tokens": list(range(3, 40)),
        "num_beams": 2,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
    }
    (folder / "generation_config.json").write_text(json.dumps(asked))
    return folder


def sample(
    policy: forwards.Policy,
    prompts: list[list[int]],
    *flags: str,
    padding: int = PAD,
    seed: int = 0,
    tokenizer: Any = None,
    static_cache: bool = False,
    kind: Any = Plain,
) -> rollout.Rollout:
    settings = tiny.settings("generation.max_new_tokens=2", *flags)
    device = tiny.cpu(settings)
    device.static_cache = static_cache
    torch.manual_seed(seed)
    decoder = kind(sampling(settings, tokenizer, [EOS], padding, device), device)
    return rollout.generate(decoder, tiny.Engine(policy), prompts)


def first_tokens(found: rollout.Rollout) -> Any:
    return found.sequences[:, -found.answer_width]


FAR = 5  # samples are so far off in fewer than one case of 100,000


def far_from(tokens: Any, probabilities: Any) -> float:
    """By how many standard deviations Pearson's chi-squared is larger than that of samples.

    By Wilson and Hilferty its cube root, per degree of freedom, is nearly normal.
    """
    seen = torch.bincount(tokens, minlength=len(probabilities)).double()
    expected = probabilities.double() * len(tokens)
    common = expected >= 5
    rare = torch.stack([seen[~common].sum(), expected[~common].sum()])
    bins = [*((seen - expected) ** 2 / expected)[common].tolist()]
    if rare[1] >= 5:
        bins.append(float((rare[0] - rare[1]) ** 2 / rare[1]))
    degrees = max(1, len(bins) - 1)
    variance = 2 / (9 * degrees)
    return float(((sum(bins) / degrees) ** (1 / 3) - (1 - variance)) / math.sqrt(variance))


def plain_logits(folder: Path, prompt: list[int]) -> Any:
    """Logits of the next token, from the plain model on the prompt alone."""
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return plain(torch.tensor([prompt])).logits[0, -1]


ROWS = 1500


@pytest.mark.knob("generation.temperature")
@pytest.mark.parametrize(("with_lora", "temperature"), [(False, 1.0), (False, 2.0), (True, 1.0)])
@BY_ANY
def test_answers_are_samples_of_the_policy_whatever_the_checkpoint_asks_for(
    stubborn: Path, with_lora: bool, temperature: float, kind: Any
) -> None:
    policy = loading.load_policy(str(stubborn), "fp32", 0.0)
    if with_lora:
        lora.add_adapters(policy, tiny.settings("lora.dim=2"))
    # A longer neighbour pads them all: that must not show.
    prompts = [PROMPTS[1]] * ROWS + [PROMPTS[0]]

    found = sample(policy, prompts, f"generation.temperature={temperature}", kind=kind)

    logits = plain_logits(stubborn, PROMPTS[1])
    tokens = first_tokens(found)[:-1]
    assert far_from(tokens, (logits / temperature).softmax(-1)) < FAR
    # The second token follows the first, which may be repeated, and nothing is suppressed.
    first = int(tokens.mode().values)
    followed = found.sequences[:-1][tokens == first][:, -1]
    after = plain_logits(stubborn, [*PROMPTS[1], first])
    if first != EOS:
        assert far_from(followed, (after / temperature).softmax(-1)) < FAR


@pytest.mark.knob("generation.top_k", "generation.top_p")
@BY_ANY
def test_top_k_and_top_p_are_the_settings_own(stubborn: Path, kind: Any) -> None:
    policy = loading.load_policy(str(stubborn), "fp32", 0.0)
    probabilities = (plain_logits(stubborn, PROMPTS[1]) / 3).softmax(-1)
    ranked = probabilities.argsort(descending=True).tolist()

    tokens = first_tokens(
        sample(
            policy, [PROMPTS[1]] * 500, "generation.temperature=3", "generation.top_k=3", kind=kind
        )
    )
    assert set(tokens.tolist()) == set(ranked[:3])

    tokens = first_tokens(
        sample(
            policy,
            [PROMPTS[1]] * 500,
            "generation.temperature=3",
            "generation.top_p=0.5",
            kind=kind,
        )
    )
    nucleus = int((probabilities[ranked].cumsum(0) < 0.5).sum()) + 1
    assert set(tokens.tolist()) == set(ranked[:nucleus])


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that speaks the test's tokenizer: every token about as likely as the next."""
    folder = tmp_path_factory.mktemp("speaker")
    vocabulary = len(tiny.tokenizer())
    return tiny.save_policy(folder, "llama", vocabulary=vocabulary, initializer_range=0.02)


@pytest.mark.knob("generation.stop")
@pytest.mark.parametrize(
    ("kind", "with_lora", "static_cache"),
    [
        *((Plain, False, True), (Plain, True, False)),
        *((Shrinking, True, False), (Fixed, True, False)),
    ],
)
def test_stop_strings_end_answers(
    speaker: Path, kind: Any, with_lora: bool, static_cache: bool
) -> None:
    tokenizer = tiny.tokenizer()
    policy = loading.load_policy(str(speaker), "fp32", 0.0)
    if with_lora:
        lora.add_adapters(policy, tiny.settings("lora.dim=2"))
    stop = ["an", "e", "\n", "ss", "."]
    flags = (f"generation.stop={json.dumps(stop)}", "generation.max_new_tokens=12")

    how = {"tokenizer": tokenizer, "kind": kind}
    found = sample(policy, PROMPTS * 25, *flags, padding=EOS, static_cache=static_cache, **how)

    by_string = 0
    for tokens, ended in zip(answers_of(found), found.ended.tolist(), strict=True):
        text, before = tokenizer.decode(tokens), tokenizer.decode(tokens[:-1])
        assert not any(string in before for string in stop), "an answer ends with the first"
        string = any(string in text for string in stop)
        by_string += string
        assert ended == (string or tokens[-1] == EOS)
        assert ended or len(tokens) == 12
    assert by_string > 20
    without = sample(policy, PROMPTS * 25, flags[1], **how)
    assert without.lengths.float().mean() > found.lengths.float().mean() + 2


@pytest.mark.knob("generation.max_new_tokens", "generation.min_new_tokens")
@BY_ANY
def test_answers_are_as_long_as_they_may_and_must_be(speaker: Path, kind: Any) -> None:
    tokenizer = tiny.tokenizer()
    policy = loading.load_policy(str(speaker), "fp32", 0.0)
    stop = f"generation.stop={json.dumps([chr(i) for i in range(97, 123)])}"
    flags = (stop, "generation.max_new_tokens=9")

    free = sample(policy, PROMPTS * 99, *flags, tokenizer=tokenizer, kind=kind)
    held = sample(
        policy, PROMPTS * 99, *flags, "generation.min_new_tokens=5", tokenizer=tokenizer, kind=kind
    )

    assert (int(free.lengths.min()), int(free.lengths.max())) == (1, 9)
    assert (int(held.lengths.min()), int(held.lengths.max())) == (5, 9)
    early = [found.sequences[:, -found.answer_width :][:, :4] for found in (free, held)]
    assert [bool((tokens == EOS).any()) for tokens in early] == [True, False]


@BY_ANY
def test_more_than_fifty_tokens_can_be_sampled(tmp_path: Path, kind: Any) -> None:
    """Fifty is transformers' own top_k where nobody sets one."""
    folder = tiny.save_policy(tmp_path, "llama", vocabulary=200, initializer_range=0.01)
    policy = loading.load_policy(str(folder), "fp32", 0.0)

    tokens = first_tokens(sample(policy, [PROMPTS[1]] * 2000, kind=kind))

    assert len(set(tokens.tolist())) > 150


def test_the_policy_gets_its_own_generation_configuration_back(stubborn: Path) -> None:
    policy = loading.load_policy(str(stubborn), "fp32", 0.0)

    sample(policy, PROMPTS)

    assert policy.generation_config.repetition_penalty == 50.0
    assert policy.generation_config.do_sample is False


@BY_ANY
def test_dropout_is_off_while_the_policy_samples(stubborn: Path, kind: Any) -> None:
    policy = loading.load_policy(str(stubborn), "fp32", 0.9)
    policy.train()

    found = sample(policy, [PROMPTS[1]] * ROWS, kind=kind)

    logits = plain_logits(stubborn, PROMPTS[1])
    assert far_from(first_tokens(found), logits.softmax(-1)) < FAR


# 3. Padding.


@BY_ANY
def test_padding_that_is_a_token_like_any_other_does_not_show(stubborn: Path, kind: Any) -> None:
    """Padded with the end token, and with that token in the prompt itself."""
    policy = loading.load_policy(str(stubborn), "fp32", 0.0)
    prompt = [1, EOS, 30]

    found = sample(policy, [prompt] * ROWS + [PROMPTS[0]], padding=EOS, kind=kind)

    probabilities = plain_logits(stubborn, prompt).softmax(-1)
    assert far_from(first_tokens(found)[:-1], probabilities) < FAR


@BY_ANY
def test_a_rollout_of_prompts_of_many_lengths(stubborn: Path, kind: Any) -> None:
    policy = loading.load_policy(str(stubborn), "fp32", 0.0)

    found = sample(policy, PROMPTS, "generation.max_new_tokens=9", kind=kind)

    width = found.sequences.shape[1] - found.answer_width
    assert width == 6
    for row, mask, prompt in zip(found.sequences, found.attention_mask, PROMPTS, strict=True):
        assert row[:width][mask[:width].bool()].tolist() == prompt
        assert mask[:width].tolist() == [0] * (width - len(prompt)) + [1] * len(prompt)
    assert found.attention_mask[:, width:].bool().equal(found.answer_mask)
    assert found.lengths.min() >= 1


@BY_ANY
def test_padded_rows_have_the_log_probs_of_unpadded_ones(stubborn: Path, kind: Any) -> None:
    """Tolerance 1e-4 nats: fp32 sums in another order."""
    policy = loading.load_policy(str(stubborn), "fp32", 0.0).eval()
    plain = AutoModelForCausalLM.from_pretrained(stubborn).eval()
    found = sample(policy, PROMPTS, "generation.max_new_tokens=9", seed=3, kind=kind)

    with torch.no_grad():
        together = policy(found.sequences, found.attention_mask, found.answer_width, 0.7)
        for i, prompt in enumerate(PROMPTS):
            answer = found.sequences[i, -found.answer_width :][found.answer_mask[i]]
            alone = torch.cat([torch.tensor(prompt), answer])
            logits = plain(alone[None]).logits[0, len(prompt) - 1 : -1].double() / 0.7
            expected = [float(logits[t].log_softmax(-1)[token]) for t, token in enumerate(answer)]
            assert together[i, : len(answer)].tolist() == pytest.approx(expected, abs=1e-4)
            assert all(math.isfinite(value) for value in expected)


# 4. Warnings.


@pytest.mark.parametrize("stop", ["generation.stop=[]", "generation.stop=['xyz']"])
@BY_ANY
def test_a_warning_ends_all_answers_and_nothing_is_made_of_them(
    speaker: Path, stop: str, kind: Any
) -> None:
    policy = loading.load_policy(str(speaker), "fp32", 0.0)
    settings = tiny.settings("generation.max_new_tokens=9", "generation.min_new_tokens=9", stop)
    device = tiny.cpu(settings)
    how = sampling(settings, tiny.tokenizer(), [EOS], PAD, device)
    for heard, tokens in ((3, 3), (9, 9), (10, 9)):
        # Asked once for each token.
        asked = itertools.count(1)
        decoder = kind(how, device, lambda asked=asked, heard=heard: next(asked) >= heard)
        decoded = decoder(tiny.Engine(policy), PROMPTS)
        assert decoded.sequences.shape[1] - decoded.prompt_mask.shape[1] == tokens
    asked = itertools.count(1)
    with pytest.raises(rollout.Abandoned):
        rollout.generate(kind(how, device, lambda: next(asked) >= 3), tiny.Engine(policy), PROMPTS)
    assert next(asked) == 5, "by three tokens and by the ranks"


# 5. Ranks.

ROLLOUTS = 50


class Recording(Plain):
    """Records numbers that say which tokens they belong to."""

    def __call__(self, *arguments: Any) -> Any:
        decoded = super().__call__(*arguments)
        answers = decoded.sequences[:, decoded.prompt_mask.shape[1] :]
        return replace(decoded, logprobs=-answers.float())


def roll_out_and_update(folder: Path, chunk: int) -> tuple[list[int], list[int]]:
    """One of two ranks under ZeRO-3: rollouts of random lengths, each with an update after it.

    Returns the longest answer of each rollout, and the chunks that its log-probs were computed in.
    """
    settings = tiny.settings(
        "devices_per_node=2",
        "actor.zero_stage=3",
        "generation.max_new_tokens=24",
        "optimizer.lr_scheduler=constant",
        f"ppo.logprob_chunk={chunk}",
    )
    own = tiny.cpu(settings)
    policy = loading.load_policy(str(folder), "fp32", 0.0, chunk)
    actor = engine.trained(policy, settings.actor, settings, own, ROLLOUTS)
    decoder = Recording(sampling(settings, None, [EOS, 3, 4, 5, 6], PAD, own), own)
    torch.manual_seed(dist.get_rank())
    tokens, chunks = [], []
    for _ in range(ROLLOUTS):
        found = rollout.generate(decoder, actor, PROMPTS[:2])
        tokens.append(int(found.lengths.max()))
        chunks.append(math.ceil(found.answer_width / chunk) if chunk else 1)
        answers = found.sequences[:, -found.answer_width :]
        assert found.logprobs.equal(-(answers * found.answer_mask).float())
        logprobs = actor(found.sequences, found.attention_mask, found.answer_width, 1.0)
        actor.backward(-logprobs[found.answer_mask].mean())
        actor.step()
    return tokens, chunks


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [0, 5])
def test_ranks_whose_answers_differ_in_length_do_not_wait_for_each_other(
    tmp_path: Path, chunk: int
) -> None:
    folder = tiny.save_policy(tmp_path, "llama", initializer_range=0.1)

    (first, first_chunks), (second, second_chunks) = together(2, roll_out_and_update, folder, chunk)

    assert len(first) == len(second) == ROLLOUTS
    assert sum(one != other for one, other in zip(first, second, strict=True)) > ROLLOUTS / 2
    assert len({*first, *second}) > 10
    # DeepSpeed holds a head as small as this one whole; a larger one it gathers for each chunk.
    assert first_chunks == second_chunks
