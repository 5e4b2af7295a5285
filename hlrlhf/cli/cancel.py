"""`hlrlhf cancel`"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from hlrlhf import runs
from hlrlhf.errors import shortened
from hlrlhf.jobs import states
from hlrlhf.settings.errors import printable
from hlrlhf.slurm import client
from hlrlhf.slurm.answers import STOPPED_EARLY, UNKNOWN, State


def cancel(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Names, directories or job ids."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Cancel every run that has not ended.")
    ] = False,
    save: Annotated[
        bool,
        typer.Option("--save", help="Let runs end or give up their step and save; wait for it."),
    ] = False,
) -> None:
    """Stop runs.

    A Slurm job is cancelled, a run on this machine is asked to save and stop. With --save a job
    that runs is asked too, and can go on later: hlrlhf resume RUN.
    """
    if bool(names) == everything:
        raise typer.BadParameter("give the runs to cancel, or --all")
    clusters: dict[str | None, dict[str, str]] = {}
    asked: list[runs.Run] = []
    failed = unreachable = False
    chosen = [] if names else runs.every()
    for name in names or []:
        try:
            chosen.append(runs.find(name))
        except runs.RunError as error:
            # A name that is wrong must not keep the others running.
            _say("hlrlhf", str(error))
            failed = True
    if failed and not chosen:
        raise typer.Exit(2)
    chosen = list(dict.fromkeys(chosen))
    for run, state in zip(chosen, states.look(chosen), strict=True):
        try:
            job = run.job()
            if job is None or state.ended:
                if not everything:
                    _say(run.name, f"has ended already: {state.state}" if job else state.reason)
            elif state.state == UNKNOWN:
                # The id may be that of another job or process since, which is not ours to end.
                if not everything:
                    _say(run.name, f"was not cancelled: {state.reason}")
                    failed = True
            elif job.kind == "local":
                if run.terminate():
                    _say(run.name, "asked to stop")
                    asked.append(run)
                else:
                    _say(run.name, "has ended already")
            elif save and state.state in ("SUSPENDED", "STOPPED"):
                _say(
                    run.name,
                    f"cannot save: job {job.id} is {state.state}; scontrol resume {job.id}",
                )
                failed = True
            elif save and _trains(run, job, state):
                client.signal(job.id, "USR1", job.cluster)
                _say(run.name, f"asked job {job.id} to save and stop")
                asked.append(run)
            else:
                clusters.setdefault(job.cluster, {})[job.id] = run.name
        except (runs.RunError, client.Rejected, client.SlurmError) as error:
            # One cluster that is out of reach must not keep the others' jobs running.
            _say("hlrlhf", str(error))
            failed = True
            unreachable |= isinstance(error, client.SlurmError)
    for cluster, jobs in clusters.items():
        try:
            client.cancel(list(jobs), cluster)
        except (client.Rejected, client.SlurmError) as error:
            _say("hlrlhf", str(error))
            failed = True
            unreachable |= isinstance(error, client.SlurmError)
        else:
            for job_id, name in jobs.items():
                _say(name, f"asked Slurm to cancel job {job_id}")
    if save:
        failed |= not _all_saved(asked)
    if failed:
        raise typer.Exit(client.SlurmError.exit_code if unreachable else 1)


def _all_saved(asked: list[runs.Run]) -> bool:
    """Wait for the ends of runs, say how each was; whether all have saved."""
    saved = True
    if asked:
        for found in states.poll(asked):
            if all(state.ended for state in found):
                break
        for run, state in zip(asked, found, strict=True):
            _say(run.name, f"{state.state}: {state.reason}" if state.reason else state.state)
            saved &= state.state in (STOPPED_EARLY, "COMPLETED")
    return saved


def _trains(run: runs.Run, job: runs.Job, state: State) -> bool:
    """Whether its ranks can be asked; what has not begun to train has nothing to save."""
    begun = runs.Attempt(run, job.log_id, state.restarts).has_begun
    return begun and state.state in ("RUNNING", "COMPLETING")


def _say(who: str, what: str) -> None:
    print(f"{who}: {printable(shortened(what))}", file=sys.stderr)
