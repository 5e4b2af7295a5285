"""`hlrlhf forget`"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from hlrlhf import runs
from hlrlhf.cli import options
from hlrlhf.jobs import states


def forget(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Names, directories or job ids."),
    ] = None,
    before: Annotated[
        str | None,
        typer.Option(
            metavar="WHEN", help="All runs from before a date, or longer ago than 12h, 7d, 2w."
        ),
    ] = None,
) -> None:
    """Take old runs out of the list.

    Their directories stay, and so do runs that wait or run.
    """
    if bool(names) == (before is not None):
        raise typer.BadParameter("give the runs to forget, or --before")
    if before is not None:
        limit = options.moment(before)
        chosen = [run for run in runs.every() if run.made_at < limit]
    else:
        chosen = [runs.find(name) for name in names or []]
    live = set(states.live(chosen))
    forgotten = 0
    for run in chosen:
        why = "waits or runs; cancel it first" if run in live else _unreadable(run)
        if why is None:
            run.forget()
            forgotten += 1
        else:
            print(f"{run.name}: kept: {why}", file=sys.stderr)
    print(f"forgotten: {forgotten}, kept: {len(chosen) - forgotten}", file=sys.stderr)
    if names and forgotten < len(chosen):
        raise typer.Exit(1)


def _unreadable(run: runs.Run) -> str | None:
    """Why it cannot be told whether a run is live, or None."""
    try:
        run.job()
    except runs.RunError as error:
        return str(error)
    return None
