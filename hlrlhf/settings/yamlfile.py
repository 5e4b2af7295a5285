"""Settings from a YAML file, flat, each with its line.

PyYAML reads YAML 1.1, where ``24:00:00`` is the number 86400, ``no`` is false, an account ``0123``
is 83, a partition ``1.10`` is 1.1, and where a key that stands twice silently loses. None of that
may happen to a setting: a plain scalar is the text that stands there, which the schema then turns
into what the setting is, just as it does for text from the environment; only null is special.
Doubled keys are refused.

A few lines of aliases of aliases can stand for more values than a machine holds, and PyYAML's
composer in C ends the process where brackets are nested too deeply. So a text is measured, event by
event, before anything is made of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yaml.reader import Reader

from hlrlhf.settings.errors import Problem, SettingsError

# All settings together are some thousand characters.
LIMIT = 2**18
DEPTH = 50


class TooMuch(yaml.MarkedYAMLError):
    """More than settings can be."""


class Leaf(NamedTuple):
    """One value of a file (text, a list or None) and the line that it stands on."""

    value: Any
    line: int


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The safe loader that knows text, lists, mappings and null, and no other type."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012
    yaml_constructors = {  # noqa: RUF012
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("str", "seq", "map", "null")
    }


_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""])


def value(text: str) -> Any:
    """One YAML value that stands alone, such as a list in a variable, by the rules of a file.

    Raises:
        yaml.YAMLError: the text is not YAML, or too much.
    """
    _measure(text)
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read(path: Path) -> dict[str, Leaf]:
    """The settings in a file, keyed by dotted name.

    Groups may be nested (``actor: {learning_rate: 1e-5}``) or dotted
    (``actor.learning_rate: 1e-5``).

    Raises:
        SettingsError: the file cannot be read, is not YAML or too much (with line and column),
            holds no mapping, or names a setting twice.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LIMIT + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SettingsError([Problem(str(path), f"cannot be read: {reason}")]) from error
    if len(text) > LIMIT:
        raise SettingsError([Problem(str(path), f"is longer than {LIMIT} characters")])
    control = Reader.NON_PRINTABLE.search(text)
    if control:
        before = text[: control.start()]
        where = f"{path}:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
        raise SettingsError([Problem(where, f"not YAML: {control.group()!r} is not allowed")])
    loader = _Loader(text)
    try:
        _measure(text)
        root = loader.get_single_node()
        leaves: dict[str, Leaf] = {}
        problems: list[Problem] = []
        if root is not None:
            _flatten(loader, root, "", leaves, problems, path)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        kind = "" if isinstance(error, TooMuch) else "not YAML: "
        raise SettingsError([Problem(where, f"{kind}{error.problem}")]) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise SettingsError([Problem(str(path), f"not YAML: {error}")]) from error
    finally:
        loader.dispose()
    if problems:
        raise SettingsError(problems)
    return leaves


def _measure(text: str) -> None:
    """Refuse a text that is too deep or, with its aliases written out, too long.

    Raises:
        yaml.YAMLError: the text is not YAML, or `TooMuch`.
    """
    sizes: dict[str | None, int] = {}  # of what has an anchor
    levels = [0]  # the sizes of what is open so far, each without what is open in it
    anchors: list[str | None] = []
    events: Iterable[Any] = yaml.parse(text, Loader=_Loader)
    for event in events:
        mark, anchor = event.start_mark, getattr(event, "anchor", None)
        if isinstance(event, yaml.CollectionStartEvent):
            levels.append(0)
            anchors.append(anchor)
            if len(anchors) > DEPTH:
                raise TooMuch(None, None, f"nested deeper than {DEPTH}", mark)
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            size, anchor = levels.pop(), anchors.pop()
        elif isinstance(event, yaml.ScalarEvent):
            size = len(event.value)
        elif isinstance(event, yaml.AliasEvent):
            size, anchor = sizes.get(anchor, 0), None
        else:
            continue
        levels[-1] += size + 1
        if anchor is not None:
            sizes[anchor] = size
        if levels[-1] > LIMIT:
            problem = f"longer than {LIMIT} characters, with its aliases (*) written out"
            raise TooMuch(None, None, problem, mark)


def _flatten(
    loader: Any,
    node: yaml.Node,
    prefix: str,
    leaves: dict[str, Leaf],
    problems: list[Problem],
    path: Path,
) -> None:
    line = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, below in node.value:
            if not isinstance(key, yaml.ScalarNode):
                problems.append(
                    Problem(f"{path}:{key.start_mark.line + 1}", "a key must be a name")
                )
                continue
            name = f"{prefix}.{key.value}" if prefix else key.value
            _flatten(loader, below, name, leaves, problems, path)
    elif not prefix:
        problems.append(Problem(f"{path}:{line}", "must be a mapping of settings to values"))
    elif prefix in leaves:
        problems.append(
            Problem(f"{path}:{line}", f"{prefix} stands already on line {leaves[prefix].line}")
        )
    else:
        leaves[prefix] = Leaf(loader.construct_object(node, deep=True), line)
