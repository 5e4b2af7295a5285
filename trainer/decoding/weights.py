"""Linear layers where nothing trains: adapters added to the weights, and their fastest product.

The weights do not change while a batch is sampled or scored, and to sample they are read once for
each of its tokens: what is prepared once pays many times over.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.functional import linear

from hlrlhf.trainer.device import Device
from hlrlhf.trainer.skinny import Product

# Of fewer weights, which a processor's own cache holds, no other product is faster than torch's.
LARGE = 2**18
# A measurement is the median of so many products of each kind, in turn.
TRIES = 7
# Between two of them so many bytes are written, as in a rollout other weights are read: by then a
# processor's own cache holds none of these.
BETWEEN = 2**26
# The name of torch's own product.
TORCH = "torch"


class Prepared:
    """Prepares the layers of one model, for each of its batches anew.

    Only in fp32, where another order of sums is all that changes: in bf16 a weight would swallow
    what an adapter adds to it.

    Args:
        device: what computes.
        fastest: whether large weights are multiplied by what is measured to be the fastest, for
            each shape at the first rollout. A run that is resumed goes on with the same products.
        compiled: whether the layers are called by what is compiled, which cannot look into those.
    """

    def __init__(self, device: Device, fastest: bool, compiled: bool = False):
        self._device = device
        self._fastest = fastest
        self._compiled = compiled
        self._chosen: dict[str, str] = {}

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
            if isinstance(layer, LoraLinear)
            for part in layer.modules()
            if part is not layer
        }
        replaced: list[nn.Module] = []
        try:
            for layer in model.modules():
                if layer not in inside and (product := self._product(layer, rows)) is not None:
                    layer.forward = product
                    replaced.append(layer)
            yield
        finally:
            for layer in replaced:
                del layer.forward  # of this layer alone: what is left is its class's
            _PRODUCTS.clear()

    def _product(self, layer: nn.Module, rows: int) -> Product | None:
        """What computes a layer in a rollout; None where that is its own forward."""
        if "forward" in vars(layer):
            return None  # somebody else's already
        added = None
        if isinstance(layer, LoraLinear):
            if not layer.disable_adapters:
                added = layer.get_delta_weight("default")
            layer = layer.base_layer
        if type(layer) is not nn.Linear or layer.weight.dtype != torch.float32:
            return None
        weight = layer.weight.detach()
        if added is not None:
            weight = added.add_(weight)
        bias = layer.bias

        # No functools.partial, for each of which a compiled step would be compiled again.
        def plain(read: Tensor) -> Tensor:
            return linear(read, weight, bias)

        if self._fastest and weight.numel() >= LARGE:
            makers = self._device.products(weight, bias, rows)
            shape = "x".join(map(str, weight.shape))
            if makers and shape not in self._chosen:
                products = {TORCH: plain} | {name: made() for name, made in makers.items()}
                self._chosen[shape] = self._measured(
                    products, weight.new_ones(rows, 1, weight.shape[1])
                )
            if (chosen := self._chosen.get(shape, TORCH)) in makers:
                product = makers[chosen]()
                return _unread(product, len(weight)) if self._compiled else product
        return None if added is None else plain

    def _measured(self, products: Mapping[str, Product], read: Tensor) -> str:
        """Which of the products is the fastest; all ranks take what rank 0 has measured."""
        seconds: dict[str, list[float]] = {name: [] for name in products}
        others = torch.empty(BETWEEN, dtype=torch.uint8)
        for _ in range(TRIES):
            for name, product in products.items():
                others.zero_()
                began = time.perf_counter()
                product(read)
                seconds[name].append(time.perf_counter() - began)
        fastest = [min(seconds, key=lambda name: median(seconds[name]))]
        dist.broadcast_object_list(fastest, device=self._device.torch)
        return fastest[0]

    def state(self) -> dict[str, Any]:
        """Which product is taken for which shape."""
        return dict(self._chosen)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the same ones."""
        self._chosen = dict(state)


# What an operation calls that a compiler does not look into.
_PRODUCTS: list[Product] = []


# Defined without torch's wrapper for custom operations, which takes longer than a small product.
torch.library.define("hlrlhf::product", "(Tensor read, int number, int width) -> Tensor")


@torch.library.impl("hlrlhf::product", "CPU")
def _called(read: Tensor, number: int, width: int) -> Tensor:
    return _PRODUCTS[number](read)


@torch.library.register_fake("hlrlhf::product")  # type: ignore[untyped-decorator]
def _shaped(read: Tensor, number: int, width: int) -> Tensor:
    return read.new_empty(*read.shape[:-1], width)


def _unread(product: Product, width: int) -> Product:
    """The same product, to [..., width], by its place in the model: compiled once for all."""
    number = len(_PRODUCTS)
    _PRODUCTS.append(product)
    return lambda read: torch.ops.hlrlhf.product(read, number, width)
