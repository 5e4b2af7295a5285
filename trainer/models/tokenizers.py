"""Tokenizers: the actor's, those that models hold, and whether they fit."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from hlrlhf.settings import Settings
from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.models import fidelity
from hlrlhf.trainer.models.forwards import Policy, Scorer

# A whole tokenizer has one of them at least: ``save_pretrained`` always writes it. Of less, such as
# the vocab.json and merges.txt, or the tokenizer.model, that DeepSpeed-Chat leaves beside its
# models, transformers makes a tokenizer with special tokens of its own invention.
WHOLE = ("tokenizer.json", "tokenizer_config.json")


class NoTokenizerError(TrainerError):
    """There is no whole tokenizer at a place; there may be one at another."""


def actor_tokenizer(settings: Settings) -> PreTrainedTokenizerBase:
    """The tokenizer of a run, whose tokens actor and critic work on.

    Raises:
        TrainerError: `actor.tokenizer_path` names none or, where it is unset, the actor has none.
    """
    if settings.actor.tokenizer_path is not None:
        return load_tokenizer(settings.actor.tokenizer_path)
    return model_tokenizer(
        settings.actor.model_path,
        "set HL_ACTOR_TOKENIZER_PATH to the folder or Hub name of the tokenizer that the actor was "
        "trained with",
    )


def model_tokenizer(path: str, remedy: str) -> PreTrainedTokenizerBase:
    """The tokenizer that a model was trained with.

    It is the one beside the model or, as for DeepSpeed-Chat, whose folders hold parts of one alone,
    that of the model which config.json names as the one it was made from (``_name_or_path``).

    Args:
        path: a model's folder or Hub name.
        remedy: for the error, what to do where there is none.

    Raises:
        TrainerError: there is none at either place, or it cannot be loaded.
    """
    try:
        return load_tokenizer(path)
    except NoTokenizerError as error:
        why = str(error)
    name = _made_from(path)
    if name is None:
        where = "its config.json names no other model that may have one (_name_or_path)"
    else:
        try:
            return load_tokenizer(name)
        except NoTokenizerError as error:
            where = f"nor does what its config.json names (_name_or_path): {error}"
    raise NoTokenizerError(f"{why}; {where}; {remedy}")


def held_tokenizer(path: str) -> PreTrainedTokenizerBase | None:
    """The whole tokenizer beside a model, None where there is none.

    Raises:
        TrainerError: there is one, and it cannot be loaded.
    """
    try:
        return load_tokenizer(path)
    except NoTokenizerError:
        return None


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or of a Hub name.

    Raises:
        NoTokenizerError: there is no whole one.
        TrainerError: there is one, and it cannot be loaded.
    """
    folder = Path(path)
    if folder.is_absolute() and not folder.is_dir():
        raise NoTokenizerError(f"{path}: there is no such folder to take a tokenizer from")
    if folder.is_dir() and not _holds_one(path):
        files = ", ".join(sorted(file.name for file in folder.iterdir())) or "nothing"
        raise NoTokenizerError(
            f"{path}: holds no whole tokenizer, which has {' or '.join(WHOLE)}; it holds {files}"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # tokenizers raises types of its own
        kind = TrainerError if folder.is_dir() else NoTokenizerError
        raise kind(f"{path}: no tokenizer can be loaded from it: {error}") from error
    if not _holds_one(path):
        raise NoTokenizerError(
            f"{path}: has no whole tokenizer on the Hub, which has {' or '.join(WHOLE)}"
        )
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
        raise TrainerError(
            f"{path}: the tokenizer there has no token but special ones; the files of its "
            "vocabulary are missing"
        )
    said = _file(path, "tokenizer_config.json")
    return fidelity.as_its_files_say(
        tokenizer,
        _file(path, "tokenizer.json"),
        {} if said is None else json.loads(said.read_text(encoding="utf-8")),
    )


def foreign(held: PreTrainedTokenizerBase | None, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a model's tokenizer, if it has one, differs by more than tokens that one has more."""
    if held is None:
        return False
    one, other = held.get_vocab().items(), tokenizer.get_vocab().items()
    return not (one <= other or other <= one)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, role: str, model: Policy | Scorer) -> None:
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


def end_tokens(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> list[int]:
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


def _holds_one(path: str) -> bool:
    return any(_file(path, name) is not None for name in WHOLE)


def _file(path: str, name: str) -> Path | None:
    """A file of a folder, or of a Hub name that has been loaded: it is in the cache then.

    In transformers' own, which is another than the Hub library's in releases that Gaudi has.
    """
    found = cached_file(
        path,
        name,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found is not None else None


def _made_from(path: str) -> str | None:
    """What ``_name_or_path`` in config.json says, which newer releases of transformers hide."""
    if not Path(path).is_dir():
        return None
    try:
        name = json.loads(Path(path, "config.json").read_text(encoding="utf-8"))["_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return name if isinstance(name, str) and name not in ("", path) else None
