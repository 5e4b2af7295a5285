"""Linear layers where nothing trains: adapters added to the weights, and their fastest product.

The weights do not change while a batch is sampled or scored, and to sample they are read once for
each of its tokens: what is prepared once pays many times over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeGuard

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.functional import linear

from hlrlhf.trainer.decoding.fastest import TORCH, Fastest
from hlrlhf.trainer.device import Device
from hlrlhf.trainer.kernels import Layer

# Of fewer weights, which a processor's own cache holds, no other product is faster than torch's in
# fp32. In bf16 torch's asks oneDNN each time, which takes longer than a small product.
LARGE = 2**18


class Prepared:
    """Prepares the layers of one model, for each of its batches anew.

    Another order of sums is all that changes. In bf16 adapters stay beside their layers: a weight
    would swallow what they add to it.

    Args:
        device: what computes.
        fastest: finds what large weights are multiplied by, for each shape; None: torch's product.
        compiled: whether the layers are called by what is compiled, which cannot look into those.
    """

    def __init__(self, device: Device, fastest: Fastest | None = None, compiled: bool = False):
        self._device = device
        self._fastest = fastest
        self._compiled = compiled

    @contextlib.contextmanager
    def of(self, model: nn.Module, rows: int) -> Iterator[None]:
        """Compute a model's layers from prepared weights.

        Args:
            model: in peft's wrapper when it has adapters; its weights are whole.
            rows: of the batch.
        """
        inside = {
            part
            for layer in model.modules()
            if _takes_adapters(layer)
            for part in layer.modules()
            if part is not layer
        }
        replaced: list[nn.Module] = []
        try:
            for layer in model.modules():
                if layer in inside or "forward" in vars(layer):  # somebody else's already
                    continue
                forward = self._product(layer, rows)
                if forward is not None:
                    layer.forward = forward
                    replaced.append(layer)
            yield
        finally:
            for layer in replaced:
                del layer.forward  # of this layer alone: what is left is its class's
            _PRODUCTS.clear()

    def _product(self, layer: nn.Module, rows: int) -> Layer | None:
        """What computes a linear layer; None where that is its own forward, and for others."""
        added = None
        if _takes_adapters(layer):
            if not layer.disable_adapters:
                added = layer.get_delta_weight("default")
            layer = layer.base_layer
        if type(layer) is not nn.Linear:
            return None
        weight = layer.weight.detach()
        if added is not None:
            weight = added.add_(weight)
        bias = layer.bias

        # No functools.partial, for each of which a compiled step would be compiled again.
        def plain(read: Tensor) -> Tensor:
            return linear(read, weight, bias)

        may_be_slow = weight.numel() >= LARGE or weight.dtype == torch.bfloat16
        if self._fastest is not None and self._device.has_kernels and may_be_slow:
            makers = self._device.products(weight, bias, rows)

            def ways() -> dict[str, Callable[[], Tensor]]:
                read = weight.new_ones(rows, 1, weight.shape[1])
                products = {TORCH: plain} | {name: made() for name, made in makers.items()}
                return {name: partial(product, read) for name, product in products.items()}

            # A rank that has no others takes part, as others may wait for it.
            chosen = self._fastest("x".join(map(str, weight.shape)), ways)
            if chosen in makers:
                product = makers[chosen]()
                return _unread(product, len(weight)) if self._compiled else product
        return None if added is None else plain


def _takes_adapters(layer: nn.Module) -> TypeGuard[LoraLinear]:
    """Whether a layer has adapters, and weights as precise as what they add."""
    return isinstance(layer, LoraLinear) and layer.base_layer.weight.dtype == torch.float32


# What an operation calls that a compiler does not look into.
_PRODUCTS: list[Layer] = []


# Defined without torch's wrapper for custom operations, which takes longer than a small product.
torch.library.define("hlrlhf::product", "(Tensor read, int number, int width) -> Tensor")


@torch.library.impl("hlrlhf::product", "CPU")
def _called(read: Tensor, number: int, width: int) -> Tensor:
    return _PRODUCTS[number](read)


@torch.library.register_fake("hlrlhf::product")  # type: ignore[untyped-decorator]
def _shaped(read: Tensor, number: int, width: int) -> Tensor:
    return read.new_empty(*read.shape[:-1], width)


def _unread(product: Layer, width: int) -> Layer:
    """The same product, to [..., width], by its place in the model: compiled once for all."""
    number = len(_PRODUCTS)
    _PRODUCTS.append(product)
    return lambda read: torch.ops.hlrlhf.product(read, number, width)
