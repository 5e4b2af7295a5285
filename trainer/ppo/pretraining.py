"""The language-modelling loss beside the actor's PPO loss, on texts of their own.

This is PPO-ptx of "Training Language Models to Follow Instructions with Human Feedback" (arXiv
2203.02155), which keeps an actor from forgetting what it could before.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hlrlhf.settings import Settings
from hlrlhf.trainer.data import reading
from hlrlhf.trainer.data.rows import Rows
from hlrlhf.trainer.device import Device
from hlrlhf.trainer.errors import TrainerError


class Mix:
    """Rows of text that are taken micro batch by micro batch, over and over.

    Args:
        rows: token ids, all of one length.
    """

    def __init__(self, rows: reading.Prompts, settings: Settings, device: Device):
        self._rows = rows
        self._settings = settings
        self._device = device
        self._taken = 0

    def loss(self, actor: DeepSpeedEngine) -> tuple[Tensor, Tensor]:
        """The loss of this rank's next micro batch, ready for DeepSpeed, which divides by ranks.

        Args:
            actor: the engine.

        Returns:
            The loss with gradient, a scalar; and [2], the summed negative log-probs and the tokens.
        """
        settings = self._settings
        ranks = settings.world_size
        picked = self._rows.batch(self._taken, ranks * settings.mbs)[dist.get_rank() :: ranks]
        self._taken += 1
        tokens = torch.tensor([self._rows.ids[i] for i in picked], device=self._device.torch)
        width = tokens.shape[1] - 1

        def negative_sum(logprobs: Tensor, columns: slice) -> Tensor:
            return -logprobs.sum().view(1)

        (negative,) = actor(tokens, torch.ones_like(tokens), width, 1.0, negative_sum)
        in_minibatch = settings.gbs // settings.ppo.minibatches * width
        loss = settings.pretraining.coefficient * negative * ranks / in_minibatch
        seen = torch.tensor(tokens[:, 1:].numel()).to(negative)
        return loss, torch.stack([negative.detach(), seen])

    def state(self) -> dict[str, int]:
        """How many rows all ranks have taken."""
        return {"rows": self._taken * self._settings.world_size * self._settings.mbs}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on from a state."""
        self._taken = state.get("rows", 0) // (self._settings.world_size * self._settings.mbs)


def load_mix(settings: Settings, tokenizer: PreTrainedTokenizerBase, device: Device) -> Mix | None:
    """The texts on every rank, joined by end tokens and cut into rows; None when there are none.

    Raises:
        TrainerError: on rank 0, when the texts cannot be read or do not fill a row.
    """
    if settings.pretraining.path is None:
        return None
    rows = Rows.of([])
    if dist.get_rank() == 0:
        rows = _rows(settings.pretraining.path, settings, tokenizer)
    return Mix(
        reading.Prompts(reading.to_all_ranks(rows, device.torch), settings.seed), settings, device
    )


def _rows(path: str, settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Rows:
    texts = reading.read_texts(path, settings.dataset.split, settings.pretraining.column)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = Rows.of(one + end for one in reading.tokenized(texts, tokenizer)).ids
    width = settings.pretraining.max_tokens
    number = len(ids) // width
    print(f"{path}: {len(texts)} texts make {number} rows of {width} tokens")
    if number == 0:
        raise TrainerError(
            f"{path}: its texts have {len(ids)} tokens, less than a row of {width} "
            "(HL_PRETRAINING_MAX_TOKENS)"
        )
    return Rows.with_lengths(ids[: number * width], torch.full((number,), width))
