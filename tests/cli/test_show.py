"""`hlrlhf show`"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mandatory
import pytest
import terminal

from hlrlhf.cli import main
from hlrlhf.settings.names import env_name, settings_by_name

MANDATORY = mandatory.MANDATORY | {"HL_DATASET_PATH": "/data/a /data/b"}


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Call `hlrlhf show`; its exit code, output and words."""

    def call(*arguments: str, environ: dict[str, str] = MANDATORY) -> tuple[Any, str, str]:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("sys.argv", ["hlrlhf", "show", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return call


def test_json(show: Any) -> None:
    code, out, err = show(
        "--preset", "llama2-7b", "--json", "--set", "num_nodes=2", "--set", "gbs=128"
    )
    assert (code, err) == (0, "")
    shown = json.loads(out)
    assert shown["preset"] == "llama2-7b"
    assert shown["derived"] == {
        "world_size": 16,
        "per_device_batch_size": 8,
        "gradient_accumulation_steps": 2,
    }
    settings = shown["settings"]
    assert list(settings) == list(settings_by_name())
    assert all(entry["env"] == env_name(name) for name, entry in settings.items())
    assert settings["actor.learning_rate"] == {
        "value": 9e-06,
        "env": "HL_ACTOR_LEARNING_RATE",
        "origin": "preset",
    }
    assert settings["num_nodes"]["origin"] == "flag"
    assert settings["device"]["origin"] == "default"
    assert settings["dataset.path"] == {
        "value": ["/data/a", "/data/b"],
        "env": "HL_DATASET_PATH",
        "origin": "environment",
    }


def test_json_with_missing_values(show: Any) -> None:
    code, out, err = show("--json", environ={"HL_TAG": "x"})
    assert code == 2
    shown = json.loads(out)
    assert shown["preset"] is None
    assert shown["settings"]["base_out_path"] == {
        "value": None,
        "env": "HL_BASE_OUT_PATH",
        "origin": "missing",
    }
    assert shown["settings"]["dataset.path"]["value"] is None
    assert shown["settings"]["tag"]["value"] == "x"
    assert "base_out_path" in err
    assert "HL_DATASET_PATH" in err


def test_table(show: Any) -> None:
    code, out, err = show("--preset", "bloom-1.1b-560m")
    assert (code, err) == (0, "")
    head, *rows = out.splitlines()
    assert head.split() == ["SETTING", "VALUE", "ENVIRONMENT", "ORIGIN"]
    assert len(rows) == len(settings_by_name()) + 3
    row = next(row for row in rows if row.startswith("critic.learning_rate"))
    assert row.split()[1:4] == ["6e-06", "HL_CRITIC_LEARNING_RATE", "preset"]
    assert re.search(r"/bloom-1\.1b-560m\.yaml:\d+$", row)


def test_wrong_settings_show_nothing(show: Any) -> None:
    code, out, err = show("--preset", "llama2-7b", "--set", "actor.lerning_rate=1")
    assert (code, out) == (2, "")
    assert "did you mean actor.learning_rate?" in err


def on_terminal(*arguments: str, **environ: str) -> list[str]:
    """The lines that `hlrlhf show` prints on a terminal of 80 columns."""
    return terminal.on_terminal("show", *arguments, **MANDATORY | environ)


def whole(lines: list[str], name: str) -> str:
    """What stands below the line of a setting, or of a file, put together again."""
    (at,) = (number for number, line in enumerate(lines) if line.split()[0] == name)
    below = []
    for line in lines[at + 1 :]:
        if not line.startswith("    "):
            break
        below.append(line.removeprefix("    "))
    return "".join(below)


def test_a_terminal_of_80_columns_holds_every_line(tmp_path: Path) -> None:
    folder = tmp_path / ("deep" * 30)
    folder.mkdir()
    site = folder / "site.yaml"
    data = f"/data/{'long ' * 40}end"
    site.write_text("slurm: {partition: gaudi}\n")
    models = "/models/" + "actor" * 40

    environ = {
        "HL_ACTOR_MODEL_PATH": models,
        "HL_CRITIC_LR": "1e-5",
        "HL_DATASET_PATH": f"'/data/a' '{data}'",
        "HL_DATASET_SPLIT": "train-with-a-longer-name-than-others",
    }
    lines = on_terminal("--preset", "llama2-7b", "--config", str(site), **environ)

    assert max(map(len, lines)) <= 80
    first = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert [word for word in first if word in settings_by_name()] == list(settings_by_name())
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows["slurm.partition"] == ["gaudi", "file", "site.yaml:1"]
    assert rows["critic.learning_rate"] == ["1e-05", "environment", "HL_CRITIC_LR"]
    assert whole(lines, "actor.model_path") == models
    assert whole(lines, "site.yaml") == str(site)
    assert whole(lines, "llama2-7b.yaml").endswith("/presets/llama2-7b.yaml")
    assert whole(lines, "dataset.split") == "train-with-a-longer-name-than-others"
    assert whole(lines, "dataset.path") == json.dumps(["/data/a", data])


def test_a_terminal_tells_files_of_one_name_apart(tmp_path: Path) -> None:
    files = [tmp_path / "a" / "site.yaml", tmp_path / "b" / "site.yaml"]
    for number, file in enumerate(files):
        file.parent.mkdir()
        file.write_text(f"{('seed', 'mbs')[number]}: 1\n")
    lines = on_terminal("--config", str(files[0]), "--config", str(files[1]))
    assert max(map(len, lines)) <= 80
    assert whole(lines, "seed") == f"file {files[0]}:1"
    assert whole(lines, "mbs") == f"file {files[1]}:1"
