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
from hlrlhf.slurm.answers import UNKNOWN


def cancel(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Names, directories or job ids."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Cancel every run that has not ended.")
    ] = False,
) -> None:
    """Stop runs.

    A Slurm job is cancelled, a run on this machine is asked to save and stop.
    """
    if bool(names) == everything:
        raise typer.BadParameter("give the runs to cancel, or --all")
    clusters: dict[str | None, dict[str, str]] = {}
    failed = False
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
                _say(run.name, "asked to stop" if run.terminate() else "has ended already")
            else:
                clusters.setdefault(job.cluster, {})[job.id] = run.name
        except runs.RunError as error:
            _say("hlrlhf", str(error))
            failed = True
    for cluster, jobs in clusters.items():
        try:
            client.cancel(list(jobs), cluster)
        except client.Rejected as error:
            _say("hlrlhf", str(error))
            failed = True
        else:
            for job_id, name in jobs.items():
                _say(name, f"asked Slurm to cancel job {job_id}")
    if failed:
        raise typer.Exit(1)


def _say(who: str, what: str) -> None:
    print(f"{who}: {printable(shortened(what))}", file=sys.stderr)
