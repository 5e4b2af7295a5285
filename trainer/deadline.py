"""The end of the job that a run is part of: no signal need come before it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from hlrlhf.runs import Attempt
from hlrlhf.settings import Settings
from hlrlhf.trainer.models.forwards import Parameters

# For the ranks' own end.
MARGIN = 30.0
# Bytes a second of a slow shared disk, for what has not been timed.
RATE = 200e6


class Deadline:
    """Says when to stop.

    Args:
        settings: `slurm.signal_lead` is the least time to leave.
        attempt: knows when its job ends.
        trained: the parameters of each model, of which checkpoints and models are written.
    """

    def __init__(self, settings: Settings, attempt: Attempt, trained: Sequence[Parameters]):
        self._least = float(settings.slurm.signal_lead or 0)
        self._ends = attempt.ends
        self._step = 0.0
        # A weight in fp32 and two moments, by each rank its own; whole models by one of them.
        state = sum(12 * model.trainable for model in trained) / settings.world_size
        models = sum(4 * model.total for model in trained)
        self._checkpoint, self._models = state / RATE, models / RATE

    def near(self, step: float, save: float) -> bool:
        """Whether one more step might be one too many.

        Args:
            step: seconds that the last step took.
            save: seconds that the slowest checkpoint took; 0 before the first.
        """
        self._step = max(self._step, step)
        # The next ones may be twice as slow as the slowest so far.
        saves = 2 * (save or self._checkpoint) + self._models
        lead = max(self._least, 2 * self._step + saves + MARGIN)
        return self._ends is not None and time.time() + lead >= self._ends
