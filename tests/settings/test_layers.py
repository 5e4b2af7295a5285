"""default < preset < file < environment < flag, origins, and errors, all at once."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mandatory import MANDATORY

from hlrlhf.settings import Origin, Resolved, SettingsError, resolve
from hlrlhf.settings.layers import dump, load
from hlrlhf.settings.names import ALIASES, settings_by_env, settings_by_name


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def refused(**arguments) -> list[str]:  # type: ignore[no-untyped-def]
    with pytest.raises(SettingsError) as error:
        resolve(**arguments)
    return [str(problem) for problem in error.value.problems]


def test_each_layer_wins_over_the_one_before(tmp_path: Path) -> None:
    preset = written(tmp_path / "p.yaml", "seed: 2\n")
    first = written(tmp_path / "first.yaml", "# mine\nseed: 3\n")
    second = written(tmp_path / "second.yaml", "seed: 4\n")

    def seed(**layers) -> tuple[int, Origin]:  # type: ignore[no-untyped-def]
        environ = MANDATORY | layers.pop("environ", {})
        value, origin = resolve(environ=environ, **layers).values["seed"]
        return value, origin

    layers: dict[str, object] = {}
    assert seed(**layers) == (1, Origin("default"))
    layers["preset"] = str(preset)
    assert seed(**layers) == (2, Origin("preset", f"{preset}:1"))
    layers["files"] = [first]
    assert seed(**layers) == (3, Origin("file", f"{first}:2"))
    layers["files"] = [first, second]
    assert seed(**layers) == (4, Origin("file", f"{second}:1"))
    layers["environ"] = {"HL_SEED": "5"}
    assert seed(**layers) == (5, Origin("environment", "HL_SEED"))
    layers["flags"] = ["seed=6"]
    assert seed(**layers) == (6, Origin("flag", "--set"))
    layers["flags"] = ["seed=6", "seed=7"]
    assert seed(**layers) == (7, Origin("flag", "--set"))


def test_a_layer_leaves_what_it_does_not_name(tmp_path: Path) -> None:
    site = written(tmp_path / "site.yaml", "actor: {dropout: 0.1}\n")
    resolved = resolve("llama2-7b", files=[site], environ=MANDATORY, flags=["lora.dim=8"])
    assert resolved.settings.actor.dropout == 0.1
    assert resolved.settings.actor.learning_rate == 9e-6
    assert resolved.settings.lora.dim == 8
    assert resolved.settings.lora.actor_lr == 5e-4
    assert resolved.preset == "llama2-7b"
    assert resolved.is_default("optimizer.beta1")
    assert not resolved.is_default("seed")


def test_values_are_complete_typed_and_in_order() -> None:
    resolved = resolve(environ=MANDATORY, flags=["seed=5", "actor.cp_act=1"])
    assert list(resolved.values) == list(settings_by_name())
    assert resolved.values["seed"].value == 5
    assert resolved.values["actor.cp_act"].value is True
    assert resolved.values["dataset.path"].value == ["/data/prompts"]


def test_the_real_environment_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HL_SEED", "99")
    monkeypatch.setenv("HL_NONSENSE", "1")
    assert resolve(environ=MANDATORY).settings.seed == 1


def test_other_variables_are_nobodys_business() -> None:
    environ = MANDATORY | {"HLS": "1", "PATH": "/bin", "hl_seed": "2", "HLRLHF_PRESET_PATH": "/x"}
    assert resolve(environ=environ).settings.seed == 1


# Aliases


@pytest.mark.parametrize(("alias", "env"), ALIASES.items())
def test_alias_is_another_name(alias: str, env: str) -> None:
    name = settings_by_env()[env].name
    text = "/m" if name.endswith("path") else "0.25"
    environ = {key: value for key, value in MANDATORY.items() if key != env} | {alias: text}
    value, origin = resolve(environ=environ).values[name]
    assert value == ("/m" if name.endswith("path") else 0.25)
    assert origin == Origin("environment", alias)
    assert resolve(environ=environ | {env: text}).values[name].value == value
    problems = refused(environ=environ | {env: "0.5"})
    assert problems == [
        f"{alias} = {text!r} (environment): is another name of {env}, which is '0.5'; "
        "set one of them"
    ]


def test_an_alias_may_spell_the_same_number_otherwise() -> None:
    environ = MANDATORY | {"HL_ACTOR_LR": "1e-5", "HL_ACTOR_LEARNING_RATE": "0.00001"}
    assert resolve(environ=environ).settings.actor.learning_rate == 1e-5
    paths = MANDATORY | {"HL_ACTOR_MODEL": "1.0", "HL_ACTOR_MODEL_PATH": "1"}
    assert len(refused(environ=paths)) == 1


# Lists and empty texts


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("/a", ["/a"]),
        ("/a /b", ["/a", "/b"]),
        ("'/a b' /c", ["/a b", "/c"]),
        ("[/a, /b c]", ["/a", "/b c"]),
        ('["/a, b"]', ["/a, b"]),
        ("[no, 24:00:00, 0123, 1e5]", ["no", "24:00:00", "0123", "1e5"]),
    ],
)
def test_lists_as_text(text: str, paths: list[str]) -> None:
    assert resolve(environ=MANDATORY | {"HL_DATASET_PATH": text}).settings.dataset.path == paths
    flags = [f"dataset.path={text}"]
    assert resolve(environ=MANDATORY, flags=flags).settings.dataset.path == paths


def test_lists_in_a_file(tmp_path: Path) -> None:
    one = written(
        tmp_path / "one.yaml", "dataset: {path: /a b}\nenvironment: {setup: [1.10, no]}\n"
    )
    environ = {key: value for key, value in MANDATORY.items() if key != "HL_DATASET_PATH"}
    settings = resolve(files=[one], environ=environ).settings
    assert settings.dataset.path == ["/a b"]
    assert settings.environment.setup == ["1.10", "no"]


@pytest.mark.parametrize("text", ["'/a", "[/a", "[/a]]", "[" * 5000, "[!!int 1]"])
def test_lists_that_cannot_be_split(text: str) -> None:
    problems = refused(environ=MANDATORY | {"HL_DATASET_PATH": text})
    assert len(problems) == 1
    assert problems[0].startswith("dataset.path = ")
    assert "(environment HL_DATASET_PATH): cannot be split" in problems[0]


def test_empty_text_unsets_what_may_be_unset(tmp_path: Path) -> None:
    site = written(tmp_path / "s.yaml", "slurm: {partition: gaudi, mem: 1G, extra: [--foo]}\n")
    environ = MANDATORY | {"HL_SLURM_PARTITION": "", "HL_SLURM_EXTRA": "", "HL_LOG_FILE": ""}
    settings = resolve(files=[site], environ=environ, flags=["slurm.mem="]).settings
    assert settings.slurm.partition is None
    assert settings.slurm.mem is None
    assert settings.slurm.extra == []
    assert settings.log_file is None
    unset = written(tmp_path / "u.yaml", 'slurm: {partition: "", mem: }\n')
    settings = resolve(files=[site, unset], environ=MANDATORY).settings
    assert settings.slurm.partition is None
    assert settings.slurm.mem is None


def test_empty_text_is_no_number() -> None:
    assert refused(environ=MANDATORY | {"HL_SEED": ""})[0].startswith(
        "seed = '' (environment HL_SEED): "
    )


# Errors


def test_missing_mandatory_settings() -> None:
    assert refused() == [
        f"{settings_by_env()[env].name}: is not set; give {env}, or "
        f"--set {settings_by_env()[env].name}=…"
        for env in MANDATORY
        if env in ("HL_TAG", "HL_BASE_OUT_PATH")
    ] + [
        f"{name}: is not set; give {settings_by_name()[name].env}, or --set {name}=…"
        for name in ("actor.model_path", "critic.model_path", "dataset.path")
    ]


def test_missing_may_be_allowed() -> None:
    resolved = resolve("llama2-7b", environ={"HL_TAG": "x"}, allow_missing=True)
    assert [problem.where for problem in resolved.missing] == [
        "base_out_path",
        "actor.model_path",
        "critic.model_path",
        "dataset.path",
    ]
    assert resolved.values["actor.model_path"] == (None, Origin("missing"))
    assert resolved.values["tag"].value == "x"
    # A weight per data set can only be checked once the data sets are known.
    assert resolve(flags=["dataset.weights=1 2"], allow_missing=True)


def test_unknown_names_with_the_nearest_right_one(tmp_path: Path) -> None:
    site = written(tmp_path / "site.yaml", "seed: 1\nactor:\n  lerning_rate: 1\ncritc: 1\n")
    problems = refused(
        files=[site],
        environ=MANDATORY | {"HL_ACTOR_LERNING_RATE": "1", "HL_ACTOR_MODL": "/m"},
        flags=["mbss=1", "zzzzz=1", "mbs", "slurm=1", "seed.x=1"],
    )
    assert problems == [
        f"actor.lerning_rate (file {site}:3): no such setting; did you mean actor.learning_rate?",
        f"critc (file {site}:4): no such setting; `hlrlhf show` lists them all",
        "HL_ACTOR_LERNING_RATE (environment): no such setting; did you mean "
        "HL_ACTOR_LEARNING_RATE?",
        "HL_ACTOR_MODL (environment): no such setting; did you mean HL_ACTOR_MODEL?",
        "mbss (flag --set): no such setting; did you mean mbs?",
        "zzzzz (flag --set): no such setting; `hlrlhf show` lists them all",
        "--set mbs: must have the form name=value",
        next(problem for problem in problems if problem.startswith("slurm ")),
        "seed.x (flag --set): no such setting; did you mean seed?",
    ]
    assert "is a group of settings: slurm.partition, slurm.account" in problems[7]


def test_an_error_names_setting_value_origin_and_what_is_allowed(tmp_path: Path) -> None:
    site = written(tmp_path / "site.yaml", "mbs: 0\nactor:\n  model_path: [/a, /b]\n")
    problems = refused(files=[site], environ=MANDATORY | {"HL_SEED": "x"}, flags=["lora.dim=-1"])
    assert problems[0].startswith("seed = 'x' (environment HL_SEED): ")
    assert problems[1].startswith(f"mbs = '0' (file {site}:1): ")
    assert problems[1].endswith("; allowed: integer, at least 1")
    assert problems[2].startswith("lora.dim = '-1' (flag --set): ")
    assert len(problems) == 3
    one_value = {key: value for key, value in MANDATORY.items() if "ACTOR" not in key}
    problems = refused(files=[site], environ=one_value, flags=["mbs=1"])
    assert problems == [
        f"actor.model_path = ['/a', '/b'] (file {site}:3): input should be a valid string; "
        "allowed: text"
    ]


def test_all_errors_of_one_call_at_once(tmp_path: Path) -> None:
    site = written(tmp_path / "site.yaml", "sed: 1\n")
    broken = written(tmp_path / "broken.yaml", "a: [1\n")
    problems = refused(
        preset="llama3",
        files=[site, broken, tmp_path / "absent.yaml"],
        environ={
            "HL_TAG": "a b",
            "HL_ACTOR_LR": "1",
            "HL_ACTOR_LEARNING_RATE": "2",
            "HL_SED": "1",
            "HL_DATASET_PATH": "'",
        },
        flags=[
            "mbs=3",
            "actor.zero_stage=9",
            "hpz.enabled_actor=1",
            "slurm.mem=1",
            "foo",
            "slurm.mem_per_cpu=1",
        ],
    )
    starts = [
        "--preset llama3: no such preset",
        f"sed (file {site}:1): no such setting",
        f"{broken}:2:1: not YAML",
        f"{tmp_path}/absent.yaml: cannot be read",
        "HL_ACTOR_LR = '1' (environment): is another name",
        'dataset.path = "\'" (environment HL_DATASET_PATH): cannot be split',
        "HL_SED (environment): no such setting",
        "--set foo: must have the form",
        "base_out_path: is not set",
        "actor.model_path: is not set",
        "critic.model_path: is not set",
        "tag = 'a b' (environment HL_TAG): ",
        "actor.zero_stage = '9' (flag --set): ",
        "gbs = 32 (default), mbs = 3 (flag --set), ",
        "slurm.mem = '1' (flag --set), slurm.mem_per_cpu = '1' (flag --set): ",
    ]
    assert len(problems) == len(starts), problems
    for problem, start in zip(problems, starts, strict=True):
        assert problem.startswith(start)
    assert not any("hpZ" in problem for problem in problems), "the stage itself is in doubt"


def test_what_is_printed_cannot_drive_a_terminal() -> None:
    for problem in refused(
        environ={"HL_\x1b[2J": "1", "HL_ACTOR_LR": "\x1b[2J", "HL_ACTOR_LEARNING_RATE": "\udcff"},
        flags=["\x1b]0;x\x07=1", "\x1b"],
    ):
        assert problem.isprintable()


# dump and load


def test_dump_names_every_setting_and_its_origin(tmp_path: Path) -> None:
    resolved = resolve("llama2-7b", environ=MANDATORY, flags=["mbs=2"])
    lines = dump(resolved).splitlines()
    assert "mbs: 2  # flag --set" in lines
    assert "tag: first  # environment HL_TAG" in lines
    assert "device: hpu  # default" in lines
    assert "actor:" in lines
    settings = [line for line in lines[2:] if not line.endswith(":")]
    assert len(settings) == len(settings_by_name())


def test_a_default_port_is_still_a_default_after_a_round_trip(tmp_path: Path) -> None:
    def again(*flags: str) -> Resolved:
        text = dump(resolve(environ=MANDATORY, flags=flags))
        return resolve(files=[written(tmp_path / "settings.yaml", text)])

    assert again().is_default("master_port")
    assert not again("master_port=29500").is_default("master_port")
    assert again("master_port=4000").settings.master_port == 4000


# What a text setting may hold: all that is printable, and more; see the schema.
texts = st.text(
    st.characters(blacklist_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=40
)
hostile = st.one_of(
    texts,
    st.sampled_from(
        [
            "null",
            "~",
            "no",
            "true",
            "1e5",
            "0123",
            "24:00:00",
            "1.10",
            "0x1f",
            "1_000",
            ".inf",
            "2020-01-01",
        ]
    ),
    st.sampled_from(
        [
            "- a",
            "a: b",
            "a #b",
            " a ",
            "...",
            "---",
            "[a",
            "{a",
            "*a",
            "&a",
            "!a",
            "%a",
            "@a",
            "`a",
            ">",
            "?",
            "<<",
            "=",
            "'",
            '"',
        ]
    ),
    st.sampled_from(["|", "\\", "$(x)", "\ufeff", "\xa0"]),
)


@given(
    text=hostile,
    items=st.lists(hostile, max_size=3),
    rate=st.floats(5e-324, 1e300),
    flag=st.booleans(),
)
def test_dump_and_load_give_the_same_settings(
    tmp_path_factory: pytest.TempPathFactory, text: str, items: list[str], rate: float, flag: bool
) -> None:
    folder = tmp_path_factory.getbasetemp()
    resolved = resolve(
        environ=MANDATORY | {"HL_ACTOR_MODEL_PATH": text, "HL_SLURM_COMMENT": text},
        flags=[f"actor.learning_rate={rate!r}", f"slurm.requeue={flag}"],
    )
    given_values = dict(resolved.values)
    settings = resolved.settings
    for group, key, value in (("environment", "setup", items), ("slurm", "nodelist", text)):
        changed = getattr(settings, group).model_copy(update={key: value})
        settings = settings.model_copy(update={group: changed})
        given_values[f"{group}.{key}"] = given_values[f"{group}.{key}"]._replace(value=value)
    resolved = Resolved(settings, given_values, None)
    assert load(written(folder / "settings.yaml", dump(resolved))) == settings


@pytest.mark.parametrize("given", [r'["\n\nHuman:", "</s>"]', "'\n\nHuman:' '</s>'"])
def test_stop_strings_may_hold_newlines(tmp_path: Path, given: str) -> None:
    resolved = resolve(environ=MANDATORY | {"HL_GENERATION_STOP": given})

    assert resolved.settings.generation.stop == ["\n\nHuman:", "</s>"]
    lines = dump(resolved).splitlines()
    assert '  stop: ["\\n\\nHuman:", "</s>"]  # environment HL_GENERATION_STOP' in lines


@given(st.lists(st.text(min_size=1), max_size=3))
def test_any_stop_strings_survive_the_file(
    tmp_path_factory: pytest.TempPathFactory, strings: list[str]
) -> None:
    resolved = resolve(environ=MANDATORY, flags=[f"generation.stop={shlex.join(strings)}"])

    file = written(tmp_path_factory.getbasetemp() / "settings.yaml", dump(resolved))

    assert load(file).generation.stop == resolved.settings.generation.stop == strings


def test_load_refuses_an_incomplete_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="tag: is not set"):
        load(written(tmp_path / "settings.yaml", "seed: 1\n"))


def test_settings_that_no_file_can_hold_are_refused() -> None:
    """Each of them is short enough, and comes from a place of its own."""
    environ = MANDATORY | {f"HL_SLURM_{name}": "x" * 100_000 for name in ("QOS", "ACCOUNT")}
    assert len(dump(resolve(environ=environ))) > 200_000
    with pytest.raises(SettingsError, match=r"settings\.yaml: together they are longer than"):
        dump(resolve(environ=environ | {"HL_SLURM_COMMENT": "x" * 100_000}))
