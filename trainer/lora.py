"""LoRA through peft: adapters on every linear layer of the backbone."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from hlrlhf.settings import Settings
from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.models import Policy, Scorer


def add_adapters(model: Policy | Scorer, settings: Settings) -> None:
    """Put adapters on `model`, in place, and say what trains.

    With ``only_optimize_lora`` the adapters and a scorer's head train; otherwise everything does.

    Raises:
        TrainerError: the model has no layer that could take one.
    """
    inner = model.inner
    head = inner.get_output_embeddings() if isinstance(model, Policy) else model.head
    targets = [
        name
        for name, module in inner.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    if not targets:
        raise TrainerError(
            f"lora.dim = {settings.lora.dim}, but {type(inner).__name__} has no linear layers for "
            "adapters; set HL_LORA_DIM=0"
        )
    config = LoraConfig(
        r=settings.lora.dim, lora_alpha=settings.lora.alpha, target_modules=targets, lora_dropout=0
    )
    adapted = get_peft_model(inner, config)
    if isinstance(model, Policy):
        model.lm = adapted
    else:
        model.classifier = adapted
    for name, parameter in adapted.named_parameters():
        in_head = isinstance(model, Scorer) and name.endswith("score.weight")
        parameter.requires_grad_(is_adapter(name) or in_head or not settings.adapters_only)


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def merged(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the model without adapters, the adapters' part added to them.

    The model itself is left as it is, so that training can go on.

    Args:
        model: peft's model.
        weights: its weights by name, whole (not partitioned), on any device.

    Returns:
        Weights by the names of the Hugging Face model underneath.
    """
    plain = {}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    for name, value in weights.items():
        owner, _, last = name.rpartition(".base_layer.")
        if is_adapter(name):
            continue
        if owner in layers and last == "weight":
            scale = layers[owner].scaling["default"]
            up = weights[f"{owner}.lora_B.default.weight"].float()
            down = weights[f"{owner}.lora_A.default.weight"].float()
            value = (value.float() + scale * (up @ down)).to(value.dtype)
        plain[name.removeprefix("base_model.model.").replace(".base_layer.", ".")] = value
    return plain
