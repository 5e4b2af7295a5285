"""`hlrlhf show`"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from hlrlhf.cli import main
from hlrlhf.settings.names import env_name, settings_by_name

MANDATORY = {
    "HL_TAG": "shown",
    "HL_BASE_OUT_PATH": "/runs",
    "HL_ACTOR_MODEL_PATH": "/models/actor",
    "HL_CRITIC_MODEL_PATH": "/models/critic",
    "HL_DATASET_PATH": "/data/a /data/b",
}


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
