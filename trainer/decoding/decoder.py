"""What samples answers: the one interface, and how a run samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from hlrlhf.settings import Settings
from hlrlhf.trainer.device import Device
from hlrlhf.trainer.models.forwards import Placed

# Is shown the logits [b, v] of every token, before temperature and truncation.
Witness = Callable[[Tensor], None]


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled, complete: nothing is left to a checkpoint's own defaults.

    A checkpoint's generation_config.json may ask for greedy decoding, a low temperature or a
    repetition penalty; PPO needs samples of the policy itself.

    Attributes:
        config: for transformers' ``generate``.
        stop: texts that end an answer.
        tokenizer: what they are found with.
        multiple: widths of prompts and of answers are rounded up to a multiple of this.
    """

    config: GenerationConfig
    stop: list[str]
    tokenizer: PreTrainedTokenizerBase
    multiple: int = 1


@dataclass(frozen=True)
class Decoded:
    """What was sampled, as it came.

    Attributes:
        sequences: [b, l + r], prompts padded on the left; what follows an answer's end is not read.
        prompt_mask: [b, l], 1 on prompt tokens.
        ends: [b], position in the answer of the token that completed a stop string, -1 for none;
            None where there are no stop strings.
        logprobs: [b, r] in fp32, of the sampled tokens under softmax(logits / temperature), before
            truncation; None, then on all ranks, from a decoder that does not record them.
    """

    sequences: Tensor
    prompt_mask: Tensor
    ends: Tensor | None
    logprobs: Tensor | None = None


class Decoder(Protocol):
    """Samples answers from a policy."""

    @property
    def name(self) -> str:
        """The setting that asks for it."""

    @property
    def sampling(self) -> Sampling:
        """How."""

    @property
    def device(self) -> Device:
        """Where."""

    @property
    def warned(self) -> Callable[[], bool]:
        """Whether this rank has been asked to stop: sampling then ends with the next token.

        Nobody wants the answers, which may be cut short anywhere.
        """

    def __call__(
        self, policy: Placed, prompts: Sequence[list[int]], witness: Witness | None = None
    ) -> Decoded:
        """Sample one answer to each prompt.

        Args:
            policy: an engine around a `forwards.Policy`, or see `frozen`.
            prompts: token ids, this rank's.
            witness: sees what tokens are sampled from.
        """

    def state(self) -> dict[str, Any]:
        """What it has found out, and samples by from then on."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""


def sampling(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    end_tokens: list[int],
    padding: int,
    device: Device,
) -> Sampling:
    """How a run samples its answers."""
    # Left alone, transformers compiles the model on some devices when the cache is static.
    static = {"cache_implementation": "static", "disable_compile": True}
    config = GenerationConfig(
        do_sample=True,
        temperature=settings.generation.temperature,
        top_p=settings.generation.top_p,
        top_k=settings.generation.top_k,
        min_new_tokens=settings.generation.min_new_tokens or None,
        max_new_tokens=settings.generation.max_new_tokens,
        eos_token_id=end_tokens,
        pad_token_id=padding,
        use_cache=True,
        **(static if device.static_cache else {}),
    )
    return Sampling(config, settings.generation.stop, tokenizer, device.pad_to)
