"""Files that a run adds to while it trains; a disk that is full costs records, not the run."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm


def warn(words: str) -> None:
    """Say it where the progress is shown, beside the bar if there is one."""
    tqdm.write(f"warning: {words}", file=sys.stdout)
    sys.stdout.flush()


class Appended:
    """A file in a folder that is there, to which whole records are added, and no part of one.

    It is opened for each record and closed after it: a network's file system may tell only then
    that a quota is reached. What fails is said when it begins and when it is over.

    Args:
        path: the file, made when the first record comes.
        end: what the last byte of a whole record is, where there is such a byte: an attempt that
            was killed may have left a part, which is taken away.
    """

    def __init__(self, path: Path, end: bytes = b""):
        self._path = path
        self._end = end
        self._lost = 0

    def add(self, data: bytes, records: int = 1, head: bytes = b"") -> None:
        """Write records, or warn.

        Args:
            data: the records, as bytes.
            records: how many.
            head: what an empty file begins with.
        """
        try:
            self._add(data, head)
        except OSError as error:
            if not self._lost:
                warn(
                    f"{self._path}: cannot be written: {error.strerror}; training goes on, records "
                    "are lost until it can be"
                )
            self._lost += records
        else:
            if self._lost:
                warn(f"{self._path}: can be written again; records lost: {self._lost}")
            self._lost = 0

    def close(self) -> None:
        """Say what was lost, if nothing could be written since."""
        if self._lost:
            warn(f"{self._path}: records lost at the end: {self._lost}")

    def _add(self, data: bytes, head: bytes) -> None:
        begin = None
        try:
            # Without Python's buffer, which would keep what could not be written for later.
            with self._path.open("a+b", buffering=0) as file:
                begin = self._whole(file)
                # One write, at once: whoever reads meanwhile sees whole records.
                data = data if begin else head + data
                while data:
                    data = data[file.write(data) :]
        except OSError:
            if begin is not None:
                with contextlib.suppress(OSError):
                    os.truncate(self._path, begin)
            raise

    def _whole(self, file: io.FileIO) -> int:
        """The size of a file, less a record at its end that is not whole."""
        size = file.seek(0, os.SEEK_END)
        if size and self._end:
            file.seek(size - 1)
            if file.read(1) != self._end:
                size = self._path.read_bytes().rfind(self._end) + 1
                file.truncate(size)
        return size


class Lines(Appended):
    """A file of JSON lines."""

    def __init__(self, path: Path):
        super().__init__(path, b"\n")

    def write(self, records: Iterable[dict[str, Any]]) -> None:
        """Add a line for each record; what is no number is written as null."""
        lines = [_line(record) for record in records]
        if lines:
            self.add("".join(lines).encode(), len(lines))

    def complete(self, head: dict[str, Any], values: dict[str, Any]) -> None:
        """Add values to the last record, or a new one where that is of another step.

        Args:
            head: of a new one; names the step.
            values: that came late.
        """
        *before, last = [*self.records()] or [{}]
        if last.get("step") == head["step"]:
            put(self._path, "".join(map(_line, [*before, last | values])))
        else:
            self.write([head | values])

    def keep(self, up_to: int | None) -> None:
        """Drop the records of steps that are about to be done again, and lines cut short.

        Args:
            up_to: the last step whose records stay; None for none.
        """
        lines = self._lines()
        kept = [line for line in lines if up_to is not None and _is_of(line, up_to)]
        if len(kept) < len(lines):
            put(self._path, "".join(kept))

    def records(self) -> Iterator[dict[str, Any]]:
        """Those that are in the file, each a whole line."""
        for line in self._lines():
            with contextlib.suppress(ValueError):  # cut short, and the disk too full to repair it
                yield json.loads(line)

    def _lines(self) -> list[str]:
        try:
            with self._path.open(encoding="utf-8", errors="replace") as file:
                return file.readlines()
        except OSError:  # as a rule, there is none yet
            return []


class Board(Appended):
    """TensorBoard's event file, in a folder that other runs and attempts may write into.

    The folder is made when the first point comes, but not a run's directory that was deleted.

    Written here: TensorBoard's own writer is a thread, which ends with the first error.

    Args:
        folder: where.
        run: the run's directory.
        first: what other files there say of this step and later ones is not to be shown.
    """

    def __init__(self, folder: Path, run: Path, first: int):
        writer = f"{socket.gethostname()}.{os.getpid()}.{first}"
        name = f"events.out.tfevents.{time.time():010.0f}.{writer}"
        super().__init__(folder / name)
        self._run = run
        self._first = first

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Add a point to each curve."""
        now = time.time()
        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        event = Event(wall_time=now, step=step, summary=Summary(value=points))
        head = Event(wall_time=now, file_version="brain.Event:2")
        # As its own writer's `purge_step` does.
        start = SessionLog(status=SessionLog.START)
        purge = Event(wall_time=now, step=self._first, session_log=start)
        self.add(_recorded(event), head=_recorded(head) + _recorded(purge))

    def _add(self, data: bytes, head: bytes) -> None:
        self._run.stat()  # or an error
        self._path.parent.mkdir(parents=True, exist_ok=True)
        super()._add(data, head)


def put(path: Path, text: str) -> None:
    """Write a file whole, in the place of what there was, or warn."""
    part = path.with_name(f".{path.name}.unfinished")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        warn(f"{path}: cannot be written: {error.strerror}; training goes on without it")


def _line(record: dict[str, Any]) -> str:
    # JSON has no word for what is no number.
    said = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    return json.dumps(said, ensure_ascii=False, allow_nan=False) + "\n"


def _is_of(line: str, up_to: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= up_to)
    except (ValueError, LookupError, TypeError):
        return False


def _recorded(event: Any) -> bytes:
    written = io.BytesIO()
    RecordWriter(written).write(event.SerializeToString())
    return written.getvalue()
