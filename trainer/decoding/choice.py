"""Which decoder a run samples with, and what it falls back to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from hlrlhf.settings import Settings
from hlrlhf.trainer.decoding.decoder import Decoded, Decoder, Sampling, Witness, sampling
from hlrlhf.trainer.decoding.fixed import Compiled, Fixed
from hlrlhf.trainer.decoding.hybrid import Hybrid
from hlrlhf.trainer.decoding.plain import Plain
from hlrlhf.trainer.decoding.shrinking import Shrinking
from hlrlhf.trainer.device import Device
from hlrlhf.trainer.models import tokenizers
from hlrlhf.trainer.models.forwards import Placed, Policy
from hlrlhf.trainer.ranks import agreed


class Chosen:
    """A `Decoder`: a fast one for as long as it holds, then a plain one.

    What a fast one may not fit is the architecture, and that shows at once: it fails at its first
    batch, or samples from other log-probs than those that score (see `ppo.agreement`). A run that
    is resumed goes on with the decoder that it had.

    Args:
        decoders: from the fastest to the plainest.
    """

    def __init__(self, *decoders: Decoder):
        self._decoders = decoders
        self._place = 0
        self._tried = False

    @property
    def name(self) -> str:
        """See `Decoder`."""
        return self._decoders[self._place].name

    @property
    def sampling(self) -> Sampling:
        """See `Decoder`."""
        return self._decoders[self._place].sampling

    @property
    def device(self) -> Device:
        """See `Decoder`."""
        return self._decoders[self._place].device

    @property
    def warned(self) -> Callable[[], bool]:
        """See `Decoder`."""
        return self._decoders[self._place].warned

    def __call__(
        self, policy: Placed, prompts: Sequence[list[int]], witness: Witness | None = None
    ) -> Decoded:
        """Sample one answer to each prompt; all ranks have to call it."""
        is_last = self._place == len(self._decoders) - 1
        if self._tried or is_last:
            return self._decoders[self._place](policy, prompts, witness)
        failure = ""
        try:
            with self.device.undrawn_on_error():
                decoded = self._decoders[self._place](policy, prompts, witness)
        except Exception as error:  # whatever an architecture that does not fit runs into
            # Its words alone: it holds what the failed one has taken of the device's memory.
            failure = repr(error)
        if agreed(bool(failure), self.device):
            self.fall_back(failure or "it fails on another rank")
            return self(policy, prompts, witness)
        self._tried = True
        return decoded

    def fall_back(self, reason: str) -> bool:
        """Sample with the next plainer decoder from now on; all ranks have to call it.

        Returns:
            False where there is none.
        """
        if self._place == len(self._decoders) - 1:
            return False
        left = self.name
        self._place, self._tried = self._place + 1, False
        if dist.get_rank() == 0:
            print(
                f"warning: {left} cannot be used here: {reason}; {self.name} is, which is slower",
                flush=True,
            )
        return True

    def state(self) -> dict[str, Any]:
        """Which decoder it has come to, and what that has found out."""
        return {"place": self._place, "decoder": self._decoders[self._place].state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with the decoder of a state, or with as plain a one as there is."""
        self._place = min(state.get("place", 0), len(self._decoders) - 1)
        self._decoders[self._place].restore(state.get("decoder", {}))


def decoder(
    settings: Settings,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    device: Device,
    warned: Callable[[], bool],
) -> Chosen:
    """What samples a run's answers.

    Args:
        warned: see `decoder.Decoder`.

    Raises:
        TrainerError: nothing ends an answer of this policy.
    """
    end_tokens = tokenizers.end_tokens(policy, tokenizer)
    padding = end_tokens[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    how = sampling(settings, tokenizer, end_tokens, padding, device)
    if settings.hybrid_engine:
        return Chosen(Hybrid(how, device, warned))
    plain = Plain(how, device, warned)
    if settings.generation.decoder == "generate" or device.loop == "none":
        return Chosen(plain)
    if device.loop == "fixed":
        return Chosen(Fixed(how, device, warned), plain)
    fast = settings.generation.fast_kernels
    own = Shrinking(how, device, warned, fast)
    if settings.generation.decoder == "compiled":
        return Chosen(Compiled(how, device, warned, fast), own, plain)
    return Chosen(own, plain)
