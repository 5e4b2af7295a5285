"""The page of all settings: ``python -m hlrlhf.settings.page > docs/settings.md``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from hlrlhf.settings.names import ALIASES, Setting, settings_by_name
from hlrlhf.settings.presets import SEARCH_PATH
from hlrlhf.settings.schema import Group, Settings

HEAD = f"""\
# Settings

<!-- Made from hlrlhf/settings/schema.py by `make docs`; a test fails when the two differ. -->

A run has one value for each of these settings. It comes from the last of these layers that gives
one, and `hlrlhf show --preset NAME` tells from which:

1. the default, in the tables below;
2. the preset: `--preset NAME`, a file of ours or in a folder of `{SEARCH_PATH}`
   (folders separated by colons), or `--preset PATH.yaml`;
3. a file: `--config FILE`, for instance a cluster's habits; of several files the later wins;
4. the environment: the `HL_*` name;
5. a flag: `--set NAME=VALUE`; of several flags the later wins.

```yaml
# site.yaml, for --config: groups may be nested or dotted
slurm:
  partition: gaudi
  time: 24:00:00
actor.learning_rate: 9e-6
```

**Mandatory** settings have no default. An **unset** setting has no value; an empty text
(`HL_SLURM_PARTITION=`) unsets it again. Booleans are `1` or `0`, `true` or `false`. Texts must not
hold control characters; stop strings may. A relative path, and `~`, count from where the command is
run; models, data and images that are no path there are names. An unknown name, an `HL_*` variable
included, is an error.

**Lists** are YAML lists in a file. In the environment and in `--set` they are split into words as a
shell does it, so quote what holds a space; or they are a YAML list in brackets:

```sh
HL_DATASET_PATH="/data/one '/data/number two'"
HL_DATASET_PATH='[/data/one, /data/number two]'
HL_ENVIRONMENT_SETUP="'module load gcc' 'source /opt/venv/bin/activate'"
HL_GENERATION_STOP='["\\n\\nHuman:"]'     # in YAML's double quotes \\n is a newline
```
"""

ALIAS_HEAD = """\
## Other names

These variables of the reference step-3 scripts are accepted too. Setting both names to different
values is an error.
"""


def page() -> str:
    """The page as Markdown."""
    blocks = [HEAD]
    run = [setting for name, setting in settings_by_name().items() if "." not in name]
    blocks += ["## The run\n", _table(run)]
    for key, group in _groups():
        members = [
            setting for name, setting in settings_by_name().items() if name.startswith(f"{key}.")
        ]
        blocks += [f"## {key}\n", f"{group.__doc__}\n", _table(members)]
    blocks += [
        ALIAS_HEAD,
        _rows(("Variable", "is"), ((f"`{a}`", f"`{b}`") for a, b in ALIASES.items())),
    ]
    return "\n".join(blocks)


def _groups() -> Iterator[tuple[str, type[Group]]]:
    for key, field in Settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Group):
            yield key, field.annotation


def _table(settings: Iterable[Setting]) -> str:
    return _rows(
        ("Setting", "Variable", "Type", "Unit", "Default", "Meaning"),
        (
            (
                f"`{setting.name}`",
                f"`{setting.env}`",
                ", ".join(filter(None, (setting.type, setting.allowed))),
                setting.unit,
                _default(setting),
                setting.description,
            )
            for setting in settings
        ),
    )


def _rows(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )


def _default(setting: Setting) -> str:
    value: Any = setting.default
    if setting.mandatory:
        return "mandatory"
    if value is None:
        return "unset"
    if value == []:
        return "empty"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    print(page(), end="")
