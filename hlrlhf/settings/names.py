"""The names of settings: dotted, HL_*, aliases, and the nearest right one."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import annotated_types
from pydantic.fields import FieldInfo

from hlrlhf.settings.schema import Allowed, Group, Place, Settings

# Spellings that the reference step-3 scripts read for the same thing.
ALIASES = {
    "HL_ACTOR_MODEL": "HL_ACTOR_MODEL_PATH",
    "HL_CRITIC_MODEL": "HL_CRITIC_MODEL_PATH",
    "HL_ACTOR_LR": "HL_ACTOR_LEARNING_RATE",
    "HL_CRITIC_LR": "HL_CRITIC_LEARNING_RATE",
    "HL_ACTOR_WD": "HL_ACTOR_WEIGHT_DECAY",
    "HL_CRITIC_WD": "HL_CRITIC_WEIGHT_DECAY",
}


@dataclass(frozen=True)
class Setting:
    """What the schema says of one setting."""

    name: str
    env: str
    type: str
    allowed: str
    unit: str
    default: Any
    mandatory: bool
    nullable: bool
    description: str
    place: Place | None

    @property
    def is_list(self) -> bool:
        return self.type.startswith("list")


def env_name(name: str) -> str:
    """The one rule: ``actor.learning_rate`` is ``HL_ACTOR_LEARNING_RATE``."""
    return "HL_" + name.upper().replace(".", "_")


@cache
def settings_by_name() -> dict[str, Setting]:
    """Every setting by its dotted name, in the schema's order."""
    return {setting.name: setting for setting in _walk(Settings, "")}


@cache
def settings_by_env() -> dict[str, Setting]:
    """Every setting by its HL_* name."""
    return {setting.env: setting for setting in settings_by_name().values()}


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean X?"`` for the known word nearest to `word`, or an empty string."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""


def _walk(group: type[Group], prefix: str) -> Iterator[Setting]:
    for key, field in group.model_fields.items():
        name = prefix + key
        if isinstance(field.annotation, type) and issubclass(field.annotation, Group):
            yield from _walk(field.annotation, name + ".")
        else:
            yield _describe(name, field)


def _describe(name: str, field: FieldInfo) -> Setting:
    kind, nullable, bounds = _kind(field.annotation, field.metadata)
    extra = field.json_schema_extra
    return Setting(
        name=name,
        env=env_name(name),
        type=kind,
        allowed=", ".join(bounds),
        unit=str(extra.get("unit", "")) if isinstance(extra, dict) else "",
        default=None if field.is_required() else field.default,
        mandatory=field.is_required(),
        nullable=nullable,
        description=field.description or "",
        place=_place([*field.metadata, field.annotation]),
    )


def _place(parts: Iterable[Any]) -> Place | None:
    """The `Place` in an annotation, however deep."""
    for part in parts:
        place = part if isinstance(part, Place) else _place(typing.get_args(part))
        if place is not None:
            return place
    return None


_WORDS = {int: "integer", float: "number", bool: "boolean", str: "text"}


def _kind(annotation: Any, metadata: Iterable[Any]) -> tuple[str, bool, list[str]]:
    """The plain-English type, whether null is allowed, and the bounds."""
    bounds = [text for item in metadata for text in _bound(item)]
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        inner, *more = typing.get_args(annotation)
        kind, nullable, inner_bounds = _kind(inner, more)
        return kind, nullable, inner_bounds + bounds
    if origin in (typing.Union, types.UnionType):
        inner = next(arg for arg in typing.get_args(annotation) if arg is not type(None))
        kind, _, inner_bounds = _kind(inner, ())
        return kind, True, inner_bounds + bounds
    if origin is list:
        kind, _, inner_bounds = _kind(typing.get_args(annotation)[0], ())
        return f"list of {kind}", False, [f"each {text}" for text in inner_bounds] + bounds
    if origin is Literal:
        choices = typing.get_args(annotation)
        kind = "integer" if isinstance(choices[0], int) else "text"
        return kind, False, ["one of " + ", ".join(str(choice) for choice in choices), *bounds]
    return _WORDS[annotation], False, bounds


def _bound(item: Any) -> Iterator[str]:
    """A constraint of annotated-types or pydantic, in words."""
    if isinstance(item, FieldInfo):
        for inner in item.metadata:
            yield from _bound(inner)
    elif isinstance(item, Allowed):
        yield item.words
    elif isinstance(item, annotated_types.MinLen) and item.min_length == 1:
        yield "not empty"
    elif isinstance(item, annotated_types.Ge):
        yield f"at least {item.ge}"
    elif isinstance(item, annotated_types.Gt):
        yield f"greater than {item.gt}"
    elif isinstance(item, annotated_types.Le):
        yield f"at most {item.le}"
    elif isinstance(item, annotated_types.Lt):
        yield f"less than {item.lt}"
