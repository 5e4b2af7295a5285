"""The launcher without Slurm, with small ranks of real processes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import mandatory
import pytest
from cluster import until

from hlrlhf.jobs import local, ports
from hlrlhf.jobs.ports import PortTakenError, is_free, rendezvous_port
from hlrlhf.settings import Resolved, SettingsError, resolve
from hlrlhf.settings.layers import dump

MANDATORY = mandatory.MANDATORY | {"HL_DEVICE": "cpu", "HL_DEVICES_PER_NODE": "2"}


def settings(folder: Path, *flags: str) -> Resolved:
    return resolve(environ=MANDATORY | {"HL_BASE_OUT_PATH": str(folder)}, flags=flags)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A run directory."""
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    (run / "job.json").write_text("{}")
    return run


Start = Callable[..., int]

# What every piece of Python begins with.
PRELUDE = """
import os, pathlib, signal, sys, time
rank = int(os.environ['RANK'])
def leave(code, why=''):
    own = f"{os.environ['HLRLHF_JOB']}.{os.environ['HLRLHF_ATTEMPT']}"
    pathlib.Path(f"logs/{own}.rank").write_text(f'{code}\\n{why}\\n')
    sys.exit(code)
"""


@pytest.fixture
def start(directory: Path) -> Start:
    """Run a piece of Python as every rank, which then leaves with success; the exit code."""

    def run(code: str, *flags: str, **environ: str) -> int:
        command = (sys.executable, "-c", f"{PRELUDE}{code}\nleave(0)")
        resolved = settings(directory.parent, *flags)
        return local.run(resolved, directory, os.environ | environ, command).code

    return run


