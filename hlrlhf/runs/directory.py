"""One run directory and the job that was made from it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from hlrlhf.errors import HlrlhfError


class RunError(HlrlhfError):
    """A run that cannot be made, found or used; says which and why."""

    exit_code = 2


@dataclass(frozen=True)
class Job:
    """What ``job.json`` says: how the run was started.

    Attributes:
        kind: by Slurm, or by a launcher on this machine.
        id: the job's id; the launcher's process id.
        cluster: the cluster to ask with ``-M``; None for the default one.
        submitted: when, in Unix seconds, by Slurm's clock if it said so. Slurm uses an id again
            after some time, so the id alone does not name a job.
    """

    kind: Literal["slurm", "local"]
    id: str
    cluster: str | None
    submitted: int

    @property
    def log_id(self) -> str:
        """What the job's files in ``logs/`` begin with."""
        return "local" if self.kind == "local" else self.id


@dataclass(frozen=True)
class Run:
    """A run directory; every name of a file or folder in it is here or in `Attempt`.

    Attributes:
        directory: absolute.
        link: the run's place in the index, when it was made here.
        made: the folders above the directory that were made for it, innermost first.
    """

    directory: Path
    link: Path | None = None
    made: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.directory.name

    @property
    def settings_file(self) -> Path:
        """All settings of the run."""
        return self.directory / "settings.yaml"

    @property
    def script(self) -> Path:
        """The batch script that runs."""
        return self.directory / "job.sbatch"

    @property
    def job_file(self) -> Path:
        """See `Job`. A launcher on this machine holds a lock on it while it lives."""
        return self.directory / "job.json"

    @property
    def logs(self) -> Path:
        """The folder of logs and exit codes."""
        return self.directory / "logs"

    def batch_log(self, job: str) -> Path:
        """What the batch shell, srun and Slurm say; the job as in `Job.log_id`."""
        return self.logs / f"{job}.batch.log"

    @property
    def parameters(self) -> Path:
        """How many parameters train."""
        return self.directory / "parameters.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.directory / "metrics.jsonl"

    @property
    def attempts(self) -> Path:
        """One JSON object for each attempt that has ended, see `hlrlhf.runs.ledger`."""
        return self.directory / "attempts.jsonl"

    @property
    def samples(self) -> Path:
        """One JSON object for each answer that was kept."""
        return self.directory / "samples.jsonl"

    @property
    def evaluations(self) -> Path:
        """One JSON object for each answer of an evaluation."""
        return self.directory / "evaluations.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The folder of event files, unless ``tensorboard_path`` names another."""
        return self.directory / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """The folder of saved models, unless ``checkpoint_path`` names another that takes them."""
        return self.directory / "checkpoints"

    @property
    def resume(self) -> Path:
        """The folder of the states that the run goes on from, unless ``checkpoint_path`` is set."""
        return self.directory / "resume"

    @property
    def newest_checkpoint(self) -> Path:
        """The step of the newest state in `resume`, and where it is."""
        return self.directory / "checkpoint.json"

    @property
    def skipped(self) -> Path:
        """The folder of the batches at which a run stopped whose numbers were not finite."""
        return self.directory / "skipped"

    @property
    def job_copy(self) -> Path | None:
        """A copy of ``job.json`` in the index, which outlives the directory."""
        return None if self.link is None else self.link.parent.with_name("jobs") / self.link.name

    @property
    def made_at(self) -> float:
        """When the run was made, in Unix seconds: the index never changes a link."""
        return (self.link or self.directory).lstat().st_mtime

    @property
    def is_deleted(self) -> bool:
        """Whether the directory is gone, or cannot be reached from here."""
        return not os.path.isdir(self.directory)  # noqa: PTH112 - Path raises on what it cannot reach

    def write_script(self, text: str) -> None:
        """Write ``job.sbatch``.

        Raises:
            RunError: it cannot be written.
        """
        try:
            _replace(self.script, text)
        except OSError as error:
            raise RunError(f"{self.script}: {error.strerror}") from error

    def within(self, folder: str | Path) -> Path:
        """The run's own place in a folder that runs may share: their names differ."""
        return Path(folder, self.name)

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """While here, nobody else gives the run a job.

        Raises:
            RunError: somebody does just now, or ``settings.yaml`` cannot be written.
        """
        try:
            # For writing: a network's file system has no other exclusive locks.
            file = self.settings_file.open("r+")
        except OSError as error:
            raise RunError(f"{self.name}: {self.settings_file}: {error.strerror}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                words = "another command that starts it is under way"
                raise RunError(f"{self.name}: {words}") from error
            except OSError:
                pass  # a file system without locks: that the job has ended is asked for anyway
            yield

    def set_job_aside(self) -> None:
        """Let the run get another job, which may begin before it is recorded.

        It would take the directory for another job's, as long as ``job.json`` says so.
        """
        with contextlib.suppress(FileNotFoundError):
            self.job_file.rename(self._aside)

    def take_job_back(self) -> None:
        """Undo `set_job_aside`."""
        with contextlib.suppress(OSError):
            self._aside.rename(self.job_file)

    @property
    def _aside(self) -> Path:
        return self.job_file.with_name(".job.json.before")

    def record(self, job: Job) -> None:
        """Write ``job.json``, and its copy in the index if that is possible.

        Raises:
            RunError: ``job.json`` cannot be written.
        """
        text = json.dumps(asdict(job)) + "\n"
        try:
            _replace(self.job_file, text)
            self._aside.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(f"{self.job_file}: {error.strerror}") from error
        if self.job_copy is not None:
            with contextlib.suppress(OSError):
                self.job_copy.parent.mkdir(exist_ok=True)
                _replace(self.job_copy, text)

    def job(self) -> Job | None:
        """The run's job, or None when it was never submitted.

        Raises:
            RunError: ``job.json`` cannot be understood.
        """
        file = self.job_file
        if self.job_copy is not None and self.is_deleted:
            file = self.job_copy
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
            job = Job(
                fields["kind"], str(fields["id"]), fields["cluster"], int(fields["submitted"])
            )
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunError(f"{file}: {error.strerror}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise RunError(f"{file}: not a job's record") from error
        # Both go into commands, and the id into file names.
        plain = re.fullmatch(r"[0-9]+ (None|[\w.-]+)", f"{job.id} {job.cluster}", re.ASCII)
        if job.kind not in ("slurm", "local") or not plain:
            raise RunError(f"{file}: not a job's record")
        return job

    def is_held(self) -> bool:
        """Whether a launcher on this machine, or one that shares its disks, runs the run now."""
        try:
            with self.job_file.open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        return False

    def terminate(self) -> bool:
        """Send SIGTERM to the run's launcher; False when it has ended.

        Raises:
            RunError: the launcher runs on another machine, or is not ours to signal.
        """
        job = self.job()
        if job is None or job.kind != "local" or not self.is_held():
            return False
        pid = int(job.id)
        try:
            # A process id is used again, and means another process on another machine: hold on
            # to the process first, then see that it is the one with our file open.
            process = os.pidfd_open(pid)
        except ProcessLookupError as error:
            raise RunError(f"{self.name}: its launcher runs on another machine") from error
        try:
            if not self._is_open_in(pid):
                raise RunError(f"{self.name}: its launcher runs on another machine")
            signal.pidfd_send_signal(process, signal.SIGTERM)
        except PermissionError as error:
            raise RunError(f"{self.name}: process {pid} belongs to another user") from error
        except ProcessLookupError:
            return False
        finally:
            os.close(process)
        return True

    def _is_open_in(self, pid: int) -> bool:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if link.samefile(self.job_file):
                    return True
        return False

    def discard(self) -> None:
        """Remove the run and everything that `create` made for it."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.forget()
        remove_empty(self.made)

    def forget(self) -> None:
        """Take the run out of the index; the directory stays.

        Raises:
            RunError: the index cannot be changed.
        """
        try:
            # The link last: without it nothing would find the copy.
            for file in filter(None, (self.job_copy, self.link)):
                file.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(f"{error.filename}: {error.strerror}") from error


def _replace(file: Path, text: str) -> None:
    """Write a file whole beside its place and rename it, so that no reader sees half of it."""
    draft = file.with_name(f".{file.name}.new")
    draft.write_text(text, encoding="utf-8")
    draft.replace(file)


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove the folders that are there and empty, in the given order."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
