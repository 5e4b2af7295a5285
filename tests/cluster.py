"""A real Slurm cluster on this machine: two nodes with eight ``hpu`` each, in a folder of its own.

Jobs in the partition ``high`` preempt those in ``low``, which get a minute of grace.

slurmctld, two slurmd, munge and, with accounting, slurmdbd on MariaDB all keep their sockets,
ports, keys and data to themselves, so that clusters may stand side by side and nothing of the
machine's own Slurm is touched. The daemons end with the test session, even when it is killed.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from hlrlhf.runs import Outcome, Run

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "setpriv")
ACCOUNTING_COMMANDS = ("slurmdbd", "mariadbd", "mariadb-install-db", "sacctmgr", "sacct")
# For stand-ins of the trainer in bash: the last words of a rank, its exit code and why.
LEAVE = """
leave() {
    (set -C; printf '%s\\n' "$1" "${2:-}" >"logs/$HLRLHF_JOB.$HLRLHF_ATTEMPT.rank") 2>/dev/null
    exit "$1"
}
"""
SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")


def missing() -> list[str]:
    """What this machine lacks to run the cluster; empty when it can."""
    commands = COMMANDS + ACCOUNTING_COMMANDS
    lacking = [name for name in commands if shutil.which(name, path=daemons_path()) is None]
    return lacking + (["root"] if os.geteuid() else [])


def until(condition: Callable[[], object], what: str, seconds: float = 240) -> None:
    """Wait until `condition` holds.

    Raises:
        TimeoutError: it did not within `seconds`; says `what` was waited for.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s in vain for {what}")
        time.sleep(0.05)


def whole(file: Path) -> Callable[[], object]:
    """Whether an attempt's word of its end is there, and not just about to be written."""
    return lambda: Outcome.read(file)


def job_id(run: Run) -> str:
    """The id of a run that was submitted."""
    job = run.job()
    assert job is not None
    return job.id


def count_calls(folder: Path, path: str) -> tuple[str, Path]:
    """A PATH on which each command of Slurm's leaves its name in a file first, and that file."""
    calls = folder / "calls"
    folder.mkdir()
    for name in ("sbatch", "squeue", "sacct", "scancel", "scontrol", "sinfo"):
        before = folder / name
        real = shutil.which(name, path=path)
        before.write_text(f'#!/bin/sh\necho {name} >>"{calls}"\nexec "{real}" "$@"\n')
        before.chmod(0o755)
    return f"{folder}{os.pathsep}{path}", calls


def spawn(log: Path, environ: dict[str, str], *command: str) -> subprocess.Popen[bytes]:
    """Start a daemon that gets TERM when this process dies."""
    with log.open("ab") as out:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", "--", *command],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )


