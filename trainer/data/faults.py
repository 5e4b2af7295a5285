"""Where a data file is broken: a second look at it, once the library that read it has failed.

The library works on blocks of a file, and names a row within one or none.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class _FoundError(Exception):
    """A fault, in words."""


def fault(file: Path) -> str | None:
    """What is wrong with a file of JSON or CSV, and in which line; None where nothing is found."""
    if not file.is_file():
        return None
    if file.stat().st_size == 0:
        return "is empty"
    if file.suffix == ".parquet":
        return None
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return (
                    f"line {number} is not UTF-8: byte {error.start + 1} of it is "
                    f"0x{line[error.start]:02x}; save the file as UTF-8"
                )
    if file.suffix == ".csv":
        return csv_fault(file) or csv_fault(file, strict=True)
    return _fault_of_rows(_rows_of_lines(file) if _in_lines(file) else _rows_of_array(file))


def csv_fault(file: Path, records: int | None = None, strict: bool = False) -> str | None:
    """What is wrong in the first records of a CSV file, or in all.

    pandas takes the first field for an index where there are more than the header has names: a
    comma in a text that is not quoted would move all columns, without a word.

    Args:
        file: in UTF-8.
        records: how many are looked at, the header included; None: all.
        strict: whether quotes have to match, of which pandas does not ask it everywhere.
    """
    header = None
    try:
        for number, record in itertools.islice(_records(file, strict), records):
            header = header or record
            if len(record) > len(header):
                return (
                    f"line {number} has {len(record)} fields, but the header {len(header)}; texts "
                    "with commas or line breaks have to stand in double quotes"
                )
    except _FoundError as error:
        return str(error)
    return None


def place(path: str, index: int) -> str:
    """Where a row is, counted from 0: its line, or where no line is a row, its number from 1."""
    file = Path(path)
    numbers: Iterator[int] = iter(())
    if file.is_file() and file.suffix == ".csv":
        numbers = (number for number, _ in itertools.islice(_records(file), 1, None))
    elif file.is_file() and _in_lines(file):
        numbers = (number for number, _ in _lines(file))
    number = next(itertools.islice(numbers, index, None), None)
    return f"row {index + 1}" if number is None else f"line {number}"


def _fault_of_rows(rows: Iterator[tuple[str, Any]]) -> str | None:
    kinds: dict[str, tuple[str, str]] = {}
    try:
        for where, row in rows:
            if not isinstance(row, dict):
                return f'{where} holds {_kind(row)}, where a row is an object: {{"column": "text"}}'
            for column, value in row.items():
                if value is None:
                    continue
                kind, first = kinds.setdefault(column, (_kind(value), where))
                if _kind(value) != kind:
                    return f"{where}: column {column} holds {_kind(value)}, but {kind} in {first}"
    except _FoundError as error:
        return str(error)
    return None


def _rows_of_lines(file: Path) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(file):
        yield f"line {number}", _parsed(line, number)


def _rows_of_array(file: Path) -> Iterator[tuple[str, Any]]:
    """Those of an array; of another kind of file, whose rows have no one form, none but one."""
    whole = _parsed(file.read_text(encoding="utf-8-sig"), 1)
    rows = whole if isinstance(whole, list) else [whole]
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _parsed(text: str, number: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {number + error.lineno - 1} is not JSON"
        raise _FoundError(f"{where}: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise _FoundError(f"line {number} is nested too deep") from error


def _in_lines(file: Path) -> bool:
    """Whether each line is a row, as in JSONL and in many files that are called JSON."""
    if file.suffix != ".json":
        return file.suffix == ".jsonl"
    first = next(_lines(file), (0, ""))[1]
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1."""
    # Of JSON, the line feed alone ends a line.
    with file.open(encoding="utf-8-sig", newline="\n") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield number, line.rstrip("\r\n")


def _records(file: Path, strict: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Those of CSV that are not blank, the header first, each with the line that it begins in."""
    csv.field_size_limit(2**31 - 1)
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=strict)
        begin = 1
        try:
            for record in reader:
                if record:
                    yield begin, record
                begin = reader.line_num + 1
        except csv.Error as error:
            raise _FoundError(f"line {begin} has quotes that do not match: {error}") from error


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return "null" if value is None else kinds.get(type(value), "a number")
