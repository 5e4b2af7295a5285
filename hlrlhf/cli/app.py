"""The commands, each a module that is imported when its command is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from hlrlhf import __version__

# The modules of this package with a function of the same name, in the order of a run's life.
COMMANDS = ("presets", "show", "render", "submit", "status", "logs", "cancel")

TAKE_SETTINGS = ("show", "render", "submit")


class _WithSettings(TyperCommand):
    """A command whose help ends in the list of settings, made from the schema when asked for."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from hlrlhf.settings.names import settings_by_name

        with formatter.section(
            "Settings (--set NAME=VALUE, a file's NAME: VALUE, or the variable)"
        ):
            formatter.write_dl(
                [(f"{one.name} {one.env}", one.description) for one in settings_by_name().values()],
                col_max=24,
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
        kind = _WithSettings if cmd_name in TAKE_SETTINGS else TyperCommand
        single.command(cmd_name, cls=kind)(getattr(module, cmd_name))
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