class Cluster:
    """The cluster, once started.

    Attributes:
        folder: everything of it, logs included.
        environ: what a user's shell on this cluster has: SLURM_CONF, and HL_MASTER_ADDR because
            the names n1 and n2 resolve nowhere.
        accounting: whether sacct works.
    """

    def __init__(self, *, accounting: bool = True, min_job_age: int = 300):
        self.accounting = accounting
        # Not pytest's folder: the path of a Unix socket holds about 100 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)
        self._min_job_age = min_job_age
        self._daemons: list[subprocess.Popen[bytes]] = []
        outside = ("SLURM", "SBATCH", "SRUN", "SQUEUE", "SACCT", "HL_", "PMI", "MYSQL")
        self.environ = {k: v for k, v in os.environ.items() if not k.startswith(outside)} | {
            "PATH": daemons_path(),
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "MYSQL_UNIX_PORT": str(self.folder / "mariadb.sock"),
            "HL_MASTER_ADDR": "127.0.0.1",
        }

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            print(f"the cluster did not start; its daemons' logs are in {self.folder}")
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: str, check: bool = True) -> str:
        """A Slurm command's standard output."""
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.stderr or done.stdout}")
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What ``scontrol show job`` says, by key; empty when the controller forgot the job."""
        text = self.run("scontrol", "-o", "show", "job", job_id, check=False)
        return dict(pair.split("=", 1) for pair in text.split() if "=" in pair)

    def wait(self, job_id: str, *states: str) -> str:
        """Wait until the controller says that the job is in one of `states`; returns which."""
        until(
            lambda: self.job(job_id).get("JobState") in states,
            f"job {job_id} to be {' or '.join(states)}",
        )
        return self.job(job_id)["JobState"]

    @contextlib.contextmanager
    def without(self, node: str) -> Iterator[None]:
        """The cluster while its controller takes a node for dead whose processes live on."""
        (slurmd,) = (daemon for daemon in self._daemons if daemon.args[-1] == node)  # type: ignore[index]
        slurmd.send_signal(signal.SIGSTOP)
        try:
            self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=broken")
            yield
        finally:
            slurmd.send_signal(signal.SIGCONT)
            self._back(node)

    def _of_node(self, node: str) -> list[int]:
        """The process groups of this cluster's jobs on a node, and last those of their keepers."""
        names = {f"SLURMD_NODENAME={node}", f"SLURM_CONF={self.environ['SLURM_CONF']}"}
        jobs, keepers = set(), set()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                environ = (folder / "environ").read_bytes().decode(errors="replace")
                if names <= set(environ.split("\0")):
                    status = (folder / "status").read_text()
                    parent = int(status.partition("\nPPid:")[2].split()[0])
                    jobs.add(os.getpgid(int(folder.name)))
                    # It writes its title over its environment.
                    if Path(f"/proc/{parent}/cmdline").read_bytes().startswith(b"slurmstepd"):
                        keepers.add(os.getpgid(parent))
        return [*jobs, *(keepers - jobs)]

    def _back(self, node: str) -> None:
        def back() -> bool:
            self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
            idle = self.run("sinfo", "-h", "-p", "main", "-n", node, "-o", "%T", check=False)
            return idle.strip() in ("idle", "mixed", "allocated")

        until(back, f"{node} to come back")

    @contextlib.contextmanager
    def configured(self, line: str) -> Iterator[None]:
        """The cluster with one more line in its slurm.conf."""
        file = self.folder / "slurm.conf"
        text = file.read_text()
        file.write_text(f"{text}{line}\n")
        self.run("scontrol", "reconfigure")
        try:
            yield
        finally:
            file.write_text(text)
            self.run("scontrol", "reconfigure")

    @contextlib.contextmanager
    def away(self, *command: str, by: signal.Signals = signal.SIGKILL) -> Iterator[None]:
        """The cluster while one of its daemons has been ended; afterwards it is started again.

        Args:
            command: how it was started, such as ``slurmd -D -N n1``.
            by: slurmctld, which writes its state every few seconds, forgets what was since when
                it is killed.
        """
        (daemon,) = (one for one in self._daemons if _started(one)[: len(command)] == [*command])
        whole = _started(daemon)
        daemon.send_signal(by)
        daemon.wait()
        self._daemons.remove(daemon)
        try:
            yield
        finally:
            self._spawn(*whole)

    @contextlib.contextmanager
    def crashed(self, node: str) -> Iterator[None]:
        """The cluster while a node is dead, with all that ran on it; afterwards it is back."""
        with self.away("slurmd", "-D", "-N", node):
            # All at once: none lives to see the others' end, and to tell of it. A group that is
            # stopped is woken by the end of its keeper, which therefore dies after it.
            there = self._of_node(node)
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for group in there:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(group, number)
            self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=broken")
            yield
        self._back(node)

    def start_now(self, job_id: str) -> None:
        """Start a requeued job soon, rather than after Slurm's two minutes.

        Not at once: the end of the attempt before revokes all that was launched in that second.
        """
        until(lambda: self.job(job_id).get("JobState") == "PENDING", f"job {job_id} to be PENDING")
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now+2")

    def stop(self) -> None:
        """Cancel what runs, then end the daemons in the reverse order of their start."""
        if self._daemons:
            self.run("scancel", "--full", "--signal=KILL", "--user=root", check=False)
            self.run("scancel", "--user=root", check=False)
            idle = ("squeue", "-h", "-t", "PENDING,RUNNING,COMPLETING,SUSPENDED")
            try:
                until(lambda: not self.run(*idle, check=False), "the jobs to end", 15)
            except TimeoutError as error:
                print(error)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()

    def _start(self) -> None:
        self._start_munge()
        ports = _free_ports(4)
        self._configure(ports)
        if self.accounting:
            self._start_accounting(ports[3])
        self._spawn("slurmctld", "-D", "-i")
        for node in ("n1", "n2"):
            self._spawn("slurmd", "-D", "-N", node)
        until(
            lambda: (
                self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).split()
                == ["idle"] * 2
            ),
            f"two idle nodes; see {self.folder}",
        )

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        self._spawn(
            "munged",
            "--foreground",
            "--origin=127.0.0.1",
            f"--socket={self.folder}/munge.sock",
            f"--key-file={key}",
            f"--seed-file={self.folder}/munge.seed",
            f"--pid-file={self.folder}/munge.pid",
        )
        until((self.folder / "munge.sock").exists, "munge's socket")

    def _start_accounting(self, port: int) -> None:
        data = self.folder / "mariadb"
        self.run(
            "mariadb-install-db",
            "--no-defaults",
            "--user=root",
            f"--datadir={data}",
            # In /tmp, two clusters that start at one time would take each other's tables.
            f"--tmpdir={self.folder}",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
            "--skip-name-resolve",
        )
        self._spawn(
            "mariadbd",
            "--no-defaults",
            "--user=root",
            f"--datadir={data}",
            f"--tmpdir={self.folder}",
            f"--socket={self.folder}/mariadb.sock",
            f"--pid-file={self.folder}/mariadb.pid",
            "--skip-networking",
            "--innodb-flush-log-at-trx-commit=0",
        )
        until((self.folder / "mariadb.sock").exists, "MariaDB's socket")
        self._spawn("slurmdbd", "-D")
        # sacctmgr that finds no slurmdbd waits for seconds before it tries again.
        until(lambda: _listens(port), "slurmdbd's port")
        self.run("sacctmgr", "-i", "add", "cluster", "test")

    def _spawn(self, command: str, *arguments: str) -> None:
        log = self.folder / f"{command}.out"
        self._daemons.append(spawn(log, self.environ, command, *arguments))

    def _configure(self, ports: list[int]) -> None:
        controller, n1, n2, dbd = ports
        here = self.folder
        storage = (
            f"""AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd}
AccountingStoragePass={here}/munge.sock"""
            if self.accounting
            else "AccountingStorageType=accounting_storage/none"
        )
        (here / "slurm.conf").write_text(
            f"""ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={here}/munge.sock
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/linux
JobRequeue=1
KillWait=1
MinJobAge={self._min_job_age}
ReturnToService=2
StateSaveLocation={here}/state
SlurmdSpoolDir={here}/%n
SlurmctldPidFile={here}/slurmctld.pid
SlurmdPidFile={here}/slurmd-%n.pid
SlurmctldLogFile={here}/slurmctld.log
SlurmdLogFile={here}/slurmd-%n.log
{storage}
GresTypes=hpu
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n1} CPUs=64 Gres=hpu:8
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n2} CPUs=64 Gres=hpu:8
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=UNLIMITED State=UP PreemptMode=OFF
PartitionName=gaudi Nodes=n1,n2 MaxTime=UNLIMITED State=UP PreemptMode=OFF
PartitionName=low Nodes=n1,n2 MaxTime=UNLIMITED State=UP GraceTime=60
PartitionName=high Nodes=n1,n2 MaxTime=UNLIMITED State=UP PriorityTier=2 PreemptMode=OFF
"""
        )
        (here / "gres.conf").write_text("NodeName=n[1-2] Name=hpu Count=8\n")
        dbd_conf = here / "slurmdbd.conf"
        dbd_conf.touch(0o600)
        dbd_conf.write_text(
            f"""AuthType=auth/munge
AuthInfo=socket={here}/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd}
SlurmUser=root
LogFile={here}/slurmdbd.log
PidFile={here}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
"""
        )


def _started(daemon: subprocess.Popen[bytes]) -> list[str]:
    """The command of a daemon, as `spawn` got it."""
    words = [str(word) for word in daemon.args]  # type: ignore[union-attr]
    return words[words.index("--") + 1 :]


def daemons_path() -> str:
    """PATH with the folders of system daemons, which a user's shell may not have."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *SBIN])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_ports(count: int) -> list[int]:
    """Ports below the range from which the kernel draws for outgoing connections."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(15000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in ports:
            ports.append(port)
    return ports
