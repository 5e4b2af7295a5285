"""Checkpoints → models: strictly, in the formats that step 3 knows."""

from __future__ import annotations

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import cached_file

from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.models import kinds, probes
from hlrlhf.trainer.models.dropout import set_dropout
from hlrlhf.trainer.models.forwards import Policy, Scorer
from hlrlhf.trainer.models.weights import check_names, read_shapes, read_weights

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# The key of config.json under which a saved model says what it was in training.
ROLE = "hlrlhf_role"

# In Llama's tokenizer, 1 and 2, without a token for padding.
LLAMA_TOKENS = 32000

# What transformers lets through of its own and its readers' errors about a checkpoint.
UNREADABLE = (
    OSError,
    ValueError,
    RuntimeError,
    SafetensorError,
    UnpicklingError,
    # A configuration with values of other types; Gaudi's transformers does not check them.
    getattr(hub_errors, "StrictDataclassError", ValueError),
)


def load_policy(path: str, dtype: str, dropout: float, logprob_chunk: int = 0) -> Policy:
    """An actor or reference.

    Args:
        path: a Hugging Face folder or Hub name.
        dtype: ``bf16`` or ``fp32``.
        dropout: for every dropout that the architecture has.
        logprob_chunk: see `Policy`.

    Raises:
        TrainerError: the checkpoint cannot be read, is no causal language model or lacks weights;
            its dropout is not what was set; or its logits are not those of its head, so that they
            cannot be computed in chunks.
    """
    try:
        config = _config(path, dropout)
        kinds.check_policy(path, config)
        lm, report = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            output_loading_info=True,
            trust_remote_code=False,
            **_dtype(dtype),
        )
    except UNREADABLE as error:
        raise TrainerError(f"{path}: no causal language model can be loaded: {error}") from error
    if "v_head.weight" in report["unexpected_keys"]:
        raise TrainerError(
            f"{path}: is a reward model of step 2 (v_head.weight); the actor is a causal language "
            "model (HL_ACTOR_MODEL_PATH)"
        )
    _check_report(path, report)
    policy = Policy(lm, logprob_chunk)
    probes.check(path, policy, dropout)
    if logprob_chunk:
        probes.check_chunks(path, policy)
    return policy


def load_scorer(path: str, dtype: str, dropout: float) -> Scorer:
    """A critic or reward model, in either format.

    A DeepSpeed-Chat step-2 folder holds ``rwtransformer.*`` and ``v_head.weight``; a Hugging Face
    sequence classifier holds the backbone under its own name and ``score.weight``.

    Args:
        path: a folder, or the Hub name of a sequence classifier.
        dtype: ``bf16`` or ``fp32``.
        dropout: for every dropout that the architecture has.

    Raises:
        TrainerError: the checkpoint cannot be read, has no head that gives one score for each
            token, or its weights are not exactly those that the model needs; or its dropout is not
            what was set.
    """
    try:
        config = _config(path, dropout)
    except UNREADABLE as error:
        raise TrainerError(f"{path}: no sequence classifier can be loaded: {error}") from error
    folder = Path(path)
    step2 = (
        folder.is_dir() and kinds.may_be_step2(config) and "v_head.weight" in read_shapes(folder)
    )
    kinds.check_scorer(path, config, step2)
    classifier = (_step2 if step2 else _classifier)(path, config, dtype)
    if not hasattr(classifier, "score"):
        raise TrainerError(
            f"{path}: {type(classifier).__name__} has no `score` head on the tokens; {kinds.NEEDED}"
        )
    scorer = Scorer(classifier, _learnt_at(folder)) if step2 else Scorer(classifier)
    probes.check(path, scorer, dropout)
    return scorer


def saved_as(path: str) -> str | None:
    """The role, ``actor`` or ``critic``, in which this trainer saved a folder; else None."""
    role: str | None = _raw_config(Path(path)).get(ROLE)
    return role


def _raw_config(folder: Path) -> dict[str, Any]:
    """What stands in a folder's config.json, of which transformers drops some; empty without."""
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return raw if isinstance(raw, dict) else {}


def _learnt_at(folder: Path) -> str:
    """Where DeepSpeed-Chat's step 2 read the score of a text: at the token before its padding.

    For Llama's tokenizer it adds a token for padding, and makes room for it in the embeddings. For
    all others the padding is the end token, so that the text's own end counts as padding too; for
    Llama's as well where the base model's name, by which it knows them, does not say so.
    """
    raw = _raw_config(folder)
    padded_apart = raw.get("model_type") == "llama" and raw.get("vocab_size") != LLAMA_TOKENS
    return "end" if padded_apart else "before_end"


def _dtype(dtype: str) -> dict[str, torch.dtype]:
    # Gaudi's transformers is older than the argument's new name.
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    return {"dtype" if version >= (4, 56) else "torch_dtype": DTYPES[dtype]}


def _config(path: str, dropout: float) -> PretrainedConfig:
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    try:
        set_dropout(config, dropout)
    except TrainerError as error:
        raise TrainerError(f"{path}: {error}") from error
    return config


def _step2(path: str, config: PretrainedConfig, dtype: str) -> PreTrainedModel:
    weights = read_weights(Path(path))
    config.num_labels = 1
    try:
        with torch.device("meta"):
            empty = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
        prefix = empty.base_model_prefix
        renamed = {_from_step2(name, prefix): value for name, value in weights.items()}
        # Weights are those of the file, mapped; a whole model would have been drawn for them.
        classifier, report = type(empty).from_pretrained(
            None, config=config, state_dict=renamed, output_loading_info=True, **_dtype(dtype)
        )
    except UNREADABLE as error:
        raise TrainerError(f"{path}: its step-2 weights cannot be loaded: {error}") from error
    shapes = {name: value.shape for name, value in renamed.items()}
    check_names(path, report["missing_keys"], report["unexpected_keys"], shapes)
    return classifier


def _from_step2(name: str, prefix: str) -> str:
    if name == "v_head.weight":
        return "score.weight"
    if name.startswith("rwtransformer."):
        return f"{prefix}.{name.removeprefix('rwtransformer.')}"
    return name


def _classifier(path: str, config: PretrainedConfig, dtype: str) -> PreTrainedModel:
    try:
        classifier, report = AutoModelForSequenceClassification.from_pretrained(
            path,
            config=config,
            output_loading_info=True,
            trust_remote_code=False,
            **_dtype(dtype),
        )
    except UNREADABLE as error:
        raise TrainerError(f"{path}: no sequence classifier can be loaded: {error}") from error
    _check_report(path, report)
    return classifier


def _check_report(path: str, report: dict[str, Any]) -> None:
    """What transformers says of names, but for buffers; where weights lie, their files tell."""
    unexpected = report["unexpected_keys"]
    shapes = {}
    if unexpected:
        # A Hub name's files lie in its cache, out of which they were just loaded.
        shapes = read_shapes(Path(cached_file(path, "config.json")).parent)
    check_names(path, report["missing_keys"], unexpected, shapes)
