"""The command line: one module per command, imported when it is called.

Data goes to standard output and words to standard error. Exit codes: 0 done, 1 the run or job
failed, 2 bad usage or settings, 3 Slurm could not be reached.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hlrlhf import __version__

# The modules of this package with a function of the same name, in the order of a run's life.
COMMANDS = ("presets", "show", "render", "submit", "status", "logs", "cancel")


class _Commands(TyperGroup):
    """The commands by name; a module is imported when its command is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"{__name__}.{cmd_name}")
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(cmd_name)(getattr(module, cmd_name))
        return typer.main.get_command(single)


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"hlrlhf {__version__}")
        raise typer.Exit


@app.callback(help="RLHF (PPO) on a Slurm cluster, or on this machine, from one command.")
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line of this process and end it."""
    try:
        app()
    except Exception as error:
        code, lines = _explain(error)
        for line in lines:
            print(f"hlrlhf: {line}", file=sys.stderr)
        sys.exit(code)


def _explain(error: Exception) -> tuple[int, Iterator[str]]:
    """The exit code and the words for an error; what we did not foresee is raised again."""
    from hlrlhf.runs import RunError
    from hlrlhf.settings.errors import SettingsError
    from hlrlhf.slurm.client import Rejected, SlurmError

    if isinstance(error, SettingsError):
        return 2, (str(problem) for problem in error.problems)
    for kind, code in ((RunError, 2), (Rejected, 1), (SlurmError, 3)):
        if isinstance(error, kind):
            return code, iter(str(error).splitlines())
    raise error
