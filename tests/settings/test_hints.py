"""What a run would lose or miss, told before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from mandatory import MANDATORY

from hlrlhf.settings import SettingsError, resolve
from hlrlhf.settings.hints import check_here, hints

HERE = "/usr"  # is there, and in none of the places below
MODELS_AND_DATA = (
    *("actor.model_path", "actor.tokenizer_path", "critic.model_path", "reference.model_path"),
    *("reward.model_path", "dataset.path", "pretraining.path", "evaluation.path"),
)
MOUNTS = """/dev/vda / ext4 rw 0 0
tmpfs /scratch tmpfs rw 0 0
server:/scratch /scratch nfs4 rw 0 0
tmpfs /fast\\040disk tmpfs rw 0 0
none /ram ramfs rw 0 0
server:/shared /tmp/shared nfs4 rw 0 0
"""


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    file = tmp_path / "mounts"
    file.write_text(MOUNTS)
    return file


def said(mounts: Path, *flags: str, tmpdir: str = "") -> list[str]:
    """The hints of a run whose models and data are here."""
    environ = MANDATORY | {
        "HL_ACTOR_MODEL_PATH": HERE,
        "HL_CRITIC_MODEL_PATH": HERE,
        "HL_DATASET_PATH": HERE,
    }
    resolved = resolve(environ=environ, flags=flags)
    return list(hints(resolved, [], {"TMPDIR": tmpdir}, mounts))


def test_a_run_that_has_all_gets_no_hint(mounts: Path) -> None:
    assert said(mounts) == []


def test_a_limit_after_which_nobody_starts_the_run_again(mounts: Path) -> None:
    assert said(mounts, "slurm.time=12:00:00") == [
        "slurm.time = '12:00:00' (flag --set): a run that needs longer stops before this limit, "
        "with a checkpoint; with slurm.requeue=true it goes on by itself, else by hlrlhf resume"
    ]


@pytest.mark.parametrize(
    "flags",
    [
        *(["slurm.time=UNLIMITED"], ["slurm.time=0"], ["slurm.time=0-00:00:00"]),
        ["slurm.time=10", "slurm.requeue=true"],
    ],
)
def test_no_limit_or_a_requeue_needs_no_hint(mounts: Path, flags: list[str]) -> None:
    assert said(mounts, *flags) == []


@pytest.mark.parametrize(
    "flag",
    [
        *("base_out_path", "checkpoint_path", "tensorboard_path", "log_file"),
        *("environment.python", "actor.model_path", "dataset.path"),
    ],
)
@pytest.mark.parametrize(
    ("path", "place"),
    [
        *(("/tmp", "/tmp"), ("/var/tmp/a/b", "/var/tmp"), ("/dev/shm/a", "/dev/shm")),
        *(("/run/a", "/run"), ("/mine/a", "/mine"), ("/ram/a", "/ram")),
        ("/fast disk/a", "/fast disk"),
    ],
)
def test_a_path_that_each_machine_has_for_itself(
    mounts: Path, flag: str, path: str, place: str
) -> None:
    value = f"'{path}'" if flag == "dataset.path" else path
    first = said(mounts, f"{flag}={value}", tmpdir="/mine")[0]
    assert first == (
        f"{flag} = {path!r} (flag --set): nodes may not see it; {place} is each machine's own"
    )


@pytest.mark.parametrize(
    "flag",
    [
        *("base_out_path=/tmpfs/a", "base_out_path=/scratch/a", "base_out_path=/tmp/shared/a"),
        *("base_out_path=/runs", "environment.python=python3"),
        # The cache is to be a node's own, and the template is read here.
        *("hpu.recipe_cache_path=/tmp/a", "slurm.template=/tmp/a.j2"),
    ],
)
def test_a_path_that_nodes_may_well_see(mounts: Path, flag: str) -> None:
    assert said(mounts, flag, tmpdir="/") == []


def test_a_path_that_leads_into_a_machines_own_place(mounts: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("/ram/mine")
    (hint,) = (line for line in said(mounts, f"log_file={link}/log") if "/ram" in line)
    assert hint.startswith(f"log_file = '{link}/log' (flag --set): ")


def test_the_image_and_what_is_in_it(mounts: Path) -> None:
    flags = ("container.kind=apptainer", "environment.python=/tmp/bin/python")
    assert said(mounts, *flags, "container.image=docker://a/tmp") == []
    (hint,) = said(mounts, *flags, "container.image=/tmp/a.sif")
    assert hint.startswith("container.image = '/tmp/a.sif'")


def test_what_is_mounted_here_is_asked(tmp_path: Path) -> None:
    """Whatever that is; where it cannot be read, the usual places are known still."""
    resolved = resolve(environ=MANDATORY, flags=["base_out_path=/dev/shm/runs"])
    for lines in (hints(resolved, [], {}), hints(resolved, [], {}, tmp_path / "none")):
        assert "/dev/shm is each machine's own" in next(lines)


@pytest.mark.parametrize("name", MODELS_AND_DATA)
def test_models_and_data_that_are_not_here(mounts: Path, name: str) -> None:
    flags = [f"{name}=/nowhere", "evaluation.interval=1"]
    assert said(mounts, *flags) == [
        f"{name} = '/nowhere' (flag --set): not on this machine; the nodes must have it"
    ]
    resolved = resolve(environ=dict.fromkeys(MANDATORY, HERE) | {"HL_TAG": "x"}, flags=flags)
    with pytest.raises(SettingsError) as error:
        check_here(resolved, [])
    assert [str(problem) for problem in error.value.problems] == [
        f"{name} = '/nowhere' (flag --set): not on this machine, where --local reads it"
    ]
    check_here(resolved, [Path("/nowhere")])


def test_each_data_set_is_looked_for(mounts: Path) -> None:
    lines = said(mounts, f"dataset.path=/nowhere/a {HERE} org/name /nowhere/b")
    assert [line.partition(" (")[0] for line in lines] == [
        "dataset.path = '/nowhere/a'",
        "dataset.path = '/nowhere/b'",
    ]


def test_what_a_run_does_not_read_is_not_missed(mounts: Path, tmp_path: Path) -> None:
    preset = tmp_path / "p.yaml"
    preset.write_text(
        f"evaluation.path: /nowhere\nreward: {{model_path: /nowhere, model_weight: 0, "
        f"function: 'm:f'}}\nactor.model_path: {HERE}\n"
    )
    environ = dict.fromkeys(MANDATORY, HERE) | {"HL_TAG": "x"}
    check_here(resolve(str(preset), environ=environ), [])
