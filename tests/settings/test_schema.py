"""The schema: what is there, its defaults, and what it refuses."""

from __future__ import annotations

import pytest
from mandatory import MANDATORY
from pydantic import ValidationError

from hlrlhf.settings import Resolved, Settings, SettingsError, resolve
from hlrlhf.settings.names import settings_by_env, settings_by_name

# What a user of the reference scripts knows, with its default where one was promised.
ANY = object()
PROMISED = {
    "HL_NUM_NODES": 1,
    "HL_DEVICES_PER_NODE": 8,
    "HL_ACTOR_CP_ACT": 0,
    "HL_CRITIC_CP_ACT": 0,
    "HL_SEED": ANY,
    "HL_MBS": ANY,
    "HL_GBS": ANY,
    "HL_TENSORBOARD_PATH": None,
    "HL_LOG_FILE": None,
    "HL_MASTER_PORT": 29500,
    "HL_HYBRID_ENGINE": 0,
    "HL_ACTOR_LEARNING_RATE": ANY,
    "HL_CRITIC_LEARNING_RATE": ANY,
    "HL_ACTOR_WEIGHT_DECAY": ANY,
    "HL_CRITIC_WEIGHT_DECAY": ANY,
    "HL_ACTOR_DROPOUT": 0,
    "HL_CRITIC_DROPOUT": 0,
    "HL_LORA_ACTOR_LR": ANY,
    "HL_LORA_CRITIC_LR": ANY,
    "HL_ONLY_OPTIMIZE_LORA": ANY,
    "HL_LORA_DIM": ANY,
    "HL_EPOCHS": 1,
    "HL_NUM_WARMUP_STEPS": 100,
    "HL_PRINT_ANSWERS_INTERVAL": 0,
    "HL_ACTOR_ZERO_STAGE": 1,
    "HL_CRITIC_ZERO_STAGE": 1,
    "HL_CHECKPOINT_PATH": ANY,
    "HL_HPZ_ENABLED_ACTOR": 0,
    "HL_HPZ_ENABLED_CRITIC": 0,
    "HL_ENABLE_HPU_GRAPHS": 1,
    "HL_RUN_STEPS": 0,
}


def resolved(*flags: str, **environ: str) -> Resolved:
    return resolve(environ=MANDATORY | environ, flags=flags)


def refused(*flags: str, **environ: str) -> str:
    with pytest.raises(SettingsError) as error:
        resolved(*flags, **environ)
    return str(error.value)


@pytest.mark.parametrize("env", PROMISED)
def test_promised_name_and_default(env: str) -> None:
    setting = settings_by_env()[env]
    assert not setting.mandatory
    if PROMISED[env] is not ANY:
        assert resolved().values[setting.name].value == PROMISED[env]


def test_exactly_the_promised_settings_are_mandatory() -> None:
    mandatory = {setting.env for setting in settings_by_name().values() if setting.mandatory}
    assert mandatory == set(MANDATORY)


def test_defaults_alone_are_valid() -> None:
    settings = resolved().settings
    assert settings.world_size == 8
    assert settings.per_device_batch_size == 4
    assert settings.gradient_accumulation_steps == 1


def test_derived_numbers() -> None:
    settings = resolved("num_nodes=4", "devices_per_node=2", "mbs=2", "gbs=48").settings
    assert settings.world_size == 8
    assert settings.per_device_batch_size == 6
    assert settings.gradient_accumulation_steps == 3


@pytest.mark.parametrize(
    ("device", "given", "name"),
    [
        ("hpu", "auto", "hpu"),
        ("cuda", "auto", "gpu"),
        ("cpu", "auto", None),
        ("hpu", "gpu", "gpu"),
        ("hpu", "", None),
    ],
)
def test_gres_name_follows_the_device(device: str, given: str, name: str | None) -> None:
    assert resolved(f"device={device}", f"slurm.gres_name={given}").settings.gres_name == name


def test_settings_are_frozen() -> None:
    settings = resolved().settings
    with pytest.raises(ValidationError, match="frozen"):
        settings.seed = 2  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        settings.actor.learning_rate = 1.0  # type: ignore[misc]


