"""Which checkpoints stay in a run's folder: the newest, perhaps the best; what is useless goes."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from hlrlhf.trainer.saving.checkpoint import Checkpoint, DamagedError, settle


def every(folder: Path) -> list[Path]:
    """The places of checkpoints, the newest first, whole or not."""
    found = {}
    try:
        for path in folder.iterdir():
            if name := re.fullmatch(r"step-([0-9]+)", path.name):
                found[path] = int(name[1])
    except OSError:
        return []
    return sorted(found, key=lambda path: -found[path])


class Retention:
    """The checkpoints of a run, as its rank 0 keeps them.

    Args:
        folder: where.
        attempt: the number of this attempt.
        keep: how many of the newest.
        keep_best: whether to keep the one with the highest reward too.
    """

    def __init__(self, folder: Path, attempt: int, keep: int, keep_best: bool):
        self._folder = folder
        self._attempt = attempt
        self._keep = keep
        self._keep_best = keep_best
        # The manifest of one may be whole, and a file that it names not.
        self._damaged: set[Path] = set()

    def unfinished(self, name: str) -> Path:
        """Where one is written, and where one is taken away."""
        return self._folder / f".{name}.{self._attempt}.unfinished"

    def sweep(self) -> Iterator[Path]:
        """Remove what this attempt and earlier ones left unfinished."""
        for left in sorted(self._folder.glob(".step-*.unfinished")):
            number = re.fullmatch(r"\.step-.+\.([0-9]+)\.unfinished", left.name)
            if number and int(number[1]) <= self._attempt:
                shutil.rmtree(left, ignore_errors=True)
                yield left

    def damaged(self, folders: Iterable[Path]) -> None:
        """Count these as useless, whatever their manifests say."""
        self._damaged.update(folders)

    def add(self, unfinished: Path, step: int) -> Path:
        """Make a written one visible, in the place of one that is there, and drop what is spare.

        Returns:
            Where it is now.
        """
        place = self._folder / f"step-{step}"
        old = self._aside(place)
        unfinished.rename(place)
        settle(self._folder)
        shutil.rmtree(old, ignore_errors=True)
        self._damaged.discard(place)
        for folder in self._spare(step):
            self._remove(folder)
        return place

    def is_best(self, reward: float) -> bool:
        """Whether the best is to be kept, and none that is there was evaluated as well."""
        rewards = [found.manifest["reward"] for found in self._whole()]
        return self._keep_best and all(reward > other for other in rewards if other is not None)

    def _whole(self) -> list[Checkpoint]:
        """Those that may be used, the newest first."""
        whole = []
        for folder in every(self._folder):
            if folder not in self._damaged:
                try:
                    whole.append(Checkpoint.at(folder))
                except DamagedError:
                    continue
        return whole

    def _spare(self, step: int) -> list[Path]:
        """What is neither among the newest nor the best, now that there is one of a step.

        Of later steps only what is damaged can be there: it is kept for who may want to look at it,
        until its step comes again.
        """
        whole = self._whole()
        kept = {found.folder for found in whole[: self._keep]}
        rewards = [found for found in whole if found.manifest["reward"] is not None]
        if self._keep_best and rewards:
            kept.add(max(rewards, key=lambda found: float(found.manifest["reward"])).folder)
        known = every(self._folder)
        older = known[known.index(self._folder / f"step-{step}") :]
        return [folder for folder in older if folder not in kept]

    def _remove(self, folder: Path) -> None:
        """Take it away at once: half of one must never pass for a checkpoint."""
        shutil.rmtree(self._aside(folder), ignore_errors=True)

    def _aside(self, folder: Path) -> Path:
        """Move it, if it is there, to where `sweep` would remove it."""
        gone = self.unfinished(f"{folder.name}.old")
        with contextlib.suppress(OSError):
            folder.rename(gone)
        return gone
