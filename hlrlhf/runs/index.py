"""Making runs and finding them again, wherever their directories are.

The index is a folder of links, one to each run directory, in the user's state folder, and beside it
a folder of copies of their jobs' records. A link that leads nowhere is a run that was deleted; it
stays known while its job's record is there, so that the job can be cancelled.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from hlrlhf.runs.directory import Run, RunError, remove_empty


def create(base: Path, tag: str, environ: Mapping[str, str] = os.environ) -> Run:
    """Make the directory of a new run: ``tag``, or ``tag-2``, ``tag-3``… when it is taken.

    A name is taken when a run in `base` or any run in the index has it: no two runs of a user
    share a name.

    Args:
        base: the folder to make it in; made too when it is missing.
        tag: a setting of that type, so fit for a file name.
        environ: says where the index is.

    Raises:
        RunError: something cannot be made; what had been made is removed.
    """
    base = Path(os.path.abspath(base))  # noqa: PTH100 - resolve() would follow links
    index = _folder(environ)
    made: tuple[Path, ...] = ()
    run: Run | None = None
    try:
        made = tuple(itertools.takewhile(lambda folder: not folder.exists(), [base, *base.parents]))
        index.mkdir(parents=True, exist_ok=True)
        base.mkdir(parents=True, exist_ok=True)
        with _locked(index):
            for name in itertools.chain([tag], (f"{tag}-{n}" for n in itertools.count(2))):
                link = index / name
                if _entry(link) is not None:
                    continue
                try:
                    (base / name).mkdir()
                except FileExistsError:
                    continue
                run = Run(base / name, link, made)
                link.unlink(missing_ok=True)
                link.symlink_to(run.directory)
                run.logs.mkdir()
                return run
    except OSError as error:
        if run is None:
            remove_empty(made)
        else:
            run.discard()
        raise RunError(f"{error.filename or base}: {error.strerror}") from error
    raise AssertionError("the names are endless")


def every(environ: Mapping[str, str] = os.environ) -> list[Run]:
    """All runs in the index, the oldest first.

    Raises:
        RunError: the index cannot be read.
    """
    try:
        links = list(_folder(environ).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise RunError(f"{error.filename}: {error.strerror}") from error
    found: list[tuple[float, Run]] = []
    for link in links:
        with contextlib.suppress(FileNotFoundError):  # forgotten meanwhile
            if run := _entry(link):
                found.append((run.made_at, run))
    return [run for _, run in sorted(found, key=lambda pair: pair[0])]


def find(name: str, environ: Mapping[str, str] = os.environ) -> Run:
    """The run that the user means.

    Args:
        name: a run's name, its directory, or its job's id.
        environ: says where the index is.

    Raises:
        RunError: there is none, or more than one.
    """
    runs = every(environ)
    try:
        path = Path(os.path.abspath(name))  # noqa: PTH100 - a run may be reached by a link
    except FileNotFoundError as error:
        raise RunError("the current directory is gone; change to another one") from error
    if os.sep in name or name in (".", ".."):
        if not _is_run(path):
            gone = next((run for run in runs if run.directory == path), None)
            if gone is None:
                raise RunError(f"{name}: not a run directory")
            return gone
        own = path.stat()
        return next((run for run in runs if _is_at(run.directory, own)), Run(path))
    found = [run for run in runs if name == run.name]
    if name.isdigit():
        found += [run for run in runs if run not in found and _job_id(run) == name]
    if not found and _is_run(path):
        return Run(path)
    if len(found) > 1:
        which = ", ".join(str(run.directory) for run in found)
        raise RunError(f"{name}: more than one run; give the directory of one: {which}")
    if not found:
        near = difflib.get_close_matches(name, [run.name for run in runs], n=1)
        raise RunError(f"{name}: no such run" + (f"; did you mean {near[0]}?" if near else ""))
    return found[0]


def _entry(link: Path) -> Run | None:
    """The run behind a link of the index; None where there is none, or nothing is left of it."""
    try:
        run = Run(link.readlink(), link)
    except OSError:
        return None
    if run.is_deleted and not (run.job_copy and run.job_copy.exists()):
        return None
    return run


def _is_at(directory: Path, own: os.stat_result) -> bool:
    try:
        return os.path.samestat(directory.stat(), own)
    except OSError:
        return False


def _folder(environ: Mapping[str, str]) -> Path:
    # The specification says that a relative path there is to be ignored.
    state = environ.get("XDG_STATE_HOME", "")
    if not state.startswith("/"):
        state = str(Path(environ.get("HOME") or Path.home()) / ".local" / "state")
    return Path(state) / "hlrlhf" / "runs"


@contextlib.contextmanager
def _locked(index: Path) -> Iterator[None]:
    """Keep other processes of the user from taking a name at the same time."""
    with (index.parent / "runs.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_run(path: Path) -> bool:
    run = Run(path)
    # Path raises on names that no file can have.
    return any(os.path.isfile(file) for file in (run.settings_file, run.job_file))  # noqa: PTH113


def _job_id(run: Run) -> str | None:
    try:
        job = run.job()
    except RunError:
        return None
    return job.id if job and job.kind == "slurm" else None
