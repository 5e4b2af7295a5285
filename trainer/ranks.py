"""What the ranks of a run say together; all of them have to call it at the same place."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from hlrlhf.trainer.device import Device


def summed(values: Tensor) -> Tensor:
    """The sum over all ranks of a tensor, in place."""
    dist.all_reduce(values)
    return values


def agreed(flag: bool, device: Device) -> bool:
    """Whether any rank says yes; all ranks have to ask."""
    votes = torch.tensor([float(flag)], device=device.torch)
    return bool(summed(votes).item())
