"""The names of settings, and what is said about them."""

from __future__ import annotations

import pytest

from hlrlhf.settings.names import (
    ALIASES,
    env_name,
    nearest,
    settings_by_env,
    settings_by_name,
)
from hlrlhf.settings.schema import Place


def test_one_rule_for_all_names() -> None:
    assert env_name("actor.learning_rate") == "HL_ACTOR_LEARNING_RATE"
    for name, setting in settings_by_name().items():
        assert setting.name == name
        assert setting.env == env_name(name)


def test_no_two_settings_share_a_name() -> None:
    assert len(settings_by_env()) == len(settings_by_name())
    assert not set(ALIASES) & set(settings_by_env())
    assert set(ALIASES.values()) <= set(settings_by_env())


@pytest.mark.parametrize("setting", settings_by_name().values(), ids=lambda setting: setting.name)
def test_each_setting_is_described(setting) -> None:  # type: ignore[no-untyped-def]
    assert setting.description
    assert setting.description.endswith(".") or setting.description.startswith("--")
    assert setting.type.removeprefix("list of ") in ("integer", "number", "boolean", "text")


def test_each_setting_that_is_called_a_path_says_what_it_is_to_the_run() -> None:
    for name, setting in settings_by_name().items():
        if name.endswith(("path", "_file", "_folder", "_dir")):
            assert setting.place is not None, f"{name} needs a Place in the schema"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("actor.model_path", Place("model", mounted=True)),
        ("actor.tokenizer_path", Place("model", mounted=True)),
        ("dataset.path", Place("data", mounted=True)),
        ("checkpoint_path", Place("output", mounted=True)),
        ("log_file", Place("output")),
        ("hpu.recipe_cache_path", Place("output", shared=False)),
        ("environment.python", Place("command")),
        ("reward.function", None),
    ],
)
def test_places_are_found_under_null_and_in_lists(name: str, place: Place | None) -> None:
    assert settings_by_name()[name].place == place


@pytest.mark.parametrize(
    ("name", "kind", "allowed"),
    [
        ("mbs", "integer", "at least 1"),
        ("actor.dropout", "number", "at least 0, less than 1"),
        ("generation.top_p", "number", "greater than 0, at most 1"),
        ("dtype", "text", "one of bf16, fp32"),
        ("dataset.path", "list of text", "not empty"),
        ("dataset.weights", "list of number", "each greater than 0"),
        ("slurm.mem", "text", "a whole number, and K, M, G or T if not MB"),
        ("slurm.cpus_per_task", "integer", "at least 1"),
        ("slurm.exclusive", "boolean", ""),
        ("reward.function", "text", "module:function"),
    ],
)
def test_type_and_bounds_in_words(name: str, kind: str, allowed: str) -> None:
    setting = settings_by_name()[name]
    assert (setting.type, setting.allowed) == (kind, allowed)


def test_nullable_and_units() -> None:
    known = settings_by_name()
    assert known["slurm.partition"].nullable
    assert known["dataset.weights"].nullable
    assert not known["seed"].nullable
    assert known["slurm.signal_lead"].unit == "seconds"
    assert known["generation.max_new_tokens"].unit == "tokens"


def test_nearest() -> None:
    assert nearest("HL_SED", settings_by_env()) == "; did you mean HL_SEED?"
    assert nearest("actor.lerning_rate", settings_by_name()) == (
        "; did you mean actor.learning_rate?"
    )
    assert nearest("zzzzzz", settings_by_name()) == ""
