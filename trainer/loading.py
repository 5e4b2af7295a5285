"""Checkpoints → models: strictly, in the formats that step 3 knows."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.models import Policy, Scorer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# What transformers lets through of its own and its readers' errors about a checkpoint.
UNREADABLE = (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError)

# The names that model configurations give to their dropout rates.
DROPOUT_FIELDS = (
    "dropout",
    "attention_dropout",
    "hidden_dropout",
    "activation_dropout",
    "attn_pdrop",
    "embd_pdrop",
    "resid_pdrop",
    "embed_dropout",
    "resid_dropout",
    "emb_pdrop",
    "ffn_dropout",
)

# The key of config.json under which a saved model says what it was in training.
ROLE = "hlrlhf_role"

# Buffers that older checkpoints carry and that a model computes for itself.
DERIVED_BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias")


def load_policy(path: str, dtype: str, dropout: float, logprob_chunk: int = 0) -> Policy:
    """An actor or reference.

    Args:
        path: a Hugging Face folder or Hub name.
        dtype: ``bf16`` or ``fp32``.
        dropout: for every dropout that the architecture has.
        logprob_chunk: see `Policy`.

    Raises:
        TrainerError: the checkpoint cannot be read or lacks weights, or its logits are not those of
            its head, so that they cannot be computed in chunks.
    """
    try:
        lm, report = AutoModelForCausalLM.from_pretrained(
            path, config=_config(path, dropout), output_loading_info=True, **_dtype(dtype)
        )
    except UNREADABLE as error:
        raise TrainerError(f"{path}: no causal language model can be loaded: {error}") from error
    _strict(path, report["missing_keys"], report["unexpected_keys"])
    policy = Policy(lm, logprob_chunk)
    if logprob_chunk:
        _check_chunks(path, policy)
    return policy


@torch.no_grad()
def _check_chunks(path: str, policy: Policy) -> None:
    """Some architectures scale or cap what their head gives; those logits need the whole model."""
    tokens = torch.tensor([[1, 2, 3]])
    mask = torch.ones_like(tokens)
    in_chunks = policy(tokens, mask, 2, 1.0)
    whole = Policy(policy.lm)(tokens, mask, 2, 1.0)
    if not torch.allclose(in_chunks, whole, atol=0.05):
        raise TrainerError(
            f"{path}: {type(policy.lm).__name__} changes the logits after its head, so they cannot "
            "be computed in chunks; set HL_PPO_LOGPROB_CHUNK=0"
        )


def load_scorer(path: str, dtype: str, dropout: float) -> Scorer:
    """A critic or reward model, in either format.

    A DeepSpeed-Chat step-2 folder holds ``rwtransformer.*`` and ``v_head.weight``; a Hugging Face
    sequence classifier holds the backbone under its own name and ``score.weight``.

    Args:
        path: a folder, or the Hub name of a sequence classifier.
        dtype: ``bf16`` or ``fp32``.
        dropout: for every dropout that the architecture has.

    Raises:
        TrainerError: the checkpoint cannot be read, has another number of labels, or its weights
            are not exactly those that the model needs.
    """
    folder = Path(path)
    if not folder.is_dir() or _says_classifier(folder):
        return _load_classifier(path, dtype, dropout)
    weights = read_weights(folder)
    if "v_head.weight" not in weights:
        return _load_classifier(path, dtype, dropout)
    try:
        config = _config(path, dropout)
        config.num_labels = 1
        classifier = AutoModelForSequenceClassification.from_config(config, **_dtype(dtype))
        prefix = classifier.base_model_prefix
        renamed = {_from_step2(name, prefix): value for name, value in weights.items()}
        missing, unexpected = classifier.load_state_dict(renamed, strict=False)
    except UNREADABLE as error:
        raise TrainerError(f"{path}: its step-2 weights cannot be loaded: {error}") from error
    _strict(path, missing, unexpected)
    return Scorer(classifier, _learnt_at(folder))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder: safetensors or PyTorch's own format, in one file or in shards.

    Raises:
        TrainerError: there are none, or they cannot be read safely.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.exists():
            shards = _shards(index)
        elif (folder / name).exists():
            shards = [name]
        else:
            continue
        weights: dict[str, Tensor] = {}
        for shard in shards:
            weights.update(_read_shard(folder / shard))
        return weights
    raise TrainerError(f"{folder}: holds neither model.safetensors nor pytorch_model.bin")


def _dtype(dtype: str) -> dict[str, torch.dtype]:
    # Gaudi's transformers is older than the argument's new name.
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    return {"dtype" if version >= (4, 56) else "torch_dtype": DTYPES[dtype]}


def _config(path: str, dropout: float) -> Any:
    config = AutoConfig.from_pretrained(path)
    for field in DROPOUT_FIELDS:
        if hasattr(config, field):
            setattr(config, field, dropout)
    return config


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


def _says_classifier(folder: Path) -> bool:
    """Whether the configuration names a classifier, which spares reading the weights to see."""
    return "ForSequenceClassification" in str(_raw_config(folder).get("architectures"))


def _learnt_at(folder: Path) -> str:
    """Where DeepSpeed-Chat's step 2 read the score of a text: at the token before its padding.

    Of a base model with "llama" in its name the padding is a token of its own. Of all others it is
    the end token, so that the text's own end counts as padding too.
    """
    raw = _raw_config(folder)
    base = raw.get("_name_or_path") or raw.get("model_type")
    return "end" if "llama" in str(base) else "before_end"


def _load_classifier(path: str, dtype: str, dropout: float) -> Scorer:
    try:
        config = _config(path, dropout)
        if config.num_labels != 1:
            raise TrainerError(
                f"{path}: is a classifier with {config.num_labels} labels; a reward model has one"
            )
        classifier, report = AutoModelForSequenceClassification.from_pretrained(
            path, config=config, output_loading_info=True, **_dtype(dtype)
        )
    except UNREADABLE as error:
        raise TrainerError(f"{path}: no sequence classifier can be loaded: {error}") from error
    _strict(path, report["missing_keys"], report["unexpected_keys"])
    if not hasattr(classifier, "score"):
        raise TrainerError(
            f"{path}: {type(classifier).__name__} has no `score` head on the tokens; a reward "
            "model is a causal model's backbone with one"
        )
    return Scorer(classifier)


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise TrainerError(f"{index}: is no index of weights: {error!r}") from error


def _read_shard(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Mapped, so that the ranks of a node share the file's pages.
        mapped = zipfile.is_zipfile(path)  # files older than torch 1.6 cannot be
        weights: dict[str, Tensor] = torch.load(
            path, map_location="cpu", weights_only=True, mmap=mapped
        )
        return weights
    except Exception as error:  # the readers raise types of their own, many of them
        raise TrainerError(f"{path}: cannot be read: {error}") from error


def _from_step2(name: str, prefix: str) -> str:
    if name == "v_head.weight":
        return "score.weight"
    if name.startswith("rwtransformer."):
        return f"{prefix}.{name.removeprefix('rwtransformer.')}"
    return name


def _strict(path: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    def listed(names: list[str]) -> str:
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

    extra = sorted(name for name in unexpected if not name.endswith(DERIVED_BUFFERS))
    lacking = sorted(missing)
    parts = [f"it lacks {listed(lacking)}"] if lacking else []
    parts += [f"it has {listed(extra)}, which the model has not"] if extra else []
    if parts:
        raise TrainerError(f"{path}: not this model's checkpoint: {'; '.join(parts)}")
