"""A real Docker daemon on this machine, of the tests alone, and an image that is made of nothing.

Everything of the daemon lies in a folder of its own, and it changes nothing of the machine's
network: containers are on that of the node. It ends with the test session, even a killed one.

The image holds links and empty folders only; what a rank runs is mounted from this machine,
read-only. As often in a real one, the user of the job has no entry in its ``/etc/passwd``.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from cluster import daemons_path, spawn, until

COMMANDS = ("dockerd", "docker", "containerd", "runc")
IMAGE = "hlrlhf-test"
# Who submits: not root, as whom everything is allowed and all files look alike.
USER, GROUP = "nobody", "nogroup"


class StartError(Exception):
    """A Docker daemon cannot start here, as in a container that is not privileged."""


def missing() -> list[str]:
    """What this machine lacks to run the daemon; empty when it may."""
    lacking = [name for name in COMMANDS if shutil.which(name, path=daemons_path()) is None]
    return lacking + (["root"] if os.geteuid() else [])


def mounts() -> list[str]:
    """What a rank has of this machine: its programs and libraries, this Python and this tree."""
    repository = Path(__file__).parents[1]
    places = ["/usr", sys.prefix, sys.base_prefix, repository, *filter(os.path.isdir, sys.path)]
    return [f"{place}:{place}:ro" for place in dict.fromkeys(map(str, places))]


class Docker:
    """The daemon, once started.

    Attributes:
        folder: everything of it.
        host: its address, for ``DOCKER_HOST``.
    """

    def __init__(self) -> None:
        # Not pytest's folder: the path of a Unix socket holds about 100 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="docker-"))
        self.folder.chmod(0o755)
        self.host = f"unix://{self.folder}/socket"
        self._environ = os.environ | {"PATH": daemons_path(), "DOCKER_HOST": self.host}

    def __enter__(self) -> Docker:
        self._daemon = spawn(
            self.folder / "out",
            self._environ,
            "dockerd",
            f"--host={self.host}",
            f"--group={GROUP}",
            f"--data-root={self.folder}/data",
            f"--exec-root={self.folder}/exec",
            f"--pidfile={self.folder}/pid",
            "--bridge=none",
            "--iptables=false",
            "--ip6tables=false",
        )
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # The daemon would end what runs, but only after some time; and perhaps it answers no more.
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            if left := self.of(""):
                self.run("rm", "--force", *left)
        self._daemon.terminate()
        try:
            self._daemon.wait(20)
        except subprocess.TimeoutExpired:
            self._daemon.kill()
            self._daemon.wait()
        # The node's network stays mounted, and the folder on itself where the daemon did not start.
        mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        for point in reversed(mounted):
            if point.startswith(f"{self.folder}/"):
                subprocess.run(["umount", point], check=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *arguments: str, given: bytes | None = None) -> str:
        """Standard output of a command of Docker's."""
        done = subprocess.run(
            ["docker", *arguments],
            env=self._environ,
            input=given,
            capture_output=True,
            timeout=60,
        )
        if done.returncode:
            raise AssertionError(f"docker {' '.join(arguments)}: {done.stderr.decode()}")
        return done.stdout.decode()

    def of(self, job: str) -> list[str]:
        """The containers of a job, or of all, whether they run or not."""
        label = f"label=hlrlhf.job={job}" if job else "label=hlrlhf.job"
        return self.run("ps", "--all", "--quiet", "--filter", label).split()

    def _start(self) -> None:
        socket = self.folder / "socket"
        try:
            until(lambda: socket.exists() or self._daemon.poll() is not None, "Docker's socket")
            self.run("version")
            self.run("import", "-", IMAGE, given=_image())
            self.run("run", "--rm", "--net=host", "--volume=/usr:/usr:ro", IMAGE, "true")
        except (AssertionError, TimeoutError) as error:
            ends = (self.folder / "out").read_text(errors="replace").splitlines()[-1:]
            raise StartError("; ".join([str(error).strip(), *ends])) from error


def _image() -> bytes:
    """A root file system whose programs lie in ``/usr``, which is mounted."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, mode in {"usr": 0o755, "etc": 0o755, "sbin": 0o755, "tmp": 0o1777}.items():
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, mode
            tar.addfile(folder)
        # Not sbin: Docker mounts its own init there, which /usr would cover.
        for name in ("bin", "lib", "lib64"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, f"usr/{name}"
            tar.addfile(link)
    return archive.getvalue()
