"""Starting a run: settings → directory → job. Nothing here prints; commands do.

Slurm (`hlrlhf.jobs.batch`) and this machine (`hlrlhf.jobs.local`) are two places to run at, behind
one interface.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hlrlhf.jobs import states
from hlrlhf.runs import Job, Run, RunError, attempts, create, ledger
from hlrlhf.settings import layers
from hlrlhf.settings.layers import Resolved
from hlrlhf.slurm import client


@dataclass(frozen=True)
class Started:
    """A run that has a job.

    Attributes:
        run: with its directory.
        job: as it was recorded there.
        clock_ahead: seconds by which this machine's clock is ahead of Slurm's.
        before: the last job of a run that goes on.
    """

    run: Run
    job: Job
    clock_ahead: int = 0
    before: Job | None = None


class Place(Protocol):
    """Where runs can go; modules are places."""

    def check(self, resolved: Resolved) -> None:
        """Refuse what cannot run there.

        Raises:
            SettingsError: naming the settings.
        """

    def start(self, resolved: Resolved, environ: Mapping[str, str]) -> Started:
        """Make the run's directory and its job; where that fails, nothing is left.

        Raises:
            RunError: the directory cannot be made.
            SettingsError: the settings make no script.
            Rejected, SlurmError: Slurm refused the job, or could not be reached.
        """

    def resume(self, resolved: Resolved, run: Run, environ: Mapping[str, str]) -> Started:
        """Give a run that has ended another job; where that fails, it keeps the last one.

        Raises:
            RunError, SettingsError, Rejected, SlurmError: as `start`.
        """

    def finish(
        self,
        resolved: Resolved,
        started: Started,
        environ: Mapping[str, str],
        say: Callable[[str], None],
    ) -> int:
        """See the run to its end; its exit code.

        Args:
            resolved: the settings.
            started: by `start`.
            environ: the caller's environment.
            say: gets a sentence when there is news.
        """


def directory(resolved: Resolved) -> Path:
    """Where the run goes if its name is still free."""
    return Path(resolved.settings.base_out_path, resolved.settings.tag)


def resumable(
    run: Run, environ: Mapping[str, str], *, without_fault: bool = True
) -> Resolved | None:
    """The settings with which a run can go on; None for one that is complete.

    They are its own, but that it does not wait again for the jobs that it has waited for.

    Args:
        run: the run.
        environ: the caller's environment.
        without_fault: leave out the node that was at fault when its last attempt failed.

    Raises:
        RunError: it has not ended.
        SettingsError: its ``settings.yaml`` cannot be used.
        SlurmError: Slurm cannot be asked whether it has ended.
    """
    own = layers.load(run.settings_file).slurm
    job = run.job()
    flags = []
    if job is None:
        # A submission to which Slurm gave no answer leaves no record.
        if jobs := client.named(run.name, environ):
            raise RunError(
                f"{run.name}: job {jobs[0]} has its name and has not ended; cancel it first"
            )
    else:
        if states.live([run], environ):
            raise RunError(
                f"{run.name}: job {job.id} has not ended; to stop it first: "
                f"hlrlhf cancel --save {run.name}"
            )
        *_, last = [None, *attempts(run, job).values()]
        if last is not None and last.code == 0:
            return None
        if last is not None and own.dependency and own.dependency in run.script.read_text():
            flags.append("slurm.dependency=")
        *_, entry = [None, *ledger.entries(run)]
        if without_fault and entry and entry.at_fault and not own.nodelist:
            out = filter(None, [own.exclude, entry.at_fault])
            flags.append(f"slurm.exclude={','.join(out)}")
    return layers.resolve(files=[run.settings_file], flags=flags)


def make(resolved: Resolved, environ: Mapping[str, str]) -> Run:
    """A new run directory with its settings.

    Raises:
        RunError: it cannot be made; nothing of it is left.
        SettingsError: no file can hold the settings.
    """
    settings, text = resolved.settings, layers.dump(resolved)
    run = create(Path(settings.base_out_path), settings.tag, environ)
    try:
        run.settings_file.write_text(text, encoding="utf-8")
    except BaseException:
        run.discard()
        raise
    return run
