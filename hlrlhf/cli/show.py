"""`hlrlhf show`"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from hlrlhf.cli import options
from hlrlhf.cli.table import columns
from hlrlhf.settings.errors import SettingsError
from hlrlhf.settings.layers import Resolved
from hlrlhf.settings.names import env_name


def show(
    preset: options.Preset = None,
    config: options.Config = None,
    flags: options.Set = None,
    template: options.Template = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show every setting with its value, its HL_* name and where the value came from."""
    resolved = options.resolved(preset, config, flags, template, allow_missing=True)
    print(_json(resolved) if as_json else _table(resolved))
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
        (name, _text(given.value), env_name(name), str(given.origin))
        for name, given in resolved.values.items()
    ]
    rows += [(name, str(value), "", "derived") for name, value in _derived(resolved).items()]
    return columns(rows)


def _text(value: object) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
