"""Our own loop over tokens: any architecture of transformers, at a fraction of generate's work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hlrlhf.trainer.data import reading
from hlrlhf.trainer.decoding.cache import Growing
from hlrlhf.trainer.decoding.decoder import Decoded, Sampling, Witness
from hlrlhf.trainer.decoding.draw import Draw
from hlrlhf.trainer.decoding.stopping import StopStrings
from hlrlhf.trainer.decoding.weights import Prepared
from hlrlhf.trainer.device import Device
from hlrlhf.trainer.models import forwards
from hlrlhf.trainer.models.engine import gathered
from hlrlhf.trainer.models.forwards import Placed


class Shrinking:
    """A `Decoder`: the whole batch at once; an answer that has ended leaves it.

    The cache of keys and values is not copied at each token, drawing needs no random number for
    each word, and the log-probs of what is drawn are written down on the way.

    Args:
        warned: see `decoder.Decoder`.
        may_pack: see `weights.Prepared`.
    """

    def __init__(
        self,
        sampling: Sampling,
        device: Device,
        warned: Callable[[], bool] = lambda: False,
        may_pack: bool = True,
    ):
        self.sampling = sampling
        self.device = device
        self.warned = warned
        self._weights = Prepared(device, may_pack)

    @torch.no_grad()
    def __call__(
        self, policy: Placed, prompts: Sequence[list[int]], witness: Witness | None = None
    ) -> Decoded:
        config = self.sampling.config
        ids, mask = reading.pad_left(prompts, config.pad_token_id, self.sampling.multiple)
        ids, mask = ids.to(self.device.torch), mask.to(self.device.torch)
        policy.eval()
        try:
            with gathered(policy), self._weights.of(policy.module.lm, len(prompts)):
                return self._sampled(policy, ids, mask, witness)
        finally:
            policy.train()
            self.device.step_done()

    def state(self) -> dict[str, Any]:
        """Which weights are packed."""
        return self._weights.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Pack the same ones."""
        self._weights.restore(state)

    def _sampled(
        self, policy: Placed, ids: Tensor, prompt_mask: Tensor, witness: Witness | None
    ) -> Decoded:
        """Answers to prompts [b, l] that are padded on the left."""
        config = self.sampling.config
        (batch, prompt_width), longest = ids.shape, config.max_new_tokens
        width = prompt_width + longest
        sequences = ids.new_full((batch, width), config.pad_token_id)
        sequences[:, :prompt_width] = ids
        logprobs = torch.zeros(batch, longest, device=ids.device)
        end_tokens = torch.tensor(config.eos_token_id, device=ids.device)
        stops = None
        if self.sampling.stop:
            shortest = config.min_new_tokens or 0
            tokenizer = self.sampling.tokenizer
            stops = StopStrings(self.sampling.stop, tokenizer, prompt_width, shortest)
        draw = Draw(self.sampling, self.device)
        model = forwards.unwrapped(policy.module.lm)
        cache = Growing(model.config.get_text_config().num_hidden_layers, width)

        # Of the answers that have not ended: their row, their mask and the tokens to read next.
        rows = torch.arange(batch, device=ids.device)
        mask = prompt_mask.new_ones(batch, width)
        mask[:, :prompt_width] = prompt_mask
        tokens = ids
        for written in range(longest):
            end = prompt_width + written
            logits = policy.module.next_logits(tokens, mask[:, :end], cache)
            if witness is not None:
                shown = logits.new_zeros(batch, logits.shape[-1])
                shown[rows] = logits
                witness(shown)
            drawn, logprobs[rows, written] = draw(logits, torch.tensor(written))
            sequences[rows, end] = drawn
            if self.warned():
                break
            ended = torch.isin(drawn, end_tokens)
            if stops is not None:
                ended |= stops(sequences[:, : end + 1], None)[rows]
            staying = int((~ended).sum())
            if staying == 0:
                break
            tokens = drawn[:, None]
            if staying < len(rows):
                # The last ones take the places of those that leave: what stays in place is not
                # copied.
                sources = staying + (~ended[staying:]).nonzero()[:, 0]
                targets = ended[:staying].nonzero()[:, 0]
                cache.move(sources, targets)
                for held in (rows, mask, tokens):
                    held[targets] = held[sources]
                rows, mask, tokens = rows[:staying], mask[:staying], tokens[:staying]
        ends = torch.tensor(stops.ends, device=ids.device) if stops else None
        return Decoded(sequences[:, : end + 1], prompt_mask, ends, logprobs[:, : written + 1])
