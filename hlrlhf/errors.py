"""The base of all errors that end a command, or a rank, with words rather than a traceback."""

from __future__ import annotations

from typing import ClassVar

# Some lines of a terminal: a value of 100 kB would push all else off it.
_LONGEST = 1000


def shortened(text: str) -> str:
    """A line of words with its middle left out where it is very long."""
    if len(text) <= _LONGEST:
        return text
    half = _LONGEST // 2
    return f"{text[:half]}… ({len(text) - 2 * half} characters left out) …{text[-half:]}"


class HlrlhfError(Exception):
    """Something that a user can mend; its text says what is wrong and what to do, line by line.

    Attributes:
        exit_code: of a command that it ends: 1 the run or job failed, 2 what was asked for is
            wrong, 3 Slurm could not be reached.
    """

    exit_code: ClassVar[int] = 1
