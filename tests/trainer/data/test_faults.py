"""Data files that cannot be used: each is told with its file and line, whatever it is read for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from tiny import one_rank  # noqa: F401

from hlrlhf.trainer.data import faults, reading
from hlrlhf.trainer.errors import TrainerError

TEMPLATE = "{% for m in messages %}{{ m.content + '' }}{% endfor %}"
CHAT = [{"role": "user", "content": "hi"}]


def lines(*rows: Any) -> bytes:
    """Each a line of JSON; what is bytes is a line as it is."""
    return b"".join(
        (row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows
    )


def parquet(folder: Path) -> bytes:
    Dataset.from_list([{"prompt": str(i) * i} for i in range(99)]).to_parquet(folder / "whole")
    return (folder / "whole").read_bytes()


GOOD = {"prompt": "a"}
UNREADABLE = {
    "empty.jsonl": (b"", "is empty"),
    "empty.json": (b"", "is empty"),
    "empty.csv": (b"", "is empty"),
    "empty.parquet": (b"", "is empty"),
    "blank.jsonl": (b"\n\n", "holds no rows"),
    "none.json": (b"[]", "holds no rows"),
    "header.csv": (b"prompt\n", "holds no rows"),
    "latin.jsonl": (
        lines(GOOD, b'{"prompt": "\xfc"}'),
        "line 2 is not UTF-8: byte 13 of it is 0xfc; save the file as UTF-8",
    ),
    "latin.json": (b'[{"prompt":\n"\xfc"}]', "line 2 is not UTF-8: byte 2 of it is 0xfc; "),
    "latin.csv": (b"prompt\na\n\xfc\n", "line 3 is not UTF-8: byte 1 of it is 0xfc; "),
    "utf16.jsonl": (
        '{"prompt": "a"}\n'.encode("utf-16"),
        "line 1 is not UTF-8: byte 1 of it is 0xff; ",
    ),
    "cut.jsonl": (lines(GOOD, b"", GOOD)[:-5], "line 3 is not JSON: Expecting value at column 12"),
    "comma.jsonl": (
        lines(GOOD, b'{"prompt": "b"', GOOD),
        "line 2 is not JSON: Expecting ',' delimiter at column 15",
    ),
    "zeros.jsonl": (lines(GOOD, b"\0\0\0"), "line 2 is not JSON: "),
    "lines.json": (lines(GOOD, GOOD, b"}"), "line 3 is not JSON: Expecting value at column 1"),
    "array.json": (
        b'[{"prompt": "a"},\n\n{"prompt": }]',
        "line 3 is not JSON: Expecting value at column 12",
    ),
    "list.jsonl": (
        lines(GOOD, [1, 2]),
        'line 2 holds a list, where a row is an object: {"column": "text"}',
    ),
    "texts.jsonl": (lines("a", "b"), "line 1 holds text, where a row is an object: "),
    "long.csv": (
        b'prompt,b\n"x\ny",1\n\nx,y,z\n',
        "line 5 has 3 fields, but the header 2; texts with commas or line breaks have to stand in "
        "double quotes",
    ),
    "quote.csv": (
        b'prompt\n"a"\n"b\nc\n',
        "line 3 has quotes that do not match: unexpected end of data",
    ),
    # pandas would take the first field for an index, and " world" for the prompt.
    "shifted.csv": (b"prompt\nHello, world\nyes, no\n", "line 2 has 2 fields, but the header 1; "),
    "cut.parquet": (b"", "no data set can be read from it: Parquet magic bytes not found"),
    "number.jsonl": (lines(GOOD, b"", {"prompt": 5}), "line 3: column prompt holds "),
    "null.jsonl": (lines(GOOD, {"prompt": None}), "line 2: column prompt holds "),
    "other.jsonl": (lines(GOOD, {"text": "b"}), "line 2: column prompt holds "),
    "number.json": (b'[{"prompt": "a"}, {"prompt": 5}]', "row 2: column prompt holds "),
    "hole.csv": (b'prompt,b\n"x\ny",1\n\n,2\n', "line 5: column prompt holds "),
    "numbers.csv": (b"prompt\n1\n2\n", "line 2: column prompt holds "),
    "column.csv": (b"ask;b\nx;y\n", "has no column prompt"),
}


@pytest.mark.parametrize("name", UNREADABLE)
@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder of files"])
def test_a_file_that_cannot_be_used(tmp_path: Path, name: str, folder: bool) -> None:
    content, words = UNREADABLE[name]
    path = tmp_path / "data" / f"train.{name}"
    path.parent.mkdir()
    path.write_bytes(parquet(tmp_path)[:-30] if name == "cut.parquet" else content)
    place = str(path.parent if folder else path)

    for read in (
        lambda: reading.read(place, tiny.settings(), tiny.tokenizer()),
        lambda: reading.read_texts(place, "train", "prompt"),
    ):
        with pytest.raises(TrainerError) as caught:
            read()

        assert str(caught.value).startswith(f"{path}: {words}")
        assert "\n" not in str(caught.value)


def test_parquet_without_rows(tmp_path: Path) -> None:
    Dataset.from_dict({"prompt": []}).to_parquet(tmp_path / "none.parquet")

    with pytest.raises(TrainerError, match=r"none\.parquet: holds no rows"):
        reading.read(str(tmp_path / "none.parquet"), tiny.settings(), tiny.tokenizer())


def test_of_many_files_the_one_at_fault_is_named(tmp_path: Path) -> None:
    for name, rows in (("a", lines(GOOD) * 3), ("b", lines(GOOD, b"{")), ("c", lines(GOOD))):
        (tmp_path / f"train-{name}.jsonl").write_bytes(rows)

    with pytest.raises(TrainerError, match=r"train-b\.jsonl: line 2 is not JSON"):
        reading.read(str(tmp_path), tiny.settings(), tiny.tokenizer())


@pytest.mark.usefixtures("one_rank")
def test_prompts_to_evaluate_on_are_told_alike(tmp_path: Path) -> None:
    for name, rows in (("train", lines(GOOD)), ("held", lines(GOOD, {"prompt": 7}))):
        (tmp_path / f"{name}.jsonl").write_bytes(rows)
    flags = [f"dataset.path={tmp_path / 'train.jsonl'}", "evaluation.interval=1"]
    settings = tiny.settings(*flags, f"evaluation.path={tmp_path / 'held.jsonl'}")

    words = r"held\.jsonl: line 2: column prompt holds neither text nor chat messages: 7$"
    with pytest.raises(TrainerError, match=words):
        reading.load_prompts(settings, tiny.tokenizer(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"prompt": "a"}, {"prompt": CHAT}], "holds .*, another kind of prompt than line 1; all"),
        ([{"prompt": CHAT}, {"prompt": "a"}], "holds 'a', another kind of prompt than line 1; all"),
        ([{"prompt": CHAT}, {"prompt": [{"who": "user"}]}], "holds neither text nor chat messages"),
        ([{"prompt": CHAT}, {"prompt": [None]}], "holds neither text nor chat messages"),
        (
            [{"prompt": CHAT}, {"prompt": [{"role": "user", "content": None}]}],
            "holds neither text nor chat messages",
        ),
        (
            [{"prompt": CHAT}, {"prompt": [{"role": "user", "content": ["x"]}]}],
            "holds a chat that the actor's chat template does not take: can only concatenate list",
        ),
    ],
)
def test_chats_that_make_no_prompt(tmp_path: Path, rows: Any, words: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines(*rows))

    with pytest.raises(TrainerError, match=rf"rows\.jsonl: line 2: column prompt {words}"):
        reading.read(str(tmp_path / "rows.jsonl"), tiny.settings(), tiny.tokenizer(TEMPLATE))


def test_kinds_that_differ_are_found_where_a_release_of_the_library_does_not_take_them(
    tmp_path: Path,
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        lines({"prompt": None}, b"", {"prompt": "a", "n": 1}, {"prompt": CHAT, "n": 2.5})
    )

    assert faults.fault(path) == "line 4: column prompt holds a list, but text in line 3"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.jsonl", b"\xef\xbb\xbf" + lines(GOOD)),
        ("blank.jsonl", b"\n" + lines(GOOD) + b"\n\n"),
        ("crlf.jsonl", lines(GOOD).replace(b"\n", b"\r\n")),
        ("lines.json", lines(GOOD)),
        ("short.csv", b"prompt,b\na\n"),
        ("quotes.csv", b'prompt,b\n"a",\n'),
        # What ends a line of text ends none of JSON.
        ("separator.jsonl", '{"prompt": "a",\r"b": "x\u2028y\x85z"}\n'.encode()),
    ],
)
def test_files_that_look_odd_and_are_whole(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)

    assert reading.read_texts(str(tmp_path / name), "train", "prompt") == ["a"]
    assert not re.search(" is | has ", faults.fault(tmp_path / name) or "")
