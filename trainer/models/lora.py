"""LoRA through peft: adapters on every linear layer of the backbone, which is frozen under them."""

from __future__ import annotations

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hlrlhf.settings import Settings
from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.models.adapted import fuse
from hlrlhf.trainer.models.forwards import Policy, Scorer


def add_adapters(model: Policy | Scorer, settings: Settings) -> None:
    """Put adapters on `model`, in place, and say what trains.

    As in DeepSpeed-Chat, a matrix with an adapter is frozen; with ``only_optimize_lora`` all else
    is too, a scorer's head excepted, and otherwise embeddings, norms, biases and heads train
    beside the adapters.

    Raises:
        TrainerError: the model has matrices that no adapter can stand beside.
    """
    inner = model.inner
    config = LoraConfig(
        r=settings.lora.dim,
        lora_alpha=settings.lora.alpha,
        target_modules=_wrappable(model),
        lora_dropout=0,
        # As GPT-2 stores its matrices; peft looks at each layer all the same, and warns.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in inner.modules()),
    )
    adapted = get_peft_model(inner, config)
    for layer in _layers(adapted).values():
        _start(layer)
        fuse(layer)
    if isinstance(model, Policy):
        model.lm = adapted
    else:
        model.classifier = adapted
    for name, parameter in adapted.named_parameters():
        in_head = isinstance(model, Scorer) and name.endswith("score.weight")
        beside = not settings.adapters_only and not name.endswith(".base_layer.weight")
        parameter.requires_grad_(is_adapter(name) or in_head or beside)


def _wrappable(model: Policy | Scorer) -> list[str]:
    """Names of the layers that take an adapter: all matrices but embeddings and heads.

    Raises:
        TrainerError: the backbone has other matrices, such as experts fused into one tensor, which
            would stay frozen or train whole behind the user's back.
    """
    inner = model.inner
    head = inner.get_output_embeddings() if isinstance(model, Policy) else model.head
    names = []
    for name, module in inner.named_modules():
        if module is head or isinstance(module, nn.Embedding):
            continue
        if isinstance(module, nn.Linear | Conv1D):
            names.append(name)
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1:
                raise TrainerError(
                    f"{type(inner).__name__} has weights that take no adapter: {name}.{own} "
                    f"{list(parameter.shape)}, in {type(module).__name__}; set HL_LORA_DIM=0"
                )
    if not names:
        raise TrainerError(
            f"lora.dim is above 0, but {type(inner).__name__} has no linear layers for adapters; "
            "set HL_LORA_DIM=0"
        )
    return names


def _layers(adapted: PeftModel) -> dict[str, LoraLayer]:
    return {name: layer for name, layer in adapted.named_modules() if isinstance(layer, LoraLayer)}


def _start(layer: LoraLayer) -> None:
    """Draw the first factor as DeepSpeed-Chat does.

    Its factor has the shape [in, r], so that the fan-in of its Kaiming-uniform start is r, and the
    deviation 1 / sqrt(3 r). peft's has the shape [r, in], and would begin sqrt(in / r) times weaker
    at the same scaling and rates.
    """
    down = layer.lora_A["default"].weight
    bound = down.shape[0] ** -0.5
    nn.init.uniform_(down, -bound, bound)


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def merged(model: PeftModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the model without adapters, the adapters' part added to them.

    The model itself is left as it is, so that training can go on.

    Args:
        model: peft's model.
        weights: its weights by name, whole (not partitioned), on any device.

    Returns:
        Weights by the names of the Hugging Face model underneath.
    """
    plain = {}
    layers = _layers(model)
    for name, value in weights.items():
        owner, _, last = name.rpartition(".base_layer.")
        if is_adapter(name):
            continue
        if owner in layers and last == "weight":
            layer = layers[owner]
            up = weights[f"{owner}.lora_B.default.weight"].float()
            down = weights[f"{owner}.lora_A.default.weight"].float()
            part = layer.scaling["default"] * (up @ down)
            value = (value.float() + (part.T if layer.fan_in_fan_out else part)).to(value.dtype)
        plain[name.removeprefix("base_model.model.").replace(".base_layer.", ".")] = value
    return plain
