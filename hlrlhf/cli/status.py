"""`hlrlhf status`"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hlrlhf import runs
from hlrlhf.cli.table import columns
from hlrlhf.slurm import states
from hlrlhf.slurm.answers import State

if TYPE_CHECKING:
    from rich.table import Table

HEAD = ("RUN", "JOB", "STATE", "STEP", "REWARD", "ELAPSED", "LEFT", "RESTARTS", "NODES", "WHY")


def status(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Names, directories or job ids; all runs if none."),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Look again every few seconds until all have ended.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """Show what became of the runs: their jobs' states, and how far they have got."""
    if watch and as_json:
        raise typer.BadParameter("--watch and --json do not go together")
    chosen = [runs.find(name) for name in names] if names else runs.every()
    if not watch:
        _show([_Line.of(*pair) for pair in zip(chosen, states.look(chosen), strict=True)], as_json)
    else:
        try:
            _watch(chosen)
        except KeyboardInterrupt:
            return


@dataclass(frozen=True)
class _Line:
    """One run, as it is shown. `job` is None too when its record cannot be read."""

    run: runs.Run
    job: runs.Job | None
    state: State
    progress: runs.Progress | None

    @classmethod
    def of(cls, run: runs.Run, state: State) -> _Line:
        progress = runs.progress(run)
        # After a requeue, what the attempt before had reached no longer counts.
        if progress and not state.ended and progress.attempt < state.restarts:
            progress = None
        try:
            job = run.job()
        except runs.RunError:
            job = None
        return cls(run, job, state, progress)

    @property
    def seconds_left(self) -> float | None:
        running = self.state.state == "RUNNING"
        return self.progress.seconds_left if self.progress and running else None

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        progress = self.progress
        return {
            "name": self.run.name,
            "directory": str(self.run.directory),
            "kind": self.job.kind if self.job else None,
            "id": self.job.id if self.job else None,
            "cluster": self.job.cluster if self.job else None,
            **asdict(self.state),
            "ended": self.state.ended,
            "step": progress.step if progress else None,
            "total_steps": progress.total_steps if progress else None,
            "reward": progress.reward if progress else None,
            "seconds_left": self.seconds_left,
        }

    def as_row(self) -> tuple[str, ...]:
        """The texts under `HEAD`."""
        state, progress = self.state, self.progress
        step = "-"
        if progress:
            total = "?" if progress.total_steps is None else progress.total_steps
            step = f"{progress.step}/{total}"
        reward = progress.reward if progress else None
        job = self.job.log_id if self.job else "-"
        why = state.reason
        if state.ended and state.exit_code:
            why = f"{why} (exit code {state.exit_code})".lstrip()
        texts = (
            self.run.name,
            job,
            state.state,
            step,
            "-" if reward is None else f"{reward:.3f}",
            _time(state.elapsed),
            _time(self.seconds_left),
            str(state.restarts),
            state.node_list or "-",
            why or "-",
        )
        # Names and reasons come from files and from Slurm; none may steer the terminal.
        return tuple("".join(c if c.isprintable() else "?" for c in text) for text in texts)


def _show(lines: list[_Line], as_json: bool) -> None:
    if as_json:
        print(json.dumps([line.as_dict() for line in lines], indent=2))
    elif not lines:
        print("no runs", file=sys.stderr)
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(_table(lines))
    else:
        print(columns([HEAD, *(line.as_row() for line in lines)]))


def _watch(chosen: list[runs.Run]) -> None:
    """Show the runs until all have ended: in place on a terminal, else whenever a line changes."""
    looks = (
        [_Line.of(*pair) for pair in zip(chosen, seen, strict=True)] for seen in states.poll(chosen)
    )
    if sys.stdout.isatty():
        from rich.live import Live

        with Live(auto_refresh=False) as live:
            for lines in looks:
                live.update(_table(lines), refresh=True)
                if all(line.state.ended for line in lines):
                    return
    shown = None
    for lines in looks:
        # Elapsed time alone is no news.
        news = [(line.state.state, line.progress) for line in lines]
        if news != shown:
            print(time.strftime("%H:%M:%S"))
            _show(lines, as_json=False)
            sys.stdout.flush()
        shown = news
        if all(line.state.ended for line in lines):
            return


def _table(lines: list[_Line]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(*HEAD, box=None, header_style="bold")
    for line in lines:
        table.add_row(*(Text(text) for text in line.as_row()))
    return table


def _time(seconds: float | None) -> str:
    """``H:MM:SS``."""
    if seconds is None:
        return "-"
    minutes, second = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"