def test_success(directory: Path, start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    code = start("print('rank', rank, os.getcwd(), sys.argv[1]); sys.stdout.write('no line end')")
    assert code == 0
    log = (directory / "logs" / "local.0.log").read_text()
    assert sorted(log.splitlines()) == ["no line end"] * 2 + [
        f"rank {rank} {directory} {directory}" for rank in (0, 1)
    ]
    assert capfd.readouterr().err == log
    assert (directory / "logs" / "local.0.exit").read_text() == "0\n"


def test_environment(directory: Path, start: Start) -> None:
    program = """
import json
json.dump(dict(os.environ), open(f'{rank}.json', 'w'))
"""
    flags = ("device=hpu", "hpu.lazy_mode=true", "network_interface=lo")
    assert start(program, *flags, OTHER="kept") == 0
    for rank in (0, 1):
        found = json.loads((directory / f"{rank}.json").read_text())
        assert {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "HLRLHF_JOB": "local",
            "HLRLHF_ATTEMPT": "0",
            "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 2)),
            "PT_HPU_LAZY_MODE": "1",
            "HCCL_SOCKET_IFNAME": "lo",
            "GLOO_SOCKET_IFNAME": "lo",
            "OTHER": "kept",
        }.items() <= found.items()


def test_threads_stay_as_the_user_set_them(directory: Path, start: Start) -> None:
    program = "open(f'{rank}', 'w').write(os.environ['OMP_NUM_THREADS'])"
    assert start(program, OMP_NUM_THREADS="7") == 0
    assert (directory / "0").read_text() == "7"


def test_a_failing_rank_ends_the_others(directory: Path, start: Start) -> None:
    began = time.monotonic()
    assert start("if rank: leave(9, 'broken')\ntime.sleep(60)") == 9
    assert time.monotonic() - began < 30
    assert (directory / "logs" / "local.0.exit").read_text() == "9\nbroken\n"


def test_nor_does_one_stay_that_is_stopped(directory: Path, start: Start) -> None:
    program = """
other = pathlib.Path('other')
if rank:
    other.write_text(f'{os.getpid()}\\n')
    os.kill(os.getpid(), signal.SIGSTOP)
while not other.exists() or not other.read_text(): time.sleep(0.01)
while ') T ' not in pathlib.Path(f'/proc/{int(other.read_text())}/stat').read_text():
    time.sleep(0.01)
leave(1, 'rank 1 does not answer')
"""
    assert start(program) == 1
    assert (directory / "logs" / "local.0.exit").read_text() == "1\nrank 1 does not answer\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int((directory / "other").read_text()), 0)


def test_a_killed_rank_counts_as_in_a_shell(directory: Path, start: Start) -> None:
    assert start("if rank: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)") == 137
    said = (directory / "logs" / "local.0.exit").read_text()
    assert said == "137\nrank 1 was ended by SIGKILL\n"


def test_no_success_without_a_word_from_the_ranks(directory: Path, start: Start) -> None:
    assert start("sys.exit(0)") == 1
    assert "without a word" in (directory / "logs" / "local.0.exit").read_text()


def test_stopped_early(start: Start) -> None:
    assert start("leave(75)") == 75


# A handler in Python would wait for the end of a sleep that begins just when the signal comes.
STOPS = """
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
print('ready', flush=True)
signal.sigwait({signal.SIGUSR1})
print('stopping', flush=True)
leave(75)
"""
GOES_ON = STOPS.replace("leave(75)", "time.sleep(60)")


@pytest.fixture
def launcher(directory: Path) -> Callable[[str], subprocess.Popen[bytes]]:
    """The launcher as a process of its own, up to where both ranks are ready."""

    def launch(code: str) -> subprocess.Popen[bytes]:
        (directory / "settings.yaml").write_text(dump(settings(directory.parent)))
        program = PRELUDE + code
        start = f"""
import os, sys
from pathlib import Path
from hlrlhf.jobs import local
from hlrlhf.settings import resolve
directory = Path({str(directory)!r})
resolved = resolve(files=[directory / 'settings.yaml'])
outcome = local.run(resolved, directory, os.environ, (sys.executable, '-c', {program!r}))
sys.exit(outcome.code)
"""
        process = subprocess.Popen([sys.executable, "-c", start], start_new_session=True)
        log = directory / "logs" / "local.0.log"
        until(lambda: log.exists() and log.read_text().count("ready") == 2, "the ranks")
        return process

    return launch


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_stops_the_ranks_gracefully(
    directory: Path, launcher: Callable[[str], subprocess.Popen[bytes]], number: signal.Signals
) -> None:
    process = launcher(STOPS)
    # As a terminal does it: to the whole group, of which the ranks are no part.
    os.killpg(process.pid, number)
    assert process.wait(timeout=30) == 75
    assert (directory / "logs" / "local.0.log").read_text().count("stopping") == 2
    assert (directory / "logs" / "local.0.exit").read_text() == "75\n"


def test_a_second_signal_ends_them(
    directory: Path, launcher: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    process = launcher(GOES_ON)
    process.send_signal(signal.SIGINT)
    log = directory / "logs" / "local.0.log"
    until(lambda: log.read_text().count("stopping") == 2, "the ranks' own end")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 128 + signal.SIGKILL


def test_nor_does_one_outlive_a_killed_launcher(
    directory: Path, launcher: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    """It would train beside the ranks of the next attempt, on their devices and on their port."""
    process = launcher("print('ready', os.getpid(), flush=True)\nsignal.pause()")
    words = (directory / "logs" / "local.0.log").read_text().split()
    ranks = [os.pidfd_open(int(word)) for word in words if word.isdigit()]
    process.kill()
    process.wait()
    try:
        until(lambda: set(select.select(ranks, [], [], 0)[0]) == set(ranks), "the ranks' end")
    finally:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(rank, signal.SIGKILL)
            os.close(rank)


def test_nor_does_one_begin_whose_launcher_is_gone() -> None:
    code = "import ctypes, os; from hlrlhf.jobs import local;"
    code += "local._end_with(os.getpid(), ctypes.CDLL(None))"  # which is not its parent's
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL


def test_the_lock_says_that_the_launcher_lives(directory: Path, start: Start) -> None:
    held = []

    def probe() -> None:
        until((directory / "0").exists, "the rank")
        with (directory / "job.json").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(True)
        (directory / "go").touch()

    prober = threading.Thread(target=probe)
    prober.start()
    program = "open(f'{rank}', 'w').close()\nwhile not os.path.exists('go'): time.sleep(0.01)"
    assert start(program) == 0
    prober.join()
    assert held == [True]
    with (directory / "job.json").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_users_port_is_kept_or_the_run_fails(directory: Path, start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(SettingsError, match=f"HL_MASTER_PORT={port} is taken"):
            start("", f"master_port={port}")
    program = "open(f'{rank}', 'w').write(os.environ['MASTER_PORT'])"
    assert start(program, f"master_port={port}") == 0
    assert (directory / "0").read_text() == str(port)


def test_the_default_port_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Other runs on this machine claim the port too.
    monkeypatch.setattr(ports, "_NAMESPACE", tmp_path / "namespace")
    (tmp_path / "namespace").touch()
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    # Both are in their context at once, and nobody listens yet.
    with (
        rendezvous_port(29500, keep=False, seed=1) as first,
        rendezvous_port(29500, keep=False, seed=2) as second,
    ):
        assert first != second
        assert not low <= second <= high
        assert is_free(second)
        # Where it would look first is what it must not take.
        with rendezvous_port(second, keep=False, seed=2) as third:
            assert third != second
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        with rendezvous_port(taken, keep=False, seed=1) as port:
            assert port != taken
        with pytest.raises(PortTakenError), rendezvous_port(taken, keep=True, seed=1):
            pass


def test_the_log_goes_where_the_user_wants_it(tmp_path: Path, start: Start) -> None:
    log = tmp_path / "elsewhere" / "x.log"
    assert start("print('hello')", f"log_file={log}") == 0
    assert start("print('hello')", f"log_file={log}") == 0
    assert log.read_text() == "hello\n" * 4


def test_a_log_that_cannot_be_written_ends_no_run(
    start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    """As on a disk that is full."""
    assert start("print('hello')", "log_file=/dev/full") == 0
    assert capfd.readouterr().err == "hello\n" * 2


def test_what_one_machine_cannot_do(tmp_path: Path) -> None:
    flags = ("num_nodes=2", "gbs=64", "container.kind=docker", "container.image=x")
    with pytest.raises(SettingsError) as caught:
        local.check(settings(tmp_path, *flags))
    assert "num_nodes = 2 (flag --set)" in str(caught.value)
    assert "container.kind = 'docker' (flag --set)" in str(caught.value)
