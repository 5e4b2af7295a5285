"""What a run would lose or miss, as far as this machine can tell before it starts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hlrlhf.settings import paths
from hlrlhf.settings.errors import Problem, SettingsError, printable
from hlrlhf.settings.layers import Resolved

_OWN = ("/tmp", "/var/tmp", "/dev/shm", "/run")  # noqa: S108 - named, not used
_IN_MEMORY = ("tmpfs", "ramfs")


class _Mount(NamedTuple):
    point: Path
    type: str


def hints(
    resolved: Resolved,
    made: Sequence[Path],
    environ: Mapping[str, str],
    mounts: Path = Path("/proc/self/mounts"),
) -> Iterator[str]:
    """What to think of before a run goes to Slurm's nodes, one line each.

    Args:
        resolved: the settings of a call.
        made: folders that are made before the run.
        environ: the environment, of which TMPDIR is read.
        mounts: what is mounted here, as in ``/proc/self/mounts``.
    """
    yield from map(printable, _ended_at_the_limit(resolved))
    yield from map(printable, _seen_here_only(resolved, environ, _mounts(mounts)))
    for where in _missing(resolved, made):
        yield printable(f"{where}: not on this machine; the nodes must have it")


def check_here(resolved: Resolved, made: Sequence[Path]) -> None:
    """Refuse a run on this machine whose models or data are not here.

    Raises:
        SettingsError: a path does not exist.
    """
    what = "not on this machine, where --local reads it"
    problems = [Problem(where, what) for where in _missing(resolved, made)]
    if problems:
        raise SettingsError(problems)


def _ended_at_the_limit(resolved: Resolved) -> Iterator[str]:
    settings = resolved.settings
    time = settings.slurm.time
    # To Slurm, 0 is no limit either.
    if time is None or re.fullmatch("UNLIMITED|[0:-]+", time) or settings.slurm.requeue:
        return
    where = f"slurm.time = {time!r} ({resolved.values['slurm.time'].origin})"
    yield (
        f"{where}: a run that needs longer stops before this limit, with a checkpoint; with "
        "slurm.requeue=true it goes on by itself, else by hlrlhf resume"
    )


def _seen_here_only(
    resolved: Resolved, environ: Mapping[str, str], mounts: Sequence[_Mount]
) -> Iterator[str]:
    places = [Path(place) for place in (*_OWN, environ.get("TMPDIR", "")) if place.strip("/")]
    places = [Path(os.path.realpath(place)) for place in places if place.is_absolute()]
    shared = {name for name, place in paths.places().items() if place.shared}
    for name, path in paths.among(resolved.values, shared):
        if name == "environment.python" and resolved.settings.container.kind != "none":
            continue  # a path of the image's
        place = _own_place(Path(os.path.realpath(path)), places, mounts)
        if place is not None:
            where = _where(resolved, name, path)
            yield f"{where}: nodes may not see it; {place} is each machine's own"


def _own_place(path: Path, places: Sequence[Path], mounts: Sequence[_Mount]) -> Path | None:
    """The place above `path` that each machine has for itself, or None."""
    above = [mount for mount in mounts if path.is_relative_to(mount.point)]
    if above:
        # Of two on one point, the later hides the earlier.
        point, kind = max(reversed(above), key=lambda mount: len(mount.point.parts))
        if kind in _IN_MEMORY:
            return point
        # What is mounted further down may be shared.
        places = [place for place in places if place not in point.parents]
    return next((place for place in places if path.is_relative_to(place)), None)


def _mounts(file: Path) -> list[_Mount]:
    try:
        lines = [line.split(" ") for line in file.read_text(errors="surrogateescape").splitlines()]
    except OSError:
        return []
    return [
        # Spaces and the like are octal there.
        _Mount(Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line[1])), line[2])
        for line in lines
    ]


def _missing(resolved: Resolved, made: Sequence[Path]) -> Iterator[str]:
    """Models and data that are paths, would be read, and do not exist here."""
    for name, path in paths.among(resolved.values, paths.read(resolved.settings)):
        if os.path.exists(path):  # noqa: PTH110 - Path raises on odd names
            continue
        if not any(Path(path).is_relative_to(folder) for folder in made):
            yield _where(resolved, name, path)


def _where(resolved: Resolved, name: str, path: str) -> str:
    return f"{name} = {path!r} ({resolved.values[name].origin})"
