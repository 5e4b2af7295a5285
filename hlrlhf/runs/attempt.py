"""Attempts at a run: which one is the newest, and how each ended.

Slurm starts a job again after a fault, and it can take a node for dead whose ranks live on. So an
attempt counts as complete only if its ranks say so themselves, and the ranks of an older one find
out that a newer one has begun.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hlrlhf.errors import HlrlhfError
from hlrlhf.runs.directory import Job, Run, RunError

# Known to batch systems as "temporary failure, try again" (EX_TEMPFAIL of sysexits.h).
STOPPED = 75
# The third line of an outcome for which that holds.
PASSING = "may pass"


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        code: 0 complete, `STOPPED` stopped early with its state saved, 128 + n ended by signal n,
            anything else failed.
        why: one line; may be empty.
        may_pass: whether another start may go better.
        at_fault: the node that failed, rather than the run; another one may do better.
    """

    code: int
    why: str = ""
    may_pass: bool = False
    at_fault: str | None = None

    @classmethod
    def read(cls, path: Path) -> Outcome | None:
        """What a file says: code, why, `PASSING` and node, a line each; None if it does not."""
        try:
            if path.is_symlink():  # see `Attempt.say`
                return cls(int(path.readlink().name), "the disk had no room for why")
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            code, why, passing, at_fault = [*lines, "", "", "", ""][:4]
            return cls(int(code), why, passing == PASSING, at_fault or None)
        except (OSError, ValueError):
            return None

    def __str__(self) -> str:
        passing = PASSING if self.may_pass else ""
        lines = [str(self.code), self.why, passing, self.at_fault or ""]
        return "\n".join(lines).rstrip("\n") + "\n"


@dataclass(frozen=True)
class Beginning:
    """What is known of an attempt when it begins; None is "not known".

    Attributes:
        when: in Unix seconds.
        nodes: their names, in Slurm's short form.
        done: steps that earlier attempts have done; not known before its ranks have loaded.
    """

    when: int | None = None
    nodes: str = ""
    done: int | None = None


class SupersededError(HlrlhfError):
    """A newer attempt has begun in the run's directory, which this one must leave alone."""


