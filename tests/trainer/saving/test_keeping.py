"""Which checkpoints are saved, kept and taken up; what a disk without room makes of them."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny
import torch
import torch.distributed as dist
from disks import disk, fill, no_file_longer_than
from tiny import one_rank  # noqa: F401

from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.pieces import Piece
from hlrlhf.trainer.saving import checkpoint
from hlrlhf.trainer.saving.checkpoint import Checkpoint
from hlrlhf.trainer.saving.keeping import Checkpoints

pytestmark = pytest.mark.usefixtures("one_rank")


@dataclass
class State:
    """A state of one number and one tensor, of which each rank holds a part."""

    step: int = 0
    loss: float = 0.5
    weights: Any = field(default_factory=lambda: torch.arange(1000.0))

    def state(self) -> dict[str, dict[str, Any]]:
        share = len(self.weights) // dist.get_world_size()
        start = dist.get_rank() * share
        piece = Piece(self.weights[start : start + share], start, len(self.weights))
        return {"run": {"step": self.step, "loss": self.loss}, "model": {"weights": piece}}

    def restore(self, state: Any) -> None:
        self.step, self.loss = state["run"]["step"], state["run"]["loss"]
        Piece.whole(self.weights).fill(state["model"]["weights"])


def keeper(directory: Path, *flags: str, attempt: int = 0) -> Checkpoints:
    made = directory / "run"
    made.mkdir(exist_ok=True)
    return Checkpoints(tiny.settings(*flags), tiny.attempt(made, attempt))


def save(kept: Checkpoints, *steps: int, reward: float | None = None) -> None:
    for step in steps:
        kept.save(State(step), reward, wait=True)  # type: ignore[arg-type]


def there(directory: Path) -> set[str]:
    return {path.name for path in (directory / "run" / "resume").iterdir()}


@pytest.mark.knob("checkpoint.interval", "checkpoint.minutes")
def test_by_steps_by_the_clock_or_never(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    steps = keeper(tmp_path, "checkpoint.interval=3", "checkpoint.minutes=0")
    clock = keeper(tmp_path, "checkpoint.minutes=1.5")
    never = keeper(tmp_path, "checkpoint.minutes=0")
    assert (steps.on, clock.on, never.on) == (True, True, False)
    assert [step for step in range(1, 8) if steps.wanted(step, None)] == [3, 6]
    assert not clock.wanted(3, None)
    now += 90
    assert clock.wanted(3, None)
    save(clock, 3)
    assert not clock.wanted(4, None)
    now += 10**6
    assert not never.wanted(3, None)
    assert not steps.wanted(4, None)


@pytest.mark.knob("checkpoint.keep")
def test_the_newest_are_kept(tmp_path: Path) -> None:
    save(keeper(tmp_path, "checkpoint.keep=2"), 1, 2, 3, 10)
    assert there(tmp_path) == {"step-3", "step-10"}


@pytest.mark.knob("checkpoint.keep_best")
def test_and_the_best_if_it_is_asked_for(tmp_path: Path) -> None:
    own = ("checkpoint.keep_best=true", "evaluation.interval=1", "checkpoint.minutes=0")
    kept = keeper(tmp_path, *own, "checkpoint.keep=1")
    assert kept.on
    for step, reward in enumerate([1.0, 3.0, 2.0, math.nan, 3.0], 1):
        assert kept.wanted(step, reward) == (step in (1, 2))
        save(kept, step, reward=reward)
    save(kept, 6)
    # Of two that are as good, the newer one.
    assert there(tmp_path) == {"step-5", "step-6"}
    assert kept.wanted(7, 3.5)
    assert not keeper(tmp_path, "checkpoint.minutes=0").wanted(7, 3.5)


def test_a_step_is_written_once_and_again_when_it_is_evaluated(tmp_path: Path) -> None:
    def written() -> int:
        return (tmp_path / "run" / "resume" / "step-1").stat().st_ino

    first, second = keeper(tmp_path), keeper(tmp_path, attempt=1)
    save(first, 1)
    unevaluated = written()
    save(first, 1)
    assert second.newest(10) is not None
    save(second, 1)
    assert written() == unevaluated
    save(second, 1, reward=0.5)
    evaluated = written()
    save(second, 1)
    save(second, 1, reward=0.5)
    assert written() == evaluated != unevaluated
    assert there(tmp_path) == {"step-1"}
    assert Checkpoint.at(tmp_path / "run" / "resume" / "step-1").manifest["reward"] == 0.5


def test_a_damaged_one_never_counts_among_those_that_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its manifest is whole, so that only who has read it all knows."""
    save(keeper(tmp_path, "checkpoint.keep=3"), 2, 4, 6)
    newest = tmp_path / "run" / "resume" / "step-6"
    (newest / "rank-0.0.safetensors").write_bytes(b"")
    kept = keeper(tmp_path, "checkpoint.keep=1", attempt=1)

    found = kept.newest(10)

    assert found is not None
    assert found.step == 4
    assert "; this checkpoint is damaged and is not used" in capsys.readouterr().out
    save(kept, 5)
    assert there(tmp_path) == {"step-5", "step-6"}
    save(kept, 6)
    assert there(tmp_path) == {"step-6"}
    assert Checkpoint.at(newest).step == 6
    (newest / "manifest.json").write_text("[]")
    save(kept, 7)
    assert there(tmp_path) == {"step-7"}


