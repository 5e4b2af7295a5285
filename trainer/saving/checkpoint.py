"""A checkpoint on disk: the state of a run, whole and checked, for any number of ranks.

A folder ``step-N`` with ``numbers.json``, what JSON can hold; ``rank-R.P.safetensors``, the pieces
of tensors that rank R kept; and ``manifest.json``, which names every other file with its size and
digest. It becomes visible by one rename, so a folder without a manifest was never one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hlrlhf.trainer.pieces import Piece

MANIFEST, NUMBERS = "manifest.json", "numbers.json"
FORMAT = 1
# What a file's name is followed by in the manifest.
Digest = dict[str, Any]
State = Mapping[str, Mapping[str, Any]]


def numbers_of(state: State) -> dict[str, dict[str, Any]]:
    """What JSON holds of a state, by member."""
    return {
        member: {name: value for name, value in values.items() if not isinstance(value, Piece)}
        for member, values in state.items()
    }


def pieces_of(state: State) -> Iterator[tuple[str, Piece]]:
    """The pieces that this rank is to save, each under a key that says its place."""
    for member, values in state.items():
        for name, value in values.items():
            if isinstance(value, Piece) and value.kept:
                yield f"{member}/{name}@{value.start}/{value.total}", value


def parts(pieces: Iterable[tuple[str, Piece]], limit: int) -> Iterator[dict[str, Tensor]]:
    """Copies of pieces in host memory, up to about `limit` bytes at a time."""
    part: dict[str, Tensor] = {}
    size = 0
    for key, piece in pieces:
        if part and size + piece.values.nbytes > limit:
            yield part
            part, size = {}, 0
        part[key] = piece.values.detach().to("cpu", copy=True)
        size += piece.values.nbytes
    yield part


def write_part(file: Path, part: Mapping[str, Tensor]) -> Digest:
    """Write pieces, down to the disk."""
    save_file(dict(part), file)
    return _written(file)


def write_json(file: Path, content: Any) -> Digest:
    """Write numbers, down to the disk."""
    file.write_text(json.dumps(content), encoding="utf-8")
    return _written(file)


def _written(file: Path) -> Digest:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    return {"size": file.stat().st_size, "sha256": _sha256(file)}


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class DamagedError(Exception):
    """A checkpoint cannot be used; says why."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that its manifest describes.

    Attributes:
        folder: where.
        manifest: ``step``, ``ranks``, ``files`` and what else was said when it was saved.
    """

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.manifest["step"])

    @classmethod
    def at(cls, folder: Path) -> Checkpoint:
        """The checkpoint in a folder, not yet checked.

        Raises:
            DamagedError: it has no manifest that can be read.
        """
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if manifest["format"] != FORMAT:
                raise DamagedError(f"{folder}: a format that this release does not know")
            found = cls(folder, manifest)
            assert found.step >= 0
            assert NUMBERS in manifest["files"]
        except (OSError, ValueError, LookupError, TypeError, AssertionError) as error:
            raise DamagedError(f"{folder / MANIFEST}: {_reason(error)}") from error
        return found

    def check(self, rank: int, ranks: int) -> None:
        """Compare this rank's share of the files with the manifest, bit for bit.

        Raises:
            DamagedError: naming a file that differs.
        """
        for name, digest in sorted(self.manifest["files"].items())[rank::ranks]:
            file = self.folder / name
            try:
                if file.stat().st_size != digest["size"]:
                    raise DamagedError(
                        f"{file}: has {file.stat().st_size} bytes instead of {digest['size']}"
                    )
                if _sha256(file) != digest["sha256"]:
                    raise DamagedError(f"{file}: is not what was written")
            except OSError as error:
                raise DamagedError(f"{file}: {_reason(error)}") from error

    def state(self) -> dict[str, dict[str, Any]]:
        """As `trainer.state.State` restores it: numbers, and tensors that are read on demand.

        Raises:
            DamagedError: a file cannot be read.
        """
        try:
            text = (self.folder / NUMBERS).read_text(encoding="utf-8")
            state: dict[str, dict[str, Any]] = json.loads(text)
            for name in self.manifest["files"]:
                if name.endswith(".safetensors"):
                    self._index(state, self.folder / name)
        except (OSError, ValueError) as error:
            raise DamagedError(f"{self.folder}: {_reason(error)}") from error
        return state

    def _index(self, state: dict[str, dict[str, Any]], file: Path) -> None:
        opened: Any = safe_open(file, framework="pt")
        for key in opened.keys():  # noqa: SIM118 - it is no dictionary
            path, _, place = key.rpartition("@")
            member, _, name = path.partition("/")
            start, total = map(int, place.split("/"))
            whole = state[member].setdefault(name, _Stored(key, total, []))
            length = opened.get_slice(key).get_shape()[0]
            whole.pieces.append((start, start + length, opened, key))


@dataclass(frozen=True)
class _Stored:
    """A tensor whose pieces lie in files; `pieces.Readable`."""

    name: str
    total: int
    pieces: list[tuple[int, int, Any, str]]

    def read(self, start: int, stop: int) -> Tensor:
        found, reached = [], start
        for begin, end, file, key in sorted(self.pieces, key=lambda piece: piece[:2]):
            if begin <= reached < min(end, stop):
                found.append(file.get_slice(key)[reached - begin : min(end, stop) - begin])
                reached = min(end, stop)
        if reached < stop or stop > self.total:
            raise DamagedError(f"{self.name}: no numbers from {reached} to {stop}")
        return torch.cat(found)


def every(folder: Path) -> list[Path]:
    """The folders of checkpoints, the newest first, whole or not."""
    try:
        names = [path for path in folder.iterdir() if path.name.startswith("step-")]
    except OSError:
        return []
    known = [path for path in names if path.name.removeprefix("step-").isdigit()]
    return sorted(known, key=lambda path: -int(path.name.removeprefix("step-")))


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
