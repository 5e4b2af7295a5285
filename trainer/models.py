"""The four models: loaded strictly, and wrapped so that one forward gives what PPO needs."""

from __future__ import annotations

import contextlib
import inspect
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
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from hlrlhf.trainer import ppo
from hlrlhf.trainer.errors import TrainerError

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

# Buffers that older checkpoints carry and that a model computes for itself.
DERIVED_BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias")


class Policy(nn.Module):
    """A causal language model whose forward gives the log-probs of the answers.

    Args:
        lm: the language model.
        logprob_chunk: answer tokens whose logits are computed at a time; 0: all.

    Attributes:
        lm: the language model, in peft's wrapper when it has adapters.
        generation_config: the checkpoint's own, which the saved model gets again.
    """

    def __init__(self, lm: Any, logprob_chunk: int = 0):
        super().__init__()
        self.lm = lm
        self.logprob_chunk = logprob_chunk
        self.generation_config = lm.generation_config

    @property
    def inner(self) -> Any:
        """The Hugging Face model, in peft's wrapper when it has adapters."""
        return self.lm

    def forward(
        self, sequences: Tensor, attention_mask: Tensor, answer_width: int, temperature: float
    ) -> Tensor:
        """Log-probs of the answer tokens, the last `answer_width` columns.

        Args:
            sequences: [b, t], prompts padded on the left, answers on the right.
            attention_mask: [b, t].
            answer_width: r.
            temperature: the one that the answers were sampled with.

        Returns:
            [b, r], fp32.
        """
        inputs = {
            "input_ids": sequences,
            "attention_mask": attention_mask,
            "use_cache": False,
            **_positions(self.lm, attention_mask),
        }
        answers = sequences[:, -answer_width:]
        # The head is not run on prompt tokens: on BLOOM 1.1B it is a third of a forward.
        kept = answer_width + 1
        plain = unwrapped(self.lm)
        if self.logprob_chunk:
            hidden = plain.base_model(**inputs).last_hidden_state[:, -kept:-1]
            return self._logprobs_in_chunks(hidden, answers, temperature)
        if "logits_to_keep" in inspect.signature(plain.forward).parameters:
            logits = self.lm(**inputs, logits_to_keep=kept).logits
        elif plain.config.model_type == "bloom":  # Gaudi's transformers has no such argument there
            hidden = plain.transformer(**inputs).last_hidden_state
            logits = plain.lm_head(hidden[:, -kept:])
        else:
            logits = self.lm(**inputs).logits[:, -kept:]
        return ppo.token_logprobs(logits[:, :-1], answers, temperature)

    def _logprobs_in_chunks(self, hidden: Tensor, answers: Tensor, temperature: float) -> Tensor:
        """Log-probs from hidden states [b, r, h], with the logits of one chunk in memory at a time.

        Those of the backward pass are computed again.
        """
        head = unwrapped(self.lm).get_output_embeddings()

        def logprobs(states: Tensor, tokens: Tensor) -> Tensor:
            return ppo.token_logprobs(head(states), tokens, temperature)

        chunks = zip(
            torch.split(hidden, self.logprob_chunk, dim=1),
            torch.split(answers, self.logprob_chunk, dim=1),
            strict=True,
        )
        return torch.cat(
            [checkpoint(logprobs, *chunk, use_reentrant=False) for chunk in chunks], dim=1
        )

    def generate(self, **arguments: Any) -> Tensor:
        """The language model's own ``generate``."""
        sequences: Tensor = self.lm.generate(**arguments)
        return sequences


class Scorer(nn.Module):
    """A sequence classifier with one label whose forward gives a scalar for every token."""

    def __init__(self, classifier: Any):
        super().__init__()
        self.classifier = classifier

    @property
    def inner(self) -> Any:
        """The Hugging Face model, in peft's wrapper when it has adapters."""
        return self.classifier

    @property
    def head(self) -> nn.Module:
        """The layer that makes a scalar of a hidden state."""
        head: nn.Module = unwrapped(self.classifier).score
        return head

    def forward(
        self,
        sequences: Tensor,
        attention_mask: Tensor,
        answer_width: int,
        head: nn.Module | None = None,
    ) -> Tensor:
        """Scalars at the last `answer_width` + 1 columns, the one before the answer included.

        Args:
            sequences: [b, t], prompts padded on the left, answers on the right.
            attention_mask: [b, t].
            answer_width: r.
            head: takes the place of the model's own.

        Returns:
            [b, r + 1], fp32. As values, entries 0 … r-1 are the estimates before each answer token;
            as scores, entries 1 … r are those after it.
        """
        classifier = unwrapped(self.classifier)
        backbone = getattr(classifier, classifier.base_model_prefix)
        hidden = backbone(
            input_ids=sequences,
            attention_mask=attention_mask,
            use_cache=False,
            **_positions(backbone, attention_mask),
        ).last_hidden_state
        scores: Tensor = (head or self.head)(hidden[:, -answer_width - 1 :]).squeeze(-1)
        return scores.float()


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
    return Scorer(classifier)


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


def unwrapped(model: Any) -> Any:
    """The Hugging Face model under peft's wrapper, if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _positions(model: Any, attention_mask: Tensor) -> dict[str, Tensor]:
    """Position ids for models that take them, left padding not counted; ALiBi reads the mask."""
    if "position_ids" not in inspect.signature(unwrapped(model).forward).parameters:
        return {}
    counted = attention_mask.long()
    return {"position_ids": counted.cumsum(-1) - counted}


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


def _says_classifier(folder: Path) -> bool:
    """Whether the configuration names a classifier, which spares reading the weights to see."""
    try:
        names = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return "ForSequenceClassification" in str(names)


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
