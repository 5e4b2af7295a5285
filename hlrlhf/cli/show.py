"""`hlrlhf show`"""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from hlrlhf.cli import options
from hlrlhf.cli.table import columns
from hlrlhf.settings.errors import SettingsError, printable
from hlrlhf.settings.layers import Resolved
from hlrlhf.settings.names import env_name
from hlrlhf.settings.origins import Origin


def show(
    preset: options.Preset = None,
    config: options.Config = None,
    flags: options.Set = None,
    template: options.Template = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show every setting with its value and origin.

    Piped, one line for each; on a terminal, lines that fit it.
    """
    resolved = options.resolved(preset, config, flags, template, allow_missing=True)
    if as_json:
        print(_json(resolved))
    elif sys.stdout.isatty():
        # Narrower than this, a line holds no setting and its origin.
        width = max(shutil.get_terminal_size().columns, 72)
        print("\n".join(_screen(resolved, width)))
    else:
        print(_table(resolved))
    if resolved.missing:
        raise SettingsError(list(resolved.missing))


def _derived(resolved: Resolved) -> dict[str, int]:
    names = ("world_size", "per_device_batch_size", "gradient_accumulation_steps")
    return {name: getattr(resolved.settings, name) for name in names}


def _json(resolved: Resolved) -> str:
    shown: dict[str, Any] = {
        name: {"value": given.value, "env": env_name(name), "origin": given.origin.kind}
        for name, given in resolved.values.items()
    }
    whole = {"preset": resolved.preset, "settings": shown, "derived": _derived(resolved)}
    return json.dumps(whole, indent=2, ensure_ascii=False)


def _table(resolved: Resolved) -> str:
    rows = [("SETTING", "VALUE", "ENVIRONMENT", "ORIGIN")]
    rows += [
        (name, _text(given.value), env_name(name), printable(str(given.origin)))
        for name, given in resolved.values.items()
    ]
    rows += [(name, str(value), "", "derived") for name, value in _derived(resolved).items()]
    return columns(rows)


def _screen(resolved: Resolved, width: int) -> Iterator[str]:
    """The table in lines of at most `width`.

    The names of variables and the folders of files are said once, below; a value that is too long
    for its column stands whole in lines of its own.
    """
    places = {
        given.origin.place.rpartition(":")[0]
        for given in resolved.values.values()
        if given.origin.kind in ("preset", "file")
    }
    files = _short(places)
    rows = [("SETTING", "VALUE", "ORIGIN")]
    rows += [
        (name, _text(given.value), _origin(name, given.origin, files))
        for name, given in resolved.values.items()
    ]
    rows += [(name, str(value), "derived") for name, value in _derived(resolved).items()]
    first = max(len(name) for name, _, _ in rows)
    last = min(max(len(origin) for _, _, origin in rows), 30)
    middle = width - first - last - 4
    for name, value, origin in rows:
        cells = (value if len(value) <= middle else "", origin if len(origin) <= last else "")
        yield f"{name:{first}}  {cells[0]:{middle}}  {cells[1]}".rstrip()
        for text, cell in zip((value, origin), cells, strict=True):
            if text != cell:
                yield from _cut(text, width)
    for place, short in files.items():
        if place != short:
            yield f"{printable(short)} is"
            yield from _cut(printable(place), width)
    yield "Variables are HL_ and the name: HL_ACTOR_LEARNING_RATE is actor.learning_rate."


def _short(places: set[str]) -> dict[str, str]:
    """A file's name for each path, or the path where two files share a name."""
    names = Counter(Path(place).name for place in places)
    return {
        place: Path(place).name if names[Path(place).name] == 1 else place
        for place in sorted(places)
    }


def _origin(name: str, origin: Origin, files: dict[str, str]) -> str:
    """An origin in few words."""
    return printable(_origin_as_it_is(name, origin, files))


def _origin_as_it_is(name: str, origin: Origin, files: dict[str, str]) -> str:
    file, _, line = origin.place.rpartition(":")
    if origin.kind in ("preset", "file"):
        return f"{origin.kind} {files[file]}:{line}"
    return origin.kind if origin.place == env_name(name) else str(origin)


def _cut(text: str, width: int) -> Iterator[str]:
    """`text` in indented pieces; a path has no spaces to break at."""
    step = width - 4
    return (f"    {text[start : start + step]}" for start in range(0, len(text), step))


def _text(value: object) -> str:
    if value is None:
        return "-"
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
