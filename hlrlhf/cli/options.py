"""The options by which every command that needs settings takes them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from hlrlhf.settings.layers import Resolved, resolve

Preset = Annotated[
    str | None,
    typer.Option(
        "--preset", metavar="NAME", help="A preset's name (see `hlrlhf presets`), or a path to one."
    ),
]
Config = Annotated[
    list[Path] | None,
    typer.Option(
        "--config", metavar="FILE", help="YAML file of settings, over the preset. Repeatable."
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="One setting, over everything else. Repeatable."
    ),
]
Template = Annotated[
    str | None,
    typer.Option(
        "--template", metavar="FILE", help="Site template; short for --set slurm.template=FILE."
    ),
]


def resolved(
    preset: str | None,
    config: list[Path] | None,
    flags: list[str] | None,
    template: str | None,
    *,
    allow_missing: bool = False,
) -> Resolved:
    """The settings of this call, see `hlrlhf.settings.layers.resolve`."""
    every = [*(flags or []), *([f"slurm.template={template}"] if template is not None else [])]
    return resolve(preset, config or [], os.environ, every, allow_missing=allow_missing)
