"""The wheel, where there is no torch and no source tree."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import mandatory
import pytest

from hlrlhf import __version__

ROOT = Path(__file__).parents[2]
MANDATORY = mandatory.MANDATORY | {"HL_BASE_OUT_PATH": "runs"}


def run(*command: str | Path, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HL_", "HLRLHF_", "PYTHONPATH"))
    }
    return subprocess.run(
        command, cwd=cwd, env=clean | environ, capture_output=True, encoding="utf-8", check=False
    )


def passed(*command: str | Path, cwd: Path, **environ: str) -> str:
    done = run(*command, cwd=cwd, **environ)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive, and the wheel that was built from it."""
    source = tmp_path_factory.mktemp("source")
    # Only what git knows: a build must not pick up, or need, what else lies around.
    files = passed("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    passed(sys.executable, "-m", "build", "--outdir", "dist", cwd=source)
    return source / "dist"


@pytest.fixture(scope="module")
def clean(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of an environment that holds the wheel and what it asks for."""
    folder = tmp_path_factory.mktemp("clean")
    passed(sys.executable, "-m", "venv", "env", cwd=folder)
    commands = folder / "env" / "bin"
    (wheel,) = built.glob("*.whl")
    passed(
        *(commands / "python", "-m", "pip", "install", "--quiet"),
        *("--constraint", ROOT / "constraints.txt", wheel),
        cwd=folder,
    )
    return commands


@pytest.mark.slow
def test_everything_is_under_one_name(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.name == f"hlrlhf-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0] for name in names} == {
        "hlrlhf",
        f"hlrlhf-{__version__}.dist-info",
    }
    for folder, inside in (
        ("hlrlhf", "hlrlhf"),
        ("trainer", "hlrlhf/trainer"),
        ("templates", "hlrlhf/templates"),
        ("presets", "hlrlhf/presets"),
    ):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".yaml", ".j2", ".typed"):
                assert f"{inside}/{path.relative_to(ROOT / folder)}" in names


@pytest.mark.slow
def test_the_source_archive_is_enough_to_build_from(built: Path) -> None:
    # The wheel was built from it; besides, a reader wants these.
    (source,) = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "trainer/loop.py"} <= names


@pytest.mark.slow
def test_no_torch_on_a_login_node(clean: Path, tmp_path: Path) -> None:
    assert run(clean / "python", "-c", "import torch", cwd=tmp_path).returncode == 1
    where = passed(clean / "python", "-c", "import hlrlhf; print(hlrlhf.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(clean.parent)


@pytest.mark.slow
def test_the_commands_run_from_an_empty_directory(clean: Path, tmp_path: Path) -> None:
    hlrlhf = clean / "hlrlhf"
    assert passed(hlrlhf, "--version", cwd=tmp_path).split() == ["hlrlhf", __version__]
    presets = passed(hlrlhf, "presets", cwd=tmp_path)
    for preset in ("demo", "llama2-7b", "bloom-1.1b-560m"):
        assert preset in presets
    preset = ("--preset", "llama2-7b")
    assert "actor.learning_rate" in passed(hlrlhf, "show", *preset, cwd=tmp_path, **MANDATORY)
    script = passed(hlrlhf, "render", *preset, cwd=tmp_path, **MANDATORY)
    assert script.startswith("#!/bin/bash\n")
    assert "srun" in script
    assert "#SBATCH" in passed(hlrlhf, "submit", "--dry-run", *preset, cwd=tmp_path, **MANDATORY)
    assert list(tmp_path.iterdir()) == [], "a dry run writes nothing"


@pytest.mark.slow
def test_settings_errors_end_with_2(clean: Path, tmp_path: Path) -> None:
    done = run(clean / "hlrlhf", "submit", "--preset", "llama2-7b", cwd=tmp_path)
    assert done.returncode == 2
    assert "HL_TAG" in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_only_the_trainer_imports_torch(tmp_path: Path) -> None:
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "hlrlhf").rglob("*.py")
        if path.stem != "__main__"
    )
    code = (
        "import importlib, sys\n"
        f"for name in {modules}: importlib.import_module(name)\n"
        "heavy = {'torch', 'deepspeed', 'transformers', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    passed(sys.executable, "-c", code, cwd=tmp_path)
