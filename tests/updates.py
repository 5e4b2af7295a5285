"""A rollout for the tests of the update, and the models and settings that go with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from tiny import EOS, PAD

from hlrlhf.trainer.models import loading
from hlrlhf.trainer.ppo import experience
from hlrlhf.trainer.ppo.rewards import Rewards

PROMPTS = [[1, 5, 6, 7, 8, 9], [1, 30], [1, 11, 12], [1, 4]]
ANSWERS = [[7, 8, EOS], [EOS], [13, PAD, 14, 15, EOS], [20, 21, 22, 23, 24]]
TEXTS = [[1, 9, 8, 7], [1, 5, 5, 5], [1, 2, 30, 31], [1, 40, 41, 42]]


def made(settings: Any) -> experience.Experience:
    """What a policy near the actor has sampled, with advantages of either sign."""
    rolled_out = tiny.rolled_out(PROMPTS, ANSWERS)
    generator = torch.Generator().manual_seed(3)
    shape = rolled_out.answer_mask.shape
    near = torch.randn(shape, generator=generator)
    values = torch.randn(shape, generator=generator)
    said = (near - 4, near - 4.5)
    scores = torch.tensor([1.0, -2.0, 0.5, 3.0])
    rest = (scores, Rewards([], settings), settings, 0.1)
    rewarded = experience.token_rewards(rolled_out, *said, *rest)
    return experience.assemble(rolled_out, *said, values, scores, rewarded, settings)


def load(folder: Path) -> tuple[Any, Any]:
    actor = loading.load_policy(str(tiny.save_policy(folder / "actor", "llama")), "fp32", 0.0)
    critic = loading.load_scorer(str(tiny.save_classifier(folder / "critic", "llama")), "fp32", 0.0)
    return actor, critic


def settings_with(*flags: str) -> Any:
    return tiny.settings(
        "mbs=1",
        "num_warmup_steps=0",
        "optimizer.lr_scheduler=constant",
        "optimizer.gradient_clipping=0",
        "optimizer.epsilon=1e-3",
        "actor.learning_rate=1e-3",
        "critic.learning_rate=2e-3",
        *flags,
    )
