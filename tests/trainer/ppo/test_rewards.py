"""Rewards: the sum of the sources, what is made of it, and which tokenizer a model works on."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import tiny
import torch
import torch.distributed as dist
from tiny import EOS, one_rank  # noqa: F401

from hlrlhf.trainer import demo
from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.models import frozen, loading, tokenizers
from hlrlhf.trainer.ppo import rewards
from hlrlhf.trainer.ppo.rewards import Normalizer, Rewards

pytestmark = pytest.mark.usefixtures("one_rank")

# Prompt, answer, and whether it ended.
TEXTS = [
    ("Where is the boat?", " In the harbour.", True),
    ("Why", "", True),
    ("boat", " as", False),
]
LETTERS = torch.tensor([34.0, 3.0, 7.0])


def lengths(prompts: list[str], answers: list[str]) -> list[int]:
    """A reward function: letters of prompt and answer."""
    return [len(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]


LENGTHS = f"{__name__}:{lengths.__name__}"


def rolled_out() -> Any:
    tokenizer = tiny.tokenizer()
    return tiny.rolled_out(
        [tokenizer(prompt)["input_ids"] for prompt, _, _ in TEXTS],
        [
            tokenizer(answer, add_special_tokens=False)["input_ids"] + [EOS] * ended
            for _, answer, ended in TEXTS
        ],
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two classifiers on the tokens of the tiny tokenizer."""
    base, size = tmp_path_factory.mktemp("models"), len(tiny.tokenizer())
    return {
        name: tiny.save_classifier(base / name, "llama", seed=seed, vocabulary=size)
        for name, seed in (("critic", 5), ("reward", 6))
    }


def loaded(folders: dict[str, Path], *flags: str) -> Rewards:
    settings = tiny.settings(f"critic.model_path={folders['critic']}", *flags)
    rewards.check_rewards(settings, tiny.tokenizer())
    return rewards.load_rewards(settings, tiny.tokenizer(), tiny.models(None))


def raw(folders: dict[str, Path], *flags: str) -> Any:
    return loaded(folders, *flags).scores(rolled_out())


def ends(path: Path, before: bool = False) -> Any:
    """What a reward model says at the last token of each answer, or at the one before its end."""
    scorer = loading.load_scorer(str(path), "fp32", 0.0).eval()
    rollout = rolled_out()
    with torch.no_grad():
        every = scorer(rollout.sequences, rollout.attention_mask, rollout.answer_width)
    read = rollout.lengths - rollout.has_end_token.long() * before
    return torch.stack([row[position] for row, position in zip(every, read, strict=True)])


# 1. Where scores come from.


@pytest.mark.knob("reward.model_path")
def test_the_reward_model_is_the_critics_start_unless_it_has_a_path(
    folders: dict[str, Path],
) -> None:
    torch.testing.assert_close(raw(folders), ends(folders["critic"]))
    own = raw(folders, f"reward.model_path={folders['reward']}")
    torch.testing.assert_close(own, ends(folders["reward"]))
    assert not torch.allclose(own, ends(folders["critic"]), atol=0.01)


@pytest.mark.knob("reward.function", "reward.function_weight", "reward.model_weight")
def test_the_score_is_a_weighted_sum(folders: dict[str, Path]) -> None:
    model, function = ends(folders["critic"]), f"reward.function={LENGTHS}"

    torch.testing.assert_close(raw(folders, function), model + LETTERS)
    weighted = raw(folders, function, "reward.function_weight=-2", "reward.model_weight=0.25")
    torch.testing.assert_close(weighted, 0.25 * model - 2 * LETTERS)


def test_without_a_weight_no_reward_model_is_looked_for(folders: dict[str, Path]) -> None:
    flags = ("reward.model_weight=0", "critic.model_path=/nowhere", f"reward.function={LENGTHS}")

    torch.testing.assert_close(raw(folders, *flags), LETTERS)


