"""What a run has written down so far: its logs, its exit codes and its last step."""

from __future__ import annotations

import functools
import json
import math
import os
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from hlrlhf.runs.attempt import Attempt, Outcome
from hlrlhf.runs.directory import Job, Run

# A line of metrics is some hundred bytes; this much of the file's end holds the last one.
_TAIL = 64 * 1024


@dataclass(frozen=True)
class Progress:
    """The last step that a run finished; None where the record does not say.

    Attributes:
        step: from 1.
        total_steps: steps of the whole run.
        attempt: the attempt that did it, from 0.
        reward: mean score of the step's answers.
        seconds_left: to the end of the run, as guessed at that step.
        written: when, in Unix seconds.
    """

    step: int
    total_steps: int | None
    attempt: int
    reward: float | None
    seconds_left: float | None
    written: float


def progress(run: Run) -> Progress | None:
    """The run's last step, or None before the first one.

    The trainer may be writing at this moment: a line that is not whole does not count.
    """
    try:
        with run.metrics.open("rb") as file:
            written = os.fstat(file.fileno()).st_mtime
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - _TAIL))
            lines = file.read().split(b"\n")
    except OSError:
        return None
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and (step := _number(record, "step")) is not None:
            total = _number(record, "total_steps")
            return Progress(
                step=int(step),
                total_steps=None if total is None else int(total),
                attempt=int(_number(record, "attempt") or 0),
                reward=_number(record, "reward"),
                seconds_left=_number(record, "seconds_left"),
                written=written,
            )
    return None


@dataclass(frozen=True)
class Saved:
    """The newest checkpoint of a run.

    Attributes:
        step: steps done by then.
        written: when, in Unix seconds.
    """

    step: int
    written: float


def saved(run: Run) -> Saved | None:
    """The newest checkpoint, or None. Whether it is whole shows when a run goes on from it."""
    try:
        record = json.loads(run.newest_checkpoint.read_text(encoding="utf-8"))
        return Saved(int(record["step"]), run.newest_checkpoint.stat().st_mtime)
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return None


def attempts(run: Run, job: Job) -> dict[int, Outcome | None]:
    """The attempts of a job that left a trace, in order, each with how it said that it ended."""
    own = [attempt for attempt in _attempts(run) if attempt.job == job.log_id]
    own.sort(key=attrgetter("number"))
    # The ranks' word alone, where what started them could not repeat it.
    return {one.number: Outcome.read(one.ended) or one.heard() for one in own}


def every_attempt(run: Run) -> list[Attempt]:
    """The attempts of all of a run's jobs that left a trace, in order of their beginning."""

    def order(attempt: Attempt) -> tuple[int, str, int]:
        return attempt.beginning().when or 0, attempt.job or "", attempt.number

    return sorted(_attempts(run), key=order)


def _attempts(run: Run) -> set[Attempt]:
    return set(filter(None, (Attempt.by_file(run, name) for name in _names(run.logs))))


def log_files(run: Run, job: Job) -> list[Path]:
    """The logs that there are, in reading order: the ranks' of every attempt, then the shell's.

    Those of earlier jobs come first. The ranks' logs are one file when the run's setting
    ``log_file`` says so.

    Raises:
        SettingsError: ``settings.yaml`` is there and cannot be read.
    """
    own = every_attempt(run)
    shared = _log_file(run)
    files = [shared] if shared else [attempt.log for attempt in own]
    jobs = dict.fromkeys([*(str(attempt.job) for attempt in own), job.log_id])
    return [path for path in [*files, *map(run.batch_log, jobs)] if path.is_file()]


@functools.cache
def _log_file(run: Run) -> Path | None:
    if not run.settings_file.exists():
        return None
    from hlrlhf.settings import layers

    setting = layers.load(run.settings_file).log_file
    # As the ranks see it, who work in the run directory.
    return run.directory / setting if setting else None


def _number(record: dict[str, Any], key: str) -> float | None:
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 - names are all that is needed
    except OSError:
        return []
