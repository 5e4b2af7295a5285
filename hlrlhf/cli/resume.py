"""`hlrlhf resume`"""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer

from hlrlhf import runs
from hlrlhf.cli.submit import place_for, say, tell
from hlrlhf.jobs.start import resumable
from hlrlhf.settings import hints
from hlrlhf.slurm.client import Rejected


def resume(
    name: Annotated[str, typer.Argument(metavar="RUN", help="Name, directory or job id.")],
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for the job's end, and end with its exit code.")
    ] = False,
    local: Annotated[
        bool,
        typer.Option("--local", help="Go on on this machine, without Slurm, until the run ends."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Go on with a run that has ended early.

    It gets a new job in the same directory, and goes on from its last whole checkpoint, or from the
    beginning if it has none, with the settings in its settings.yaml. Exit codes are submit's.
    """
    if wait and local:
        raise typer.BadParameter("--local waits anyway")
    run = runs.find(name)
    place = place_for(local)
    with run.claimed():
        resolved = resumable(run, os.environ)
        if resolved is None:
            say(f"run {run.name} is complete; nothing is left to do")
            if as_json:
                print(json.dumps({"run": run.name, "directory": str(run.directory), "job": None}))
            return
        place.check(resolved)
        if local:
            hints.check_here(resolved, [])
        try:
            started = place.resume(resolved, run, os.environ)
        except Rejected:
            # There may be too few other nodes.
            every = resumable(run, os.environ, without_fault=False)
            if every is None or every.settings == resolved.settings:
                raise
            resolved = every
            started = place.resume(resolved, run, os.environ)
        tell(started, as_json=as_json)
        if local:
            raise typer.Exit(place.finish(resolved, started, os.environ, say))
    say(f"follow it: hlrlhf logs -f {run.name}")
    if wait:
        raise typer.Exit(place.finish(resolved, started, os.environ, say))
