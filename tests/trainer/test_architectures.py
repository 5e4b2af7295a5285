"""docs/architectures.md is what tests/examination.py finds: see there."""

from __future__ import annotations

from pathlib import Path

import architectures
import examination
import pytest
from tiny import one_rank  # noqa: F401

AGAIN = "not what the page says: find out why, then write it again: make docs"


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("architecture", architectures.CONFIGS)
def test_an_architecture_goes_through_a_run_as_the_page_says(
    tmp_path: Path, architecture: str
) -> None:
    row = examination.examine(architecture, tmp_path).row(architecture)

    print(row)
    assert row in examination.DOCUMENT.read_text(encoding="utf-8").splitlines(keepends=True), AGAIN


def test_the_page_has_a_row_for_each_architecture_and_nothing_else() -> None:
    text = examination.DOCUMENT.read_text(encoding="utf-8")
    head, rows = text[: len(examination.TOP)], text[len(examination.TOP) :]

    assert head == examination.TOP, AGAIN
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows.splitlines()] == [
        *architectures.CONFIGS
    ]
