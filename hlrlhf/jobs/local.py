"""Runs on this machine, one process per device; a place to run at, see `hlrlhf.jobs.start`."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import platform
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import FrameType
from typing import IO

from hlrlhf.jobs import start as starting
from hlrlhf.jobs.ports import PortTakenError, rendezvous_port
from hlrlhf.jobs.start import Started
from hlrlhf.runs import STOPPED, Attempt, Job, Outcome, Run, attempts, ledger
from hlrlhf.settings.errors import Problem, SettingsError
from hlrlhf.settings.layers import Resolved
from hlrlhf.settings.schema import Settings

_LOOK = 0.1  # seconds between looks at whether a rank has ended
_PR_SET_PDEATHSIG = 1  # of prctl(2)


def check(resolved: Resolved) -> None:
    """Refuse what one machine without Slurm cannot do.

    Raises:
        SettingsError: more than one node, or a container.
    """
    settings = resolved.settings
    problems = []
    if settings.num_nodes != 1:
        origin = resolved.values["num_nodes"].origin
        where = f"num_nodes = {settings.num_nodes} ({origin})"
        problems.append(Problem(where, "--local runs on one node; set num_nodes=1"))
    if settings.container.kind != "none":
        origin = resolved.values["container.kind"].origin
        where = f"container.kind = {settings.container.kind!r} ({origin})"
        problems.append(Problem(where, "--local runs without a container; set container.kind=none"))
    if problems:
        raise SettingsError(problems)


def start(resolved: Resolved, environ: Mapping[str, str]) -> Started:
    """See `Place.start`; this process is the job, and `finish` runs it."""
    made = starting.make(resolved, environ)
    job = Job("local", str(os.getpid()), None, int(time.time()))
    try:
        made.record(job)
    except BaseException:
        made.discard()
        raise
    return Started(made, job)


def resume(resolved: Resolved, run: Run, environ: Mapping[str, str]) -> Started:
    """See `Place.resume`; this process is the job, and `finish` runs it."""
    before = run.job()
    job = Job("local", str(os.getpid()), None, int(time.time()))
    run.record(job)
    return Started(run, job, before=before)


def finish(
    resolved: Resolved, started: Started, environ: Mapping[str, str], say: Callable[[str], None]
) -> int:
    """See `Place.finish`.

    Raises:
        SettingsError: HL_MASTER_PORT is taken; nothing is left of the run.
    """
    if resolved.settings.environment.setup:
        say("environment.setup is for Slurm's nodes; here, the environment is used as it is")
    made = started.run
    try:
        outcome = run(resolved, made.directory, environ)
    except SettingsError:
        # Nothing was started.
        if started.before is not None:
            made.record(started.before)
        else:
            made.discard()
        raise
    words = {0: "done", STOPPED: outcome.why}
    failed = f"failed with exit code {outcome.code}: {outcome.why}"
    say(f"run {made.name}: {words.get(outcome.code, failed)}")
    say(f"everything is in {made.directory}")
    return outcome.code


def run(
    resolved: Resolved,
    directory: Path,
    environ: Mapping[str, str],
    command: Sequence[str] = (sys.executable, "-m", "hlrlhf.trainer"),
) -> Outcome:
    """Run the ranks to their end; all that they print goes to the log and to standard error.

    A first SIGINT, SIGTERM or SIGUSR1 asks the ranks to stop and save, a second one ends them.

    Args:
        resolved: the settings, passed by `check`.
        directory: the run directory, with ``job.json`` in it.
        environ: the environment of the ranks, before what a run adds.
        command: what a rank runs; the run directory is added as its argument.

    Returns:
        What the first rank with something to say left, or what the launcher saw of it. It is also
        left in ``logs/local.N.exit``, N from 0, and in ``attempts.jsonl``.

    Raises:
        SettingsError: HL_MASTER_PORT is taken.
    """
    settings = resolved.settings
    attempt = _next(Run(directory))
    log = Path(settings.log_file or attempt.log)
    log.parent.mkdir(parents=True, exist_ok=True)
    port = rendezvous_port(
        settings.master_port, keep=not resolved.is_default("master_port"), seed=os.getpid()
    )
    with contextlib.ExitStack() as stack:
        # The lock, not the process id, says that this launcher lives: ids are reused.
        job = stack.enter_context(attempt.run.job_file.open("r+"))
        fcntl.flock(job, fcntl.LOCK_EX)
        # Without a buffer, which would keep what a full disk has not taken, and fail for it later.
        output = stack.enter_context(log.open("ab", buffering=0))
        try:
            shared = _environment(settings, environ, stack.enter_context(port))
            shared["HLRLHF_ATTEMPT"] = str(attempt.number)
        except PortTakenError as error:
            raise SettingsError(
                [Problem("master_port", f"{error}; set another one or none")]
            ) from error
        with contextlib.suppress(OSError):
            beginning = f"{int(time.time())}\n{platform.node()}\n"
            attempt.began.write_text(beginning, encoding="utf-8")
        ranks = stack.enter_context(_Ranks(output, attempt))
        stack.enter_context(_signals(ranks))
        for rank in range(settings.world_size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.start([*command, str(directory)], directory, shared | own)
        ranks.wait()
        outcome = attempt.heard() or Outcome(
            1, "the ranks ended without a word that the run is complete"
        )
        with contextlib.suppress(OSError):
            attempt.ended.write_text(str(outcome), encoding="utf-8")
            ledger.enter(attempt.run)
    return outcome


def _next(run: Run) -> Attempt:
    """The attempt at a run that comes after those that it has had on this machine."""
    before = attempts(run, Job("local", str(os.getpid()), None, 0))
    return Attempt(run, "local", max(before, default=-1) + 1)


def _environment(settings: Settings, environ: Mapping[str, str], port: int) -> dict[str, str]:
    """What all ranks have; the batch script's ``environment`` block is its other half."""
    threads = max(1, len(os.sched_getaffinity(0)) // settings.world_size)
    made = {
        "WORLD_SIZE": str(settings.world_size),
        "LOCAL_WORLD_SIZE": str(settings.world_size),
        "MASTER_ADDR": settings.master_addr or "127.0.0.1",
        "MASTER_PORT": str(port),
        "HLRLHF_JOB": "local",
        "PYTHONUNBUFFERED": "1",
    }
    if settings.device == "hpu":
        made["PT_HPU_LAZY_MODE"] = str(int(settings.hpu.lazy_mode))
        if settings.hpu.lazy_mode:
            made["PT_HPU_ENABLE_LAZY_COLLECTIVES"] = "true"
    if settings.network_interface:
        libraries = {"hpu": ["HCCL", "GLOO"], "cuda": ["NCCL", "GLOO"], "cpu": ["GLOO"]}
        for library in libraries[settings.device]:
            made[f"{library}_SOCKET_IFNAME"] = settings.network_interface
    return {"OMP_NUM_THREADS": str(threads), **environ, **made}


class _Ranks:
    """The processes of a run. Leaving the context ends those that are left.

    Args:
        log: gets every line that a rank prints.
        attempt: of which they are.
    """

    def __init__(self, log: FileIO, attempt: Attempt):
        self._log = log
        self._attempt = attempt
        self._processes: list[subprocess.Popen[bytes]] = []
        self._printed = selectors.DefaultSelector()

    def __enter__(self) -> _Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.send(signal.SIGKILL)
        for process in self._processes:
            process.wait()
        self._printed.close()

    def start(self, command: list[str], directory: Path, environ: dict[str, str]) -> None:
        """Start one rank, in a session of its own: Ctrl-C is for the launcher to pass on."""
        process = subprocess.Popen(
            command,
            cwd=directory,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            start_new_session=True,
            preexec_fn=functools.partial(_end_with, os.getpid(), ctypes.CDLL(None)),
        )
        self._processes.append(process)
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        self._printed.register(process.stdout, selectors.EVENT_READ, _Lines(process.stdout))

    def send(self, number: signal.Signals) -> None:
        """Signal every rank that still runs."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def end(self) -> None:
        """End the ranks now."""
        self._attempt.say(Outcome(128 + signal.SIGKILL, "ended without waiting for a save"))
        self.send(signal.SIGKILL)

    def wait(self) -> None:
        """Pass output on until all ranks have ended; when one fails, the others are ended."""
        while any(process.poll() is None for process in self._processes):
            self._pass_on(_LOOK)
            self._look()
        self._look()
        while self._pass_on(0):
            pass

    def _look(self) -> None:
        """Speak for ranks that cannot tell of their end any more, and end those left behind."""
        codes = [process.poll() for process in self._processes]
        failed = [(code, rank) for rank, code in enumerate(codes) if code not in (None, 0, STOPPED)]
        if failed:
            # Signals first: a rank that fails by itself may do so because another one is gone.
            code, rank = min(failed)
            words = f"rank {rank} ended with exit code {code}"
            if code < 0:
                code, words = 128 - code, f"rank {rank} was ended by {signal.Signals(-code).name}"
            self._attempt.say(Outcome(code, words))
            self.send(signal.SIGKILL)

    def _pass_on(self, timeout: float) -> bool:
        """Wait at most `timeout` seconds for output and pass on whole lines; whether there was."""
        if not self._printed.get_map():
            # The ranks have closed their output but still run.
            time.sleep(timeout)
        ready = self._printed.select(timeout)
        for key, _ in ready:
            text, more = key.data.read()
            if not more:
                self._printed.unregister(key.fileobj)
            # Neither a full disk nor a terminal that is gone must end the run.
            with contextlib.suppress(OSError):
                self._log.write(text)
            with contextlib.suppress(OSError):
                sys.stderr.buffer.write(text)
                sys.stderr.flush()
        return bool(ready)


def _end_with(launcher: int, libc: ctypes.CDLL) -> None:
    """In a rank, before its program begins: have Linux end it once the launcher has ended.

    A launcher that is killed can end nobody. Its ranks would train on beside those of the next
    attempt, on the same devices, and take the port that the launcher's end has left free.
    """
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:
        os.kill(os.getpid(), signal.SIGKILL)


class _Lines:
    """What a rank prints, cut at line ends so that those of two ranks do not mix."""

    def __init__(self, pipe: IO[bytes]):
        self._pipe = pipe
        self._rest = b""

    def read(self) -> tuple[bytes, bool]:
        """The whole lines that there are now, and whether there may be more."""
        chunk = self._pipe.read()
        if chunk:
            lines, end, self._rest = (self._rest + chunk).rpartition(b"\n")
            return lines + end, True
        rest, self._rest = self._rest, b""
        return rest + b"\n" if rest else b"", chunk is None


@contextlib.contextmanager
def _signals(ranks: _Ranks) -> Iterator[None]:
    """While here, the first signal asks the ranks to stop and save, the second ends them."""
    asked = False

    def act(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            ranks.end()
        else:
            asked = True
            os.write(
                2, b"hlrlhf: stopping, the step in hand done or given up; once more to end now\n"
            )
            ranks.send(signal.SIGUSR1)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    # One that is ignored, as nohup does with SIGHUP, stays ignored.
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, act) for number in heard}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
