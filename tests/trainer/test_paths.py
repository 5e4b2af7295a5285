"""Paths that are not there: which, on which host, and by which setting."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

pytest.importorskip("torch")

import tiny
from ranks import together
from tiny import one_rank  # noqa: F401

from hlrlhf.settings.paths import places
from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.paths import check_paths

MODELS_AND_DATA = [name for name, place in places().items() if place.kind in ("model", "data")]


def there(folder: Path, **other: object) -> tuple[str, ...]:
    """Flags of a run whose paths are all there, but for some."""
    (folder / "there").mkdir(exist_ok=True)
    values = dict.fromkeys(MODELS_AND_DATA, folder / "there") | {"evaluation.interval": 1}
    return tuple(f"{name}={value}" for name, value in (values | other).items())


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", MODELS_AND_DATA)
def test_a_path_that_is_not_there_is_told_with_its_host_and_setting(
    tmp_path: Path, name: str
) -> None:
    check_paths(tiny.settings(*there(tmp_path)))
    gone = tmp_path / "gone"

    with pytest.raises(TrainerError) as caught:
        check_paths(tiny.settings(*there(tmp_path, **{name: gone})))

    variable = "HL_" + name.upper().replace(".", "_")
    expected = f"{gone}: does not exist on host {socket.gethostname()} ({variable}); "
    assert str(caught.value).startswith(expected)


@pytest.mark.usefixtures("one_rank")
def test_a_run_that_was_begun_from_may_be_gone(tmp_path: Path) -> None:
    """For who has checkpoints of its own; the others are told when it is looked for."""
    check_paths(tiny.settings(*there(tmp_path, resume_from=tmp_path / "gone")))


@pytest.mark.usefixtures("one_rank")
def test_what_lies_under_a_file_is_not_there_and_a_link_in_a_circle_cannot_be_reached(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")

    with pytest.raises(TrainerError, match="file/x: does not exist on host"):
        check_paths(
            tiny.settings(*there(tmp_path, **{"actor.model_path": tmp_path / "file" / "x"}))
        )
    with pytest.raises(TrainerError, match=r"circle: cannot be reached \(Too many levels"):
        check_paths(tiny.settings(*there(tmp_path, **{"actor.model_path": tmp_path / "circle"})))


@pytest.mark.usefixtures("one_rank")
def test_names_on_the_hub_and_paths_that_no_one_reads_are_left_alone(tmp_path: Path) -> None:
    check_paths(tiny.settings(*there(tmp_path, **{"actor.model_path": "who/what"})))
    needed = ("actor.model_path", "critic.model_path", "dataset.path")
    flags = [f"{name}={tmp_path}" for name in needed]
    settings = tiny.settings(*flags, "reward.function=a:b", "reward.model_weight=0")
    # As a preset may name them; a person who did would be told that they have no effect.
    reward = settings.reward.model_copy(update={"model_path": "/gone"})
    evaluation = settings.evaluation.model_copy(update={"path": "/gone"})

    check_paths(settings.model_copy(update={"reward": reward, "evaluation": evaluation}))


def told(*flags: str) -> str:
    try:
        check_paths(tiny.settings(*flags))
    except TrainerError as error:
        return str(error)
    return ""


def test_only_the_rank_that_reads_data_looks_for_it(tmp_path: Path) -> None:
    gone = f"[{tmp_path / 'there'}, {tmp_path / 'gone'}]"

    first, second = together(2, told, *there(tmp_path, **{"dataset.path": gone}))

    assert "gone: does not exist on host" in first
    assert second == ""
