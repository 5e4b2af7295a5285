"""Tokenizers: the actor's, those that models hold, and whether they fit."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.models import Policy, Scorer


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model folder or Hub name.

    Raises:
        TrainerError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise TrainerError(f"{path}: no tokenizer can be loaded from it: {error}") from error


def held_tokenizer(path: str) -> Any | None:
    """The tokenizer beside a model, None where there is none.

    A folder holds one if it has a file that ``save_pretrained`` always writes. Without any,
    transformers may make up a tokenizer; and DeepSpeed-Chat leaves parts of one, which are not
    enough to tell its vocabulary by.

    Raises:
        TrainerError: there is one, and it cannot be loaded.
    """
    folder = Path(path)
    if not folder.is_dir():
        with contextlib.suppress(TrainerError):
            return load_tokenizer(path)
        return None
    names = ("tokenizer.json", "tokenizer_config.json")
    return load_tokenizer(path) if any((folder / name).exists() for name in names) else None


def check_vocabulary(tokenizer: Any, role: str, model: Policy | Scorer) -> None:
    """Every token that the tokenizer can produce must have an embedding in the model.

    Raises:
        TrainerError: the embedding is too small; names the `role`.
    """
    rows = model.inner.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise TrainerError(
            f"the {role} has embeddings for {rows} tokens, but the tokenizer that it is used with "
            f"({tokenizer.name_or_path}) has {len(tokenizer)}; they do not belong together"
        )


def end_tokens(policy: Policy, tokenizer: Any) -> list[int]:
    """The ids that end an answer.

    Raises:
        TrainerError: neither the generation configuration nor the tokenizer names one.
    """
    ids = policy.generation_config.eos_token_id
    ids = tokenizer.eos_token_id if ids is None else ids
    if ids is None:
        raise TrainerError(
            "the actor has no end-of-sequence token: set eos_token_id in its generation_config.json"
        )
    return list(ids) if isinstance(ids, list | tuple) else [ids]
