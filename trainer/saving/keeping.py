"""Which checkpoints a run keeps: when one is due, written beside the training, and taken up again.

Each rank copies its pieces to host memory and writes its own files; only the last word, one rename
by rank 0, makes them a checkpoint. Training goes on meanwhile, unless the copy would be too large.
"""

from __future__ import annotations

import json
import math
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from hlrlhf.runs import Attempt
from hlrlhf.settings import Settings
from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.pieces import MismatchError
from hlrlhf.trainer.records import put, warn
from hlrlhf.trainer.saving import checkpoint
from hlrlhf.trainer.saving.checkpoint import Checkpoint, DamagedError, Digest, words_of
from hlrlhf.trainer.saving.retention import Retention, every
from hlrlhf.trainer.state import State

GIGABYTE = 10**9
# What must be the same when a run goes on from a checkpoint: the order of prompts and the names of
# what trains follow from these.
SAME = ("gbs", "lora.dim", "only_optimize_lora")


@dataclass(frozen=True)
class _Save:
    """What is needed to write a checkpoint once the training has gone on."""

    step: int
    unfinished: Path
    numbers: dict[str, dict[str, Any]]
    about: dict[str, Any]
    last: bool


class Checkpoints:
    """The checkpoints of a run. All ranks have to call each method, at the same place.

    Args:
        settings: say when, how many, and how much host memory a copy may take.
        attempt: at the run.

    Attributes:
        seconds: that the slowest checkpoint took this rank, from its beginning to its end.
    """

    def __init__(self, settings: Settings, attempt: Attempt):
        self._settings = settings
        self._own = settings.checkpoint
        self._attempt = attempt
        self._folder = attempt.run.resume
        if settings.checkpoint_path:
            self._folder = attempt.run.within(settings.checkpoint_path) / attempt.run.resume.name
        own = self._own
        self._retention = Retention(self._folder, attempt.number, own.keep, own.keep_best)
        # The step that is on disk already, and its reward: what the run went on from or, on rank
        # 0, has written.
        self._saved: tuple[int | None, float | None] = (None, None)
        # For what ranks tell each other of their files while training uses its own groups.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
        self._began = time.monotonic()
        self.seconds = 0.0
        self._writing: threading.Thread | None = None
        self._said: str | None = None

    @property
    def on(self) -> bool:
        """Whether the run saves any unasked."""
        return self._own.interval > 0 or self._own.minutes > 0 or self._own.keep_best

    def has(self, step: int) -> bool:
        """Whether the state after a step is on disk."""
        return any(self._of_all(self._saved[0] == step))

    def wanted(self, step: int, evaluated: float | None) -> bool:
        """Whether to save after a step, by this rank's clock and what it sees on the disk.

        Args:
            step: steps done.
            evaluated: mean reward of an evaluation at this step, if there was one.
        """
        interval, seconds = self._own.interval, self._own.minutes * 60
        if interval and step % interval == 0:
            return True
        if seconds and time.monotonic() - self._began >= seconds:
            return True
        return evaluated is not None and self._retention.is_best(evaluated)

    def save(self, state: State, evaluated: float | None = None, *, wait: bool = False) -> None:
        """Save the state; what is on disk is a whole checkpoint or nothing.

        A disk that does not take it costs the checkpoint, with a warning.

        Args:
            state: of the run, between two steps.
            evaluated: mean reward of an evaluation at this step, if there was one.
            wait: until it is on disk.
        """
        self.wait()
        step = state.step
        reward = evaluated if evaluated is not None and math.isfinite(evaluated) else None
        saved, known = self._saved
        if any(self._of_all(step == saved and reward in (None, known))):
            return
        content = state.state()
        unfinished = self._retention.unfinished(f"step-{step}")
        about = {
            "format": checkpoint.FORMAT,
            "step": step,
            "ranks": dist.get_world_size(),
            "reward": reward,
            "settings": {name: attrgetter(name)(self._settings) for name in SAME},
        }
        save = _Save(step, unfinished, checkpoint.numbers_of(content), about, wait)
        pieces = list(checkpoint.pieces_of(content))
        limit = int(self._own.memory * GIGABYTE)
        fits = sum(piece.values.nbytes for _, piece in pieces) <= limit
        # One rank that has no room for its copy keeps all of them waiting.
        parts = checkpoint.parts(pieces)
        if all(self._of_all(fits)):
            copied = iter(list(parts))
            self._writing = threading.Thread(target=self._write, args=(save, copied))
            self._writing.start()
        else:
            self._write(save, parts)
        self._began = time.monotonic()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until the last save is on disk or has failed; says so if it has."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._said is not None:
            warn(self._said)
            self._said = None

    def newest(self, total_steps: int) -> Checkpoint | None:
        """The checkpoint that the run goes on from, checked; None where it begins.

        A damaged one is named, and the one before it is taken. What an attempt left unfinished is
        removed.

        Args:
            total_steps: of the run.

        Raises:
            TrainerError: `resume_from` is to be used, and holds no whole checkpoint or more steps
                than the run has; or the checkpoint does not go with the settings.
        """
        if dist.get_rank() == 0:
            self._attempt.check()
            for left in self._retention.sweep():
                warn(f"{left}: was left unfinished, and is removed")
        found, reasons = self._first_whole([self._folder])
        self._retention.damaged(reasons)
        self._warn_of(reasons)
        if found is not None:
            self._saved = (found.step, found.manifest["reward"])
        elif (source := self._settings.resume_from) is not None:
            found = self._source(Path(source), total_steps)
        elif reasons and dist.get_rank() == 0:
            warn(f"{self._folder}: holds no whole checkpoint; the run begins anew")
        if found is not None:
            self._check_settings(found)
        return found

    def restore(self, state: State, found: Checkpoint) -> None:
        """Go on from a checkpoint.

        Raises:
            TrainerError: it is of other models.
        """
        try:
            state.restore(found.state())
        except (DamagedError, MismatchError) as error:
            words = str(error)
        except KeyError as error:
            words = f"it has no {error.args[0]}"
        else:
            return
        raise TrainerError(f"{found.folder}: does not fit the models of this run: {words}")

    def _source(self, source: Path, total_steps: int) -> Checkpoint:
        """The one that the settings name to begin from."""
        found, reasons = self._first_whole([source / self._folder.name, source], source)
        if found is None:
            raise TrainerError(
                f"{source}: is neither a run's directory with a whole checkpoint nor one "
                f"(HL_RESUME_FROM): {'; '.join(reasons.values())}"
            )
        self._warn_of(reasons)
        if found.step >= total_steps:
            raise TrainerError(
                f"{found.folder}: has done {found.step} steps (HL_RESUME_FROM), and the run has "
                f"{total_steps} in all: to train on, set more with HL_RUN_STEPS or HL_EPOCHS"
            )
        return found

    def _first_whole(
        self, places: list[Path], alone: Path | None = None
    ) -> tuple[Checkpoint | None, dict[Path, str]]:
        """The newest whole checkpoint as all ranks see it, and why those before it are not.

        Args:
            places: folders with checkpoints, of which the first that has any counts.
            alone: what is taken for a checkpoint itself where none of them has any.
        """
        # Listed by one rank: another's view of the disk may be older, and it would wait for ever.
        folders = next(filter(None, map(every, places)), [alone] if alone else [])
        (folders,) = self._of_all(folders)[:1]
        damaged: dict[Path, str] = {}
        for folder in folders:
            reason = None
            try:
                one = Checkpoint.at(folder)
                one.check(dist.get_rank(), dist.get_world_size())
            except DamagedError as error:
                reason = str(error)
            if not any(reasons := self._of_all(reason)):
                return one, damaged
            damaged[folder] = next(filter(None, reasons))
        return None, damaged

    def _warn_of(self, reasons: dict[Path, str]) -> None:
        if dist.get_rank() == 0:
            for reason in reasons.values():
                warn(f"{reason}; this checkpoint is damaged and is not used")

    def _of_all(self, value: Any) -> list[Any]:
        """What each rank says."""
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, value, group=self._group)
        return said

    def _check_settings(self, found: Checkpoint) -> None:
        was = found.manifest.get("settings", {})
        for name in SAME:
            value = attrgetter(name)(self._settings)
            if was.get(name, value) != value:
                raise TrainerError(
                    f"{found.folder}: was saved with {name} = {was[name]}, and cannot go on with "
                    f"{value}; set {name} as it was"
                )

    def _write(self, save: _Save, parts: Iterator[dict[str, Tensor]]) -> None:
        """Write this rank's files, tell the others, and on rank 0 make them a checkpoint."""
        rank, began = dist.get_rank(), time.monotonic()
        files: dict[str, Digest] = {}
        failure = None
        try:
            self._attempt.check()
            save.unfinished.mkdir(parents=True, exist_ok=True)
            for number, part in enumerate(parts):
                name = f"rank-{rank}.{number}.safetensors"
                files[name] = checkpoint.write_part(save.unfinished / name, part)
        except Exception as error:  # the libraries raise types of their own
            failure = words_of(error)
        told = self._of_all((files, failure))
        self.seconds = max(self.seconds, time.monotonic() - began)
        if rank > 0:
            return
        try:
            for number, (_, failed) in enumerate(told):
                if failed is not None:
                    raise OSError(f"{failed} (rank {number})")
            self._finish(save, {name: digest for held, _ in told for name, digest in held.items()})
        except Exception as error:
            shutil.rmtree(save.unfinished, ignore_errors=True)
            self._said = (
                f"{self._folder}: the checkpoint of step {save.step} cannot be written: "
                f"{words_of(error)}" + ("" if save.last else "; training goes on")
            )

    def _finish(self, save: _Save, files: dict[str, Digest]) -> None:
        numbers = checkpoint.write_json(save.unfinished / checkpoint.NUMBERS, save.numbers)
        files = {checkpoint.NUMBERS: numbers, **files}
        checkpoint.write_manifest(save.unfinished, save.about, files)
        self._attempt.check()
        place = self._retention.add(save.unfinished, save.step)
        self._saved = (save.step, save.about["reward"])
        record = {"step": save.step, "folder": str(place)}
        put(self._attempt.run.newest_checkpoint, json.dumps(record) + "\n")
