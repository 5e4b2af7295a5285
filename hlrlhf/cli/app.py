"""The commands, each a module that is imported when its command is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hlrlhf import __version__

# The modules of this package with a function of the same name, in the order of a run's life.
COMMANDS = ("presets", "show", "render", "submit", "resume", "status", "logs", "cancel", "forget")

TAKE_SETTINGS = ("show", "render", "submit")
EPILOG = (
    "Settings come from the preset, the files, HL_* variables and --set; `hlrlhf show` lists all "
    "of them with their values, docs/settings.md with their meaning."
)


class _Commands(TyperGroup):
    """The commands by name; a module is imported when its command is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"hlrlhf.cli.{cmd_name}")
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        epilog = EPILOG if cmd_name in TAKE_SETTINGS else None
        single.command(cmd_name, epilog=epilog)(getattr(module, cmd_name))
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
