"""The next token, drawn from logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from hlrlhf.trainer.decoding.decoder import Sampling
from hlrlhf.trainer.device import Device

# Words whose weights are added up before the word itself is looked for.
BLOCK = 256


class Draw:
    """Draws as `sampling` says.

    Without a sort, and where there is fp64 with one random number a row: ``torch.multinomial``
    draws one for each word of the vocabulary.
    """

    def __init__(self, sampling: Sampling, device: Device):
        config = sampling.config
        self._temperature = config.temperature
        self._shortest = config.min_new_tokens or 0
        self._end_tokens = torch.tensor(config.eos_token_id, device=device.torch)
        self._has_fp64 = device.has_fp64
        # In the order of transformers' generate.
        self._truncation = LogitsProcessorList()
        if config.top_k:
            self._truncation.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1:
            self._truncation.append(TopPLogitsWarper(config.top_p))

    def __call__(self, logits: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a token for each row.

        Args:
            logits: [b, v].
            written: a scalar or [1], tokens that the answers have so far.

        Returns:
            Tokens [b], and their log-probs [b] in fp32 under the whole softmax(logits /
            temperature), whatever is left out of it here.
        """
        logits = logits.float()
        if self._temperature != 1:
            logits = logits / self._temperature
        weights, top = _weights(logits)
        log_total = top + weights.sum(-1, keepdim=True).log()
        shaped = logits
        if self._shortest:
            shaped = logits.clone()
            ends = shaped[:, self._end_tokens]
            shaped[:, self._end_tokens] = ends.where(written >= self._shortest, -torch.inf)
        shaped = self._truncation(None, shaped)
        if shaped is not logits:
            weights, _ = _weights(shaped)
        tokens = by_inversion(weights) if self._has_fp64 else by_race(weights)
        return tokens[:, 0], (logits.gather(-1, tokens) - log_total)[:, 0]


def _weights(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The words' probabilities up to a factor [b, v], and the highest logit [b, 1]."""
    top = logits.amax(-1, keepdim=True)
    return (logits - top).exp_(), top


def by_inversion(weights: Tensor) -> Tensor:
    """Words [b, 1] with probabilities in the ratio of weights [b, v], by one random number a row.

    It falls into the sum of the weights, in fp64: first a block of words is found, then the word,
    so that the words of one block alone are added up one by one.
    """
    blocks = pad(weights, (0, -weights.shape[-1] % BLOCK)).view(len(weights), -1, BLOCK)
    sums = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    drawn = torch.rand_like(sums[:, :1]) * sums[:, -1:]
    block = _above(sums, drawn)
    words = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, BLOCK))[:, 0]
    within = words.cumsum(-1, dtype=torch.float64)
    before = sums.gather(-1, block) - within[:, -1:]
    return block * BLOCK + _above(within, drawn - before)


def _above(sums: Tensor, drawn: Tensor) -> Tensor:
    """The first place [b, 1] where the sum is above: what has no weight adds nothing to it."""
    # Roundings may have led a little out of it.
    highest = torch.nextafter(sums[:, -1:], torch.zeros_like(drawn))
    return torch.searchsorted(sums, torch.minimum(drawn.clamp(min=0), highest), right=True)


def by_race(weights: Tensor) -> Tensor:
    """The same without fp64: the word whose weight by an exponential number is the largest."""
    return (weights / torch.empty_like(weights).exponential_()).argmax(-1, keepdim=True)
