"""Tokenizers: whether they fit the models, and the tokens that end an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import tiny  # noqa: E402
from transformers import GenerationConfig  # noqa: E402

from hlrlhf.trainer import loading, tokenizers  # noqa: E402
from hlrlhf.trainer.errors import TrainerError  # noqa: E402

# 1. Vocabulary and special tokens.


def test_every_model_needs_an_embedding_for_every_token(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    fits = loading.load_policy(
        str(tiny.save_policy(tmp_path / "actor", "llama", vocabulary=len(tokenizer))), "fp32", 0.0
    )
    small = loading.load_scorer(
        str(tiny.save_classifier(tmp_path / "hf", "bloom", vocabulary=len(tokenizer) - 1)),
        "fp32",
        0.0,
    )

    tokenizers.check_vocabulary(tokenizer, "actor", fits)
    with pytest.raises(TrainerError) as caught:
        tokenizers.check_vocabulary(tokenizer, "critic", small)
    assert str(len(tokenizer) - 1) in str(caught.value)
    assert str(caught.value).startswith("the critic has embeddings for")


def test_a_tokenizer_beside_a_model_is_found_when_it_is_whole(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    # From such a configuration alone, transformers makes up a tokenizer of one token.
    tiny.config("gpt2").save_pretrained(tmp_path)
    assert tokenizers.held_tokenizer(str(tmp_path)) is None
    # What DeepSpeed-Chat leaves beside a reward model.
    tokenizer.backend_tokenizer.model.save(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "vocab.json", "merges.txt"}
    assert tokenizers.held_tokenizer(str(tmp_path)) is None

    tokenizer.save_pretrained(tmp_path)
    assert tokenizers.held_tokenizer(str(tmp_path)).get_vocab() == tokenizer.get_vocab()

    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TrainerError, match="no tokenizer can be loaded"):
        tokenizers.held_tokenizer(str(tmp_path))
    assert tokenizers.held_tokenizer("/nowhere/at/all") is None


@pytest.mark.parametrize(
    ("configured", "of_tokenizer", "expected"),
    [(2, "</s>", [2]), ([5, 2], "</s>", [5, 2]), (None, "</s>", [2]), (7, None, [7])],
)
def test_end_tokens(
    tmp_path: Path, configured: Any, of_tokenizer: str | None, expected: list[int]
) -> None:
    policy = loading.load_policy(str(tiny.save_policy(tmp_path, "llama")), "fp32", 0.0)
    policy.generation_config.eos_token_id = configured
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = of_tokenizer

    assert tokenizers.end_tokens(policy, tokenizer) == expected


def test_no_end_token_at_all_is_refused(tmp_path: Path) -> None:
    policy = loading.load_policy(str(tiny.save_policy(tmp_path, "llama")), "fp32", 0.0)
    policy.generation_config.eos_token_id = None
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None

    with pytest.raises(TrainerError, match="no end-of-sequence token"):
        tokenizers.end_tokens(policy, tokenizer)


def test_the_checkpoints_generation_configuration_is_kept(tmp_path: Path) -> None:
    folder = tiny.save_policy(tmp_path, "llama")
    GenerationConfig(max_length=77, eos_token_id=[2, 5]).save_pretrained(folder)

    policy = loading.load_policy(str(folder), "fp32", 0.0)

    assert policy.generation_config.max_length == 77
    assert tokenizers.end_tokens(policy, tiny.tokenizer()) == [2, 5]
