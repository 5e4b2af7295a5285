"""Ends a run that no longer gets on: a rank that hangs keeps all others waiting in a collective."""

from __future__ import annotations

import faulthandler
import re
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from hlrlhf.settings import Settings

# The time is counted in so many parts: one in which this process was stopped, by a scheduler that
# suspends jobs, counts once, however long it was.
_PARTS = 60
# Seconds that the ranks have to answer rank 0, and that it has to answer them: a rank may have
# begun to wait later than another.
_ANSWER, _REPLY = 30.0, 60.0
# Seconds that rank 0, which alone knows who does not answer, may take to say so.
_WORD = 10.0
# Seconds after which the system ends a rank whose own end hangs too, on a disk or a full pipe.
_LAST = 120


class Watchdog:
    """A thread on each rank that ends it when `alive` was not called for `guard.hang`.

    The main thread cannot be interrupted: it waits in a collective, a driver or a file system.

    Args:
        settings: of the run; all ranks make their watchdogs at the same place.
        end: ends this process, with words that say why.
    """

    def __init__(self, settings: Settings, end: Callable[[str], object]):
        self._minutes = settings.guard.hang
        self._end = end
        self._alive = threading.Event()
        if self._minutes == 0:
            return
        # Its own: the others are those that hang.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=_REPLY))
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def alive(self) -> None:
        """Begin to count anew; to be called where the ranks have just met, by all of them."""
        self._alive.set()

    def _watch(self) -> None:
        left = _PARTS
        while left > 0:
            left -= 1
            if self._alive.wait(self._minutes * 60 / _PARTS):
                self._alive.clear()
                left = _PARTS
        faulthandler.dump_traceback_later(_LAST, exit=True)
        print(f"rank {dist.get_rank()} stands here:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        silent = self._silent()
        if dist.get_rank() > 0:
            time.sleep(_WORD)
        self._end(
            f"no step, evaluation or save has ended for {self._minutes:g} minutes (guard.hang): "
            f"{silent}; where those that answer stand is in the log"
        )

    def _silent(self) -> str:
        """Which ranks do not answer, in words.

        Rank 0 asks the others. These learn no more than whether it has heard of all.
        """
        limit = timedelta(seconds=min(_ANSWER, self._minutes * 30))
        try:
            dist.monitored_barrier(self._group, limit, wait_all_ranks=True)
        except RuntimeError as error:
            named = re.search(r"Ranks ([\d, ]+) failed", str(error))
            ranks = named[1] if named else "0"
            return (
                f"ranks {ranks} do not answer" if "," in ranks else f"rank {ranks} does not answer"
            )
        return "all ranks answer"
