"""`hlrlhf logs`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hlrlhf import runs
from hlrlhf.slurm import states

_CHUNK = 1 << 20


def logs(
    name: Annotated[str, typer.Argument(metavar="RUN", help="Name, directory or job id.")],
    follow: Annotated[
        bool,
        typer.Option("--follow", "-f", help="Go on, across requeues, until the job has ended."),
    ] = False,
) -> None:
    """Print a run's log: the ranks' of every attempt, in order, then the batch shell's."""
    run = runs.find(name)
    job = run.job()
    if job is None:
        raise runs.RunError(f"{run.name}: was not submitted, so it has no log")
    log = _Log(run, job)
    if not follow:
        log.copy()
        if not log.copied:
            print(f"{run.name}: no log yet", file=sys.stderr)
        return
    try:
        for (state,) in states.poll([run], meanwhile=log.copy):
            # In this order: what is written before the end is copied after it was seen.
            log.copy()
            if state.ended:
                print(f"{run.name}: {state.state}", file=sys.stderr)
                return
    except KeyboardInterrupt:
        return


class _Log:
    """A run's log files, and how much of each was copied to standard output."""

    def __init__(self, run: runs.Run, job: runs.Job):
        self._run = run
        self._job = job
        self._last: Path | None = None
        self.copied: dict[Path, int] = {}

    def copy(self) -> None:
        """Copy what is new."""
        for path in runs.log_files(self._run, self._job):
            with path.open("rb") as file:
                file.seek(self.copied.get(path, 0))
                while chunk := file.read(_CHUNK):
                    if path != self._last:
                        self._head(path)
                    sys.stdout.buffer.write(chunk)
                    self.copied[path] = file.tell()
        sys.stdout.flush()

    def _head(self, path: Path) -> None:
        """Say on standard error which file follows, when there is more than one."""
        sys.stdout.flush()
        if self._last is not None or path.name != f"{self._job.log_id}.0.log":
            print(f"==> {path} <==", file=sys.stderr, flush=True)
        self._last = path
