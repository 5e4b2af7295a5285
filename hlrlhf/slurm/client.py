"""The only place that runs Slurm's commands.

All of them get the caller's environment without the variables that would change what they do:
those of a surrounding job (inherited, ``SLURM_CPU_BIND`` alone can slow a job down threefold) and
the user's own defaults of output formats and filters.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from hlrlhf.errors import HlrlhfError

# Slurm waits for a minute of its own for a lost configuration file, and some ten seconds for a
# controller that does not answer; a loaded controller may take its time.
TIMEOUT = 60.0

QUEUE_FIELDS = "%A|%T|%V|%S|%M|%D|%P|%N|%r"
ACCOUNTING_FIELDS = "JobIDRaw,State,ExitCode,Submit,Start,End,ElapsedRaw,NNodes,Partition,NodeList"

_SCRUBBED = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SACCT_", "SCANCEL_", "PMI")
# How to reach Slurm, as opposed to what to do there.
_KEPT = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT"}
# Whole phrases of Slurm's: a site's submit plugin may refuse a job in words of its own.
_UNREACHABLE = re.compile(
    r"unable to contact slurm|can't be reached now|problem talking to (the )?database|"
    r"socket timed out on|zero bytes were transmitted|protocol authentication error|"
    r"munge encode failed|unable to process configuration file|configuration source|"
    r"connection refused|in standby mode|incompatible versions of client and server",
    re.IGNORECASE,
)


class SlurmError(HlrlhfError):
    """Slurm could not be reached, or one of its commands is not there."""

    exit_code = 3


class NoAnswer(SlurmError):  # noqa: N818 - no failure of ours
    """Slurm may have done what it was asked, or not."""


class Rejected(HlrlhfError):  # noqa: N818 - Slurm's answer, not a failure of ours
    """Slurm was reached and refused; carries its own words."""

    exit_code = 2


def submit(script: Path, environ: Mapping[str, str] = os.environ) -> tuple[str, str | None]:
    """Submit a batch script.

    Returns:
        The job's id, and the cluster if sbatch names one.

    Raises:
        SlurmError: Slurm could not be reached.
        NoAnswer: sbatch took too long, or what it printed is not a job id.
        Rejected: sbatch refused the job; says what was asked for.
    """
    done = _run(["sbatch", "--parsable", str(script)], environ)
    _check_job(done, script)
    job = parse_submitted(done.stdout)
    if job is None:
        raise NoAnswer(f"sbatch printed no job id: {_words(done)}")
    return job


def estimate(script: Path, environ: Mapping[str, str] = os.environ) -> str:
    """What Slurm would do with the script: sbatch's own estimate of the start; submits nothing.

    Raises:
        SlurmError: Slurm could not be reached.
        Rejected: sbatch would refuse the job; says what was asked for.
    """
    done = _run(["sbatch", "--test-only", str(script)], environ)
    _check_job(done, script)
    return _words(done)


def queue(
    ids: Sequence[str], cluster: str | None = None, environ: Mapping[str, str] = os.environ
) -> str:
    """Lines of `QUEUE_FIELDS`, times in Unix seconds, of those jobs that the controller knows.

    Raises:
        SlurmError: Slurm could not be reached.
    """
    arguments = ["-h", "-r", "-t", "all", "-j", ",".join(ids), "-o", QUEUE_FIELDS]
    done = _run(["squeue", *_on(cluster), *arguments], environ)
    # Asked for one job only, squeue fails when it is not in the queue.
    if done.returncode and "invalid job id" not in done.stderr.lower():
        raise SlurmError(_words(done))
    return done.stdout


def named(name: str, environ: Mapping[str, str] = os.environ) -> list[str]:
    """The ids of the user's jobs of this name that wait or run.

    Raises:
        SlurmError: Slurm could not be reached.
    """
    user = str(os.getuid())
    done = _run(["squeue", "-h", f"--user={user}", f"--name={name}", "-o", "%A"], environ)
    if done.returncode:
        raise SlurmError(_words(done))
    return done.stdout.split()


def accounting(
    ids: Sequence[str],
    since: str,
    cluster: str | None = None,
    environ: Mapping[str, str] = os.environ,
) -> str:
    """Lines of `ACCOUNTING_FIELDS`, times in Unix seconds, one for every attempt of the jobs.

    Args:
        ids: the jobs.
        since: leave out what ended before this time (``YYYY-MM-DDTHH:MM:SS``, local).
        cluster: None for the default one.
        environ: the caller's environment.

    Raises:
        SlurmError: the site has no accounting, or it could not be reached.
    """
    arguments = ["-n", "-X", "-P", "-D", "-j", ",".join(ids), "-S", since, "-o", ACCOUNTING_FIELDS]
    done = _run(["sacct", *_on(cluster), *arguments], environ)
    if done.returncode:
        raise SlurmError(_words(done))
    return done.stdout


def cancel(
    ids: Sequence[str], cluster: str | None = None, environ: Mapping[str, str] = os.environ
) -> None:
    """Cancel jobs; one that has ended meanwhile is no error.

    Raises:
        SlurmError: Slurm could not be reached.
        Rejected: scancel refused at least one of them.
    """
    done = _run(["scancel", *_on(cluster), *ids], environ)
    if not already_ended(done.stderr):
        _check(done)


def signal(
    job_id: str, name: str, cluster: str | None = None, environ: Mapping[str, str] = os.environ
) -> None:
    """Send a signal to the ranks of a job, not to its script.

    Raises:
        SlurmError: Slurm could not be reached.
        Rejected: scancel refused.
    """
    done = _run(["scancel", *_on(cluster), f"--signal={name}", job_id], environ)
    if not already_ended(done.stderr):
        _check(done)


def parse_submitted(text: str) -> tuple[str, str | None] | None:
    """Job id and cluster from what ``sbatch --parsable`` printed.

    A site's submit plugin may print lines of its own before.
    """
    for line in reversed(text.splitlines()):
        if match := re.fullmatch(r"([0-9]+)(?:;([^\s;]+))?", line.strip()):
            return match[1], match[2]
    return None


def already_ended(text: str) -> bool:
    """Whether all that scancel complained of is that the job has ended."""
    lines = [line for line in text.splitlines() if line.strip()]
    return bool(lines) and all("already completing or completed" in line for line in lines)


def scrub(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what steers Slurm's commands."""
    return {
        name: value
        for name, value in environ.items()
        if name in _KEPT or not name.startswith(_SCRUBBED)
    }


