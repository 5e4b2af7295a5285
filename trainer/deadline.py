"""The end of the job that a run is part of: no signal need come before it."""

from __future__ import annotations

import time

from hlrlhf.runs import Attempt
from hlrlhf.settings import Settings

# For what has no measured time: the models in the form of Hugging Face, and the ranks' own end.
MARGIN = 30.0


class Deadline:
    """Says when to stop.

    Args:
        settings: `slurm.signal_lead` is the least time to leave.
        attempt: knows when its job ends.
    """

    def __init__(self, settings: Settings, attempt: Attempt):
        self._least = float(settings.slurm.signal_lead or 0)
        self._ends = attempt.ends
        self._step = 0.0

    def near(self, step: float, save: float) -> bool:
        """Whether one more step might be one too many.

        Args:
            step: seconds that the last step took.
            save: seconds that the slowest checkpoint took.
        """
        self._step = max(self._step, step)
        # As slow again as the slowest step and the slowest save so far.
        lead = max(self._least, 2 * self._step + 2 * save + MARGIN)
        return self._ends is not None and time.time() + lead >= self._ends
