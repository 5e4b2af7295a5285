"""One rank: ``python -m hlrlhf.trainer RUN_DIRECTORY``.

RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say which one, as torchrun sets them.
Exits with 0 when the run is complete; with 75 when it stopped, its state saved, after a warning
(SIGUSR1, or SIGTERM from a scheduler that gives it time) or before its job's end (HLRLHF_ENDS); and
with 1 when it failed. Ranks that belong to a job (HLRLHF_JOB, HLRLHF_ATTEMPT) also leave this in
the run directory, see `hlrlhf.runs.Attempt`: whoever started them may see no more of their end than
that they are gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import NoReturn

from hlrlhf.errors import HlrlhfError
from hlrlhf.runs import STOPPED, Attempt, Outcome, Run, ledger
from hlrlhf.settings.errors import printable
from hlrlhf.settings.layers import load
from hlrlhf.trainer.errors import HungError, TrainerError, is_of_node

# Read by torch when it first takes memory: large tensors lie in huge pages, where Linux leaves the
# choice to programs. In small ones the first write to each page of each tensor is a fault, which on
# processors takes up to a fifth of a step.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# How long the end of another rank may take to be known, in seconds.
_WORD = 2.0


def main(attempt: Attempt) -> Outcome:
    """Run one rank to its end.

    Args:
        attempt: with the run's directory.

    Raises:
        TrainerError: the run cannot go on.
        SettingsError: its settings.yaml cannot be used.
        RunError: its directory belongs to another job.
        SupersededError: a newer attempt has begun.
    """
    received: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, _: received.append(number))
    settings = load(attempt.run.settings_file)
    try:
        local_rank, world_size = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    except KeyError as error:
        raise TrainerError(
            f"{error.args[0]} is not set: ranks are started by the job script, by "
            "`hlrlhf submit --local` or by torchrun"
        ) from error
    if world_size != settings.world_size:
        raise TrainerError(
            f"WORLD_SIZE = {world_size}, but the run has num_nodes x devices_per_node = "
            f"{settings.world_size} ranks"
        )
    attempt.check_job()
    if os.environ.get("RANK") == "0":
        attempt.begin()
        with contextlib.suppress(OSError):
            ledger.enter(attempt.run, but=attempt)
    # Here rather than above: imports take seconds, in which a warning must find its handler.
    from hlrlhf.trainer import device as devices

    device = devices.select(settings, local_rank)
    _quieten()
    # DeepSpeed looks for its accelerator when it is imported: only now does the device stand.
    from hlrlhf.trainer import loop
    from hlrlhf.trainer.models import engine
    from hlrlhf.trainer.watchdog import Watchdog

    engine.start(device, settings)
    watchdog = Watchdog(settings, lambda words: _leave(attempt, _failure(HungError(words))))
    end = loop.train(settings, attempt, device, lambda: len(received), watchdog.alive)
    if end is loop.End.COMPLETE:
        return Outcome(0)
    if end is loop.End.OUT_OF_TIME:
        why = "stopped before its job is out of time; what it has learnt is saved"
        return Outcome(STOPPED, why, may_pass=True)
    by = signal.Signals(received[0]).name if received else "a signal to another rank"
    return Outcome(STOPPED, f"stopped early by {by}; what it has learnt is saved")


def _quieten() -> None:
    """Keep transformers' bars and the libraries' warnings to each other and us out of the log."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # They call each other by names that are about to change.
    warnings.filterwarnings("ignore", category=FutureWarning)
    # GPT-2 wants a mask for padding, which after a text does nothing.
    logging.getLogger("transformers.modeling_utils").addFilter(
        lambda record: "passing in an `attention_mask`" not in record.getMessage()
    )


def _failure(error: BaseException) -> Outcome:
    """Say what ended this rank."""
    if isinstance(error, HlrlhfError):
        words = str(error)
    else:
        traceback.print_exception(error)
        words = f"{type(error).__name__}: {error}"
        # It may be no more than what the end of another rank looks like from here: let that one's
        # word be the first.
        if os.environ.get("WORLD_SIZE", "1") != "1" and not is_of_node(error):
            time.sleep(_WORD)
    with contextlib.suppress(OSError):  # a full disk must not hide how the run ended
        print(f"error: {words}", file=sys.stderr, flush=True)
    # Of several lines, as of a traceback, the first and the last say what happened.
    first, *more = words.strip().splitlines() or [""]
    of_node = is_of_node(error)
    may_pass = of_node or isinstance(error, HungError) or not isinstance(error, HlrlhfError)
    at_fault = os.environ.get("HLRLHF_NODE") if of_node else None
    return Outcome(1, printable(" ".join([first, *more[-1:]])), may_pass, at_fault)


def _leave(attempt: Attempt, outcome: Outcome) -> NoReturn:
    # Complete is what all are together, and failed what one is: rank 0 speaks for a good end.
    if outcome.code or os.environ.get("RANK") == "0":
        attempt.say(outcome)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    # Not sys.exit: with peers that wait in a collective, the communication library's own clean-up
    # can keep a failed rank alive, and the job with it.
    os._exit(outcome.code)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m hlrlhf.trainer RUN_DIRECTORY")
    this = Attempt.of(Run(Path(sys.argv[1]).absolute()), os.environ)
    try:
        outcome = main(this)
    except BaseException as error:  # sys.exit in a reward function too: it is no good end
        outcome = _failure(error)
    _leave(this, outcome)
