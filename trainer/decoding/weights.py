"""Linear layers where nothing trains: adapters added to the weights, and those packed.

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

from hlrlhf.trainer.device import Device, Product

# Of fewer weights, which a processor's own cache holds, packing makes nothing faster.
PACKED_FROM = 2**18
# A measurement is the median of so many products of either kind, in turn.
TRIES = 7
# Between two of them so many bytes are written, as in a rollout other weights are read: by then a
# processor's own cache holds neither copy.
BETWEEN = 2**26


class Prepared:
    """Prepares the layers of one model, for each of its batches anew.

    Only in fp32, where another order of sums is all that changes: in bf16 a weight would swallow
    what an adapter adds to it.

    Args:
        device: what computes.
        may_pack: whether weights may be packed; they are where that is measured to be faster, of
            each shape at the first rollout. A run that is resumed packs the same ones.
        compiled: whether the layers are called by what is compiled, which cannot read such weights.
    """

    def __init__(self, device: Device, may_pack: bool, compiled: bool = False):
        self._device = device
        self._may_pack = may_pack
        self._compiled = compiled
        self._packs: dict[str, bool] = {}

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

        if self._may_pack and weight.numel() >= PACKED_FROM:
            shape = "x".join(map(str, weight.shape))
            packed = None
            if self._packs.get(shape, True):
                packed = self._device.packed(weight, bias, rows)
            if packed is not None:
                if shape not in self._packs:
                    self._packs[shape] = self._is_faster(
                        packed, plain, weight.new_ones(rows, 1, weight.shape[1])
                    )
                if self._packs[shape]:
                    return _unread(packed, len(weight)) if self._compiled else packed
        return None if added is None else plain

    def _is_faster(self, packed: Product, plain: Product, read: Tensor) -> bool:
        """Whether the packed weights are; all ranks do as rank 0 has measured."""
        seconds: dict[Product, list[float]] = {packed: [], plain: []}
        others = torch.empty(BETWEEN, dtype=torch.uint8)
        for _ in range(TRIES):
            for product, taken in seconds.items():
                others.zero_()
                began = time.perf_counter()
                product(read)
                taken.append(time.perf_counter() - began)
        faster = [median(seconds[packed]) < median(seconds[plain])]
        dist.broadcast_object_list(faster, device=self._device.torch)
        return faster[0]

    def state(self) -> dict[str, Any]:
        """Which shapes are packed."""
        return dict(self._packs)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Pack the same ones."""
        self._packs = dict(state)


# What an operation calls that a compiler does not look into.
_PRODUCTS: list[Product] = []


@torch.library.custom_op("hlrlhf::product", mutates_args=())
def _called(read: Tensor, number: int, width: int) -> Tensor:
    return _PRODUCTS[number](read)


@_called.register_fake
def _shaped(read: Tensor, number: int, width: int) -> Tensor:
    return read.new_empty(*read.shape[:-1], width)


def _unread(product: Product, width: int) -> Product:
    """The same product, to [..., width], by its place in the model: compiled once for all."""
    number = len(_PRODUCTS)
    _PRODUCTS.append(product)
    return lambda read: _called(read, number, width)
