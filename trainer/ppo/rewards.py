"""Rewards: what an answer is worth, by a reward model, by a Python function, or by both.

The raw score of an answer is the weighted sum of what they say. Shaping comes after it: running
normalisation, the clip, the penalty for an answer that never ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hlrlhf.settings import Settings
from hlrlhf.trainer import flops, lengths
from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.models import frozen, loading, tokenizers
from hlrlhf.trainer.models.forwards import unwrapped
from hlrlhf.trainer.models.roles import Models
from hlrlhf.trainer.ppo.rollout import Rollout
from hlrlhf.trainer.ppo.scores import FunctionScores, ModelScores, imported

# Gives the answers of a rollout their scores, [b] in fp32.
Source = Callable[[Rollout], Tensor]


class Rewards:
    """The scores of answers, and what PPO makes of them.

    Args:
        sources: what scores, each with its weight.
        settings: the reward settings are read.
        cost: of the reward model, if there is one.
    """

    def __init__(
        self,
        sources: Sequence[tuple[float, Source]],
        settings: Settings,
        cost: flops.Cost | None = None,
    ):
        self.cost = cost
        self._sources = sources
        self._settings = settings.reward
        self._normalizer = Normalizer()

    @torch.no_grad()
    def scores(self, rollout: Rollout) -> Tensor:
        """Raw scores: the weighted sum of the sources, [b] in fp32; changes no state.

        Raises:
            TrainerError: the function failed, or returned no scores.
        """
        parts = [weight * source(rollout) for weight, source in self._sources]
        return torch.stack(parts).sum(0)

    def shaped(self, scores: Tensor, ended: Tensor) -> Tensor:
        """Scores normalised, clipped and, where no end token came, less the penalty.

        The penalty comes last, so that no clip can swallow it. With normalisation all ranks have to
        call this, once for each rollout of the training: the scores become part of the statistics.

        Args:
            scores: [b], of this rank.
            ended: [b], whether the answer ended by itself.

        Returns:
            [b], fp32.
        """
        if self._settings.normalize:
            self._normalizer.update(_of_all_ranks(scores))
            scores = self._normalizer(scores)
        clipped = scores.clamp(-self._settings.clip, self._settings.clip)
        return clipped - self._settings.missing_eos_penalty * (~ended).to(clipped.dtype)

    def state(self) -> dict[str, float]:
        """What the normalisation knows of the scores so far."""
        return asdict(self._normalizer)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._normalizer = Normalizer(**state)

    def totals(self) -> dict[str, tuple[Tensor, Tensor]]:
        """What the last scores show of the reward model, for `metrics.means`; nothing for most."""
        for _, source in self._sources:
            if isinstance(source, ModelScores) and source.cut is not None:
                rows = torch.tensor(len(source.cut), device=source.cut.device)
                return {"reward_cut": (source.cut.sum(), rows)}
        return {}


@dataclass
class Normalizer:
    """Mean and standard deviation of all scores so far, in float64.

    A batch is merged as in Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for
    Computing Sample Variances" (1979), which is Welford's method for more than one value at a time.

    Attributes:
        count: scores so far.
        mean: theirs.
        m2: the sum of their squared differences from the mean.
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def update(self, scores: Tensor) -> None:
        """Take in scores [n]; one that is not finite is left out, or no later one would be."""
        values = scores.cpu().double()
        values = values[values.isfinite()]
        if len(values) == 0:
            return
        mean = float(values.mean())
        total = self.count + len(values)
        difference = mean - self.mean
        self.m2 += float(((values - mean) ** 2).sum())
        self.m2 += difference**2 * self.count * len(values) / total
        self.mean += difference * len(values) / total
        self.count = total

    def __call__(self, scores: Tensor) -> Tensor:
        """Scores [b] less the mean, divided by the standard deviation (of the population)."""
        variance = self.m2 / max(1, self.count)
        normalized = (scores.cpu().double() - self.mean) / math.sqrt(variance + 1e-8)
        return normalized.to(scores)


