"""Our own loop over tokens: any architecture of transformers, at a fraction of generate's work."""

from __future__ import annotations

import torch
from torch import Tensor

from hlrlhf.trainer.decoding.base import Loop
from hlrlhf.trainer.decoding.cache import Growing
from hlrlhf.trainer.decoding.decoder import Decoded, Witness
from hlrlhf.trainer.decoding.draw import Draw
from hlrlhf.trainer.models import forwards
from hlrlhf.trainer.models.forwards import Placed


class Shrinking(Loop):
    """A `Decoder`: the whole batch at once; an answer that has ended leaves it.

    The cache of keys and values is not copied at each token, drawing needs no random number for
    each word, and the log-probs of what is drawn are written down on the way.
    """

    def _sampled(
        self, policy: Placed, ids: Tensor, prompt_mask: Tensor, witness: Witness | None
    ) -> Decoded:
        config = self.sampling.config
        (batch, prompt_width), longest = ids.shape, config.max_new_tokens
        width = prompt_width + longest
        sequences = ids.new_full((batch, width), config.pad_token_id)
        sequences[:, :prompt_width] = ids
        logprobs = torch.zeros(batch, longest, device=ids.device)
        end_tokens = torch.tensor(config.eos_token_id, device=ids.device)
        stops = self._stops(prompt_width)
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
        sequences, logprobs = sequences[:, : end + 1], logprobs[:, : written + 1]
        return Decoded(sequences, prompt_mask, self._ends(stops), logprobs)
