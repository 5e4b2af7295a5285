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


@pytest.mark.parametrize(
    ("arguments", "environ", "said"),
    [
        (["presets"], {"HLRLHF_PRESET_PATH": "/" + LONG}, "HLRLHF_PRESET_PATH: /xxx"),
        (["render", "--preset", "x"], {"HLRLHF_PRESET_PATH": "/" + LONG}, "File name too long"),
        (["render", "--preset", LONG], {}, "no such preset"),
        (["render", "--config", LONG], {}, "cannot be read: File name too long"),
        (["render", "--template", LONG], {}, "the folders of HLRLHF_TEMPLATE_PATH"),
        (["render", "--set", f"slurm.comment={LONG}\x1b[31m"], {}, "must not hold control"),
        (["render", "--set", f"tag={NOT_TEXT}"], {}, "unicode"),
        (["status"], {"XDG_STATE_HOME": "/" + LONG}, "File name too long"),
        (["submit"], {"XDG_STATE_HOME": "/" + LONG}, "File name too long"),
        (["submit"], {"HL_BASE_OUT_PATH": "/" + LONG}, "File name too long"),
        (["logs", LONG], {}, "no such run"),
        (["logs", "\x1b[31m"], {}, "\\x1b[31m: no such run"),
        (["cancel", "\x1b[31m"], {}, "\\x1b[31m: no such run"),
        (["logs", LONG + "/"], {}, "not a run directory"),
        (["cancel", LONG], {}, "no such run"),
        (["forget", LONG + "/"], {}, "not a run directory"),
    ],
)
def test_what_cannot_be_is_said_in_a_few_words(
    tmp_path: Path, arguments: list[str], environ: dict[str, str], said: str
) -> None:
    assert said in in_words(hlrlhf(*arguments, cwd=tmp_path, **environ))


@pytest.mark.parametrize("command", [["render"], ["logs", "x"]])
def test_a_current_directory_that_is_gone(tmp_path: Path, command: list[str]) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    done = subprocess.run(
        ["bash", "-c", 'rmdir "$PWD"; exec "$@"', "-", sys.executable, "-m", "hlrlhf", *command],
        cwd=gone,
        env=os.environ | MANDATORY | {"HL_BASE_OUT_PATH": "runs"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "gone; change to another one" in in_words(done)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8:strict"])
@pytest.mark.parametrize("command", ["render", "show"])
def test_a_script_is_utf8_whatever_the_terminals_encoding(
    tmp_path: Path, command: str, encoding: str
) -> None:
    (tmp_path / f"{NOT_TEXT}.yaml").write_text("mbs: 2\n")
    arguments = (command, "--config", f"{NOT_TEXT}.yaml", "--set", "slurm.comment=世")
    done = hlrlhf(*arguments, cwd=tmp_path, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert "世" in done.stdout


def test_files_and_values_cannot_drive_the_terminal(tmp_path: Path) -> None:
    file = tmp_path / "\x1b[31m.yaml"
    file.write_text("# red\u202e\ngeneration.stop: ['\u202e']\n")
    shown = hlrlhf("show", "--config", str(file), cwd=tmp_path)
    listed = hlrlhf("presets", cwd=tmp_path, HLRLHF_PRESET_PATH=str(tmp_path))
    for done in (shown, listed):
        assert done.returncode == 0
        assert all(line.isprintable() for line in done.stdout.splitlines())
    assert "\\x1b[31m" in shown.stdout
    assert "\\u202e" in listed.stdout


@pytest.mark.parametrize("command", ["show", "render", "submit"])
def test_help_says_that_a_template_is_code(tmp_path: Path, command: str) -> None:
    words = " ".join(hlrlhf(command, "--help", cwd=tmp_path).stdout.split())
    assert "code that runs on this machine: use only one that you trust" in words
