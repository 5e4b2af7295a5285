"""docs/settings.md is what the schema says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from hlrlhf.settings.names import ALIASES, settings_by_name
from hlrlhf.settings.page import page

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "settings.md"
SUFFIXES = {".md", ".py", ".j2", ".yaml"}


def test_the_page_has_not_drifted() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == page(), "write it again: make docs"


def test_the_command_writes_the_page() -> None:
    command = [sys.executable, "-m", "hlrlhf.settings.page"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout == page()


def test_every_setting_and_alias_has_one_row() -> None:
    rows = [line for line in page().splitlines() if line.startswith("| `")]
    assert len(rows) == len(settings_by_name()) + len(ALIASES)
    for setting in settings_by_name().values():
        (row,) = (row for row in rows if row.startswith(f"| `{setting.name}` | `{setting.env}` |"))
        for part in (setting.type, setting.allowed, setting.unit, setting.description):
            assert part in row
    for alias, env in ALIASES.items():
        assert f"| `{alias}` | `{env}` |" in rows


def test_whatever_is_told_of_a_setting_calls_it_by_its_name() -> None:
    """In the documents and in messages: one that was renamed would be advice that fails."""
    sources = [ROOT / "README.md"]
    for room in ("docs", "hlrlhf", "trainer", "templates", "presets"):
        sources += [file for file in (ROOT / room).rglob("*") if file.suffix in SUFFIXES]
    known = {setting.env for setting in settings_by_name().values()} | set(ALIASES)
    for file in sources:
        named = re.findall(r"\bHL_[A-Z0-9_]*[A-Z0-9]\b(?!\*)", file.read_text(encoding="utf-8"))
        assert set(named) <= known, file


def test_defaults_in_words() -> None:
    for row in (
        "| `tag` | `HL_TAG` | text, up to 64 letters, digits, dots, dashes and underscores |  "
        "| mandatory |",
        "| `gbs` | `HL_GBS` | integer, at least 1 | rows | `32` |",
        "| `slurm.partition` | `HL_SLURM_PARTITION` | text |  | unset |",
        "| `slurm.extra` | `HL_SLURM_EXTRA` | list of text |  | empty |",
        "| `enable_hpu_graphs` | `HL_ENABLE_HPU_GRAPHS` | boolean |  | `true` |",
    ):
        assert row in page()
