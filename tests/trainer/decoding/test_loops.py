"""Our own loops over tokens: what generate gives, with less work, or generate itself."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny
import torch
from ranks import together
from tiny import PAD, one_rank  # noqa: F401
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.utils import import_utils

from hlrlhf.trainer.decoding import choice, fixed, shrinking, weights
from hlrlhf.trainer.decoding.decoder import Sampling, sampling
from hlrlhf.trainer.decoding.draw import by_inversion, by_race
from hlrlhf.trainer.decoding.fixed import Compiled, Fixed
from hlrlhf.trainer.decoding.hybrid import Hybrid
from hlrlhf.trainer.decoding.plain import Plain
from hlrlhf.trainer.decoding.shrinking import Shrinking
from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.models import loading, lora
from hlrlhf.trainer.ppo import rollout
from hlrlhf.trainer.ppo.agreement import Agreement

pytestmark = pytest.mark.usefixtures("one_rank")

PROMPTS = [[1, 5, 6, 7, 8, 9], [1, 30], [1, 11, 12], [1, 4], [9]] * 3
# Of 48 words: most answers of twelve tokens end before.
ENDS = [2, 3, 4, 5, 6, 7, 8, 9]
# Log-probs in nats; fp32 sums in another order.
TOLERANCE = {"rtol": 0, "atol": 1e-4}
OWN = pytest.mark.parametrize("loop", [Shrinking, Fixed])


def how(*flags: str) -> tuple[Sampling, Any]:
    settings = tiny.settings("generation.max_new_tokens=12", *flags)
    device = tiny.cpu(settings)
    return sampling(settings, None, ENDS, PAD, device), device


def policy_of(folder: Path, architecture: str = "llama", **options: Any) -> Any:
    return loading.load_policy(str(tiny.save_policy(folder, architecture, **options)), "fp32", 0.0)


# Positions that rotate, that are in the mask, that are embedded; windows shorter than the texts.
@pytest.mark.parametrize("architecture", ["llama", "bloom", "gpt2", "opt", "mistral", "gemma2"])
@OWN
def test_the_likeliest_answers_are_those_of_generate(
    tmp_path: Path, architecture: str, loop: Any
) -> None:
    policy = policy_of(tmp_path, architecture)
    made = [
        rollout.generate(kind(*how("generation.top_k=1")), tiny.Engine(policy), PROMPTS)
        for kind in (loop, Plain)
    ]

    assert made[0].sequences.equal(made[1].sequences)
    assert len(set(made[0].lengths.tolist())) > 1, "some end before others"


@pytest.mark.parametrize(
    "flags",
    [
        ["generation.temperature=0.7"],
        ["generation.top_k=5", "generation.top_p=0.9"],
        ["generation.min_new_tokens=6"],
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "bloom"])
@OWN
def test_log_probs_are_written_down_of_the_whole_policy(
    tmp_path: Path, architecture: str, flags: list[str], loop: Any
) -> None:
    policy = policy_of(tmp_path, architecture)
    asked, device = how(*flags)
    torch.manual_seed(1)

    decoded = loop(asked, device)(tiny.Engine(policy), PROMPTS)

    made = rollout.from_sequences(decoded.sequences, decoded.prompt_mask, asked.config)
    width, seen = made.answer_width, made.answer_mask
    assert decoded.logprobs is not None
    with torch.no_grad():
        scored = policy.eval()(made.sequences, made.attention_mask, width, asked.config.temperature)
    assert len(set(made.lengths.tolist())) > 1
    torch.testing.assert_close(decoded.logprobs[seen], scored[seen], **TOLERANCE)


def test_an_answer_that_has_ended_is_not_computed_any_more(tmp_path: Path) -> None:
    policy = policy_of(tmp_path)
    rows: list[int] = []
    policy.lm.lm_head.register_forward_hook(lambda head, given, made: rows.append(len(made)))
    torch.manual_seed(1)

    made = rollout.generate(Shrinking(*how()), tiny.Engine(policy), PROMPTS)

    lengths = made.lengths
    assert rows == [int((lengths > written).sum()) for written in range(int(lengths.max()))]
    assert rows[-1] < rows[0] == len(PROMPTS)


@OWN
def test_a_witness_sees_every_row_at_its_place(tmp_path: Path, loop: Any) -> None:
    policy = policy_of(tmp_path)
    seen: list[Tensor] = []
    torch.manual_seed(1)

    made = rollout.generate(
        loop(*how()), tiny.Engine(policy), PROMPTS, lambda logits: seen.append(logits.clone())
    )

    logits = torch.stack(seen, 1).log_softmax(-1)
    answers = made.sequences[:, -made.answer_width :]
    shown = logits.gather(-1, answers.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        scored = policy.eval()(made.sequences, made.attention_mask, made.answer_width, 1.0)
    torch.testing.assert_close(shown[made.answer_mask], scored[made.answer_mask], **TOLERANCE)


# Shapes that must not change.


class Recorded(TorchDispatchMode):
    """Stands in for a device that captures a step: what it computed once, it computes again.

    Each result comes to stand in the memory where the first one stood, as in a CUDA graph. What a
    graph cannot hold fails: a number of a tensor's that is asked for.
    """

    def __init__(self, step: Callable[[], None]):
        super().__init__()
        self._step = step
        self._calls: list[Any] = []

    def __torch_dispatch__(self, op: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        assert op.name() not in ("aten::_local_scalar_dense", "aten::nonzero")
        made = op(*given, **(named or {}))
        self._calls.append((op, given, named or {}, made))
        return made

    def __call__(self) -> None:
        if not self._calls:
            # As transformers sees it there, and asks no tensor for a number.
            name = "is_cuda_stream_capturing"
            with self, mock.patch.object(import_utils, name, return_value=True):
                self._step()
            return
        for op, given, named, before in self._calls:
            made = op(*given, **named)
            for old, new in zip(tree_leaves(before), tree_leaves(made), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.mark.parametrize(
    "flags", [[], ["generation.top_k=5", "generation.top_p=0.9", "generation.min_new_tokens=6"]]
)
@pytest.mark.parametrize("architecture", ["llama", "bloom", "opt", "gemma2"])
def test_a_step_can_be_captured_and_taken_again(
    tmp_path: Path, architecture: str, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fixed, "BUCKET", 8)
    policy = policy_of(tmp_path, architecture)
    asked, device = how("generation.temperature=0.7", *flags)
    torch.manual_seed(1)
    plain = Fixed(asked, device)(tiny.Engine(policy), PROMPTS)
    device.capturing = lambda: Recorded  # type: ignore[assignment,method-assign,return-value]
    torch.manual_seed(1)

    captured = Fixed(asked, device)(tiny.Engine(policy), PROMPTS)

    assert captured.sequences.equal(plain.sequences)
    torch.testing.assert_close(captured.logprobs, plain.logprobs, **TOLERANCE)


def test_a_run_has_few_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixed, "BUCKET", 8)
    policy = policy_of(tmp_path)
    asked, device = how("generation.max_new_tokens=40")
    asked = dataclasses.replace(asked, multiple=8)
    shapes = set()

    def note(model: Any, given: Any, named: dict[str, Any]) -> None:
        shapes.add((named["input_ids"].shape, named["attention_mask"].shape))

    policy.lm.register_forward_pre_hook(note, with_kwargs=True)
    loop = Fixed(asked, device)
    for seed in range(8):
        torch.manual_seed(seed)
        rollout.generate(loop, tiny.Engine(policy), PROMPTS)

    batch = len(PROMPTS)
    prompts = {(torch.Size([batch, 8]), torch.Size([batch, 8]))}
    tokens = {
        (torch.Size([batch, 1]), torch.Size([batch, columns])) for columns in (16, 24, 32, 40, 48)
    }
    assert prompts < shapes <= prompts | tokens


def test_it_ends_soon_after_the_last_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fixed, "LOOK", 4)
    policy = policy_of(tmp_path)
    read: list[int] = []
    policy.lm.lm_head.register_forward_hook(lambda *_: read.append(1))
    asked, device = how("generation.max_new_tokens=60")
    asked.config.eos_token_id = list(range(2, 30))
    torch.manual_seed(1)

    made = rollout.generate(Fixed(asked, device), tiny.Engine(policy), PROMPTS)

    longest = int(made.lengths.max())
    assert longest < 50
    assert len(read) == -(-longest // 4) * 4


@tiny.compiles
@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "flags"),
    [("llama", []), ("bloom", ["generation.top_k=9", "generation.min_new_tokens=6", "lora.dim=2"])],
)
def test_a_compiled_step_draws_the_same_answers(
    tmp_path: Path, architecture: str, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fixed, "BUCKET", 8)
    policy = policy_of(tmp_path, architecture, hidden_size=64)
    asked, device = how(*flags)
    if flags:
        lora.add_adapters(policy, tiny.settings(*flags))
        tiny.draw_adapters(policy)
    plain, compiled = Fixed(asked, device), Compiled(asked, device)
    if not flags:
        # What a compiler cannot look into: the head's product, and attention of wide heads.
        monkeypatch.setattr(weights, "LARGE", 1)
        head = "x".join(map(str, policy.lm.lm_head.weight.shape))
        others = {"x".join(map(str, layer.shape)) for layer in policy.parameters()} - {head}
        for loop in (plain, compiled):
            loop.restore(dict.fromkeys(others, "torch") | {head: "own", "attention": "own"})
    torch.compiler.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()

    for prompts in (PROMPTS, [*PROMPTS, list(range(1, 14))], PROMPTS[:3]):
        made = []
        for loop in (plain, compiled):
            torch.manual_seed(1)
            made.append(rollout.generate(loop, tiny.Engine(policy), prompts))

        assert made[0].sequences.equal(made[1].sequences)
        assert made[0].logprobs is not None
        torch.testing.assert_close(made[0].logprobs, made[1].logprobs, **TOLERANCE)

    assert 1 <= graphs["unique_graphs"] <= 2, "whatever the width and the rows"


@pytest.mark.slow
def test_without_a_compiler_it_goes_on_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tiny.Engine(policy_of(tmp_path))
    torch.manual_seed(1)
    own = rollout.generate(Shrinking(*how()), policy, PROMPTS)
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    torch.compiler.reset()
    torch.manual_seed(1)

    with torch._inductor.utils.fresh_cache():
        decoder = choice.Chosen(Compiled(*how()), Shrinking(*how()), Plain(*how()))
        made = rollout.generate(decoder, policy, PROMPTS)

    assert made.sequences.equal(own.sequences), "from the same random numbers"
    told = capsys.readouterr().out
    assert "warning: generation.decoder = compiled cannot be used here" in told
    assert "no-such-compiler" in told
    assert "generation.decoder = own is, which is slower" in told


@pytest.mark.parametrize("words", [5, 256, 600])
@pytest.mark.parametrize("draw", [by_inversion, by_race])
def test_words_are_drawn_as_often_as_they_weigh(words: int, draw: Any) -> None:
    """In one block and in several, with words that have no weight among them and at the ends."""
    torch.manual_seed(0)
    weights = torch.rand(words) ** 4
    weights[torch.randperm(words)[: words // 3]] = 0
    weights[[0, -1]] = 0
    draws = 200 * words

    drawn = draw(weights.expand(draws, -1))[:, 0]

    probabilities = (weights / weights.sum()).double()
    seen = torch.bincount(drawn, minlength=words)
    assert seen[weights == 0].sum() == 0
    expected = probabilities * draws
    often = expected >= 20
    deviation = (seen - expected)[often] / (expected * (1 - probabilities))[often].sqrt()
    assert deviation.abs().max() < 6, "of 600 in fewer than one case of 100,000"


@pytest.mark.parametrize("drawn", [0.0, 1 - 2**-53])
def test_the_ends_of_the_random_numbers_fall_on_words_that_weigh_something(drawn: float) -> None:
    weights = torch.zeros(3, 700)
    weights[0, 300], weights[1, [100, 600]], weights[2, 257:511] = 1e-30, 0.1, 0.1
    rand = mock.patch.object(torch, "rand_like", lambda like: torch.full_like(like, drawn))

    with rand:
        words = by_inversion(weights)

    assert (weights.gather(-1, words) > 0).all()


# Where they do not fit.


class Broken(shrinking.Growing):
    """A cache that an architecture cannot use."""

    def __init__(self, *sizes: int):
        raise NotImplementedError("no such cache")


class Misread(shrinking.Growing):
    """A cache that an architecture reads wrongly: the tokens before the last as they began."""

    def update(self, keys: Tensor, values: Tensor, *place: Any, **more: Any) -> Any:
        keys, values = super().update(keys, values, *place, **more)
        return keys.flip(2), values


def chosen(*flags: str) -> choice.Chosen:
    return choice.Chosen(Shrinking(*how(*flags)), Plain(*how(*flags)))


def test_what_it_cannot_sample_generate_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tiny.Engine(policy_of(tmp_path))
    torch.manual_seed(1)
    plain = rollout.generate(Plain(*how()), policy, PROMPTS)
    monkeypatch.setattr(shrinking, "Growing", Broken)
    torch.manual_seed(1)
    decoder = chosen()

    made = rollout.generate(decoder, policy, PROMPTS)

    assert made.sequences.equal(plain.sequences), "from the same random numbers"
    told = capsys.readouterr().out
    assert told.count("warning: generation.decoder = own cannot be used here") == 1
    assert "generation.decoder = generate is, which is slower" in told
    assert "no such cache" in told
    assert not decoder.fall_back("nothing is plainer")


def test_what_failed_leaves_its_memory_to_what_comes_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have failed for want of it."""
    caches: weakref.WeakSet[Broken] = weakref.WeakSet()
    left = []

    class Known(Broken):
        def __init__(self, *arguments: Any):
            caches.add(self)
            super().__init__(*arguments)

    class Looking(Plain):
        def __call__(self, *arguments: Any) -> Any:
            left.append(len(caches))
            return super().__call__(*arguments)

    monkeypatch.setattr(shrinking, "Growing", Known)
    decoder = choice.Chosen(Shrinking(*how()), Looking(*how()))
    rollout.generate(decoder, tiny.Engine(policy_of(tmp_path)), PROMPTS)
    assert left == [0]


