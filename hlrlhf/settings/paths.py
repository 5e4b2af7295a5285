"""What follows for a setting from being a path, as the schema says of it.

A run is read again from other directories and on other nodes, so paths are made absolute once,
where the settings of a call come together.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterator, Mapping
from functools import cache
from typing import Any

from hlrlhf.settings.checks import idle
from hlrlhf.settings.names import settings_by_name
from hlrlhf.settings.origins import Given
from hlrlhf.settings.schema import Place, Settings

_DATA_FILES = (".json", ".jsonl", ".parquet", ".csv")


@cache
def places() -> dict[str, Place]:
    """The settings that are paths, by dotted name, in the schema's order."""
    return {name: setting.place for name, setting in settings_by_name().items() if setting.place}


def read(settings: Settings) -> list[str]:
    """The settings that name what a run reads; presets may name more than it uses."""
    unread = idle(settings)
    return [
        name
        for name, place in places().items()
        if place.kind in ("run", "model", "data") and name not in unread
    ]


def absolute(name: str, value: Any) -> Any:
    """`value`, with ``~`` and the current directory filled in where setting `name` is a path.

    What may be a name too is a path if it exists here or starts with ./ or ../, which a name never
    does, so that it may also be a path that is yet to be made.
    """
    if isinstance(value, list):
        return [absolute(name, item) for item in value]
    place = places().get(name)
    if not isinstance(value, str) or not value or place is None:
        return value
    path = os.path.expanduser(value) if value.startswith("~") else value  # noqa: PTH111
    if place.kind == "command" and os.sep not in path:
        return path  # a command, even if a file here has the same name
    named = place.kind not in ("output", "run") and not path.startswith(("./", "../"))
    if place.kind in ("model", "data"):
        # A name on the Hub has one slash at most and no suffix of a file of data.
        named = named and path.count("/") < 2 and not path.endswith(_DATA_FILES)
    if not named or os.path.exists(path):  # noqa: PTH110 - Path raises on odd names
        return os.path.abspath(path)  # noqa: PTH100 - links stay; only dots go
    return path


def among(values: Mapping[str, Given], names: Container[str]) -> Iterator[tuple[str, str]]:
    """The absolute paths in the settings `names`, each with its setting; a list may hold many."""
    for name, (value, _) in values.items():
        if name in names:
            for path in value if isinstance(value, list) else [value]:
                if isinstance(path, str) and path.startswith("/"):
                    yield name, path