def check_rewards(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> None:
    """Stop before any model loads when the scores of a run cannot be had.

    Args:
        tokenizer: the actor's.

    Raises:
        TrainerError: the function cannot be imported, or not be called with prompts and answers;
            the critic's tokenizer is not the actor's; or the reward model's is not, while answers
            are not encoded again; or the reward model would be a trained critic that nobody named
            as one.
    """
    if settings.reward.function is not None:
        imported(settings.reward.function)
    path = settings.critic.model_path
    if tokenizers.foreign(tokenizers.held_tokenizer(path), tokenizer):
        raise TrainerError(
            f"{path}: the critic's tokenizer is not the actor's, whose tokens it reads; set "
            "HL_CRITIC_MODEL_PATH to a model that shares it. As a reward model this one can serve: "
            f"HL_REWARD_OWN_TOKENIZER=1 and HL_REWARD_MODEL_PATH={path}"
        )
    if settings.reward.model_weight:
        if settings.reward.model_path is None and loading.saved_as(path) == "critic":
            raise TrainerError(
                f"{path}: is a critic that hlrlhf has trained, which foresees returns instead of "
                "scoring answers; set HL_REWARD_MODEL_PATH to the reward model, or to this folder "
                "if you mean it"
            )
        _own_tokenizer(settings, tokenizer)


def load_rewards(settings: Settings, tokenizer: PreTrainedTokenizerBase, models: Models) -> Rewards:
    """What scores the answers of a run, on the device.

    Args:
        tokenizer: the actor's.
        models: of which the critic may hold the reward model.

    Raises:
        TrainerError: see `check_rewards`; or the reward model cannot be loaded or does not fit its
            tokenizer.
    """
    own = settings.reward
    sources: list[tuple[float, Source]] = []
    cost = None
    if own.model_weight:
        again = _own_tokenizer(settings, tokenizer)
        reads = tokenizer if again is None else again
        model = frozen.reward_model(
            settings, reads, models.critic, models.first_head, models.device
        )
        cost = flops.cost(model.module)
        longest = lengths.longest(unwrapped(model.module.inner).config)
        score_at = own.score_at
        if score_at == "auto":
            score_at = model.module.score_at
        if dist.get_rank() == 0:
            where = {"end": "at an answer's last token", "before_end": "before the end token"}
            origin = "as it learnt it" if own.score_at == "auto" else "as HL_REWARD_SCORE_AT says"
            print(f"{frozen.reward_path(settings)}: rewards are read {where[score_at]}, {origin}")
        by_model = ModelScores(model, tokenizer, again, score_at, settings, models.device, longest)
        sources.append((own.model_weight, by_model))
    if own.function is not None:
        sources.append((own.function_weight, FunctionScores(own.function, tokenizer)))
    return Rewards(sources, settings, cost)


def _of_all_ranks(values: Tensor) -> Tensor:
    """This rank's [b] as [ranks x b]; all ranks have to call it."""
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values)
    return torch.cat(parts)


def _own_tokenizer(
    settings: Settings, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase | None:
    """The reward model's tokenizer, or None when the model works on the actor's tokens."""
    path = frozen.reward_path(settings)
    if settings.reward.own_tokenizer:
        return tokenizers.model_tokenizer(
            path,
            "there is none to encode answers with (reward.own_tokenizer): save one there, or set "
            "HL_REWARD_OWN_TOKENIZER=0 if the reward model shares the actor's",
        )
    if tokenizers.foreign(tokenizers.held_tokenizer(path), tokenizer):
        raise TrainerError(
            f"{path}: the reward model's tokenizer is not the actor's; set "
            f"HL_REWARD_OWN_TOKENIZER=1 and HL_REWARD_MODEL_PATH={path} to decode answers and "
            "encode them again for it"
        )
    return None
