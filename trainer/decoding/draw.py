"""The next token, drawn from logits."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from hlrlhf.trainer.decoding.decoder import Sampling


class Draw:
    """Draws as `sampling` says.

    By the inverse of the cumulative distribution, in fp64: one random number a row, where
    ``torch.multinomial`` draws one for each word of the vocabulary, and no sort.
    """

    def __init__(self, sampling: Sampling):
        config = sampling.config
        self._temperature = config.temperature
        self._shortest = config.min_new_tokens or 0
        self._end_tokens = config.eos_token_id
        # In the order of transformers' generate.
        self._truncation = LogitsProcessorList()
        if config.top_k:
            self._truncation.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1:
            self._truncation.append(TopPLogitsWarper(config.top_p))

    def __call__(self, logits: Tensor, written: int) -> tuple[Tensor, Tensor]:
        """Draw a token for each row.

        Args:
            logits: [b, v].
            written: tokens that the answers have so far.

        Returns:
            Tokens [b], and their log-probs [b] in fp32 under the whole softmax(logits /
            temperature), whatever is left out of it here.
        """
        logits = logits.float()
        if self._temperature != 1:
            logits = logits / self._temperature
        top = logits.amax(-1, keepdim=True)
        weights = (logits - top).exp_()
        cumulative = weights.cumsum(-1, dtype=torch.float64)
        log_total = top + cumulative[:, -1:].log().float()
        is_short = written < self._shortest
        if is_short or self._truncation:
            shaped = logits.clone()
            if is_short:
                shaped[:, self._end_tokens] = -torch.inf
            shaped = self._truncation(None, shaped)
            top = shaped.amax(-1, keepdim=True)
            cumulative = (shaped - top).exp_().cumsum(-1, dtype=torch.float64)
        drawn = torch.rand_like(cumulative[:, :1]) * cumulative[:, -1:]
        # The first word whose sum is above: one without probability adds nothing to it.
        tokens = torch.searchsorted(cumulative, drawn, right=True)
        tokens = tokens.clamp_(max=logits.shape[-1] - 1)
        return tokens[:, 0], (logits.gather(-1, tokens) - log_total)[:, 0]