def test_a_later_failure_is_not_taken_for_an_architecture_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, decoder = tiny.Engine(policy_of(tmp_path)), chosen()
    rollout.generate(decoder, policy, PROMPTS)
    monkeypatch.setattr(shrinking, "Growing", Broken)

    with pytest.raises(NotImplementedError):
        rollout.generate(decoder, policy, PROMPTS)


@pytest.mark.parametrize("kind", [Shrinking, Hybrid])
def test_what_disagrees_with_scoring_is_left_or_stops_the_run(
    tmp_path: Path,
    kind: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    policy = tiny.Engine(policy_of(tmp_path))
    monkeypatch.setattr(shrinking, "Growing", Misread)
    flags = ["gbs=2"]
    settings = tiny.settings(*flags)
    agreement = Agreement(settings, tiny.cpu(settings))
    if kind is Hybrid:
        # Nothing is plainer than what the user has asked for.
        wrong = tiny.Kernels(policy, tiny.shifted)
        with pytest.raises(TrainerError, match="apart by"):
            agreement.rollout(choice.Chosen(Hybrid(*how(*flags))), wrong, PROMPTS)
        return

    made = agreement.rollout(chosen(*flags), policy, PROMPTS)

    told = capsys.readouterr().out
    assert "generation.decoder = generate is, which is slower" in told
    assert "apart by" in told
    assert len(made.sequences) == len(PROMPTS)


def test_a_resumed_run_goes_on_with_the_decoder_that_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tiny.Engine(policy_of(tmp_path))
    fallen, resumed, other = chosen(), chosen(), chosen()
    fallen.fall_back("it was told to")
    resumed.restore(fallen.state())
    other.restore(chosen().state())
    capsys.readouterr()
    monkeypatch.setattr(shrinking, "Growing", Broken)

    rollout.generate(resumed, policy, PROMPTS)
    assert capsys.readouterr().out == "", "it was not tried again"
    rollout.generate(other, policy, PROMPTS)
    assert "no such cache" in capsys.readouterr().out


def sampled_by(folder: Path, kind: str, loop: str = "shrinking") -> list[str]:
    settings = tiny.settings(f"generation.decoder={kind}")
    device = tiny.cpu(settings)
    device.loop = loop
    policy = loading.load_policy(str(folder), "fp32", 0.0)
    decoder = choice.decoder(settings, policy, tiny.tokenizer(), device, lambda: False)
    return [type(one).__name__ for one in decoder._decoders]


@pytest.mark.knob("generation.decoder")
def test_the_settings_name_the_decoder(tmp_path: Path) -> None:
    tiny.save_policy(tmp_path, "llama")

    assert sampled_by(tmp_path, "own") == ["Shrinking", "Plain"]
    assert sampled_by(tmp_path, "own", "fixed") == ["Fixed", "Plain"]
    assert sampled_by(tmp_path, "own", "none") == ["Plain"]
    assert sampled_by(tmp_path, "compiled") == ["Compiled", "Shrinking", "Plain"]
    assert sampled_by(tmp_path, "generate") == ["Plain"]


def with_a_broken_one(folder: Path) -> tuple[bool, int]:
    """One of two ranks: whether it samples with generate after rank 1 alone could not."""
    if torch.distributed.get_rank():
        shrinking.Growing = Broken  # type: ignore[misc]
    decoder = chosen("devices_per_node=2")
    policy = loading.load_policy(str(folder), "fp32", 0.0)
    made = rollout.generate(decoder, tiny.Engine(policy), PROMPTS)
    return decoder.state()["place"] == 1, len(made.sequences)


@pytest.mark.slow
def test_all_ranks_leave_it_for_one(tmp_path: Path) -> None:
    tiny.save_policy(tmp_path, "llama")

    assert together(2, with_a_broken_one, tmp_path) == [(True, len(PROMPTS))] * 2