@dataclass(frozen=True)
class Attempt:
    """One attempt at a run.

    Attributes:
        run: the run.
        job: what the job's files in ``logs/`` begin with, see `Job.log_id`; None for ranks that
            were started by hand.
        number: from 0.
        ends: when the job ends at the latest, in Unix seconds; None where nothing ends it.
    """

    run: Run
    job: str | None
    number: int
    ends: float | None = field(default=None, compare=False)

    @classmethod
    def of(cls, run: Run, environ: Mapping[str, str]) -> Attempt:
        """The attempt of which this process is a rank, as its environment says."""
        # Not a number where a job has no limit.
        ends = environ.get("HLRLHF_ENDS", "")
        return cls(
            run,
            environ.get("HLRLHF_JOB"),
            int(environ.get("HLRLHF_ATTEMPT", "0")),
            float(ends) if ends.isascii() and ends.isdigit() and int(ends) else None,
        )

    @classmethod
    def by_file(cls, run: Run, name: str) -> Attempt | None:
        """The attempt whose file in ``logs/`` has this name; None for other files."""
        match = re.fullmatch(r"([0-9]+|local)\.([0-9]{1,9})\.(log|exit|rank|began)", name, re.ASCII)
        return cls(run, match[1], int(match[2])) if match else None

    @property
    def is_of_slurm(self) -> bool:
        """Whether a batch script runs it, which can start another one."""
        return self.job not in (None, "local")

    @property
    def log(self) -> Path:
        """The file with what the ranks print, unless ``log_file`` names another."""
        return self.run.logs / f"{self.job}.{self.number}.log"

    @property
    def began(self) -> Path:
        """The file with the `Beginning`: time, nodes and steps, a line each."""
        return self.run.logs / f"{self.job}.{self.number}.began"

    @property
    def said(self) -> Path:
        """The file with what the ranks say of their end; the first of them that says it counts."""
        return self.run.logs / f"{self.job}.{self.number}.rank"

    @property
    def ended(self) -> Path:
        """The file with what the script or the launcher says of the end."""
        return self.run.logs / f"{self.job}.{self.number}.exit"

    def say(self, outcome: Outcome) -> None:
        """Leave an outcome in `said`, unless another rank was first."""
        if self.job is None:
            return
        with contextlib.suppress(OSError):
            try:
                with self.said.open("x", encoding="utf-8") as file:
                    file.write(str(outcome))
            except FileExistsError:
                return
            except OSError:
                # A disk that is full has no block left, but room for the name of a link.
                self.said.unlink(missing_ok=True)
                self.said.symlink_to(str(outcome.code))

    def beginning(self) -> Beginning:
        """What was known when it began."""
        try:
            lines = self.began.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return Beginning()
        when, nodes, done = [*lines, "", "", ""][:3]
        number = re.compile("[0-9]{1,18}", re.ASCII).fullmatch
        return Beginning(
            int(when) if number(when) else None, nodes, int(done) if number(done) else None
        )

    def goes_on(self, done: int) -> None:
        """Note, by its first rank, how many steps earlier attempts have done."""
        if self.job is not None:
            # Where it could not be written before, it has no third line either.
            with contextlib.suppress(OSError), self.began.open("r+", encoding="utf-8") as file:
                file.seek(0, os.SEEK_END)
                file.write(f"{done}\n")

    def heard(self) -> Outcome | None:
        """What the ranks have said of their end, if they have."""
        return Outcome.read(self.said)

    def check_job(self) -> None:
        """See that no other job has the directory.

        Raises:
            RunError: one has, or ``job.json`` cannot be understood.
        """
        job = self.run.job()
        if job is None:
            return
        if self.job is None:
            if self._may_run(job):
                raise RunError(
                    f"{self.run.directory}: its job {job.id} runs, or has left no word of its end; "
                    "by hand, take a directory of your own with a copy of settings.yaml"
                )
        elif job.log_id != self.job:
            raise RunError(
                f"{self.run.directory}: is the run of job {job.id}, and this is job {self.job}; "
                "two jobs must not share it: submit anew, with "
                f"hlrlhf submit --config {self.run.settings_file}"
            )

    def begin(self) -> None:
        """Make this attempt the newest one; by its first rank, before it writes anything else.

        Raises:
            RunError: the directory cannot be written.
            SupersededError: a later attempt of the same job has begun already.
        """
        newest = self._newest_attempt()
        if newest is not None and newest.job == self.job and newest.number > self.number:
            self.check()
        try:
            self.run.logs.mkdir(exist_ok=True)
            draft = self._newest.with_suffix(".new")
            draft.write_text(self._name, encoding="ascii")
            draft.replace(self._newest)
        except OSError as error:
            raise RunError(f"{error.filename}: {error.strerror}") from error

    def check(self) -> None:
        """To be called before each write into a place that attempts share.

        Raises:
            SupersededError: another attempt has begun since.
            RunError: the run was deleted.
        """
        if self.job is not None and _is_not_there(self.run.logs):
            words = "was deleted while the run trained in it, which ends"
            raise RunError(f"{self.run.directory}: {words}")
        newest = self._read_newest()
        if newest not in ("", self._name):
            raise SupersededError(
                f"a newer attempt at this run has begun ({newest}), so this one ({self._name}) "
                "ends and writes nothing more"
            )

    @property
    def has_begun(self) -> bool:
        """Whether its ranks have, and those of no other attempt since."""
        return self._read_newest() == self._name

    @property
    def _newest(self) -> Path:
        return self.run.logs / "newest"

    def _may_run(self, job: Job) -> bool:
        if job.kind == "local":
            return self.run.is_held()
        newest = self._newest_attempt()
        return newest is not None and newest.job == job.log_id and not newest.ended.exists()

    def _newest_attempt(self) -> Attempt | None:
        job, _, number = self._read_newest().partition(", attempt ")
        return Attempt(self.run, job, int(number)) if number.isdigit() else None

    def _read_newest(self) -> str:
        """The newest attempt; empty where it cannot be told, which is no reason to end a run."""
        try:
            return self._newest.read_text(encoding="ascii")
        except OSError:
            return ""

    @property
    def _name(self) -> str:
        return f"{self.job or 'by hand'}, attempt {self.number}"


def _is_not_there(folder: Path) -> bool:
    """Whether it does not exist; that it cannot be reached just now does not count."""
    try:
        folder.stat()
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False
