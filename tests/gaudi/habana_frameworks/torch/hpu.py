"""habana_frameworks.torch.hpu"""

import contextlib
import os
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from habana_frameworks import record
from habana_frameworks.torch import LAZY

Event = object
Stream = contextlib.nullcontext
stream = contextlib.nullcontext


class random:  # noqa: N801 - a module in the real one
    """The device's random numbers; the stand-in draws torch's own."""

    get_rng_state = staticmethod(torch.random.get_rng_state)
    set_rng_state = staticmethod(torch.random.set_rng_state)

    @staticmethod
    def manual_seed(seed: int) -> None:
        """Begin them anew."""
        record(f"manual_seed {seed}")


def is_available() -> bool:
    """Whether a device is there."""
    return os.environ.get("STAND_IN_DEVICES") != "0"


def device_count() -> int:
    """Devices of this node."""
    return 8


def current_device() -> int:
    """The index is that within the process."""
    return 0


def set_device(_index: Any) -> None:
    """There is one."""


def synchronize() -> None:
    """Wait for the device."""
    record("synchronize")


def current_stream() -> Any:
    """The only stream."""
    return Stream()


default_stream = current_stream


def memory_allocated() -> int:
    """Bytes."""
    return 1 << 30


def max_memory_allocated() -> int:
    """Bytes."""
    return 3 << 30


def memory_stats(_index: Any = None) -> dict[str, int]:
    """Bytes."""
    return {"Limit": 96 << 30}


def memory_reserved(_index: Any = None) -> int:
    """Bytes."""
    return 1 << 30


max_memory_reserved = memory_reserved
memory_cached = memory_reserved
max_memory_cached = memory_reserved


def reset_peak_memory_stats(_index: Any = None) -> None:
    """Nothing is counted."""


class _Graph(TorchDispatchMode):
    """What Gaudi's documentation says that a graph cannot hold is refused.

    That is a number of a tensor's that is asked for, and writing to a part of a tensor.
    """

    def __torch_dispatch__(self, op: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        assert op.name() not in ("aten::_local_scalar_dense", "aten::nonzero"), "asks the device"
        for argument, value in zip(op._schema.arguments, given, strict=False):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            assert not (is_written and value._is_view()), f"{op.name()} writes to a view"
        return op(*given, **(named or {}))


def wrap_in_hpu_graph(module: nn.Module) -> nn.Module:
    """Replace the module's forward, as the real one does; it refuses what a graph cannot hold."""
    assert LAZY, "HPU graphs need lazy mode"
    record(f"wrap_in_hpu_graph {type(module).__name__}")
    plain = module.forward

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        assert not module.training, "training runs through a graph for inference"
        record("graph forward")
        with _Graph():
            return plain(*args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]
    module.clear_cache = lambda: record("clear_cache")  # type: ignore[assignment]
    return module
