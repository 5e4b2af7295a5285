"""A checkpoint on disk: the state of a run, whole and checked, for any number of ranks.

A folder ``step-N`` with ``numbers.json``, what JSON can hold; ``rank-R.P.safetensors``, the pieces
of tensors that rank R kept; and ``manifest.json``, which names every other file with its size and
digest, and has a digest of its own. It becomes visible by one rename, so a folder without a
manifest was never one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
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
# Bytes of tensors in a file: older releases of safetensors hold them once more as they write.
PART = 2**28
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
    """The pieces that this rank is to save, by member and name."""
    for member, values in state.items():
        for name, value in values.items():
            if isinstance(value, Piece) and value.kept:
                yield f"{member}/{name}", value


def parts(pieces: Iterable[tuple[str, Piece]], limit: int = PART) -> Iterator[dict[str, Tensor]]:
    """Copies in host memory, of up to `limit` bytes at a time, under keys that say their places."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, piece in pieces:
        for begin, values in _cut(piece.values, limit):
            if part and size + values.nbytes > limit:
                yield part
                part, size = {}, 0
            copied = values.detach().to("cpu", copy=True)
            part[f"{name}@{piece.start + begin}/{piece.total}"] = copied
            size += values.nbytes
    yield part


def _cut(values: Tensor, limit: int) -> Iterator[tuple[int, Tensor]]:
    length = max(1, limit // values.element_size())
    for begin in range(0, len(values), length):
        yield begin, values[begin : begin + length]


def write_part(file: Path, part: dict[str, Tensor]) -> Digest:
    """Write pieces, down to the disk, and let go of them before the next ones are copied."""
    save_file(part, file)
    part.clear()
    return _written(file)


def write_json(file: Path, content: Any) -> Digest:
    """Write numbers, down to the disk."""
    file.write_text(json.dumps(content), encoding="utf-8")
    return _written(file)


def write_manifest(folder: Path, about: Mapping[str, Any], files: Mapping[str, Digest]) -> None:
    """Say what makes a checkpoint of the files in a folder, once all of them are there.

    Raises:
        OSError: one is not, as this host sees it, or not whole.
    """
    for name, digest in files.items():
        # safetensors writes files that their owner alone can read, whatever the umask says.
        shutil.copymode(folder / NUMBERS, folder / name)
        if (folder / name).stat().st_size != digest["size"]:
            raise OSError(f"{name} is not whole as rank 0 sees it")
    content = dict(about) | {"files": dict(files)}
    write_json(folder / MANIFEST, content | {"sha256": _of(content)})
    settle(folder)


def settle(folder: Path) -> None:
    """Have the names in a folder on the disk, where its file system can say when they are."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


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


def _of(content: Mapping[str, Any]) -> str:
    """The digest of a manifest's content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
        file = folder / MANIFEST
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
            form, digest = manifest["format"], manifest.pop("sha256", None)
        except (OSError, ValueError) as error:
            raise DamagedError(f"{file}: {words_of(error)}") from error
        except (LookupError, TypeError, AttributeError) as error:
            raise DamagedError(f"{file}: is no manifest of a checkpoint") from error
        if form != FORMAT:
            raise DamagedError(f"{file}: has format {form}, and this release reads {FORMAT}")
        if digest != _of(manifest):
            raise DamagedError(f"{file}: is not what was written")
        return cls(folder, manifest)

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
                raise DamagedError(f"{file}: {words_of(error)}") from error

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
            raise DamagedError(f"{self.folder}: {words_of(error)}") from error
        return state

    def _index(self, state: dict[str, dict[str, Any]], file: Path) -> None:
        opened: Any = safe_open(file, framework="pt")
        for key in opened.keys():  # noqa: SIM118 - it is no dictionary
            path, _, place = key.rpartition("@")
            member, _, name = path.partition("/")
            start, total = map(int, place.split("/"))
            whole = state[member].setdefault(name, _Stored(path, total, []))
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


def words_of(error: BaseException) -> str:
    """Why, without the name of the file, which whoever says it knows better."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
