"""What a run does when its numbers go wrong: skip the step, warn, stop in the end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from hlrlhf.runs import Attempt
from hlrlhf.settings import Settings
from hlrlhf.trainer.device import Device
from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.ppo.experience import Experience
from hlrlhf.trainer.ranks import agreed


class Guard:
    """Judges the steps of a run.

    Args:
        attempt: at the run.

    Attributes:
        skipped: steps so far without an update, or with a part of one.
    """

    def __init__(self, settings: Settings, attempt: Attempt, device: Device):
        self._limits = settings.guard
        self._attempt = attempt
        self._device = device
        self._in_a_row = 0
        self._warned: set[str] = set()
        self.skipped = 0

    def usable(self, experience: Experience) -> bool:
        """Whether all numbers of all ranks are finite; all ranks have to ask."""
        names = ("logprobs", "reference", "values", "advantages", "returns")
        per_token = torch.stack([getattr(experience, name) for name in names])
        # What stands in padding is nobody's.
        per_token = torch.where(experience.answer_mask, per_token, 0)
        finite = per_token.isfinite().all() & experience.scores.isfinite().all()
        return not agreed(not bool(finite), self._device)

    def judge(self, step: int, applied: bool, experience: Experience) -> None:
        """Count a step; all ranks have to call it, with one opinion.

        Args:
            step: from 1.
            applied: whether all of its update was.
            experience: this rank's, which is written to disk for study when the run stops here.

        Raises:
            TrainerError: too many steps in a row were skipped.
        """
        self._in_a_row = 0 if applied else self._in_a_row + 1
        self.skipped += not applied
        if self._in_a_row < self._limits.max_skipped:
            return
        folder = self._attempt.run.skipped
        tensors = {name: value.cpu().contiguous() for name, value in experience.tensors().items()}
        where = f"the last batch is in {folder}. Look there at `scores` first"
        self._attempt.check()
        try:
            folder.mkdir(exist_ok=True)
            save_file(tensors, folder / f"step-{step}.rank-{dist.get_rank()}.safetensors")
        except Exception as error:  # of the writer's own; it is not why the run stops
            where = f"the last batch could not be written to {folder}: {error}"
        dist.barrier()
        raise TrainerError(
            f"{self._in_a_row} steps in a row had a loss, gradient or reward that is not finite "
            f"(HL_GUARD_MAX_SKIPPED); {where}; "
            "else try a lower learning rate, or HL_DTYPE=fp32"
        )

    def state(self) -> dict[str, Any]:
        """What it has counted and warned of."""
        return {
            "skipped": self.skipped,
            "in_a_row": self._in_a_row,
            "warned": sorted(self._warned),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]
        self._warned = set(state["warned"])

    def warnings(self, values: Mapping[str, float]) -> Iterator[str]:
        """What to warn of, once when a metric passes its limit and again after it has been back.

        Args:
            values: of a step, of all ranks together.
        """
        limits = self._limits
        ratio, kl, entropy = (values.get(name, math.nan) for name in ("ratio", "kl", "entropy"))
        found = {
            "ratio": (
                0 < limits.ratio < abs(ratio - 1),
                f"the mean policy ratio is {ratio:.3g}, farther from 1 than {limits.ratio} "
                "(HL_GUARD_RATIO): the updates are too large",
            ),
            "kl": (
                0 < limits.kl < kl,
                f"the KL divergence from the reference is {kl:.4g} nats per answer, over "
                f"{limits.kl} (HL_GUARD_KL): the actor may be exploiting the reward",
            ),
            "entropy": (
                entropy < limits.entropy,
                f"the entropy is {entropy:.3g} nats per token, under {limits.entropy} "
                "(HL_GUARD_ENTROPY): the actor may have collapsed",
            ),
        }
        for name, (passed, words) in found.items():
            if passed and name not in self._warned:
                yield words
        self._warned = {name for name, (passed, _) in found.items() if passed}
