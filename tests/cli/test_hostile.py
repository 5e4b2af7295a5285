"""Commands in hostile surroundings: words, no traceback; no trace of a refusal or of a secret."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from mandatory import MANDATORY

LONG = "x" * 100_000
NOT_TEXT = "\udcff"
SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "MY_SECRET", "DB_PASSWORD", "AWS_SECRET_ACCESS_KEY")
CANARY = "canary-6b1f"


def hlrlhf(*arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    whole = os.environ | MANDATORY | {"HOME": str(cwd / "home")} | environ
    return subprocess.run(
        [sys.executable, "-m", "hlrlhf", *arguments],
        cwd=cwd,
        env=whole,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        check=False,
        timeout=60,
    )


def in_words(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines
    assert all(line.startswith("hlrlhf: ") and len(line) < 1100 for line in lines)
    assert all(line.isprintable() for line in lines)
    return done.stderr


@pytest.mark.parametrize("place", ["/" + LONG, "/dev/null", "/tmp/" + NOT_TEXT, "/proc/self/x"])
def test_a_home_where_nothing_can_be_kept_is_no_reason_not_to_render(
    tmp_path: Path, place: str
) -> None:
    done = hlrlhf("render", cwd=tmp_path, HOME=place, XDG_CACHE_HOME="")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("#!/bin/bash\n")
