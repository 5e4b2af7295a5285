"""The files of a checkpoint: what is in them, and whether it is what a model needs."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from hlrlhf.trainer.errors import TrainerError


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder: safetensors or PyTorch's own format, in one file or in shards.

    Raises:
        TrainerError: there are none, or they cannot be read safely.
    """
    weights: dict[str, Tensor] = {}
    for file in _files(folder):
        weights.update(_read_file(file))
    return weights


def read_shapes(folder: Path) -> dict[str, torch.Size]:
    """The shapes of a folder's weights, by name, without their numbers.

    Raises:
        TrainerError: as `read_weights`.
    """
    shapes: dict[str, torch.Size] = {}
    for file in _files(folder):
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt") as opened:
                    names = opened.keys()
                    shapes |= {n: torch.Size(opened.get_slice(n).get_shape()) for n in names}
            except Exception as error:  # the reader raises types of its own
                raise TrainerError(f"{file}: cannot be read: {error}") from error
        else:
            shapes |= {name: value.shape for name, value in _read_file(file).items()}
    return shapes


def check_names(
    path: str,
    missing: Iterable[str],
    unexpected: Iterable[str],
    shapes: Mapping[str, torch.Size],
) -> None:
    """Stop unless a checkpoint's weights are exactly those that a model needs.

    Args:
        path: of the checkpoint.
        missing: names that the model has alone.
        unexpected: names that the checkpoint has alone.
        shapes: of the checkpoint's weights, those in `unexpected` at least; a name that is not
            there is a weight.

    Raises:
        TrainerError: naming what lacks or is too many.
    """

    def listed(names: list[str]) -> str:
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

    extra = sorted(
        name for name in unexpected if name not in shapes or not is_derived(name, shapes[name])
    )
    lacking = sorted(missing)
    parts = [f"it lacks {listed(lacking)}"] if lacking else []
    parts += [f"it has {listed(extra)}, which the model has not"] if extra else []
    if parts:
        raise TrainerError(f"{path}: not this model's checkpoint: {'; '.join(parts)}")


def is_derived(name: str, shape: torch.Size) -> bool:
    """Whether a weight is a buffer that models compute for themselves, from an older checkpoint.

    Rotary frequencies; the causal mask, which GPT-2 and its descendants saved as the attention's
    ``bias``; and what they put where it is false. A bias that is learnt is a vector.
    """
    owner, _, last = name.rpartition(".")
    if last == "inv_freq":
        return len(shape) == 1
    if not owner.endswith((".attn", ".attention")):
        return False
    if last == "masked_bias":
        return shape.numel() == 1
    is_mask = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return last in ("bias", "causal_mask") and is_mask


def _files(folder: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.exists():
            return [folder / shard for shard in _shards(index)]
        if (folder / name).exists():
            return [folder / name]
    raise TrainerError(f"{folder}: holds neither model.safetensors nor pytorch_model.bin")


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise TrainerError(f"{index}: is no index of weights: {error!r}") from error


def _read_file(path: Path) -> dict[str, Tensor]:
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