@pytest.mark.knob("reward.score_at")
@pytest.mark.parametrize(
    ("architecture", "vocabulary", "before"),
    [
        ("bloom", 32008, True),
        ("opt", 32008, True),
        # Llama's tokens and one for padding, up to a multiple of 8; and without one.
        ("llama", 32008, False),
        ("llama", 32000, True),
    ],
)
def test_a_step_2_folder_is_read_where_it_learnt_to_be(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    architecture: str,
    vocabulary: int,
    before: bool,
) -> None:
    folder = tiny.save_step2(tmp_path / "rm", architecture, vocabulary=vocabulary)
    folders = {"critic": folder}

    torch.testing.assert_close(raw(folders), ends(folder, before))
    place = "before the end token" if before else "at an answer's last token"
    assert f"{folder}: rewards are read {place}, as it learnt it" in capsys.readouterr().out
    for score_at, expected in (("end", False), ("before_end", True)):
        found = raw(folders, f"reward.score_at={score_at}")
        torch.testing.assert_close(found, ends(folder, expected))
        assert "as HL_REWARD_SCORE_AT says" in capsys.readouterr().out
    assert not torch.allclose(ends(folder, True), ends(folder), atol=0.01)


def test_a_trained_critic_is_no_reward_model_unless_it_is_named_as_one(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["critic"], tmp_path / "critic")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {loading.ROLE: "critic"}))
    trained = {"critic": folder}

    with pytest.raises(TrainerError, match=r"a critic that hlrlhf has trained.*HL_REWARD_MODEL_P"):
        loaded(trained)
    for named in (folders["reward"], folder):
        torch.testing.assert_close(raw(trained, f"reward.model_path={named}"), ends(named))
    loaded(trained, "reward.model_weight=0", f"reward.function={LENGTHS}")


def test_a_missing_function_is_told_before_anything_loads() -> None:
    settings = tiny.settings("reward.function=not_there_at_all:score")

    with pytest.raises(TrainerError, match="not_there_at_all cannot be imported"):
        rewards.check_rewards(settings, tiny.tokenizer())


# 2. Whose tokens a reward model works on.


@pytest.fixture
def foreign(tmp_path: Path) -> dict[str, Path]:
    """A critic on the actor's tokens, and a reward model on those of a larger tokenizer."""
    other = demo.train_tokenizer(
        [f"{prompt}{answer}" for prompt, answer, _ in TEXTS]
        + ["the reward model saw entirely other words in its training"]
    )
    assert len(other) > len(tiny.tokenizer())
    made = {
        name: tiny.save_classifier(tmp_path / name, "llama", vocabulary=len(tokenizer))
        for name, tokenizer in (("critic", tiny.tokenizer()), ("reward", other))
    }
    other.save_pretrained(made["reward"])
    return made


@pytest.mark.knob("reward.own_tokenizer")
def test_a_model_with_other_tokens_needs_answers_encoded_again(foreign: dict[str, Path]) -> None:
    path = f"reward.model_path={foreign['reward']}"

    with pytest.raises(TrainerError, match="not the actor's; set HL_REWARD_OWN_TOKENIZER=1"):
        loaded(foreign, path)
    again = raw(foreign, path, "reward.own_tokenizer=1")

    tokenizer = tokenizers.held_tokenizer(str(foreign["reward"]))
    scorer = loading.load_scorer(str(foreign["reward"]), "fp32", 0.0).eval()
    for score, (prompt, answer, ended) in zip(again, TEXTS, strict=True):
        row = torch.tensor([tokenizer(prompt + answer)["input_ids"] + [EOS] * ended])
        with torch.no_grad():
            expected = scorer(row, torch.ones_like(row), 0)[0, 0]
        torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(again, ends(foreign["reward"]), atol=0.01), "of the actor's tokens"


def test_the_critics_checkpoint_cannot_have_tokens_of_its_own(foreign: dict[str, Path]) -> None:
    with pytest.raises(TrainerError, match=f"HL_REWARD_MODEL_PATH={foreign['reward']}"):
        loaded({"critic": foreign["reward"]})


@pytest.mark.parametrize(
    "flags",
    [
        ["reward.model_weight=0", f"reward.function={LENGTHS}"],
        ["reward.model_path={critic}", "reward.own_tokenizer=1"],
        ["reward.model_path={reward}"],
    ],
    ids=["a function scores", "it scores text", "another model scores"],
)
def test_nor_where_it_does_not_score(foreign: dict[str, Path], flags: list[str]) -> None:
    """The critic reads the actor's tokens, whatever scores."""
    turned = {"critic": foreign["reward"], "reward": foreign["critic"]}
    with pytest.raises(TrainerError, match=r"the critic's tokenizer .*set HL_CRITIC_MODEL_PATH to"):
        loaded(turned, *(flag.format(**turned) for flag in flags))


