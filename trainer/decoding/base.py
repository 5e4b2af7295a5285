"""What decoders share: prompts side by side, stop strings, and a loop's way around the policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hlrlhf.trainer.data import reading
from hlrlhf.trainer.decoding.attention import attending
from hlrlhf.trainer.decoding.decoder import Decoded, Sampling, Witness
from hlrlhf.trainer.decoding.fastest import Fastest
from hlrlhf.trainer.decoding.stopping import StopStrings
from hlrlhf.trainer.decoding.weights import Prepared
from hlrlhf.trainer.device import Device
from hlrlhf.trainer.models import forwards
from hlrlhf.trainer.models.engine import gathered
from hlrlhf.trainer.models.forwards import Placed


class Base:
    """How, where, and whether to go on.

    Args:
        warned: see `decoder.Decoder`.
    """

    def __init__(
        self, sampling: Sampling, device: Device, warned: Callable[[], bool] = lambda: False
    ):
        self.sampling = sampling
        self.device = device
        self.warned = warned

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing to go on from."""

    def _padded(self, prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids, padded on the left, and their mask, both [b, l] and on the device."""
        padding, multiple = self.sampling.config.pad_token_id, self.sampling.multiple
        ids, mask = reading.pad_left(prompts, padding, multiple)
        return ids.to(self.device.torch), mask.to(self.device.torch)

    def _stops(self, prompt_width: int) -> StopStrings | None:
        """What finds the stop strings in a batch; None without any."""
        sampling = self.sampling
        if not sampling.stop:
            return None
        shortest = sampling.config.min_new_tokens or 0
        return StopStrings(sampling.stop, sampling.tokenizer, prompt_width, shortest)

    def _ends(self, stops: StopStrings | None) -> Tensor | None:
        """See `Decoded.ends`."""
        return None if stops is None else torch.tensor(stops.ends, device=self.device.torch)


class Loop(Base, ABC):
    """A `Decoder`: our own loop over tokens.

    Args:
        warned: see `decoder.Decoder`.
        fast: whether what takes most of the time is computed by what is measured to be the fastest.
    """

    name = "generation.decoder = own"
    compiled = False

    def __init__(
        self,
        sampling: Sampling,
        device: Device,
        warned: Callable[[], bool] = lambda: False,
        fast: bool = True,
    ):
        super().__init__(sampling, device, warned)
        self._fastest = Fastest(device) if fast else None
        self._weights = Prepared(device, self._fastest, self.compiled)

    @torch.no_grad()
    def __call__(
        self, policy: Placed, prompts: Sequence[list[int]], witness: Witness | None = None
    ) -> Decoded:
        ids, mask = self._padded(prompts)
        policy.eval()
        model = policy.module.lm
        try:
            with (
                gathered(policy),
                self._weights.of(model, len(prompts)),
                attending(self.device, self._fastest, model, len(prompts)),
                self.device.generating(forwards.unwrapped(model)),
            ):
                return self._sampled(policy, ids, mask, witness)
        finally:
            policy.train()
            self.device.step_done()

    def state(self) -> dict[str, Any]:
        """What is the fastest."""
        return {} if self._fastest is None else self._fastest.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the same."""
        if self._fastest is not None:
            self._fastest.restore(state)

    @abstractmethod
    def _sampled(
        self, policy: Placed, ids: Tensor, prompt_mask: Tensor, witness: Witness | None
    ) -> Decoded:
        """Answers to prompts [b, l] that are padded on the left."""
