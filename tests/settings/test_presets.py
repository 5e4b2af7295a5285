"""The presets: their values, and how one is found."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from mandatory import MANDATORY

from hlrlhf.settings import SettingsError, presets, resolve

BOTH = {
    "dtype": "bf16",
    "num_nodes": 1,
    "devices_per_node": 8,
    "dataset.max_prompt_tokens": 256,
    "generation.max_new_tokens": 256,
    "optimizer.lr_scheduler": "cosine",
    "ppo.epochs": 1,
    "epochs": 1,
    "num_warmup_steps": 100,
    "actor.zero_stage": 1,
    "critic.zero_stage": 1,
}
VALUES: dict[str, dict[str, Any]] = {
    "bloom-1.1b-560m": {
        "seed": 10,
        "mbs": 2,
        "gbs": 64,
        "actor.learning_rate": 1e-5,
        "critic.learning_rate": 6e-6,
        "actor.weight_decay": 0.1,
        "critic.weight_decay": 0.1,
        "lora.actor_lr": 4e-4,
        "lora.critic_lr": 6e-4,
        "lora.dim": 0,
        "only_optimize_lora": True,
    },
    "llama2-7b": {
        "seed": 1,
        "mbs": 4,
        "gbs": 32,
        "actor.learning_rate": 9e-6,
        "critic.learning_rate": 9e-6,
        "actor.weight_decay": 0.0,
        "critic.weight_decay": 0.0,
        "lora.actor_lr": 5e-4,
        "lora.critic_lr": 5e-4,
        "lora.dim": 64,
        "only_optimize_lora": False,
    },
}


@pytest.mark.parametrize(
    ("preset", "name", "value"),
    [(p, name, value) for p, own in VALUES.items() for name, value in (BOTH | own).items()],
)
def test_preset_value(preset: str, name: str, value: object) -> None:
    given = resolve(preset, environ=MANDATORY).values[name]
    assert given.value == value
    assert given.origin.kind == "preset"


@pytest.mark.parametrize("preset", presets.available({}))
def test_every_preset_is_valid_and_says_what_it_is(preset: str) -> None:
    assert resolve(preset, environ=MANDATORY)
    assert presets.summary(presets.find(preset, {}))


def test_ours_are_there() -> None:
    assert set(VALUES) <= set(presets.available({}))


def test_a_preset_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 7\n", encoding="utf-8")
    assert resolve(str(path), environ=MANDATORY).settings.seed == 7
    monkeypatch.chdir(tmp_path)
    assert resolve("mine.yaml", environ=MANDATORY).settings.seed == 7
    assert resolve("./mine.yaml", environ=MANDATORY).settings.seed == 7
    with pytest.raises(SettingsError, match=r"other\.yaml: cannot be read: No such file"):
        resolve("other.yaml", environ=MANDATORY)


def test_folders_on_the_search_path_come_first(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, seed in ((first, 7), (second, 8)):
        folder.mkdir()
        (folder / "mine.yaml").write_text(f"# Mine\nseed: {seed}\n", encoding="utf-8")
    (second / "llama2-7b.yaml").write_text("seed: 9\n", encoding="utf-8")
    environ = {
        presets.SEARCH_PATH: os.pathsep.join(["", str(first), str(second), str(tmp_path / "gone")])
    }
    available = presets.available(environ)
    assert available["mine"] == first / "mine.yaml"
    assert available["llama2-7b"] == second / "llama2-7b.yaml"
    assert "bloom-1.1b-560m" in available
    assert presets.summary(available["mine"]) == "Mine"
    assert resolve("mine", environ=MANDATORY | environ).settings.seed == 7


def test_no_such_preset() -> None:
    with pytest.raises(SettingsError) as error:
        presets.find("llama2-7", {})
    message = str(error.value)
    assert message.startswith("--preset llama2-7: no such preset; there are bloom-1.1b-560m, ")
    assert message.endswith("; did you mean llama2-7b?")
    assert presets.SEARCH_PATH in message


def test_a_broken_preset_says_where(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("# Broken\nseed: [\n", encoding="utf-8")
    (tmp_path / "latin.yaml").write_bytes(b"# caf\xe9\n")
    environ = {presets.SEARCH_PATH: str(tmp_path)}
    with pytest.raises(SettingsError, match=r"broken\.yaml:3:1: not YAML"):
        resolve("broken", environ=MANDATORY | environ)
    assert presets.summary(presets.find("latin", environ)).startswith("cannot be read: ")
    (tmp_path / "plain.yaml").write_text("seed: 1\n", encoding="utf-8")
    assert presets.summary(presets.find("plain", environ)) == ""
