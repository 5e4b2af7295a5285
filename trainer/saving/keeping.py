"""Which checkpoints a run keeps: when one is due, written beside the training, and taken up again.

Each rank copies its pieces to host memory and writes its own files; only the last word, one rename
by rank 0, makes them a checkpoint. Training goes on meanwhile, unless the copy would be too large.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from hlrlhf.runs import Attempt
from hlrlhf.settings import Settings
from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.records import put, warn
from hlrlhf.trainer.saving import checkpoint
from hlrlhf.trainer.saving.checkpoint import Checkpoint, DamagedError, Digest
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
            # A folder outside the run directory may be shared by runs, whose names differ.
            self._folder = Path(settings.checkpoint_path, attempt.run.name, attempt.run.resume.name)
        # For what ranks tell each other of their files while training uses its own groups.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
        self._began = time.monotonic()
        self.seconds = 0.0
        self._writing: threading.Thread | None = None
        self._said: str | None = None

    @property
    def on(self) -> bool:
        """Whether the run saves any unasked."""
        return self._own.interval > 0 or self._own.minutes > 0

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
        return evaluated is not None and self._is_best(evaluated)

    def save(self, state: State, evaluated: float | None = None, *, wait: bool = False) -> None:
        """Save the state; what is on disk is a whole checkpoint or nothing.

        A disk that does not take it costs the checkpoint, with a warning.

        Args:
            state: of the run, between two steps.
            evaluated: mean reward of an evaluation at this step, if there was one.
            wait: until it is on disk.
        """
        self.wait()
        content = state.state()
        step = state.step
        unfinished = self._folder / f".step-{step}.{self._attempt.number}.unfinished"
        about = {
            "format": checkpoint.FORMAT,
            "step": step,
            "ranks": dist.get_world_size(),
            "reward": evaluated if evaluated is not None and math.isfinite(evaluated) else None,
            "settings": {name: _value(self._settings, name) for name in SAME},
        }
        save = _Save(step, unfinished, checkpoint.numbers_of(content), about)
        pieces = list(checkpoint.pieces_of(content))
        limit = int(self._own.memory * GIGABYTE)
        fits = sum(piece.values.nbytes for _, piece in pieces) <= limit
        # One rank that has no room for its copy keeps all of them waiting.
        together: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(together, fits, group=self._group)
        # With no memory to use, a piece at a time.
        parts = checkpoint.parts(pieces, max(limit, 1))
        if all(together):
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

    def newest(self) -> Checkpoint | None:
        """The checkpoint that the run goes on from, checked; None where it begins.

        A damaged one is named, and the one before it is taken. What an attempt left unfinished is
        removed.

        Raises:
            TrainerError: `resume_from` is to be used, and is no whole checkpoint; or the checkpoint
                does not go with the settings.
        """
        if dist.get_rank() == 0:
            for left in self._folder.glob(".step-*.unfinished"):
                number = re.fullmatch(r"\.step-\d+\.(\d+)\.unfinished", left.name)
                if number and int(number[1]) <= self._attempt.number:
                    shutil.rmtree(left, ignore_errors=True)
        found = next(self._whole(checkpoint.every(self._folder)), None)
        source = self._settings.resume_from
        if found is None and source is not None:
            folder = Path(source)
            inside = checkpoint.every(folder / self._folder.name) or checkpoint.every(folder)
            found = next(self._whole(inside or [folder]), None)
            if found is None:
                raise TrainerError(
                    f"{source}: holds no whole checkpoint to begin from (HL_RESUME_FROM)"
                )
        if found is not None:
            self._check_settings(found)
        return found

    def _whole(self, folders: list[Path]) -> Iterator[Checkpoint]:
        """Those that are as they were written, as all ranks see them; the others are named."""
        for folder in folders:
            reasons: list[Any] = [None] * dist.get_world_size()
            one = None
            try:
                one = Checkpoint.at(folder)
                one.check(dist.get_rank(), dist.get_world_size())
                reason = None
            except DamagedError as error:
                reason = str(error)
            dist.all_gather_object(reasons, reason, group=self._group)
            said = next(filter(None, reasons), None)
            if said is None and one is not None:
                yield one
            elif dist.get_rank() == 0:
                warn(f"{said}; this checkpoint is damaged and is not used")

    def _check_settings(self, found: Checkpoint) -> None:
        was = found.manifest.get("settings", {})
        for name in SAME:
            value = _value(self._settings, name)
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
            failure = _words(error)
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, (files, failure), group=self._group)
        self.seconds = max(self.seconds, time.monotonic() - began)
        if rank > 0:
            return
        try:
            for _, failed in every:
                if failed is not None:
                    raise OSError(failed)
            self._finish(save, {name: digest for held, _ in every for name, digest in held.items()})
        except Exception as error:
            shutil.rmtree(save.unfinished, ignore_errors=True)
            self._said = (
                f"{self._folder}: the checkpoint of step {save.step} cannot be written: "
                f"{_words(error)}; training goes on"
            )

    def _finish(self, save: _Save, files: dict[str, Digest]) -> None:
        numbers = checkpoint.write_json(save.unfinished / checkpoint.NUMBERS, save.numbers)
        files = {checkpoint.NUMBERS: numbers, **files}
        checkpoint.write_json(save.unfinished / checkpoint.MANIFEST, save.about | {"files": files})
        self._attempt.check()
        place = self._folder / f"step-{save.step}"
        if place.exists():  # damaged, or this attempt would not have come by here again
            shutil.rmtree(place)
        save.unfinished.rename(place)
        record = {"step": save.step, "folder": str(place)}
        put(self._attempt.run.newest_checkpoint, json.dumps(record) + "\n")
        for folder in self._spare():
            shutil.rmtree(folder, ignore_errors=True)

    def _spare(self) -> list[Path]:
        """The folders that need not be kept: neither among the newest nor the best."""
        whole = []
        for folder in checkpoint.every(self._folder):
            try:
                whole.append(Checkpoint.at(folder))
            except DamagedError:
                continue
        kept = {found.folder for found in whole[: self._own.keep]}
        rewards = [found for found in whole if found.manifest.get("reward") is not None]
        if self._own.keep_best and rewards:
            kept.add(max(rewards, key=lambda found: float(found.manifest["reward"])).folder)
        return [found.folder for found in whole if found.folder not in kept]

    def _is_best(self, reward: float) -> bool:
        """Whether no checkpoint that is kept was evaluated as well."""
        if not self._own.keep_best:
            return False
        rewards = []
        for folder in checkpoint.every(self._folder):
            try:
                rewards.append(Checkpoint.at(folder).manifest.get("reward"))
            except DamagedError:
                continue
        return all(reward > float(other) for other in rewards if other is not None)


def _value(settings: Settings, name: str) -> Any:
    value: Any = settings
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
