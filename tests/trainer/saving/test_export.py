"""Saving where the disk does not take the models: nothing half-made, and nothing lost for it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from disks import disk, fill, no_file_longer_than
from ranks import Run, finish, prepare, running, together, train, wait_for
from transformers import AutoModelForCausalLM

from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.models import ema, engine, loading
from hlrlhf.trainer.saving import export

ROOM = "8m"  # for the demo's models once, which have 4 MB


def engines(folder: Path, ranks: int, stage: int) -> tuple[Any, Any]:
    settings = tiny.settings(
        "mbs=1",
        f"gbs={ranks}",
        f"devices_per_node={ranks}",
        f"actor.zero_stage={stage}",
        f"critic.zero_stage={stage}",
    )
    own, device = loading.load_policy(str(folder / "policy"), "fp32", 0.0), tiny.cpu(settings)
    actor = engine.trained(own, settings.actor, settings, device, 10)
    scorer = loading.load_scorer(str(folder / "scorer"), "fp32", 0.0)
    return actor, engine.trained(scorer, settings.critic, settings, device, 10)


def saved(models: Path, place: Path, ranks: int, stage: int) -> tuple[list[str], list[list[str]]]:
    """Save three times, the second time with too little room.

    Returns:
        What was said the second time; what the place held after each.
    """
    actor, critic = engines(models, ranks, stage)
    attempt = tiny.attempt(place, 1)
    both = tiny.models(actor, critic, average=ema.Average(actor, 0.5))
    said, held = [], []
    for limit in (10**9, 4000, 10**9):
        with no_file_longer_than(limit):
            try:
                export.save_models(place / "final", both, tiny.tokenizer(), attempt)
            except export.NotSavedError as error:
                said.append(str(error))
        torch.distributed.barrier()
        held.append(sorted(path.name for path in place.iterdir()))
        torch.distributed.barrier()
    return said, held


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 0), (2, 3)])
def test_a_save_that_fails_leaves_nothing_and_takes_nothing_away(
    tmp_path: Path, ranks: int, stage: int
) -> None:
    tiny.save_policy(tmp_path / "policy", "llama", **tiny.WIDE["llama"])
    tiny.save_classifier(tmp_path / "scorer", "llama", **tiny.WIDE["llama"])
    files = [tmp_path / name / "model.safetensors" for name in ("policy", "scorer")]
    sizes = [file.stat().st_size for file in files]
    place = tmp_path / "models"
    for name in (".final.0.unfinished", ".step-3.1.unfinished", ".final.2.unfinished", ".other"):
        (place / name).mkdir(parents=True)

    (said, held), *others = together(ranks, saved, tmp_path, place, ranks, stage)

    # Leftovers of this and earlier attempts are gone, those of a later one and what else there is
    # are not.
    assert held == [[".final.2.unfinished", ".other", "final"]] * 3
    (words,) = said
    assert words.startswith(f"{place / 'final'}: the models cannot be saved: File too large; they")
    needed = (2 * sizes[0] + sizes[1]) / 1e6
    assert float(words.split(" need ")[1].split(" MB")[0]) == pytest.approx(needed, rel=0.01)
    assert words.endswith("are free there")
    for own, seen in others:
        assert seen == held
        assert "the models cannot be saved: File too large" in own[0]
    AutoModelForCausalLM.from_pretrained(place / "final" / "actor")


def saved_at_last(models: Path, room: Path) -> list[Any]:
    """Save where there is no folder, then where there is no room until it has been waited for."""
    export.PAUSE = 1
    actor, critic = engines(models, 2, 0)
    asked = 0

    def save(folder: Path) -> None:
        export.save_models(
            folder, tiny.models(actor, critic), tiny.tokenizer(), tiny.attempt(models)
        )

    def asked_to_stop() -> bool:
        nonlocal asked
        asked += 1
        if asked == 2:
            torch.distributed.barrier()
            (room / "filler").unlink(missing_ok=True)
        return False

    folders = [models / "policy" / "config.json" / "final", room / "final"]
    return [export.save_at_last(folders, save, asked_to_stop), asked]


def test_a_last_save_goes_to_the_next_place_and_waits_for_room(tmp_path: Path) -> None:
    tiny.save_policy(tmp_path / "policy", "llama")
    tiny.save_classifier(tmp_path / "scorer", "llama")
    with disk(tmp_path / "disk", ROOM) as room:
        fill(room)

        found = together(2, saved_at_last, tmp_path, room)

        assert found == [[room / "final", 2]] * 2
        AutoModelForCausalLM.from_pretrained(room / "final" / "actor")
        assert [path.name for path in room.iterdir()] == ["final"]


def programmed_wrong(models: Path, place: Path) -> list[str]:
    actor, critic = engines(models, 1, 0)
    with pytest.raises(AttributeError, match="save_pretrained"):
        export.save_models(place / "final", tiny.models(actor, critic), None, tiny.attempt(place))
    return [path.name for path in place.iterdir()]


def test_an_error_that_is_not_the_disks_is_told_as_it_is(tmp_path: Path) -> None:
    tiny.save_policy(tmp_path / "policy", "llama")
    tiny.save_classifier(tmp_path / "scorer", "llama")

    assert together(1, programmed_wrong, tmp_path, tmp_path / "models") == [[]]


# Whole runs.


def warnings(run: Run) -> list[str]:
    return [line for line in run.output[0].splitlines() if line.startswith("warning: ")]


@pytest.mark.slow
@pytest.mark.knob("checkpoint_path", "save_interval")
@pytest.mark.parametrize("ranks", [1, 2])
def test_models_that_find_no_room_in_their_place_are_saved_in_the_run_directory(
    demo_models: Path, tmp_path: Path, ranks: int
) -> None:
    run_directory = tmp_path / "run"
    with disk(tmp_path / "disk", ROOM) as full:
        fill(full)
        prepare(
            run_directory,
            demo_models,
            devices_per_node=ranks,
            mbs=4,
            save_interval=1,
            checkpoint_path=full,
            tensorboard_path=full,
            evaluation__interval=1,
        )
        names = ("metrics", "samples", "evaluations")
        for name in names:
            (run_directory / f"{name}.jsonl").symlink_to(full / f"{name}.jsonl")

        run = train(run_directory, ranks)

        assert run.codes == [0] * ranks, run.output
        assert not [path for path in full.rglob("*") if path.name.endswith(".unfinished")]
    assert [path.name for path in (run_directory / "checkpoints").iterdir()] == ["final"]
    assert run.weights("actor").keys() == run.weights("actor", "final").keys()
    assert f"actor and critic are in {run_directory / 'checkpoints' / 'final'}" in run.output[0]
    said = warnings(run)
    for name in ("step-1", "step-2", "final"):
        (words,) = [line for line in said if f"/run/{name}: the models cannot be saved: " in line]
        assert "No space left on device; they need " in words
        assert " and 0 bytes are free there" in words
        assert words.endswith("; training goes on") == (name != "final")
    for name in (*(f"{name}.jsonl" for name in names), "events.out"):
        first, last = [line for line in said if name in line]
        assert "cannot be written: No space left on device; training goes on" in first
        assert "records lost at the end: " in last
    assert "Traceback" not in "".join(run.output)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_waits_for_room_can_be_asked_to_stop(
    demo_models: Path, tmp_path: Path, ranks: int
) -> None:
    run_directory = tmp_path / "run"
    with disk(tmp_path / "disk", ROOM) as full:
        fill(full)
        prepare(run_directory, demo_models, devices_per_node=ranks, mbs=4, run_steps=1)
        (run_directory / "checkpoints").symlink_to(full)
        log = run_directory / "rank-0.log"
        with running(run_directory, ranks) as processes:
            wait_for(lambda: log.exists() and "the run waits with" in log.read_text(), processes)
            os.kill(processes[-1].pid, signal.SIGUSR1)
            run = finish(run_directory, processes)
        assert [path.name for path in full.iterdir()] == ["filler"]
    assert run.codes == [1] * ranks, run.output
    (error,) = [line for line in run.output[0].splitlines() if line.startswith("error: ")]
    assert error.startswith("error: the models are lost: ")
    assert "final: the models cannot be saved: No space left on device; they need " in error
    assert "HL_CHECKPOINT_PATH" in error


def test_without_a_disk_at_fault_there_is_no_waiting(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise TrainerError("something else")

    with pytest.raises(TrainerError, match="something else"):
        export.save_at_last([tmp_path], fail, lambda: True)
