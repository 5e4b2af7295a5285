"""What squeue and sacct answer, read into records.

Text and not JSON: their JSON came late, changes its shape from release to release, and squeue's
ignored filters for years.
"""

from __future__ import annotations

import contextlib
import signal
import time
from dataclasses import dataclass

ENDS = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "TIMEOUT",
    }
)
_LIVE = frozenset(
    {
        "COMPLETING",
        "CONFIGURING",
        "PENDING",
        "REQUEUED",
        "REQUEUE_FED",
        "REQUEUE_HOLD",
        "RESIZING",
        "RESV_DEL_HOLD",
        "REVOKED",
        "RUNNING",
        "SIGNALING",
        "SPECIAL_EXIT",
        "STAGE_OUT",
        "STOPPED",
        "SUSPENDED",
    }
)
# Words of ours, beside Slurm's.
UNKNOWN = "UNKNOWN"
STOPPED_EARLY = "STOPPED_EARLY"

# Slurm's number for a script that could not be started on its node; no signal has it.
_NOT_STARTED = 53


@dataclass(frozen=True)
class State:
    """One job, as far as it is known; None is "not known".

    Attributes:
        state: Slurm's word for it; STOPPED_EARLY instead of its FAILED where a run stopped after a
            warning, its state saved; or UNKNOWN.
        reason: why it is in that state, in the run's words, Slurm's or ours; may be empty.
        exit_code: of the run, 128 + n when signal n ended it; None before the end, and where Slurm
            ended the job with no code to tell.
        restarts: how often the job was requeued.
        submitted, started, finished: Unix seconds, of the last attempt.
        elapsed: seconds that the last attempt has run.
        nodes: their number.
        node_list: their names, in Slurm's short form.
        partition: its name.
    """

    state: str = UNKNOWN
    reason: str = ""
    exit_code: int | None = None
    restarts: int = 0
    submitted: int | None = None
    started: int | None = None
    finished: int | None = None
    elapsed: int | None = None
    nodes: int | None = None
    node_list: str = ""
    partition: str = ""

    @property
    def ended(self) -> bool:
        """Whether the job is over for good."""
        return self.state in ENDS or self.state == STOPPED_EARLY


def parse_queue(text: str) -> dict[str, State]:
    """States by job id from `client.queue`; lines of another shape are not records."""
    found = {}
    for line in text.splitlines():
        fields = line.split("|", 8)
        if len(fields) != 9 or not fields[0].strip().isdigit():
            continue
        job_id, word, submitted, started, elapsed, nodes, partition, node_list, reason = (
            field.strip() for field in fields
        )
        state = first_word(word)
        waiting = state == "PENDING"
        found[job_id] = State(
            state=state,
            reason=_in_words(reason),
            submitted=seconds(submitted),
            # Of a waiting job it is only Slurm's guess.
            started=None if waiting else seconds(started),
            elapsed=None if waiting else duration(elapsed),
            nodes=_count(nodes),
            node_list=node_list,
            partition=partition,
        )
    return found


def parse_accounting(text: str) -> dict[str, list[State]]:
    """States of all attempts by job id, the last one last, from `client.accounting`."""
    found: dict[str, list[State]] = {}
    for line in text.splitlines():
        fields = line.split("|", 9)
        if len(fields) != 10 or not fields[0].isdigit():
            continue
        job_id, word, code, submitted, started, finished, elapsed, nodes, partition, node_list = (
            fields
        )
        state = first_word(word)
        ended, why = exit_code(code) if state in ENDS else (None, "")
        if ended == 0 and state != "COMPLETED":
            ended = None  # a job that Slurm itself ended has none
        found.setdefault(job_id, []).append(
            State(
                state=state,
                reason=word if state == "CANCELLED" and word != state else why,
                exit_code=ended,
                submitted=seconds(submitted),
                started=seconds(started),
                finished=seconds(finished),
                elapsed=_count(elapsed),
                nodes=_count(nodes),
                node_list="" if node_list == "None assigned" else node_list,
                partition=partition,
            )
        )
    for states in found.values():
        states.sort(key=lambda state: state.submitted or 0)
    return found


def first_word(text: str) -> str:
    """The state in what Slurm prints for one, such as ``CANCELLED by 1000`` or ``CANCELLED+``."""
    word = text.split()[0].rstrip("+") if text.split() else ""
    return word if word in ENDS | _LIVE else UNKNOWN


def seconds(text: str) -> int | None:
    """A time in Unix seconds, or None for Slurm's words for "none"; ISO is taken as local time.

    ``SLURM_TIME_FORMAT`` asks for seconds; a wrapper around a command may not pass it on.
    """
    if text.isascii() and text.isdigit():
        return int(text)
    with contextlib.suppress(ValueError, OverflowError):
        return int(time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S")))
    return None


def duration(text: str) -> int | None:
    """Seconds of ``D-HH:MM:SS`` and its shorter forms, or None for anything else."""
    days, dash, clock = text.rpartition("-")
    try:
        parts = [int(part) for part in clock.split(":")]
        total = int(days) * 86400 if dash else 0
    except ValueError:
        return None
    for part, unit in zip(reversed(parts), (1, 60, 3600), strict=False):
        total += part * unit
    return total


def exit_code(text: str) -> tuple[int | None, str]:
    """One number for Slurm's ``code:signal``, and what a signal means; None for no exit at all."""
    code, _, number = text.partition(":")
    if not code.isdigit() or not (number or "0").isdigit():
        return None, ""
    if int(number or 0) == _NOT_STARTED:
        return None, _in_words(f"RaisedSignal:{_NOT_STARTED}")
    if int(number or 0):
        return 128 + int(number), f"ended by {signal_name(int(number))}"
    return int(code), ""


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _in_words(reason: str) -> str:
    """Slurm's reason, but for those that say less than they should."""
    if reason == "JobLaunchFailure" or reason.startswith(f"RaisedSignal:{_NOT_STARTED}"):
        return (
            "Slurm could not start the script on its node, or not open the log: do the nodes see "
            "HL_BASE_OUT_PATH?"
        )
    return "" if reason == "None" else reason


def _count(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() else None
