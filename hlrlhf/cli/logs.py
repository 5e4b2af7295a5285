"""`hlrlhf logs`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hlrlhf import runs
from hlrlhf.jobs import states
from hlrlhf.settings.errors import printable
from hlrlhf.slurm.answers import State
from hlrlhf.slurm.client import SlurmError

_CHUNK = 1 << 20


def logs(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Names, directories or job ids."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="The logs of every run that was submitted.")
    ] = False,
    follow: Annotated[
        bool,
        typer.Option("--follow", "-f", help="Go on, across requeues, until the jobs have ended."),
    ] = False,
) -> None:
    """Print the logs of runs.

    The ranks' of every attempt, in order, then the batch shell's with what Slurm says.
    """
    if bool(names) == everything:
        raise typer.BadParameter("give the runs whose logs to print, or --all")
    if names:
        chosen = [runs.find(name) for name in names]
    else:
        chosen = [run for run in runs.every() if run.job_file.exists()]
    log = _Log(chosen)
    if not follow:
        log.copy()
        log.say_where_there_is_none()
        return
    try:
        for seen in states.poll(chosen, meanwhile=log.copy):
            # In this order: what is written before the end is copied after it was seen.
            log.copy()
            if all(state.ended for state in seen):
                for run, state in zip(chosen, seen, strict=True):
                    why = f" ({state.reason})" if state.reason else ""
                    print(f"{run.name}: {state.state}{printable(why)}", file=sys.stderr)
                log.say_where_there_is_none()
                return
    except KeyboardInterrupt:
        return


class _Log:
    """Runs' log files, and how much of each was copied to standard output."""

    def __init__(self, chosen: list[runs.Run]):
        self._jobs: list[tuple[runs.Run, runs.Job]] = []
        for run in chosen:
            job = run.job()
            if job is None:
                raise runs.RunError(f"{run.name}: was not submitted, so it has no log")
            self._jobs.append((run, job))
        self._last: Path | None = None
        self.copied: dict[Path, int] = {}

    def copy(self) -> None:
        """Copy what is new."""
        for run, job in self._jobs:
            for path in runs.log_files(run, job):
                with path.open("rb") as file:
                    file.seek(self.copied.get(path, 0))
                    while chunk := file.read(_CHUNK):
                        if path != self._last:
                            self._head(path, runs.Attempt(run, job.log_id, 0).log)
                        sys.stdout.buffer.write(chunk)
                        self.copied[path] = file.tell()
        sys.stdout.flush()

    def say_where_there_is_none(self) -> None:
        """Say on standard error of which runs nothing was copied, and where to look instead."""
        mute = [
            (run, job)
            for run, job in self._jobs
            if not self.copied.keys() & set(runs.log_files(run, job))
        ]
        if not mute:
            return
        try:
            seen = states.look([run for run, _ in mute])
        except SlurmError as error:
            seen = [State(reason=str(error))] * len(mute)
        for (run, job), state in zip(mute, seen, strict=True):
            words = f"no log yet: {state.state}"
            if state.ended:
                words = f"ended without a log: {state.state}"
            if state.reason:
                words += f" ({state.reason})"
            if state.ended and job.kind == "slurm":
                words += f"; `sacct -j {job.id}` and the node's own log of slurmd may say more"
            print(f"{run.name}: {printable(words)}", file=sys.stderr)

    def _head(self, path: Path, usual: Path) -> None:
        """Say on standard error which file follows, unless it is one run's `usual` first one."""
        sys.stdout.flush()
        if self._last is not None or len(self._jobs) > 1 or path.name != usual.name:
            print(f"==> {path} <==", file=sys.stderr, flush=True)
        self._last = path
