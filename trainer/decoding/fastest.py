"""The fastest of several ways to compute something here, as measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from hlrlhf.trainer.device import Device

# A measurement is the median of so many times for each way, in turn.
TRIES = 7
# Between two of them so many bytes are written, as in a rollout other weights are read: by then a
# processor's own cache holds nothing of what is read again.
BETWEEN = 2**26
# The name of torch's own way.
TORCH = "torch"


class Fastest:
    """Measures at the first rollout, and keeps to it; so does a run that is resumed."""

    def __init__(self, device: Device):
        self._device = device
        self._chosen: dict[str, str] = {}

    def __call__(self, what: str, ways: Callable[[], Mapping[str, Callable[[], object]]]) -> str:
        """The name of the fastest way; all ranks have to call it.

        Args:
            what: is computed.
            ways: makes all of them, where they have to be measured; all ranks take what rank 0 has
                found.
        """
        if what not in self._chosen:
            fastest = [self._measured(ways())]
            dist.broadcast_object_list(fastest, device=self._device.torch)
            self._chosen[what] = fastest[0]
        return self._chosen[what]

    def _measured(self, ways: Mapping[str, Callable[[], object]]) -> str:
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        others = torch.empty(BETWEEN, dtype=torch.uint8)
        for _ in range(TRIES):
            for name, way in ways.items():
                others.zero_()
                began = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - began)
        return min(seconds, key=lambda name: median(seconds[name]))

    def state(self) -> dict[str, Any]:
        """Which way is taken for what."""
        return dict(self._chosen)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the same ones."""
        self._chosen = dict(state)
