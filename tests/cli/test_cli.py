"""The command line as a whole: what goes where, and with which exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mandatory
import pytest

from hlrlhf import __version__
from hlrlhf.cli.app import COMMANDS

MANDATORY = mandatory.MANDATORY


def hlrlhf(
    *arguments: str, cwd: Path | None = None, **environ: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hlrlhf", *arguments],
        cwd=cwd,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        check=False,
    )


def test_version() -> None:
    done = hlrlhf("--version")
    assert (done.returncode, done.stdout) == (0, f"hlrlhf {__version__}\n")


def test_the_installed_command_is_the_same() -> None:
    command = Path(sys.executable).with_name("hlrlhf")
    assert subprocess.check_output([command, "--version"], text=True) == hlrlhf("--version").stdout


def test_help_lists_every_command() -> None:
    done = hlrlhf("--help")
    assert done.returncode == 0
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert [word for word in listed if word in COMMANDS] == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    done = hlrlhf(command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"hlrlhf {command} [OPTIONS]" in " ".join(done.stdout.split())


@pytest.mark.parametrize("arguments", [["rendr"], ["render", "--prest", "x"], ["render", "extra"]])
def test_bad_usage(arguments: list[str]) -> None:
    done = hlrlhf(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr


def test_presets_lists_ours_and_the_users(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("# My models\nmbs: 2\n")
    done = hlrlhf("presets", HLRLHF_PRESET_PATH=str(tmp_path))
    assert done.returncode == 0
    first, *others = done.stdout.splitlines()
    assert first.split(maxsplit=1) == ["mine", "My models"]
    assert {line.split()[0] for line in others} >= {"bloom-1.1b-560m", "llama2-7b"}


def test_render_prints_the_script_and_writes_nothing(tmp_path: Path) -> None:
    environ = MANDATORY | {"HL_BASE_OUT_PATH": str(tmp_path / "runs")}
    done = hlrlhf("render", "--preset", "llama2-7b", cwd=tmp_path, **environ)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("#!/bin/bash\n")
    assert f"#SBATCH --chdir={tmp_path}/runs/first\n" in done.stdout
    assert not list(tmp_path.iterdir())


def test_template_is_short_for_the_setting(tmp_path: Path) -> None:
    (tmp_path / "site.j2").write_text(
        '{% extends "job.sbatch.j2" %}{% block finish %}echo site{% endblock %}'
    )
    arguments = ["render", "--preset", "llama2-7b"]
    short = hlrlhf(*arguments, "--template", "site.j2", cwd=tmp_path, **MANDATORY)
    long = hlrlhf(*arguments, "--set", "slurm.template=site.j2", cwd=tmp_path, **MANDATORY)
    assert "echo site" in short.stdout
    assert short.stdout == long.stdout


def test_all_wrong_settings_are_named_at_once() -> None:
    arguments = ["--preset", "llama2-7b", "--set", "gbs=33", "--set", "nodes=2"]
    done = hlrlhf("render", *arguments, HL_ACTOR_LEARNIN_RATE="1", HL_TAG="x")
    assert (done.returncode, done.stdout) == (2, "")
    for word in ("gbs", "nodes", "HL_ACTOR_LEARNIN_RATE", "HL_BASE_OUT_PATH"):
        assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_template_is_an_error_of_settings(tmp_path: Path) -> None:
    site = tmp_path / "site.j2"
    site.write_text('{% extends "job.sbatch.j2" %}{% block finish %}{{ nothing }}{% endblock %}')
    done = hlrlhf("render", "--preset", "llama2-7b", "--template", str(site), **MANDATORY)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"hlrlhf: template {site}:1: 'nothing' is undefined\n"


def test_no_such_run() -> None:
    done = hlrlhf("logs", "nothing")
    assert done.returncode == 2
    assert "nothing" in done.stderr


def test_no_slurm_here(tmp_path: Path) -> None:
    environ = MANDATORY | {"HL_BASE_OUT_PATH": str(tmp_path / "runs"), "PATH": str(tmp_path)}
    done = hlrlhf("submit", "--preset", "llama2-7b", **environ)
    assert (done.returncode, done.stdout) == (3, "")
    assert "sbatch" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["show", "render", "submit"])
def test_help_fits_a_screen_and_says_where_settings_are_listed(command: str) -> None:
    lines = hlrlhf(command, "--help", COLUMNS="80").stdout.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 80
    for option in ("--preset NAME", "--config FILE", "--set NAME=VALUE", "--template FILE"):
        assert any(line.strip().startswith(option) for line in lines)
    words = " ".join(" ".join(lines).split())
    assert "`hlrlhf show` lists all of them" in words
    assert "docs/settings.md" in words


def test_what_can_be_no_name_on_the_hub_is_a_path(tmp_path: Path) -> None:
    models = {
        "HL_ACTOR_MODEL_PATH": "my/models/actor",
        "HL_ACTOR_TOKENIZER_PATH": "my/own/tokenizer",
        "HL_CRITIC_MODEL_PATH": "me/critic",
    }
    environ = MANDATORY | models | {"HL_DATASET_PATH": "data/new.jsonl prompts/new"}
    shown = json.loads(hlrlhf("show", "--json", cwd=tmp_path, **environ).stdout)["settings"]
    assert shown["actor.model_path"]["value"] == f"{tmp_path}/my/models/actor"
    assert shown["actor.tokenizer_path"]["value"] == f"{tmp_path}/my/own/tokenizer"
    assert shown["critic.model_path"]["value"] == "me/critic"
    assert shown["dataset.path"]["value"] == [f"{tmp_path}/data/new.jsonl", "prompts/new"]


def test_paths_are_absolute_from_the_start(tmp_path: Path) -> None:
    (tmp_path / "models" / "actor").mkdir(parents=True)
    environ = MANDATORY | {
        "HOME": "/home/me",
        "HL_BASE_OUT_PATH": "runs",
        "HL_ACTOR_MODEL_PATH": "models/actor",
        "HL_CRITIC_MODEL_PATH": "models/critic",
        "HL_DATASET_PATH": "~/data org/name",
        "HL_TENSORBOARD_PATH": "~/tb/../boards",
    }
    done = hlrlhf("show", cwd=tmp_path, **environ)
    shown = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert f" {tmp_path}/runs " in shown["base_out_path"]
    assert f" {tmp_path}/models/actor " in shown["actor.model_path"]
    assert " models/critic " in shown["critic.model_path"]
    assert '["/home/me/data", "org/name"]' in shown["dataset.path"]
    assert " /home/me/boards " in shown["tensorboard_path"]


def test_render_imports_nothing_heavy() -> None:
    """The start-up of every command is that of its imports."""
    code = """
import sys
from hlrlhf.cli.app import app
app(["render", "--preset", "llama2-7b"], standalone_mode=False)
print(*sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | MANDATORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {"torch", "rich", "transformers"} & set(done.stderr.split())
