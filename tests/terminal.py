"""What a command prints on a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios


def on_terminal(*arguments: str, columns: int = 80, rows: int = 24, **environ: str) -> list[str]:
    """The lines that ``hlrlhf`` with these arguments prints, to both outputs, before it ends."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "hlrlhf", *arguments],
        stdout=its,
        stderr=its,
        env={name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        | {"TERM": "xterm"}
        | environ,
    )
    os.close(its)
    text = b""
    with contextlib.suppress(OSError):  # Linux's end of a terminal
        while some := os.read(ours, 65536):
            text += some
    os.close(ours)
    assert process.wait() == 0, text
    return text.decode().splitlines()
