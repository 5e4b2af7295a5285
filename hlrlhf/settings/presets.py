"""Finding presets: ours, and a user's own on a search path."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from hlrlhf.settings.errors import Problem, SettingsError
from hlrlhf.settings.names import nearest

SEARCH_PATH = "HLRLHF_PRESET_PATH"


def folders(environ: Mapping[str, str]) -> list[Path]:
    """The folders that are searched, a user's (``HLRLHF_PRESET_PATH``) before ours."""
    own = [Path(part) for part in environ.get(SEARCH_PATH, "").split(os.pathsep) if part]
    return [*own, Path(str(resources.files("hlrlhf.presets")))]


def available(environ: Mapping[str, str]) -> dict[str, Path]:
    """Every preset by name; of two with one name the first on the path wins.

    Raises:
        SettingsError: a folder of the search path is no place to look in.
    """
    found: dict[str, Path] = {}
    for folder in folders(environ):
        try:
            paths = sorted(folder.glob("*.yaml"))
        except OSError as error:
            raise SettingsError([Problem(SEARCH_PATH, f"{folder}: {error.strerror}")]) from error
        for path in paths:
            found.setdefault(path.stem, path)
    return found


def summary(path: Path) -> str:
    """The first comment line of a preset, or an empty string."""
    try:
        first = path.read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, UnicodeDecodeError) as error:
        return f"cannot be read: {error}"
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def find(preset: str, environ: Mapping[str, str]) -> Path:
    """The file of a preset, given by name or as a path to a ``.yaml`` file.

    Raises:
        SettingsError: there is none.
    """
    if preset.endswith((".yaml", ".yml")) or os.sep in preset:
        return Path(preset)
    known = available(environ)
    if preset not in known:
        raise SettingsError(
            [
                Problem(
                    f"--preset {preset}",
                    f"no such preset; there are {', '.join(known)}, a path ending in .yaml, or a "
                    f"file in a folder of {SEARCH_PATH}{nearest(preset, known)}",
                )
            ]
        )
    return known[preset]
