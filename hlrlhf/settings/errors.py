"""One error for all that is wrong with the settings of a call."""

from __future__ import annotations

from dataclasses import dataclass

from hlrlhf.errors import HlrlhfError


def printable(text: str) -> str:
    """`text` on one line, with what a terminal could obey written as an escape."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


@dataclass(frozen=True)
class Problem:
    """One thing wrong: `where` names the setting, value and origin, `what` says what to do."""

    where: str
    what: str

    def __str__(self) -> str:
        return printable(f"{self.where}: {self.what}")


class SettingsError(HlrlhfError):
    """The settings cannot be used; carries every problem that was found.

    Args:
        problems: at least one.
    """

    exit_code = 2

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))
