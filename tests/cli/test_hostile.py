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


# --- a file of a few lines that stands for more than a machine holds

LEVELS = "abcdefghij"
BOMB = "[&a [x,x,x,x,x,x,x,x,x,x]" + "".join(
    f", &{name} [{','.join([f'*{before}'] * 10)}]" for before, name in pairwise(LEVELS)
)
BOMB += "]"


@pytest.mark.parametrize("way", ["--preset", "--config", "--set", "environment"])
def test_a_bomb_ends_at_once_wherever_it_stands(tmp_path: Path, way: str) -> None:
    file = tmp_path / "bomb.yaml"
    file.write_text(f"dataset.path: {BOMB}\n")
    arguments = {"--set": ["--set", f"dataset.path={BOMB}"], "environment": []}
    environ = {"HL_DATASET_PATH": BOMB} if way == "environment" else {}
    done = hlrlhf("render", *arguments.get(way, [way, str(file)]), cwd=tmp_path, **environ)
    assert "with its aliases (*) written out" in in_words(done)


# --- secrets


@pytest.fixture
def slurm(tmp_path: Path) -> str:
    """A PATH with an sbatch that takes every job, or, told so, none."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in (
        ("sbatch", 'if [ "$REFUSE" ]; then echo "no: $REFUSE" >&2; exit 1; fi; echo 7'),
        ("squeue", ""),
        ("sacct", ""),
    ):
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_secrets_of_the_environment_reach_no_file_and_no_words(tmp_path: Path, slurm: str) -> None:
    secrets = {name: f"{CANARY}-{name}" for name in SECRETS}
    environ = {"PATH": slurm, "HL_BASE_OUT_PATH": str(tmp_path / "runs")}
    environ |= {"XDG_STATE_HOME": str(tmp_path / "state")} | secrets
    calls = [
        (["render"], {}, 0),
        (["show"], {}, 0),
        (["show", "--json"], {}, 0),
        (["submit", "--dry-run", "--json"], {}, 0),
        (["submit", "--json"], {}, 0),
        (["status", "--json"], {}, 0),
        (["submit"], {"REFUSE": "because"}, 2),
        (["submit", "--set", "seed=x"], {}, 2),
        (["render"], {"HL_WANDB_API_KEY": CANARY}, 2),
        (["submit", "--local"], {}, 2),
    ]
    for device in ("cuda", "hpu"):
        for kind in ("docker", "apptainer", "pyxis"):
            flags = [f"device={device}", f"container.kind={kind}", "container.image=x"]
            calls.append((["render", *(f"--set={flag}" for flag in flags)], {}, 0))
    for arguments, more, code in calls:
        done = hlrlhf(*arguments, cwd=tmp_path, **environ, **more)
        assert done.returncode == code, done.stderr
        assert CANARY not in done.stdout + done.stderr, arguments
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"settings.yaml", "job.sbatch", "job.json"} <= {file.name for file in files}
    assert not [file for file in files if CANARY.encode() in file.read_bytes()]


# --- refusals


def tree(folder: Path) -> dict[str, object]:
    """All below a folder: links, texts and modes."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mode,
            path.readlink() if path.is_symlink() else path.is_file() and path.read_bytes(),
        )
        for path in sorted(folder.rglob("*"))
    }


ONLY_SUBMIT = ("--local", "--wait", "--test-only")
REFUSED = [
    (["--set", "seed=x"], {}),
    (["--set", "nothing=1"], {}),
    (["--preset", "none"], {}),
    (["--config", "none.yaml"], {}),
    (["--template", "none.j2"], {}),
    (["--set", "slurm.template=broken.j2"], {"HLRLHF_TEMPLATE_PATH": "."}),
    (["--set", "base_out_path=back\\slash"], {}),
    (["--set", "container.kind=docker"], {}),
    (["--config", "long.yaml"], {}),
    (["--set", f"slurm.comment={LONG}"], {"HL_SLURM_QOS": LONG, "HL_SLURM_ACCOUNT": LONG}),
    (["--set", "base_out_path=broken.j2/below"], {}),
    (["--set", f"base_out_path=new/{LONG}"], {}),
    (["--local"], {}),
    (["--local", "--set", "num_nodes=2"], {}),
    ([], {"REFUSE": "no such partition"}),
    (["--test-only"], {"REFUSE": "no such partition"}),
    (["--wait", "--test-only"], {}),
]


@pytest.mark.parametrize(
    ("arguments", "environ"), REFUSED, ids=lambda value: " ".join(value)[:40] or "-"
)
@pytest.mark.parametrize("base", ["runs", "there/deep/er"])
def test_a_refusal_leaves_everything_as_it_was(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    slurm: str,
    base: str,
    arguments: list[str],
    environ: dict[str, str],
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "broken.j2").write_text("{{ nothing }}")
    (tmp_path / "long.yaml").write_text(f"master_addr: {'x' * 2**17}\n")
    # Made for all runs, not for one: compiled templates, and, once there is a script, the index.
    state, cache = tmp_path / "state", tmp_path_factory.mktemp("cache")
    if "REFUSE" in environ or any("base_out_path=" in word for word in arguments):
        (state / "hlrlhf" / "runs").mkdir(parents=True)
        (state / "hlrlhf" / "runs.lock").touch()
    everywhere = {"PATH": slurm, "XDG_STATE_HOME": str(state), "TMPDIR": str(tmp_path)}
    everywhere |= {"XDG_CACHE_HOME": str(cache), "HL_BASE_OUT_PATH": base} | environ
    before = tree(tmp_path)
    for command in ("submit", "render"):
        own = [word for word in arguments if command == "submit" or word not in ONLY_SUBMIT]
        done = hlrlhf(command, *own, cwd=tmp_path, **everywhere)
        assert done.returncode == 2 or command == "render", done.stderr
        assert "Traceback" not in done.stderr
        after = tree(tmp_path)
        assert after == before, {*after} ^ {*before}
