"""Values and where they came from."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

OriginKind = Literal["default", "preset", "file", "environment", "flag", "missing"]


class Origin(NamedTuple):
    """Where a value came from: the layer, and the place in it."""

    kind: OriginKind
    place: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.place}".rstrip()


class Given(NamedTuple):
    """A value and where it came from."""

    value: Any
    origin: Origin