def test_the_same_tokenizer_beside_the_model_is_no_trouble(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    both = shutil.copytree(folders["critic"], tmp_path / "both")
    tiny.tokenizer().save_pretrained(both)

    torch.testing.assert_close(raw({"critic": both}), raw(folders))


def test_tokenizers_may_differ_by_tokens_that_one_has_more(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    smaller = shutil.copytree(folders["reward"], tmp_path / "smaller")
    tiny.tokenizer().save_pretrained(smaller)
    actors = tiny.tokenizer()
    actors.add_tokens(["<more>"])

    rewards.check_rewards(tiny.settings(f"reward.model_path={smaller}"), actors)


def test_encoding_again_needs_a_tokenizer(folders: dict[str, Path]) -> None:
    with pytest.raises(TrainerError, match=r"holds no whole tokenizer.*HL_REWARD_OWN_TOKENIZER=0"):
        loaded(folders, f"reward.model_path={folders['reward']}", "reward.own_tokenizer=1")


def test_a_tokenizer_of_its_own_may_be_that_of_the_model_it_was_made_from(
    foreign: dict[str, Path], tmp_path: Path
) -> None:
    flags = (f"reward.model_path={foreign['reward']}", "reward.own_tokenizer=1")
    expected = raw(foreign, *flags)
    base = tmp_path / "base"
    base.mkdir()
    for file in foreign["reward"].glob("*token*"):
        file.rename(base / file.name)
    config = foreign["reward"] / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_name_or_path": str(base)}))

    torch.testing.assert_close(raw(foreign, *flags), expected)


def test_a_reference_cannot_have_tokens_of_its_own(foreign: dict[str, Path]) -> None:
    def check(path: Path) -> None:
        settings = tiny.settings(f"reference.model_path={path}")
        frozen.check_reference(settings, tiny.tokenizer())

    check(foreign["critic"])
    with pytest.raises(TrainerError, match="the reference's tokenizer is not the actor's"):
        check(foreign["reward"])


def test_the_embedding_must_fit_the_tokenizer_that_is_used(foreign: dict[str, Path]) -> None:
    size = len(tiny.tokenizer())
    tiny.save_classifier(foreign["reward"], "llama", vocabulary=size)

    with pytest.raises(TrainerError, match=f"reward model has embeddings for {size} tokens"):
        loaded(foreign, f"reward.model_path={foreign['reward']}", "reward.own_tokenizer=1")


# 3. What is made of scores.


def shaper(*flags: str) -> Rewards:
    return Rewards([], tiny.settings(*flags))


@pytest.mark.knob("reward.clip", "reward.missing_eos_penalty")
def test_the_penalty_comes_after_the_clip() -> None:
    scores = torch.tensor([9.0, 9.0, -9.0, -9.0, 1.0, 1.0])
    ended = torch.tensor([True, False] * 3)

    assert shaper().shaped(scores, ended).tolist() == [5.0, 5.0, -5.0, -5.0, 1.0, 1.0]
    clipped = shaper("reward.clip=2").shaped(scores, ended)
    assert clipped.tolist() == [2.0, 2.0, -2.0, -2.0, 1.0, 1.0]
    punished = shaper("reward.clip=2", "reward.missing_eos_penalty=3").shaped(scores, ended)
    assert punished.tolist() == [2.0, -1.0, -2.0, -5.0, 1.0, -2.0]


@pytest.mark.usefixtures("one_rank")
@pytest.mark.knob("reward.normalize")
@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1.0), (-3000.0, 0.5), (7.0, 1e-3)])
def test_scores_are_normalized_by_all_scores_so_far(offset: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    sizes = (4, 1, 64, 8)
    batches = [torch.randn(size, generator=generator) * scale + offset for size in sizes]
    made = shaper("reward.normalize=1", "reward.clip=100", "reward.missing_eos_penalty=0.5")

    for i, batch in enumerate(batches):
        ended = torch.arange(len(batch)) % 2 == 0
        found = made.shaped(batch, ended)
        so_far = torch.cat(batches[: i + 1]).double().numpy()
        expected = (batch.double().numpy() - so_far.mean()) / np.sqrt(so_far.var() + 1e-8)
        expected -= 0.5 * (1 - ended.numpy())
        assert found.dtype == torch.float32
        assert found.numpy() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.usefixtures("one_rank")
def test_the_clip_is_that_of_normalized_scores() -> None:
    made = shaper("reward.normalize=1", "reward.clip=1.5")

    found = made.shaped(torch.tensor([100.0] * 9 + [200.0]), torch.tensor([True] * 10))

    assert found[:9].tolist() == pytest.approx([-1 / 3] * 9)
    assert found[9] == 1.5


def test_equal_scores_are_normalized_to_zero_and_no_number_is_kept_out() -> None:
    normalizer = Normalizer()
    normalizer.update(torch.tensor([torch.nan, torch.inf]))
    assert normalizer == Normalizer()
    normalizer.update(torch.tensor([3.0, torch.nan, 3.0]))

    assert normalizer == Normalizer(count=2, mean=3.0, m2=0.0)
    assert normalizer(torch.tensor([3.0, 3.0])).tolist() == [0.0, 0.0]


def _one_of_two(rank: int, folder: str, batches: Any) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    made = shaper("reward.normalize=1", "reward.clip=100")
    found = [made.shaped(batch[rank], torch.ones(4, dtype=torch.bool)) for batch in batches]
    torch.save((found, made._normalizer), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_have_one_mean_and_deviation(tmp_path: Path) -> None:
    # Far apart, so that a rank's own statistics would show.
    batches = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1))
    batches += torch.tensor([-2.0, 5.0])[:, None]
    # The server that the runs of other tests are forked from.
    context = multiprocessing.get_context("forkserver")
    arguments = [(rank, str(tmp_path), batches) for rank in range(2)]
    processes = [context.Process(target=_one_of_two, args=each) for each in arguments]

    for process in processes:
        process.start()
    for process in processes:
        process.join(120)

    assert [process.exitcode for process in processes] == [0, 0]
    (first, ours), (second, theirs) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)
    )
    assert ours == theirs, "to the last digit"
    for i, found in enumerate(zip(first, second, strict=True)):
        so_far = batches[: i + 1].double().numpy()
        expected = (batches[i].double().numpy() - so_far.mean()) / np.sqrt(so_far.var() + 1e-8)
        assert torch.stack(found).numpy() == pytest.approx(expected, rel=1e-6, abs=1e-6)


