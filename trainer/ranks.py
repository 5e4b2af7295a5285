"""What the ranks of a run say together; all of them have to call it at the same place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hlrlhf.trainer.device import Device


def summed(values: Tensor) -> Tensor:
    """The sum over all ranks of a tensor, in place."""
    dist.all_reduce(values)
    return values


def meet(device: Device) -> None:
    """Wait until all ranks are here."""
    agreed(False, device)


def agreed(flag: bool, device: Device) -> bool:
    """Whether any rank says yes; all ranks have to ask."""
    return votes([flag], device)[0]


def votes(flags: Sequence[bool], device: Device) -> list[bool]:
    """To each of several questions, whether any rank says yes; all ranks have to ask."""
    counts = torch.tensor([float(flag) for flag in flags], device=device.torch)
    return [bool(count) for count in summed(counts).tolist()]
