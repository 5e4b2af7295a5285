"""What a step shows of itself: the numbers of its rollout, its models and its time."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hlrlhf.settings import Settings
from hlrlhf.trainer import flops, formulas
from hlrlhf.trainer.device import Device
from hlrlhf.trainer.flops import Cost
from hlrlhf.trainer.models.roles import Models
from hlrlhf.trainer.ppo.experience import Experience, moments, reused
from hlrlhf.trainer.ppo.rollout import Rollout
from hlrlhf.trainer.ranks import summed


class Clock:
    """Seconds of each part of a step, and of the whole step.

    A step takes from one record to the next: nothing that it costs is left out.
    """

    def __init__(self, device: Device):
        self._device = device
        self._began = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def start(self) -> None:
        """Begin the first part of a step."""
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a part, and begin the next."""
        self._device.synchronize()
        now = time.perf_counter()
        self._laps[name] = now - self._last
        self._last = now

    def step(self) -> dict[str, float]:
        """End the step: the seconds of its parts, and `seconds` of it all."""
        now = time.perf_counter()
        began, self._began = self._began, now
        laps, self._laps = self._laps, {}
        return laps | {"seconds": now - began}


def totals(rollout: Rollout, experience: Experience) -> dict[str, tuple[Tensor, Tensor]]:
    """This rank's sums and weights of what a rollout shows, for `metrics.means`."""
    mask = rollout.answer_mask
    rows = torch.tensor(len(mask), device=mask.device)
    tokens = mask.sum()
    kl = formulas.kl_estimate(experience.logprobs, experience.reference)
    return {
        "reward": (experience.scores.sum(), rows),
        # Of whole answers: the sum over tokens.
        "kl": (kl.sum(), rows),
        "length": (tokens, rows),
        "ended": (rollout.ended.sum(), rows),
        # The sampled estimate, in nats per token.
        "entropy": (-experience.logprobs.sum(), tokens),
        "value": ((experience.values * mask).sum(), tokens),
        "return": (experience.returns.sum(), tokens),
    }


class Pace:
    """What a run does in a second.

    Args:
        actor, critic, reward: what the models cost; None without a reward model.
    """

    def __init__(self, settings: Settings, actor: Cost, critic: Cost, reward: Cost | None):
        self._settings = settings
        self._actor, self._critic, self._reward = actor, critic, reward

    def __call__(self, rollout: Rollout, seconds: float) -> dict[str, float]:
        """Of a step; all ranks have to call it.

        Args:
            rollout: this rank's.
            seconds: that the whole step took.
        """
        settings = self._settings
        answers = rollout.lengths
        prompts = rollout.attention_mask.sum(-1) - answers
        operations = flops.of_step(
            prompts,
            answers,
            self._actor,
            self._critic,
            self._reward,
            settings.ppo.epochs,
            recorded=reused(rollout, settings) is not None,
            learns_at_once=settings.critic_learns_at_once,
        )
        counted = torch.stack([(prompts + answers).sum().to(operations), operations])
        tokens, operations = summed(counted).tolist()
        if settings.pretraining.path is not None:
            # A row of text goes with each answer that an optimizer step learns from.
            rows = settings.ppo.epochs * settings.gbs
            operations += flops.of_texts(rows, settings.pretraining.max_tokens, self._actor).item()
        return {
            "samples_per_second": settings.gbs / seconds,
            "tokens_per_second": tokens / seconds,
            "tflops_per_device": operations / settings.world_size / 1e12 / seconds,
        }


def of_update(models: Models, experience: Experience) -> dict[str, float]:
    """What shows how an update went; all ranks have to call it."""
    return gradient_norms(models) | {"explained_variance": explained_variance(experience)}


def explained_variance(experience: Experience) -> float:
    """Of the returns by the critic's values before the update, 1 at best; all ranks have to ask."""
    both = torch.stack([experience.returns, experience.returns - experience.values])
    _, (returns, errors) = moments(both, experience.answer_mask)
    return 1 - float(errors / returns) if returns else 0.0


def learning_rates(models: Models) -> dict[str, float]:
    """Learning rates of the coming update, those of adapters apart."""
    rates = {}
    for role, trained in (("actor", models.actor), ("critic", models.critic)):
        for group in trained.optimizer.param_groups:
            kind = "lora_learning_rate" if group["name"] == "lora" else "learning_rate"
            rates[f"{role}_{kind}"] = group["lr"]
    return rates


def gradient_norms(models: Models) -> dict[str, float]:
    """Gradient norms of the last update, where they are kept."""
    norms = {}
    for role, trained in (("actor", models.actor), ("critic", models.critic)):
        if (norm := trained.get_global_grad_norm()) is not None:
            norms[f"{role}_gradient_norm"] = float(norm)
    return norms


def samples(
    rollout: Rollout, experience: Experience, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """The first row of this rank's rollout."""
    # Picked out on the CPU: elsewhere, each length would be a shape to compile.
    tokens, mask = rollout.sequences[0].cpu(), rollout.attention_mask[0].bool().cpu()
    width = len(tokens) - rollout.answer_width
    prompt, answer = tokens[:width][mask[:width]], tokens[width:][mask[width:]]
    return [
        {
            "prompt": tokenizer.decode(prompt),
            "answer": tokenizer.decode(answer),
            "score": experience.scores[0].item(),
        }
    ]
