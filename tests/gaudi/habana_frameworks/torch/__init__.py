"""Loading the bridge: it reads its mode once, and torch knows the device from then on."""

import os
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from habana_frameworks import record

LAZY = os.environ.get("PT_HPU_LAZY_MODE", "1") == "1"


def _here(value: Any) -> Any:
    named = isinstance(value, str | torch.device) and str(value).partition(":")[0] == "hpu"
    return torch.device("cpu") if named else value


class _OnCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: _here(value) for name, value in (kwargs or {}).items()}
        if func is torch.Tensor.backward:
            # The mode is off while it handles a call, and backward calls DeepSpeed's hooks, which
            # make tensors too: on again, below all that would be handled itself.
            loss, keep = args[0], bool(kwargs.get("retain_graph"))
            with _OnCpu():
                torch.autograd.Variable._execution_engine.run_backward(
                    (loss,), (torch.ones_like(loss),), keep, False, (), True, True
                )
            return None
        return func(*map(_here, args), **kwargs)


record(f"load lazy={LAZY}")
_OnCpu().__enter__()
