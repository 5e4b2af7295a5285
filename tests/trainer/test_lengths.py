"""How long a text a model can read, and runs whose texts are longer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    MptConfig,
    OPTConfig,
    Qwen2Config,
)

from hlrlhf.trainer import lengths
from hlrlhf.trainer.data import reading
from hlrlhf.trainer.data.rows import Rows
from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.models import loading
from hlrlhf.trainer.ppo import scores

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 50,
}


def rotary(rope: dict[str, Any] | None = None) -> Any:
    return LlamaConfig(max_position_embeddings=100, rope_scaling=rope)


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (GPT2Config(n_positions=32), 32),
        (OPTConfig(max_position_embeddings=40), 40),
        (Qwen2Config(max_position_embeddings=64, sliding_window=8), 64),
        (FalconConfig(alibi=False, max_position_embeddings=70), 70),
        (rotary(), 100),
        (rotary({"rope_type": "linear", "factor": 2.0}), 200),
        (rotary({"rope_type": "dynamic", "factor": 2.0}), 200),
        (rotary(YARN), 400),
        # Its configurations give the length after the scaling already.
        (rotary(LLAMA3 | {"factor": 2.0}), 100),
        (BloomConfig(), None),
        (FalconConfig(alibi=True), None),
        (MptConfig(max_seq_len=16), 16),
    ],
    ids=lambda value: type(value).__name__.removesuffix("Config"),
)
def test_what_a_model_can_read_follows_from_its_configuration(
    config: Any, longest: int | None
) -> None:
    assert lengths.longest(config) == longest


def saved(folder: Path, role: str, places: int | None) -> str:
    """A configuration alone: nothing here may need weights."""
    config = BloomConfig() if places is None else GPT2Config(n_positions=places)
    config.save_pretrained(folder / role)
    return str(folder / role)


def check(folder: Path, places: dict[str, int | None], *flags: str) -> None:
    """Of prompts of 10 tokens at most and one of 12 that is held out, with answers up to 20."""
    models = {role: saved(folder, role, each) for role, each in places.items()}
    settings = tiny.settings(
        *(f"{role}.model_path={path}" for role, path in models.items()),
        "generation.max_new_tokens=20",
        *flags,
    )
    prompts = reading.Prompts(Rows.of([[1] * 10, [1] * 3]), 1, Rows.of([[1] * 12]))
    lengths.check_lengths(settings, prompts)


ENOUGH = {"actor": 32, "critic": 32, "reference": 32, "reward": 32}


@pytest.mark.parametrize("role", list(ENOUGH))
def test_prompts_and_answers_that_a_model_cannot_read_are_an_error(
    tmp_path: Path, role: str
) -> None:
    check(tmp_path, ENOUGH)

    with pytest.raises(TrainerError) as caught:
        check(tmp_path, ENOUGH | {role: 31})

    named = "reward model" if role == "reward" else role
    assert str(caught.value) == (
        f"{tmp_path / role}: the {named} can read 31 tokens at most, by its config.json, but the "
        "longest prompt has 12 and an answer up to 20 (generation.max_new_tokens): set "
        "HL_DATASET_MAX_PROMPT_TOKENS to 11 at most, or HL_GENERATION_MAX_NEW_TOKENS to 19 at most"
    )


@pytest.mark.parametrize(
    ("places", "words"),
    [
        (20, "set HL_GENERATION_MAX_NEW_TOKENS to 8 at most$"),
        (12, "set HL_DATASET_MAX_PROMPT_TOKENS and HL_GENERATION_MAX_NEW_TOKENS to less$"),
    ],
)
def test_only_what_can_help_is_advised(tmp_path: Path, places: int, words: str) -> None:
    with pytest.raises(TrainerError, match=words):
        check(tmp_path, {"actor": places, "critic": 99})


def test_what_does_not_read_these_tokens_has_no_say(tmp_path: Path) -> None:
    check(tmp_path, {"actor": None, "critic": None})
    check(tmp_path, ENOUGH | {"reward": 8}, "reward.own_tokenizer=1")
    # Nobody scores by a model that would be the critic's, whose own limit is told as the critic's.
    flags = ("reward.model_weight=0", "reward.function=math:fsum")
    check(tmp_path, {"actor": 32, "critic": 32}, *flags)


@pytest.mark.knob("pretraining.max_tokens")
def test_rows_of_the_pretraining_mix_are_read_by_the_actor(tmp_path: Path) -> None:
    mix = ("pretraining.path=/x", "pretraining.max_tokens=40")
    check(tmp_path, ENOUGH | {"actor": 40}, *mix)

    with pytest.raises(TrainerError, match=r"mix has 40 .*HL_PRETRAINING_MAX_TOKENS to 39 at most"):
        check(tmp_path, ENOUGH | {"actor": 39}, *mix)


# Whole rows, and what follows them.


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_a_row_as_long_as_the_model_can_read_may_be_padded_behind(
    tmp_path: Path, architecture: str
) -> None:
    """Tolerance 1e-4: fp32 sums in another order."""
    folder = tmp_path / "actor"
    if architecture == "gpt2":
        tiny.save_policy(folder, "gpt2")
    else:
        config = OPTConfig(
            vocab_size=48,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            init_std=0.4,
        )
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    policy = loading.load_policy(str(folder), "fp32", 0.0).eval()
    row = torch.arange(32) % 40 + 3
    behind = torch.cat([row, torch.zeros(3, dtype=torch.long)])[None]
    mask = (torch.arange(35) < 32).long()[None]

    with torch.no_grad():
        alone = policy(row[None], torch.ones(1, 32, dtype=torch.long), 10, 1.0)
        padded = policy(behind, mask, 13, 1.0)

    torch.testing.assert_close(padded[:, :10], alone, rtol=1e-4, atol=1e-4)


def test_a_text_too_long_for_a_reward_model_of_other_tokens_keeps_its_end() -> None:
    tokenizer = own = tiny.tokenizer()
    settings = tiny.settings()
    prompt, short = tokenizer("Human: where is the blue boat?")["input_ids"], [1, 50]
    answer = [*tokenizer("In the harbour", add_special_tokens=False)["input_ids"], tiny.EOS]
    rollout = tiny.rolled_out([prompt, short], [answer, answer])
    longest = len(short) + len(answer)
    assert len(prompt) > len(short)

    def read(longest: int | None) -> tuple[list[list[int]], Any]:
        source = scores.ModelScores(
            None, tokenizer, own, "end", settings, tiny.cpu(settings), longest
        )
        ids, mask = source._encoded_again(rollout)
        return [row[kept].tolist() for row, kept in zip(ids, mask.bool(), strict=True)], source.cut

    whole, cut = read(None)
    assert (whole, cut) == ([prompt + answer, short + answer], None)
    rows, cut = read(longest)
    assert rows == [[1, *(prompt + answer)[1 - longest :]], short + answer]
    assert cut.tolist() == [True, False]
    own.bos_token = None
    rows, cut = read(longest)
    assert rows[0] == (prompt + answer)[-longest:]


@pytest.mark.slow
def test_a_run_tells_how_many_texts_its_reward_model_could_not_read_whole(
    demo_models: Path, tmp_path: Path
) -> None:
    reward = tmp_path / "reward"
    shutil.copytree(demo_models / "reward", reward)
    config = json.loads((reward / "config.json").read_text())
    (reward / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    ranks.prepare(
        tmp_path / "run",
        demo_models,
        reward__model_path=reward,
        reward__own_tokenizer=1,
        run_steps=1,
    )

    run = ranks.train(tmp_path / "run")

    assert run.codes == [0], run.output
    assert 0 < run.metrics[0]["reward_cut"] <= 1


@pytest.mark.slow
def test_a_run_that_is_too_long_stops_before_it_loads_a_model(
    demo_models: Path, tmp_path: Path
) -> None:
    actor = shutil.copytree(demo_models / "actor", tmp_path / "actor")
    (actor / "model.safetensors").unlink()
    ranks.prepare(
        tmp_path / "run", demo_models, actor__model_path=actor, generation__max_new_tokens=255
    )

    run = ranks.train(tmp_path / "run")

    assert run.codes == [1]
    assert "the actor can read 256 tokens at most" in run.output[0]
