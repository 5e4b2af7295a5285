"""The options by which every command that needs settings takes them."""

from __future__ import annotations

import os
import re
import time
from datetime import datetime
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
        "--template",
        metavar="FILE",
        help="Site template, which is code that runs on this machine: use only one that you trust. "
        "Short for --set slurm.template=FILE.",
    ),
]


def moment(text: str) -> float:
    """A point in time, in Unix seconds: so long ago (``90m``, ``12h``, ``7d``), or a date.

    Raises:
        BadParameter: it is neither.
    """
    if match := re.fullmatch(r"([0-9]{1,6})([mhdw])", text):
        unit = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}[match[2]]
        return time.time() - int(match[1]) * unit
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError) as error:
        raise typer.BadParameter(
            f"{text!r} is neither a time ago, such as 90m, 12h, 7d or 2w, nor a date, such as "
            "2026-11-30 or 2026-11-30T18:00"
        ) from error


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
