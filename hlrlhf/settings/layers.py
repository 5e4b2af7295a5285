"""default < preset < file < environment < flag: one way from layers to validated settings."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hlrlhf.settings import checks, paths, presets, yamlfile
from hlrlhf.settings.errors import Problem, SettingsError, printable
from hlrlhf.settings.names import (
    ALIASES,
    Setting,
    nearest,
    settings_by_env,
    settings_by_name,
)
from hlrlhf.settings.origins import Given, Origin, OriginKind
from hlrlhf.settings.schema import Settings


@dataclass(frozen=True)
class Resolved:
    """The settings of a call, each with its origin.

    Attributes:
        settings: validated and frozen. With `missing`, mandatory texts hold a placeholder.
        values: every setting by dotted name, in the schema's order.
        preset: the preset's name as it was asked for, if one was.
        missing: mandatory settings that no layer gave, one problem each.
    """

    settings: Settings
    values: dict[str, Given]
    preset: str | None
    missing: tuple[Problem, ...] = ()

    def is_default(self, name: str) -> bool:
        """Whether nobody set this value."""
        return self.values[name].origin.kind == "default"


def resolve(
    preset: str | None = None,
    files: Sequence[Path] = (),
    environ: Mapping[str, str] | None = None,
    flags: Sequence[str] = (),
    *,
    allow_missing: bool = False,
) -> Resolved:
    """Merge the layers and validate the outcome.

    Args:
        preset: a preset's name, or a path to one.
        files: YAML files of settings; later ones win.
        environ: the environment, of which the ``HL_*`` variables are read.
        flags: ``name=value`` texts; later ones win.
        allow_missing: report missing mandatory settings in the result instead of raising.

    Raises:
        SettingsError: with all that is wrong, the missing mandatory settings included.
    """
    environ = environ or {}
    problems: list[Problem] = []
    layers: list[dict[str, Given]] = []
    sources: list[tuple[OriginKind, Path | str]] = [("preset", preset)] if preset else []
    sources += [("file", path) for path in files]
    for kind, source in sources:
        try:
            path = presets.find(source, environ) if isinstance(source, str) else source
            layers.append(dict(_from_file(kind, path, problems)))
        except SettingsError as error:
            problems += error.problems
    layers.append(dict(_from_environment(environ, problems)))
    layers.append(dict(_from_flags(flags, problems)))

    merged: dict[str, Given] = {}
    for layer in layers:
        merged.update(layer)
    for name, given in merged.items():
        try:
            merged[name] = given._replace(value=paths.absolute(name, given.value))
        except FileNotFoundError:
            what = "is relative to the current directory, which is gone; change to another one"
            problems.append(Problem(_where(name, given.value, given.origin), what))
    missing = {
        setting.name: Problem(
            setting.name, f"is not set; give {setting.env}, or --set {setting.name}=…"
        )
        for setting in settings_by_name().values()
        if setting.mandatory and setting.name not in merged
    }
    if not allow_missing:
        problems += missing.values()
    invalid = _invalid(merged)
    problems += invalid.values()
    # What is left is valid one by one; so contradictions are found in the same call.
    settings = Settings.model_validate(
        _nested({name: given for name, given in merged.items() if name not in invalid})
    )
    values = {
        name: _final(settings, setting, merged.get(name))
        for name, setting in settings_by_name().items()
    }
    unsure = {*missing, *invalid}
    for names, what in checks.contradictions(settings, values):
        if unsure.isdisjoint(names):
            where = ", ".join(
                f"{name} = {values[name].value!r} ({values[name].origin})" for name in names
            )
            problems.append(Problem(where, what))
    if problems:
        raise SettingsError(problems)
    return Resolved(settings, values, preset, tuple(missing.values()))


def load(path: Path) -> Settings:
    """The settings of one complete file, such as ``settings.yaml`` in a run directory.

    Raises:
        SettingsError: see `resolve`.
    """
    return resolve(files=[path]).settings


def dump(resolved: Resolved) -> str:
    """The settings as YAML, complete, each value with its origin in a comment.

    Raises:
        SettingsError: the text is longer than one that can be read again.
    """
    lines = [
        "# Every setting of this run, and where it came from. The trainer reads this file only.",
        "# To run it again: hlrlhf submit --config THIS_FILE",
    ]
    previous: list[str] = []
    for name, given in resolved.values.items():
        *groups, key = name.split(".")
        if groups and groups != previous:
            lines.append(f"{groups[0]}:")
        previous = groups
        text = _yaml(given.value)
        indent = "  " * len(groups)
        if name == "master_port" and resolved.is_default(name):
            # Read back as somebody's wish, it would no longer give way when it is taken.
            indent = "# "
        lines.append(f"{indent}{key}: {text}  # {printable(str(given.origin))}")
    whole = "\n".join(lines) + "\n"
    if len(whole) > yamlfile.LIMIT:
        what = (
            f"together they are longer than {yamlfile.LIMIT} characters, all that a file can hold"
        )
        raise SettingsError([Problem("settings.yaml", what)])
    return whole


def _yaml(value: Any) -> str:
    """A value as YAML on one line."""
    options: dict[str, Any] = {"default_flow_style": True, "width": 10**9, "allow_unicode": True}
    text: str = yaml.safe_dump(value, **options).removesuffix("...\n").removesuffix("\n")
    if len(text.splitlines()) > 1:  # in double quotes a line's end is an escape
        text = yaml.safe_dump(value, **options, default_style='"').removesuffix("\n")
    return text


def _from_file(
    kind: OriginKind, path: Path, problems: list[Problem]
) -> Iterator[tuple[str, Given]]:
    for name, leaf in yamlfile.read(path).items():
        place = f"{path}:{leaf.line}"
        setting = settings_by_name().get(name)
        if setting is None:
            problems.append(Problem(f"{name} ({kind} {place})", _unknown(name, settings_by_name())))
        else:
            value = leaf.value
            if value == "" and setting.nullable:
                value = None
            elif setting.is_list and isinstance(value, str):
                value = [value]
            yield name, Given(value, Origin(kind, place))


def _from_environment(
    environ: Mapping[str, str], problems: list[Problem]
) -> Iterator[tuple[str, Given]]:
    known = settings_by_env()
    for variable in sorted(name for name in environ if name.startswith("HL_")):
        env = ALIASES.get(variable, variable)
        text = environ[variable]
        if env not in known:
            problems.append(
                Problem(f"{variable} (environment)", _unknown(variable, [*known, *ALIASES]))
            )
        elif env != variable and not _same(known[env], environ.get(env, text), text):
            problems.append(
                Problem(
                    f"{variable} = {text!r} (environment)",
                    f"is another name of {env}, which is {environ[env]!r}; set one of them",
                )
            )
        else:
            yield from _parse(known[env], text, Origin("environment", variable), problems)


def _from_flags(flags: Sequence[str], problems: list[Problem]) -> Iterator[tuple[str, Given]]:
    known = settings_by_name()
    for flag in flags:
        name, equals, text = flag.partition("=")
        if not equals:
            problems.append(Problem(f"--set {flag}", "must have the form name=value"))
        elif name not in known:
            problems.append(Problem(f"{name} (flag --set)", _unknown(name, known)))
        else:
            yield from _parse(known[name], text, Origin("flag", "--set"), problems)


def _same(setting: Setting, one: str, other: str) -> bool:
    """Whether two texts are one value of the setting; 1e-5 is 0.00001."""
    try:
        return one == other or (setting.type == "number" and float(one) == float(other))
    except ValueError:
        return False


def _unknown(name: str, known: Mapping[str, Setting] | list[str]) -> str:
    members = [other for other in known if other.startswith(f"{name}.")]
    if members:
        return f"is a group of settings: {', '.join(members)}"
    return f"no such setting{nearest(name, known) or '; `hlrlhf show` lists them all'}"


def _parse(
    setting: Setting, text: str, origin: Origin, problems: list[Problem]
) -> Iterator[tuple[str, Given]]:
    """A value given as text: lists are split as a shell splits words, or are YAML in [ ]."""
    value: Any = text
    if not text and setting.nullable:
        value = None
    elif setting.is_list:
        try:
            value = yamlfile.value(text) if text.startswith("[") else shlex.split(text)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            reason = str(error).replace("\n", " ")
            problems.append(
                Problem(_where(setting.name, text, origin), f"cannot be split: {reason}")
            )
            value = [text]
    yield setting.name, Given(value, origin)


def _where(name: str, value: Any, origin: Origin) -> str:
    return f"{name} = {value!r} ({origin})"


# Stands in for a mandatory text while the rest of the settings is validated.
_PLACEHOLDER = "missing"


@cache
def _build() -> None:
    """Build the schema's validator, without a search for pydantic's plugins.

    The search reads the metadata of every installed package, a tenth of the time that
    ``hlrlhf render`` takes as a whole, and we use none.
    """
    switch = "PYDANTIC_DISABLE_PLUGINS"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        Settings.model_rebuild()
    finally:
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before


def _invalid(merged: dict[str, Given]) -> dict[str, Problem]:
    """What the schema refuses, by the setting's name."""
    problems: dict[str, Problem] = {}
    _build()
    try:
        Settings.model_validate(_nested(merged))
    except ValidationError as error:
        for item in error.errors(include_url=False):
            name = ".".join(part for part in item["loc"] if isinstance(part, str))
            setting, given = settings_by_name()[name], merged[name]
            what = item["msg"][0].lower() + item["msg"][1:]
            if item["type"] == "string_pattern_mismatch":
                what = "does not have the right form"
            allowed = f"; allowed: {setting.type}" + f", {setting.allowed}".removesuffix(", ")
            where = _where(name, given.value, given.origin)
            problems.setdefault(name, Problem(where, what + allowed))
    return problems


def _nested(merged: dict[str, Given]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, setting in settings_by_name().items():
        *groups, key = name.split(".")
        branch = tree
        for group in groups:  # also a group of defaults: pydantic would build its model apart
            branch = branch.setdefault(group, {})
        if given := merged.get(name):
            branch[key] = given.value
        elif setting.mandatory:
            branch[key] = [_PLACEHOLDER] if setting.is_list else _PLACEHOLDER
    return tree


def _final(settings: Settings, setting: Setting, given: Given | None) -> Given:
    if given is None and setting.mandatory:
        return Given(None, Origin("missing"))
    value: Any = settings
    for part in setting.name.split("."):
        value = getattr(value, part)
    return Given(value, given.origin if given else Origin("default"))
