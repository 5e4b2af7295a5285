"""`hlrlhf forget`"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from hlrlhf import runs
from hlrlhf.cli import options
from hlrlhf.slurm import states


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
    kept = set(states.live(chosen))
    for run in chosen:
        if run not in kept:
            run.forget()
        elif names:
            _say(f"{run.name}: waits or runs; cancel it first: hlrlhf cancel {run.name}")
    _say(f"forgot {len(chosen) - len(kept)} runs" + (f", kept {len(kept)}" if kept else ""))
    if names and kept:
        raise typer.Exit(1)


def _say(words: str) -> None:
    print(words, file=sys.stderr)
