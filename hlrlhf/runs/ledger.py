"""What became of each attempt at a run: a line each in ``attempts.jsonl``, in order of their ends.

What runs an attempt's ranks, the batch script or the launcher on this machine, adds the line. Where
it was killed it cannot; then the next attempt does.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import asdict, dataclass
from typing import Any

from hlrlhf.runs.attempt import Attempt, Outcome
from hlrlhf.runs.directory import Run
from hlrlhf.runs.records import every_attempt, progress

_SILENT = "it left no word of its end: its node was lost, or its script was killed"


@dataclass(frozen=True)
class Entry:
    """One attempt that has ended; None is "not known".

    Attributes:
        job: what its files in ``logs/`` begin with, see `Job.log_id`.
        attempt: its number, from 0 in each job.
        nodes: their names, in Slurm's short form.
        began, ended: Unix seconds.
        first_step: the first step that it took; None if it took none.
        last_step: steps of the run that were done at its end.
        exit_code: see `Outcome.code`.
        at_fault: the node that failed, rather than the run.
        why: one line; may be empty.
    """

    job: str
    attempt: int
    nodes: str = ""
    began: int | None = None
    ended: int | None = None
    first_step: int | None = None
    last_step: int | None = None
    exit_code: int | None = None
    at_fault: str | None = None
    why: str = ""

    @classmethod
    def of(cls, record: Any) -> Entry:
        """From a line.

        Raises:
            TypeError, ValueError, LookupError: it is none.
        """
        fields = {name: record.get(name) for name in cls.__dataclass_fields__}
        whole = ("began", "ended", "first_step", "last_step", "exit_code")
        numbers = {name: None if fields[name] is None else int(fields[name]) for name in whole}
        fields |= {"job": str(record["job"]), "attempt": int(record["attempt"]), **numbers}
        texts = {name: str(fields[name] or "") for name in ("nodes", "why")}
        return cls(**fields | texts)


def entries(run: Run) -> list[Entry]:
    """The attempts that have ended, in order of their ends; other lines are passed by."""
    found: dict[tuple[str, int], Entry] = {}
    with contextlib.suppress(OSError):
        for line in run.attempts.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError):
                entry = Entry.of(json.loads(line))
                # The ranks of a node that was taken for dead may end after the next attempt.
                found.pop((entry.job, entry.attempt), None)
                found[entry.job, entry.attempt] = entry
    return list(found.values())


def enter(run: Run, *, but: Attempt | None = None) -> None:
    """Add the attempts that have no line yet.

    Args:
        run: the run.
        but: the attempt that goes on.

    Raises:
        OSError: the file cannot be written.
    """
    known = {(entry.job, entry.attempt) for entry in entries(run)}
    lines = ""
    for attempt in every_attempt(run):
        assert attempt.job is not None
        if attempt != but and (attempt.job, attempt.number) not in known:
            lines += json.dumps(asdict(_entry(attempt))) + "\n"
    if lines:
        with run.attempts.open("a", encoding="utf-8") as file:
            file.write(lines)


def _entry(attempt: Attempt) -> Entry:
    assert attempt.job is not None
    said = attempt.heard()
    outcome = Outcome.read(attempt.ended) or said
    began = attempt.beginning()
    last = progress(attempt.run)
    step = last.step if last else 0
    first = None
    if began.done is not None and step > began.done:
        first = began.done + 1
    return Entry(
        job=attempt.job,
        attempt=attempt.number,
        nodes=began.nodes,
        began=began.when,
        ended=int(time.time()) if outcome else None,
        first_step=first,
        last_step=step,
        exit_code=outcome.code if outcome else None,
        at_fault=said.at_fault if said else None,
        why=outcome.why if outcome else _SILENT,
    )