def _on(cluster: str | None) -> list[str]:
    return [f"--clusters={cluster}"] if cluster else []


def _run(command: Sequence[str], environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    own = scrub(environ)
    if command[0] in ("squeue", "sacct"):
        own["SLURM_TIME_FORMAT"] = "%s"
    try:
        return subprocess.run(
            command,
            env=own,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT,
        )
    except FileNotFoundError as error:
        raise SlurmError(f"{command[0]}: not found; is this a machine with Slurm?") from error
    except PermissionError as error:
        raise SlurmError(f"{command[0]}: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        said = (error.stderr or b"").decode("utf-8", "replace").strip()
        raise NoAnswer(
            f"{command[0]} did not answer within {TIMEOUT:g} s" + (f": {said}" if said else "")
        ) from error


def _check(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        words = _words(done)
        raise (SlurmError if _UNREACHABLE.search(words) else Rejected)(words)


def _check_job(done: subprocess.CompletedProcess[str], script: Path) -> None:
    try:
        _check(done)
    except Rejected as error:
        words = f"Slurm refuses this job: {error}\nit asked for {' '.join(_request(script))}"
        raise Rejected(words) from error


def _request(script: Path) -> list[str]:
    """The directives of a script but for those that only name its job and its files."""
    own = tuple(f"#SBATCH --{name}=" for name in ("job-name", "chdir", "output", "open-mode"))
    lines = script.read_text(encoding="utf-8").splitlines()
    comments = itertools.takewhile(lambda line: line.startswith("#") or not line.strip(), lines)
    return [
        line.removeprefix("#SBATCH").strip()
        for line in comments
        if line.startswith("#SBATCH") and not line.startswith(own)
    ]


def _words(done: subprocess.CompletedProcess[str]) -> str:
    """What a command said, or its exit code if it said nothing."""
    text = "\n".join(part.strip() for part in (done.stderr, done.stdout) if part.strip())
    return text or f"{done.args[0]}: exit code {done.returncode}"