# 4. Whole runs.


@pytest.mark.slow
def test_a_run_whose_rewards_are_those_of_a_function_alone(
    demo_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "kindness_of_a_test.py").write_text(
        "import json, pathlib\n"
        "def score(prompts, answers):\n"
        "    scores = [answer.count('a') / 4 + len(prompt) % 3\n"
        "              for prompt, answer in zip(prompts, answers)]\n"
        "    with pathlib.Path(__file__).with_name('calls.jsonl').open('a') as file:\n"
        "        print(json.dumps([prompts, answers, scores]), file=file)\n"
        "    return scores\n"
    )
    ranks.prepare(
        tmp_path,
        demo_models,
        reward__function="kindness_of_a_test:score",
        reward__model_weight=0,
        mbs=4,
        run_steps=2,
    )

    run = ranks.train(tmp_path)

    assert run.codes == [0], run.output
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    samples = ranks.read_lines(tmp_path / "samples.jsonl")
    assert len(calls) == 2, "once for each rollout, with all of its rows"
    for step, sample, (prompts, answers, scores) in zip(run.metrics, samples, calls, strict=True):
        assert len(prompts) == 8
        assert all(prompt.startswith("Human:") for prompt in prompts)
        # Eight additions and a division in fp32.
        assert step["reward"] == pytest.approx(sum(scores) / 8, rel=1e-5)
        assert step["reward"] > 0
        assert sample["score"] == pytest.approx(scores[0])
        assert sample["prompt"] == f"<s>{prompts[0]}"
        assert sample["answer"].removesuffix("</s>") == answers[0]
