"""Which decoder a run samples with."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from hlrlhf.settings import Settings
from hlrlhf.trainer.decoding.decoder import Decoder, sampling
from hlrlhf.trainer.decoding.hybrid import Hybrid
from hlrlhf.trainer.decoding.plain import Plain
from hlrlhf.trainer.device import Device
from hlrlhf.trainer.models import tokenizers
from hlrlhf.trainer.models.forwards import Policy


def decoder(
    settings: Settings,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    device: Device,
    warned: Callable[[], bool],
) -> Decoder:
    """What samples a run's answers.

    Args:
        warned: see `decoder.Decoder`.

    Raises:
        TrainerError: nothing ends an answer of this policy.
    """
    end_tokens = tokenizers.end_tokens(policy, tokenizer)
    padding = end_tokens[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    how = sampling(settings, tokenizer, end_tokens, padding, device)
    return (Hybrid if settings.hybrid_engine else Plain)(how, device, warned)
