"""The next token, drawn from logits."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from hlrlhf.trainer.decoding.decoder import Sampling
from hlrlhf.trainer.device import Device


class Draw:
    """Draws as `sampling` says.

    By the inverse of the cumulative distribution, in fp64: one random number a row, where
    ``torch.multinomial`` draws one for each word of the vocabulary, and no sort. Where there is no
    fp64, by a race: the word whose weight, divided by an exponential random number, is the largest.
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
        weights, log_total = self._weights(logits)
        shaped = logits
        if self._shortest:
            shaped = logits.clone()
            ends = shaped[:, self._end_tokens]
            shaped[:, self._end_tokens] = ends.where(written >= self._shortest, -torch.inf)
        shaped = self._truncation(None, shaped)
        if shaped is not logits:
            weights, _ = self._weights(shaped)
        if self._has_fp64:
            drawn = torch.rand_like(weights[:, :1]) * weights[:, -1:]
            # The first word whose sum is above: one without probability adds nothing to it.
            tokens = torch.searchsorted(weights, drawn, right=True)
            tokens = tokens.clamp_(max=logits.shape[-1] - 1)
        else:
            tokens = (weights / torch.empty_like(weights).exponential_()).argmax(-1, keepdim=True)
        return tokens[:, 0], (logits.gather(-1, tokens) - log_total)[:, 0]

    def _weights(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The words' probabilities up to a factor, added up if there is fp64, and their logsumexp.

        [b, v] and [b, 1].
        """
        top = logits.amax(-1, keepdim=True)
        weights = (logits - top).exp_()
        if self._has_fp64:
            weights = weights.cumsum(-1, dtype=torch.float64)
            return weights, top + weights[:, -1:].log().float()
        return weights, top + weights.sum(-1, keepdim=True).log()