def test_nor_does_it_when_it_has_been_passed(tmp_path: Path) -> None:
    save(keeper(tmp_path), 4, 6)
    (tmp_path / "run" / "resume" / "step-6" / "numbers.json").write_text("{}")
    kept = keeper(tmp_path, "checkpoint.keep=2", attempt=1)
    assert kept.newest(10)
    save(kept, 7)
    assert there(tmp_path) == {"step-4", "step-7"}


def test_what_was_left_unfinished_goes_but_a_later_attempts_stays(tmp_path: Path) -> None:
    resume = tmp_path / "run" / "resume"
    for name in (".step-1.0.unfinished", ".step-2.old.1.unfinished", ".step-3.2.unfinished", "own"):
        (resume / name).mkdir(parents=True)
    assert keeper(tmp_path, attempt=1).newest(10) is None
    assert there(tmp_path) == {".step-3.2.unfinished", "own"}


def test_everything_comes_back_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no number too, and a tensor that is cut into files of 1000 bytes."""
    monkeypatch.setattr(checkpoint.parts, "__defaults__", (1000,))
    kept = keeper(tmp_path)
    weights = torch.randn(1000)
    weights[7] = math.nan
    kept.save(State(3, -math.inf, weights), wait=True)  # type: ignore[arg-type]
    files = sorted((tmp_path / "run" / "resume" / "step-3").glob("*.safetensors"))
    assert len(files) == 4
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in files)

    again = keeper(tmp_path, attempt=1)
    found = again.newest(10)
    assert found is not None
    state = State()
    again.restore(state, found)  # type: ignore[arg-type]
    assert (state.step, state.loss) == (3, -math.inf)
    assert state.weights.view(torch.int32).equal(weights.view(torch.int32))


def test_training_changes_nothing_that_is_being_written(tmp_path: Path) -> None:
    kept, state = keeper(tmp_path), State(3)
    expected = state.weights.clone()
    kept.save(state)  # type: ignore[arg-type]
    state.weights.zero_()
    kept.wait()
    found = keeper(tmp_path, attempt=1).newest(10)
    assert found is not None
    assert found.state()["model"]["weights"].read(0, 1000).equal(expected)


@pytest.mark.knob("checkpoint.memory")
def test_training_waits_where_there_is_no_memory_for_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, write = threading.Event(), checkpoint.write_part
    monkeypatch.setattr(checkpoint, "write_part", lambda *to: gate.wait(60) and write(*to))
    kept = keeper(tmp_path, "checkpoint.memory=4e-6")  # for the 4000 bytes of the tensor
    kept.save(State(1))  # type: ignore[arg-type]
    assert not (tmp_path / "run" / "resume" / "step-1").exists()
    gate.set()
    kept.wait()

    kept = keeper(tmp_path, "checkpoint.memory=3.9e-6")
    monkeypatch.setattr(kept, "wait", lambda: None)
    kept.save(State(2))  # type: ignore[arg-type]
    assert there(tmp_path) == {"step-1", "step-2"}


def test_a_checkpoint_of_other_models_is_an_error_that_says_so(tmp_path: Path) -> None:
    kept = keeper(tmp_path)
    save(kept, 3)
    found = kept.newest(10)
    assert found is not None
    folder = tmp_path / "run" / "resume" / "step-3"
    words = f"^{folder}: does not fit the models of this run: "
    for length in (999, 1001):
        with pytest.raises(TrainerError, match=f"{words}model/weights has 1,000 numbers there and"):
            kept.restore(State(0, 0, torch.zeros(length)), found)  # type: ignore[arg-type]

    class Other(State):
        def restore(self, state: Any) -> None:
            state["model"]["weight/lm_head"]

    with pytest.raises(TrainerError, match=f"{words}it has no weight/lm_head$"):
        kept.restore(Other(), found)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "was", "now"),
    [
        (("gbs=8",), "gbs = 4", "8"),
        (("lora.dim=8",), "lora.dim = 4", "8"),
        (("only_optimize_lora=true",), "only_optimize_lora = False", "True"),
    ],
)
def test_what_must_be_the_same_is_told_before_a_model_loads(
    tmp_path: Path, flags: tuple[str, ...], was: str, now: str
) -> None:
    save(keeper(tmp_path, "lora.dim=4"), 3)
    words = f"was saved with {was}, and cannot go on with {now}; set {was.split()[0]} as it was"
    with pytest.raises(TrainerError, match=f"step-3: {words}$"):
        keeper(tmp_path, "lora.dim=4", *flags).newest(10)


def test_no_checkpoint_to_begin_from_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(TrainerError) as raised:
        keeper(tmp_path, f"resume_from={empty}").newest(10)
    assert str(raised.value) == (
        f"{empty}: is neither a run's directory with a whole checkpoint nor one (HL_RESUME_FROM): "
        f"{empty / 'manifest.json'}: No such file or directory"
    )
    assert capsys.readouterr().out == ""


def test_a_run_to_begin_from_has_fewer_steps(tmp_path: Path) -> None:
    save(keeper(tmp_path), 3)
    other = tmp_path / "other"
    other.mkdir()
    fork = keeper(other, f"resume_from={tmp_path / 'run'}")
    assert fork.newest(4) is not None
    with pytest.raises(
        TrainerError, match=r"step-3: has done 3 steps .* has 3 in all: .*RUN_STEPS"
    ):
        fork.newest(3)
    # Its own come first.
    save(fork, 3)
    found = keeper(other, f"resume_from={tmp_path / 'run'}", attempt=1).newest(3)
    assert found is not None
    assert found.folder == other / "run" / "resume" / "step-3"


def test_a_manifest_is_checked_to_the_last_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = keeper(tmp_path)
    save(kept, 3)
    file = tmp_path / "run" / "resume" / "step-3" / "manifest.json"
    whole = json.loads(file.read_text())
    for changed, words in (
        (whole | {"step": 2}, "is not what was written"),
        ({**whole, "files": {}}, "is not what was written"),
        (whole | {"format": 9}, "has format 9, and this release reads 1"),
        ([], "is no manifest of a checkpoint"),
    ):
        file.write_text(json.dumps(changed))
        assert kept.newest(10) is None
        assert f"{file}: {words}; this checkpoint is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("memory", [0, 8])
def test_a_full_disk_costs_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], memory: int
) -> None:
    kept = keeper(tmp_path, f"checkpoint.memory={memory}")
    with disk(tmp_path / "disk", "1m") as full:
        (tmp_path / "run" / "resume").symlink_to(full)
        save(kept, 1)
        filler = fill(full)
        kept.save(State(2))  # type: ignore[arg-type]
        kept.wait()
        words = capsys.readouterr().out
        assert "resume: the checkpoint of step 2 cannot be written: " in words
        assert "No space left on device" in words
        assert "; training goes on" in words
        assert there(tmp_path) == {"step-1", "filler"}
        filler.unlink()
        save(kept, 3)
        assert there(tmp_path) == {"step-1", "step-3"}


def on_a_rank_without_room(directory: Path) -> list[set[str]]:
    kept, held = keeper(directory, "devices_per_node=2", "mbs=1"), []
    for step in (1, 2, 3):
        alone = step == 2 and dist.get_rank() == 1
        with no_file_longer_than(1000 if alone else 10**9):
            save(kept, step)
        dist.barrier()
        held.append(there(directory))
        dist.barrier()
    return held


def test_room_that_one_rank_lacks_too(tmp_path: Path) -> None:
    held, other = ranks.together(2, on_a_rank_without_room, tmp_path)
    assert held == other == [{"step-1"}, {"step-1"}, {"step-1", "step-3"}]


def own_view(directory: Path) -> list[Any]:
    """What each rank takes up where one of them cannot read a file that it is to check."""
    settings = ("devices_per_node=2", "mbs=1")
    save(keeper(directory, *settings), 1, 2)
    dist.barrier()
    if dist.get_rank() == 1:
        Checkpoint.check = blind  # type: ignore[method-assign]
    found = keeper(directory, *settings, attempt=1).newest(10)
    return [found and found.step]


def blind(self: Checkpoint, rank: int, ranks: int) -> None:
    if self.step == 2:
        raise checkpoint.DamagedError("cannot be read here")


def test_all_ranks_take_up_the_same(tmp_path: Path) -> None:
    assert ranks.together(2, own_view, tmp_path) == [[1], [1]]
