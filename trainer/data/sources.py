"""A column of a data set: read by the library, its faults named by file and line."""

from __future__ import annotations

import glob
import logging
import reprlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hlrlhf.trainer.data import faults
from hlrlhf.trainer.errors import TrainerError

# Imported where it reads: rank 0 alone does, and pyarrow and pandas with it take 90 MB.
if TYPE_CHECKING:
    from datasets import Dataset

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}

Cell = TypeVar("Cell")

# What the library's readers log of a failure stands in the error too, with the line.
logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)


class CellError(Exception):
    """A cell cannot be used; the text goes on from the name of its column."""


def column(
    path: str,
    split: str,
    candidates: Sequence[str],
    variable: str,
    convert: Callable[[str, Any], Cell],
) -> list[Cell]:
    """What a function makes of the cells of one column, all of them of one type.

    Args:
        path: of the data set: a file, a folder, or a name on the Hub.
        split: of the data set; a file has none.
        candidates: the first of these columns that there is.
        variable: the setting that names another.
        convert: takes the name of the column and a cell; raises CellError.

    Raises:
        TrainerError: the data set cannot be read, has no rows or no such column, or a cell cannot
            be used; with the file and the line where there is one.
    """
    try:
        return _column(path, split, candidates, variable, convert)
    except TrainerError:
        # The rows of a folder come from many files: one that fails alone is the one to name.
        for file in _files(path, split):
            _column(file, split, candidates, variable, convert)
        raise


def _column(
    path: str,
    split: str,
    candidates: Sequence[str],
    variable: str,
    convert: Callable[[str, Any], Cell],
) -> list[Cell]:
    cells: list[Cell] = []
    # Files are converted in a cache of their own, which goes with this call.
    with tempfile.TemporaryDirectory() as cache:
        try:
            rows = _open(path, split, cache)
            name = next((each for each in candidates if each in rows.column_names), None)
            if name is None:
                raise TrainerError(
                    f"{path}: has no column {' or '.join(candidates)}; it has "
                    f"{', '.join(rows.column_names)} ({variable})"
                )
            for index, value in enumerate(rows[name]):
                try:
                    cells.append(convert(name, value))
                    if type(cells[index]) is not type(cells[0]):
                        raise CellError(
                            f"holds {reprlib.repr(value)}, another kind of prompt than "
                            f"{faults.place(path, 0)}; all of a data set have to be of one"
                        )
                except CellError as error:
                    where = faults.place(path, index)
                    raise TrainerError(f"{path}: {where}: column {name} {error}") from error
        except TrainerError:
            raise
        except Exception as error:  # the library raises types of its own, many of them
            words = f"no data set can be read from it: {_words(error)}"
            if "corresponds to no data" in words:
                words = "holds no rows"
            raise TrainerError(f"{path}: {faults.fault(Path(path)) or words}") from error
    return cells


def _open(path: str, split: str, cache: str) -> Dataset:
    from datasets import DatasetDict, disable_progress_bars, load_dataset, load_from_disk

    disable_progress_bars()
    local = Path(path)
    if not local.exists():
        return load_dataset(path, split=split)
    for file in [local] if local.suffix == ".csv" else sorted(local.rglob("*.csv")):
        if found := faults.csv_fault(file, records=2):
            raise TrainerError(f"{file}: {found}")
    if local.is_file():
        if local.suffix not in BUILDERS:
            raise TrainerError(f"{path}: not one of {', '.join(BUILDERS)}")
        # The library takes names of files for patterns.
        name = glob.escape(path)
        builder = BUILDERS[local.suffix]
        return load_dataset(builder, data_files=name, split="train", cache_dir=cache)
    if not _saved(local):
        return load_dataset(path, split=split, cache_dir=cache)
    saved = load_from_disk(path)
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise TrainerError(f"{path}: no split {split}; it has {', '.join(saved)}")
        return saved[split]
    return saved


def _saved(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("state.json", "dataset_dict.json"))


def _files(path: str, split: str) -> list[str]:
    """The files of which a folder's rows come, in their order; none where it is saved otherwise."""
    folder = Path(path)
    if not folder.is_dir() or _saved(folder):
        return []
    from datasets import load_dataset_builder

    try:
        files = load_dataset_builder(path).config.data_files[split]
    except Exception:  # it may be what failed in the first place
        return []
    return [str(file) for file in files if Path(file).suffix in BUILDERS]


def _words(error: BaseException) -> str:
    """What an error was raised from says, in one line: the library's own often says nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__
