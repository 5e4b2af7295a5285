"""Disks that are too small, read-only or full: real ones, in memory."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def disk(place: Path, size: str) -> Iterator[Path]:
    """A file system of its own with so much room; skips the test where none can be mounted."""
    place.mkdir()
    options = f"size={size},mode=0777"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place],
        check=False,
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here, as root may: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def fill(place: Path) -> Path:
    """Leave no byte free; taking the file away makes room again."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file:
        free = os.statvfs(place)
        file.write(bytes(free.f_bavail * free.f_bsize))
    free = os.statvfs(place)
    assert free.f_bavail == 0
    return filler


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """A quota of a kind: of a write across the limit, the system takes the first part."""
    assert signal.getsignal(signal.SIGXFSZ) is signal.SIG_IGN
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
