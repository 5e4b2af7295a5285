"""What further options for sbatch and srun must not say, because the script says it already.

Slurm takes the last of two equal options, so one that slipped in here would win over a setting
that `hlrlhf show` still shows, or take the job out of the directory of its run. Both commands read
options as getopt_long does: values apart or behind ``=``, short options in one word, long ones cut
short.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

_DIRECTORY = "the run's directory depends on it, and there is no setting"
# The option of sbatch, and what to do instead.
_SBATCH = {
    "job-name": "set tag",
    "nodes": "set num_nodes",
    "ntasks": "set num_nodes and devices_per_node",
    "ntasks-per-node": "set devices_per_node",
    "gres": "set slurm.gres_name, slurm.gres_type and devices_per_node, or give all of it here "
    "and set slurm.gres_name to nothing",
    **{
        option: f"set slurm.{option.replace('-', '_')}"
        for option in (
            *("partition", "account", "qos", "time", "constraint", "reservation", "exclude"),
            *("nodelist", "mem", "mem-per-cpu", "mem-per-gpu", "cpus-per-task", "mail-type"),
            *("mail-user", "comment", "exclusive", "dependency", "requeue"),
        )
    },
    "no-requeue": "set slurm.requeue",
    "kill-on-invalid-dep": "it comes with slurm.dependency",
    "signal": "set slurm.signal_lead",
    **dict.fromkeys(("chdir", "output", "error", "open-mode"), _DIRECTORY),
    "array": "one run is one job: two trainers would share its directory; submit once for each",
    "wrap": "the script is hlrlhf's",
    "test-only": "call hlrlhf submit --test-only",
    "parsable": "hlrlhf gives it itself",
    "wait": "call hlrlhf submit --wait",
    **dict.fromkeys(("help", "usage", "version"), "sbatch would print it and submit nothing"),
    # Older names.
    "tasks": "set num_nodes and devices_per_node",
    "tasks-per-node": "set devices_per_node",
}
_STEP = "the script gives it itself"
_SRUN = {
    **{
        option: _SBATCH[option]
        for option in (
            *("nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "tasks", "tasks-per-node"),
        )
    },
    "output": "the script opens the log; set log_file",
    "error": "the script opens the log; set log_file",
    "chdir": _DIRECTORY,
    **dict.fromkeys(("export", "kill-on-bad-exit", "multi-prog"), _STEP),
    "container-image": "set container.kind=pyxis and container.image",
    "container-mounts": "set container.mounts",
    "container-workdir": _DIRECTORY,
}
_SHORT = {
    **{"J": "job-name", "N": "nodes", "n": "ntasks", "c": "cpus-per-task", "p": "partition"},
    **{"A": "account", "q": "qos", "t": "time", "C": "constraint", "x": "exclude"},
    **{"w": "nodelist", "d": "dependency", "D": "chdir", "o": "output", "e": "error"},
    **{"a": "array", "W": "wait", "K": "kill-on-bad-exit"},
}
# Short options without a value: another one may follow in the same word.
_SWITCHES = "EHIOQVXZhlsuv"
# No abbreviation, though an option above begins with it.
_WHOLE = {"container"}


def refused_lines(lines: Sequence[str], *, gres: bool) -> Iterator[str]:
    """What is wrong with directives, each as it stands after #SBATCH.

    Args:
        lines: the directives.
        gres: whether the script says --gres.
    """
    table = {name: words for name, words in _SBATCH.items() if gres or name != "gres"}
    for line in lines:
        # Slurm begins another job's request at these words, older ones anywhere in a line.
        if re.search("hetjob|packjob", line, re.IGNORECASE):
            yield f"{line!r}: one run is one job of equal nodes, not a heterogeneous one"
            continue
        try:
            words = _split(line)
        except ValueError as error:
            yield f"{line!r}: {error}"
        else:
            # `slurm.exclusive` says no more than that: whose nodes they may be is said here.
            bare = [word for word in words if not word.startswith("--exclusive=")]
            yield from _refused(bare, table)


def refused_arguments(words: Sequence[str]) -> Iterator[str]:
    """What is wrong with arguments of srun."""
    return _refused(words, _SRUN)


def _refused(words: Sequence[str], table: Mapping[str, str]) -> Iterator[str]:
    may_be_value = False
    for word in words:
        if word in ("-", "--") or not word.startswith("-"):
            if not may_be_value:
                yield f"{word!r} is neither an option nor the value of one"
            may_be_value = False
            continue
        may_be_value = "=" not in word
        name = word[2:].partition("=")[0] if word.startswith("--") else _in_cluster(word, table)
        if name in table:
            yield f"{word!r}: {table[name]}"
        elif name and name not in _WHOLE and any(full.startswith(name) for full in table):
            yield f"{word!r}: write the option out"


def _in_cluster(word: str, table: Mapping[str, str]) -> str:
    """The first option in a word of short ones that `table` refuses, or an empty string."""
    for letter in word[1:]:
        if _SHORT.get(letter) in table:
            return _SHORT[letter]
        if letter not in _SWITCHES:
            break  # the rest is its value
    return ""


def _split(line: str) -> list[str]:
    """The words of a line as sbatch splits it, which no shell does.

    A backslash takes the meaning of what follows even in quotes, and an open # ends the line.

    Raises:
        ValueError: a quote is not closed.
    """
    words: list[str] = []
    word: str | None = None
    quote = ""
    characters = iter(line)
    for char in characters:
        if char == "\\":
            word = (word or "") + next(characters, "")
        elif quote and char == quote:
            quote = ""
        elif quote:
            word = (word or "") + char
        elif char in "'\"":
            quote, word = char, word or ""
        elif char == "#":
            break
        elif char in " \t":
            words += [word] if word is not None else []
            word = None
        else:
            word = (word or "") + char
    if quote:
        raise ValueError("a quote is not closed")
    return words + ([word] if word is not None else [])
