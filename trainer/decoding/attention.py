"""Attention of the one token that each row reads, by a kernel of our own where that is faster."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from hlrlhf.trainer.decoding.fastest import TORCH, Fastest
from hlrlhf.trainer.device import Device
from hlrlhf.trainer.kernels import DTYPES, LANES, Kernels
from hlrlhf.trainer.models import forwards

# The implementation of transformers that it takes the place of: models that take it need no more
# than a mask and a scale.
PLAIN = "sdpa"
_PLAIN = AttentionInterface()[PLAIN]
# What is measured: so many heads, tokens and numbers of each.
SHAPE = (8, 256, 64)


@contextlib.contextmanager
def attending(
    device: Device, fastest: Fastest | None, model: PreTrainedModel, rows: int
) -> Iterator[None]:
    """Let a model attend from one token a row by the fastest way; all ranks have to enter it.

    Args:
        fastest: finds it; None: leave the model as it is.
        model: in peft's wrapper when it has adapters.
        rows: of the batch.
    """
    kernels = _taken(device, fastest, forwards.unwrapped(model), rows)
    if kernels is None:
        yield
        return
    _KERNELS.append(kernels)
    ALL_ATTENTION_FUNCTIONS[PLAIN] = _attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[PLAIN]  # what stood there for all files is left
        _KERNELS.clear()


def _taken(
    device: Device, fastest: Fastest | None, model: PreTrainedModel, rows: int
) -> Kernels | None:
    """The kernels, where they are the fastest way; None where torch is, or they do not fit."""
    if fastest is None or not device.has_kernels or not _may_fit(model):
        return None
    kernels = device.kernels
    # A rank that has none takes part, as others may wait for it.
    ways = partial(_ways, kernels, rows, model.dtype)
    return None if fastest("attention", ways) == TORCH else kernels


def _may_fit(model: PreTrainedModel) -> bool:
    """Whether a model may come to ask for what the kernel computes."""
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    is_plain: bool = config._attn_implementation == PLAIN
    return is_plain and width % LANES == 0 and model.dtype in DTYPES


def _ways(
    kernels: Kernels | None, rows: int, dtype: torch.dtype
) -> dict[str, Callable[[], Tensor]]:
    heads, length, width = SHAPE
    query = torch.ones(rows, heads, 1, width, dtype=dtype)
    keys, values = torch.ones(2, rows, heads, length, width, dtype=dtype)
    seen = torch.ones(rows, length, dtype=torch.bool)
    mask = seen[:, None, None]
    ways = {TORCH: lambda: scaled_dot_product_attention(query, keys, values, mask)}
    if kernels is not None:
        ways["own"] = lambda: kernels.attention(query, keys, values, seen, 1)
    return ways


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **further: Any,
) -> tuple[Tensor, None]:
    """As transformers' ``sdpa_attention_forward``."""
    seen = None
    if attention_mask is not None and attention_mask.shape[1:3] == (1, 1):
        seen = attention_mask[:, 0, 0].expand(len(query), -1)
    fits = (
        query.shape[2] == 1
        and query.dtype == key.dtype == value.dtype
        and query.dtype in DTYPES
        and query.shape[3] == key.shape[3] == value.shape[3]
        and query.shape[3] % LANES == 0
        and (attention_mask is None or (seen is not None and seen.dtype == torch.bool))
        and (seen is None or seen.shape[1] == key.shape[2])
        and further.get("position_bias") is None
        and not dropout
    )
    if not fits:
        given = (module, query, key, value, attention_mask, dropout, scaling)
        attended: tuple[Tensor, None] = _PLAIN(*given, **further)
        return attended
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    return torch.ops.hlrlhf.attention(query, key, value, seen, scale), None


# What an operation calls that a compiler does not look into.
_KERNELS: list[Kernels] = []


# Defined without torch's wrapper for custom operations, which takes longer than a small attention.
torch.library.define(
    "hlrlhf::attention",
    "(Tensor query, Tensor keys, Tensor values, Tensor? seen, float scale) -> Tensor",
)


@torch.library.impl("hlrlhf::attention", "CPU")
def _called(
    query: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, scale: float
) -> Tensor:
    return _KERNELS[0].attention(query, keys, values, seen, scale)


@torch.library.register_fake("hlrlhf::attention")  # type: ignore[untyped-decorator]
def _shaped(
    query: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, scale: float
) -> Tensor:
    rows, heads, _, width = query.shape
    return query.new_empty(rows, 1, heads, width)