def test_unknown_field_is_refused() -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        Settings.model_validate(resolved().settings.model_dump() | {"sed": 1})


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("num_nodes", "0", "at least 1"),
        ("mbs", "0", "at least 1"),
        ("gbs", "3.5", "integer"),
        ("seed", "-1", "at least 0"),
        ("seed", str(2**32), "less than 4294967296"),
        ("run_steps", "-1", "at least 0"),
        ("master_port", "80", "at least 1024"),
        ("master_port", "65536", "at most 65535"),
        ("actor.zero_stage", "4", "at most 3"),
        ("actor.learning_rate", "0", "greater than 0"),
        ("actor.learning_rate", "inf", "finite"),
        ("actor.learning_rate", "nan", "finite"),
        ("critic.weight_decay", "-0.1", "at least 0"),
        ("critic.dropout", "1", "less than 1"),
        ("generation.top_p", "1.1", "at most 1"),
        ("generation.temperature", "0", "greater than 0"),
        ("ppo.gamma", "2", "at most 1"),
        ("lora.dim", "64.5", "integer"),
        ("reward.function", "score", "module:function"),
        ("reward.function", "my/module.py:score", "module:function"),
        ("reward.function", "module:score()", "module:function"),
        ("reward.function_weight", "inf", "finite"),
        ("reward.score_at", "pad", "one of auto, end, before_end"),
        ("dtype", "fp8", "one of bf16, fp32"),
        ("device", "gpu", "one of hpu, cuda, cpu"),
        ("container.kind", "podman", "one of none, apptainer, pyxis, docker"),
        ("actor.cp_act", "2", "boolean"),
        ("mbs", "true", "integer"),
        ("mbs", "[1, 2]", "integer"),
        ("tag", "two words", "letters, digits"),
        ("tag", "", "letters, digits"),
        ("tag", ".hidden", "letters, digits"),
        ("tag", "a/b", "letters, digits"),
        ("tag", "x" * 65, "up to 64"),
        ("tag", "naïve", "letters, digits"),
        ("base_out_path", "", "at least 1 character"),
        ("dataset.path", "", "not empty"),
        ("dataset.weights", "[1, 0]", "each greater than 0"),
        ("slurm.time", "1 day", "D-H:M:S or UNLIMITED"),
        ("slurm.time", "24:00:00:00", "D-H:M:S or UNLIMITED"),
        ("slurm.time", "\u0662\u0664:00:00", "D-H:M:S or UNLIMITED"),
        ("slurm.mem", "10 GB", "K, M, G or T"),
        ("slurm.cpus_per_task", "0", "at least 1"),
    ],
)
def test_out_of_bounds(name: str, value: str, allowed: str) -> None:
    message = refused(f"{name}={value}")
    assert message.startswith(f"{name} = ")
    assert "(flag --set)" in message
    assert allowed in message


@pytest.mark.parametrize("time", ["90", "90:30", "24:00:00", "2-0", "2-12:30", "2-12:30:00"])
def test_slurm_times(time: str) -> None:
    assert resolved(f"slurm.time={time}").settings.slurm.time == time


@pytest.mark.parametrize("char", ["\n", "\r", "\0", "\t", "\x1b", "\x7f", "\x85", "\u2028"])
@pytest.mark.parametrize(
    "name", ["base_out_path", "actor.model_path", "slurm.partition", "slurm.comment", "log_file"]
)
def test_control_characters_are_refused(name: str, char: str) -> None:
    message = refused(f"{name}=a{char}b")
    assert "must not hold control characters" in message
    assert char not in message, "an error text must not carry the character to the terminal"


def test_control_characters_are_refused_in_lists() -> None:
    assert "control characters" in refused(HL_DATASET_PATH="'a\nb'")
    assert "control characters" in refused(HL_ENVIRONMENT_SETUP="'a\nb'")
    assert resolved(HL_ENVIRONMENT_SETUP="'a\tb'").settings.environment.setup == ["a\tb"]


def test_text_that_is_not_unicode_is_refused() -> None:
    assert "actor.model_path" in refused(HL_ACTOR_MODEL_PATH="/models/\udcff")


def test_quotes_and_spaces_are_welcome() -> None:
    hostile = "/a b/$(touch x)/'\"`;&|%j\\n#*é😀"
    assert resolved(f"actor.model_path={hostile}").settings.actor.model_path == hostile
