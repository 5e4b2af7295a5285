"""`hlrlhf status`"""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
import time
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from hlrlhf import runs
from hlrlhf.cli import options
from hlrlhf.cli.table import columns
from hlrlhf.jobs import states
from hlrlhf.runs import ledger
from hlrlhf.slurm.answers import State

HEAD = (
    "RUN",
    "JOB",
    "STATE",
    "STEP",
    "AGE",
    "SAVED",
    "REWARD",
    "ELAPSED",
    "LEFT",
    "RESTARTS",
    "NODES",
)
# What goes first where a terminal is too narrow for all.
_DISPENSABLE = ("NODES", "SAVED", "RESTARTS", "ELAPSED", "LEFT", "REWARD", "JOB", "AGE", "STEP")
_NEWEST = 20


def status(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Names, directories or job ids; all runs if none."),
    ] = None,
    running: Annotated[
        bool, typer.Option("--running", help="Those that wait or run, alone.")
    ] = False,
    failed: Annotated[
        bool, typer.Option("--failed", help="Those that ended without success, alone.")
    ] = False,
    since: Annotated[
        str | None,
        typer.Option(metavar="WHEN", help="Those made since a date, or at most 12h, 7d ago."),
    ] = None,
    newest: Annotated[
        int | None,
        typer.Option(
            "--newest",
            "-n",
            min=0,
            help=f"At most so many that have ended; 0 for all. {_NEWEST} if nothing is asked for.",
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Look again every few seconds until all have ended.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """Show what became of the runs.

    The newest come first; what waits or runs is never left out.
    """
    if watch and as_json:
        raise typer.BadParameter("--watch and --json do not go together")
    known: dict[runs.Run, State] | None = None
    if names:
        if running or failed or since or newest is not None:
            raise typer.BadParameter("give runs, or --running, --failed, --since and --newest")
        chosen = [runs.find(name) for name in names]
    else:
        limit = options.moment(since) if since else 0
        made = [run for run in reversed(runs.every()) if run.made_at >= limit]
        if newest is None and not (running or failed or since):
            newest = _NEWEST
        if running:
            known = states.first_and_live(made, 0)
        elif failed:
            known = _newest_failed(made, newest)
        else:
            known = states.first_and_live(made, newest or len(made))
            _say_left_out(len(made) - len(known))
        chosen = list(known)
    if not watch:
        if known is None:
            known = dict(zip(chosen, states.look(chosen), strict=True))
        _show([_Line.of(run, known[run]) for run in chosen], as_json)
    else:
        try:
            _watch(chosen)
        except KeyboardInterrupt:
            return


def _newest_failed(made: list[runs.Run], newest: int | None) -> dict[runs.Run, State]:
    """The first so many that ended without success; says how many of those it leaves out."""
    failed = [
        (run, state)
        for run, state in zip(made, states.look(made), strict=True)
        if state.ended and state.state != "COMPLETED"
    ]
    shown = failed[: newest or None]
    _say_left_out(len(failed) - len(shown))
    return dict(shown)


def _say_left_out(number: int) -> None:
    if number:
        print(
            f"{number} older runs are left out; -n 0 shows them, hlrlhf forget drops them",
            file=sys.stderr,
        )


@dataclass(frozen=True)
class _Line:
    """One run, as it is shown. `job` is None too when its record cannot be read."""

    run: runs.Run
    job: runs.Job | None
    state: State
    progress: runs.Progress | None
    saved: runs.Saved | None = None
    before: str = ""

    @classmethod
    def of(cls, run: runs.Run, state: State) -> _Line:
        try:
            job = run.job()
        except runs.RunError:
            job = None
        before = ""
        if not state.ended and (ends := ledger.entries(run)):
            before = ends[-1].why
        return cls(run, job, state, runs.progress(run), runs.saved(run), before)

    @property
    def seconds_left(self) -> float | None:
        """To the end of the run."""
        return self.progress.seconds_left if self.progress and self._steps else None

    @property
    def step_age(self) -> float | None:
        """Seconds since the last step, by which a run that hangs shows."""
        return self._since(self.progress.written) if self.progress and self._steps else None

    @staticmethod
    def _since(written: float) -> float:
        return max(0, time.time() - written)

    @property
    def _steps(self) -> bool:
        """Whether it runs, and this attempt has taken a step."""
        began = self.state.started or 0
        if self.progress is None or self.state.state != "RUNNING":
            return False
        return self.progress.written >= began and self.progress.attempt >= self.state.restarts

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
            "step_age": self.step_age,
            "saved_step": self.saved.step if self.saved else None,
            "saved_age": self._since(self.saved.written) if self.saved else None,
            "attempt_before": self.before or None,
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
        texts = (
            self.run.name,
            self.job.log_id if self.job else "-",
            state.state,
            step,
            _time(self.step_age),
            str(self.saved.step) if self.saved else "-",
            "-" if reward is None else f"{reward:.3f}",
            _time(state.elapsed),
            _time(self.seconds_left),
            str(state.restarts),
            state.node_list or "-",
        )
        return tuple(map(_plain, texts))

    @property
    def why(self) -> str:
        """Why it is in its state; may be empty."""
        why = self.state.reason
        if self.state.ended and self.state.exit_code:
            why = f"{why} (exit code {self.state.exit_code})".lstrip()
        before = f"the attempt before: {self.before}" if self.before else ""
        return _plain("; ".join(filter(None, [why, before])))


def _plain(text: str) -> str:
    """Without what could steer the terminal: names and reasons come from files and from Slurm."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _show(lines: list[_Line], as_json: bool) -> None:
    if as_json:
        print(json.dumps([line.as_dict() for line in lines], indent=2))
    elif not lines:
        print("no runs", file=sys.stderr)
    elif sys.stdout.isatty():
        print(_fitted(lines, shutil.get_terminal_size().columns))
    else:
        rows = [(*HEAD, "WHY"), *((*line.as_row(), line.why or "-") for line in lines)]
        print(columns(rows))


def _watch(chosen: list[runs.Run]) -> None:
    """Show the runs until all have ended: in place on a terminal, else whenever a line changes."""
    looks = (
        [_Line.of(*pair) for pair in zip(chosen, seen, strict=True)] for seen in states.poll(chosen)
    )
    if sys.stdout.isatty():
        from rich.live import Live
        from rich.text import Text

        with Live(auto_refresh=False) as live:
            for lines in looks:
                width, height = shutil.get_terminal_size()
                # The newest stay in sight: what is too high is cut below.
                fitted = _fitted(lines, width).split("\n")[: height - 1]
                text = Text("\n".join(fitted), no_wrap=True, overflow="fold")
                live.update(text, refresh=True)
                if all(line.state.ended for line in lines):
                    return
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


def _fitted(lines: list[_Line], width: int) -> str:
    """As many columns as `width` has room for, names whole, and under each run why it is so."""
    rows = [HEAD, *(line.as_row() for line in lines)]
    kept = list(HEAD)
    for name in ("", *_DISPENSABLE):
        kept = [other for other in kept if other != name]
        places = [HEAD.index(other) for other in kept]
        table = columns([[row[place] for place in places] for row in rows]).split("\n")
        if max(map(len, table)) <= width:
            break
    shown = [table[0]]
    for row, line in zip(table[1:], lines, strict=True):
        shown.append(row)
        shown += textwrap.wrap(
            line.why, width, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
        )
    return "\n".join(shown)


def _time(seconds: float | None) -> str:
    """``H:MM:SS``."""
    if seconds is None:
        return "-"
    minutes, second = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"
