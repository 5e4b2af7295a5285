"""Settings from a YAML file, flat, each with its line.

PyYAML reads YAML 1.1, where ``24:00:00`` is the number 86400, ``1e-5`` is a string and ``no`` is
false, and where a key that stands twice silently loses. None of that may happen to a setting, so
plain scalars are resolved by the core schema of YAML 1.2 and doubled keys are refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from hlrlhf.settings.errors import Problem, SettingsError


class Leaf(NamedTuple):
    """One value of a file and the line that it stands on."""

    value: Any
    line: int


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The safe loader with YAML 1.2's idea of what a plain scalar is."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


def _plain(tag: str, pattern: str, first: str) -> None:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))


_plain("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF")
_plain("int", r"^[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789")
_plain("float", r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?$", "-+0123456789.")
_plain("float", r"^[-+]?[0-9]+[eE][-+]?[0-9]+$", "-+0123456789.")
_plain("null", r"^(?:~|null|Null|NULL|)$", "~nN\0")
_Loader.yaml_implicit_resolvers.setdefault("", _Loader.yaml_implicit_resolvers.get("\0", []))


def read(path: Path) -> dict[str, Leaf]:
    """The settings in a file, keyed by dotted name.

    Groups may be nested (``actor: {learning_rate: 1e-5}``) or dotted
    (``actor.learning_rate: 1e-5``).

    Raises:
        SettingsError: the file cannot be read, is not YAML (with line and column), holds no
            mapping, or names a setting twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SettingsError([Problem(str(path), f"cannot be read: {reason}")]) from error
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        leaves: dict[str, Leaf] = {}
        problems: list[Problem] = []
        if root is not None:
            _flatten(loader, root, "", leaves, problems, path)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise SettingsError([Problem(where, f"not YAML: {error.problem}")]) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise SettingsError([Problem(str(path), f"not YAML: {error}")]) from error
    finally:
        loader.dispose()
    if problems:
        raise SettingsError(problems)
    return leaves


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
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                problems.append(
                    Problem(f"{path}:{key.start_mark.line + 1}", "a key must be a name")
                )
                continue
            _flatten(loader, value, f"{prefix}.{key.value}".lstrip("."), leaves, problems, path)
    elif not prefix:
        problems.append(Problem(f"{path}:{line}", "must be a mapping of settings to values"))
    elif prefix in leaves:
        problems.append(
            Problem(f"{path}:{line}", f"{prefix} stands already on line {leaves[prefix].line}")
        )
    else:
        leaves[prefix] = Leaf(loader.construct_object(node, deep=True), line)
