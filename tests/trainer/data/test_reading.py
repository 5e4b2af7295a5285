"""Prompts: every format, what becomes of a row, blends, and the order of a run."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict
from hypothesis import strategies as st
from tiny import one_rank  # noqa: F401
from tokenizers import processors

from hlrlhf.trainer.data import reading
from hlrlhf.trainer.data.rows import Rows
from hlrlhf.trainer.errors import TrainerError

TEXTS = ["Human: hi\n\nAssistant:", 'Human: ünï 漢字, "quoted"\nline\n\nAssistant:', "third"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
HH = Path(__file__).resolve().parents[4] / "shared" / "data" / "hh-rlhf"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


def read(path: Path | str, tokenizer: Any, *flags: str) -> list[list[int]]:
    return list(reading.read(str(path), tiny.settings(*flags), tokenizer))


def texts(prompts: Iterable[list[int]], tokenizer: Any) -> list[str]:
    """The prompts' texts; each begins with one BOS, as the tokenizer puts it."""
    prompts = list(prompts)
    assert all(ids.count(tokenizer.bos_token_id) == 1 for ids in prompts)
    assert all(ids[0] == tokenizer.bos_token_id for ids in prompts)
    return [tokenizer.decode(ids[1:]) for ids in prompts]


def as_jsonl(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def as_json(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def as_parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def as_csv(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def as_saved(folder: Path, rows: list[dict[str, Any]]) -> Path:
    Dataset.from_list(rows).save_to_disk(folder / "saved")
    return folder / "saved"


def as_saved_splits(folder: Path, rows: list[dict[str, Any]]) -> Path:
    other = Dataset.from_list([{"prompt": "not this one"}])
    splits = DatasetDict(test=other, train=Dataset.from_list(rows))
    splits.save_to_disk(folder / "splits")
    return folder / "splits"


def as_folder_of_files(folder: Path, rows: list[dict[str, Any]]) -> Path:
    as_jsonl(folder / "files", rows, "train.jsonl")
    as_jsonl(folder / "files", [{"prompt": "not this one"}], "test.jsonl")
    return folder / "files"


FORMATS = [
    as_jsonl,
    as_json,
    as_parquet,
    as_csv,
    as_saved,
    as_saved_splits,
    as_folder_of_files,
]


# 1. Formats.


@pytest.mark.parametrize("save", FORMATS)
def test_formats(
    tmp_path: Path, tokenizer: Any, save: Callable[[Path, list[dict[str, Any]]], Path]
) -> None:
    path = save(tmp_path, [{"prompt": text, "chosen": "no"} for text in TEXTS])

    assert texts(read(path, tokenizer), tokenizer) == TEXTS


@pytest.mark.knob("dataset.split")
@pytest.mark.parametrize("save", [as_saved_splits, as_folder_of_files])
def test_another_split(tmp_path: Path, tokenizer: Any, save: Any) -> None:
    path = save(tmp_path, [{"prompt": text} for text in TEXTS])

    found = texts(read(path, tokenizer, "dataset.split=test"), tokenizer)

    assert found == ["not this one"]


@pytest.mark.parametrize("folder", ["with space", "[x]", "a*b", "100%", "ümlaut", "it's"])
def test_paths_are_taken_literally(tmp_path: Path, tokenizer: Any, folder: str) -> None:
    # What the name would find, were it a pattern.
    as_jsonl(tmp_path / "x", [{"prompt": "not this one"}])
    as_jsonl(tmp_path / "axb", [{"prompt": "not this one"}])
    for save in (as_jsonl, as_saved):
        (tmp_path / folder).mkdir(exist_ok=True)
        path = save(tmp_path / folder, [{"prompt": text} for text in TEXTS])

        assert texts(read(path, tokenizer), tokenizer) == TEXTS


def test_a_changed_file_is_read_again(tmp_path: Path, tokenizer: Any) -> None:
    for text in ("before", "after!"):
        path = as_jsonl(tmp_path, [{"prompt": text}])

        assert texts(read(path, tokenizer), tokenizer) == [text]


# 2. What becomes of a row.


def test_a_transcript_is_cut_before_its_last_answer(tmp_path: Path, tokenizer: Any) -> None:
    talk = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d\nAssistant: e"
    path = as_jsonl(tmp_path, [{"chosen": talk, "rejected": talk + "!"}])

    (found,) = texts(read(path, tokenizer), tokenizer)

    assert found == "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"


@pytest.mark.knob("dataset.prompt_column")
def test_the_prompt_column_is_taken_before_messages_and_transcripts(
    tmp_path: Path, tokenizer: Any
) -> None:
    chat = [{"role": "user", "content": "chat"}]
    row = {"chosen": "x\n\nAssistant: y", "messages": chat, "prompt": "plain", "ask": "named"}
    path = as_jsonl(tmp_path, [row])

    assert texts(read(path, tokenizer), tokenizer) == ["plain"]
    named = read(path, tokenizer, "dataset.prompt_column=ask")
    assert texts(named, tokenizer) == ["named"]


@pytest.mark.parametrize("save", [as_jsonl, as_json, as_parquet, as_saved])
@pytest.mark.parametrize("column", ["messages", "chosen", "prompt"])
def test_chats_are_written_by_the_template_up_to_their_last_answer(
    tmp_path: Path, save: Any, column: str
) -> None:
    tokenizer = tiny.tokenizer(TEMPLATE)
    system = {"role": "system", "content": "be kind"}
    user = {"role": "user", "content": "hi"}
    answer = {"role": "assistant", "content": "ho"}
    path = save(
        tmp_path, [{column: talk} for talk in ([system, user, answer, user], [user, answer])]
    )

    found = read(path, tokenizer)

    # Nothing is put in front: a template writes its special tokens itself.
    assert [tokenizer.decode(ids) for ids in found] == [
        "<system>be kind</s><user>hi</s><assistant>ho</s><user>hi</s><assistant>",
        "<user>hi</s><assistant>",
    ]
    assert found[1].count(tokenizer.eos_token_id) == 1


def test_a_prompt_does_not_end_with_an_end_token(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    path = as_jsonl(tmp_path, [{"prompt": "closed</s>"}, {"prompt": "open"}])

    found = read(path, tokenizer)

    assert texts(found, tokenizer) == ["closed", "open"]


@pytest.mark.parametrize("text", ["<s>Human: hi", "<s> Human: hi", "<s>"])
def test_a_prompt_that_begins_with_bos_gets_no_other(tmp_path: Path, text: str) -> None:
    tokenizer = tiny.tokenizer()
    ended = tiny.tokenizer()
    ended.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    path = as_jsonl(tmp_path, [{"prompt": text}, {"prompt": text.removeprefix("<s>") or "x"}])

    for each in (tokenizer, ended):
        first, second = read(path, each)
        assert first == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert second == tokenizer(text.removeprefix("<s>") or "x")["input_ids"]


def test_a_transcript_that_begins_with_bos_gets_no_other(tmp_path: Path, tokenizer: Any) -> None:
    path = as_jsonl(tmp_path, [{"chosen": "<s>\n\nHuman: a\n\nAssistant: b"}])

    assert texts(read(path, tokenizer), tokenizer) == ["\n\nHuman: a\n\nAssistant:"]


def test_a_chat_whose_template_and_first_message_begin_with_bos_has_one(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = tiny.tokenizer(template)
    chats = [[{"role": "user", "content": text}] for text in ("<s>hi", "hi")]
    path = as_jsonl(tmp_path, [{"messages": chat} for chat in chats])

    assert texts(read(path, tokenizer), tokenizer) == ["hi", "hi"]


def test_two_tokens_that_a_text_itself_begins_with_stay(tmp_path: Path) -> None:
    """As GPT-2's tokenizer: its BOS is its end token, and it puts none in front."""
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    path = as_jsonl(tmp_path, [{"prompt": "</s></s>x"}])

    ((first, second, *_),) = read(path, tokenizer)
    assert first == second == tokenizer.eos_token_id


@pytest.mark.knob("dataset.max_prompt_tokens")
def test_long_and_empty_prompts_are_dropped_and_counted(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "q" * 40
    width = len(tokenizer(long)["input_ids"])
    path = as_jsonl(tmp_path, [{"prompt": long + "q"}, {"prompt": long}, {"prompt": "a"}])

    found = read(path, tokenizer, f"dataset.max_prompt_tokens={width}")

    assert texts(found, tokenizer) == [long, "a"]
    assert f"{path}: 2 prompts, 1 dropped" in capsys.readouterr().out


# 3. Errors.


@pytest.mark.parametrize(
    ("rows", "flags", "words"),
    [
        ([{"text": "x"}], (), "no column prompt or messages or chosen; it has text"),
        ([{"prompt": "x"}], ("dataset.prompt_column=ask",), "no column ask; it has prompt"),
        ([{"chosen": "x"}], (), "line 1: column chosen holds a transcript without a turn"),
        ([{"prompt": 7}], (), "column prompt holds neither text nor chat messages: 7"),
        ([{"prompt": None}], (), "column prompt holds neither text nor chat messages: None"),
        ([{"messages": []}], (), r"column messages holds neither .*: \[\]"),
        (
            [{"messages": [{"role": "user", "content": "x"}]}],
            (),
            "the actor's tokenizer has no chat template",
        ),
        ([{"prompt": "far too long"}], ("dataset.max_prompt_tokens=2",), "none of its 1 prompts"),
    ],
)
def test_rows_that_make_no_prompt(
    tmp_path: Path, tokenizer: Any, rows: Any, flags: tuple[str, ...], words: str
) -> None:
    path = as_jsonl(tmp_path, rows)

    with pytest.raises(TrainerError, match=words):
        read(path, tokenizer, *flags)


def test_data_sets_that_cannot_be_read(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(TrainerError, match=r"rows\.txt: not one of \.json, \.jsonl"):
        read(tmp_path / "rows.txt", tokenizer)

    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainerError, match="empty: no data set can be read"):
        read(tmp_path / "empty", tokenizer)

    saved = as_saved_splits(tmp_path, [{"prompt": "x"}])
    with pytest.raises(TrainerError, match="no split dev; it has test, train"):
        read(saved, tokenizer, "dataset.split=dev")


# 4. Blends.


def test_without_weights_a_blend_holds_all_of_all() -> None:
    sets = [Rows.of([[1], [2]]), Rows.of([[3]])]

    assert list(reading.blend(sets, None, 0)) == [[1], [2], [3]]


@pytest.mark.parametrize(
    ("sizes", "weights", "taken"),
    [
        ((100, 100), (1, 1), (100, 100)),
        ((100, 100), (3, 1), (100, 33)),
        ((100, 20), (0.5, 0.5), (20, 20)),
        ((10, 1000, 40), (1, 20, 4), (10, 200, 40)),
    ],
)
def test_weights_are_shares_and_no_prompt_is_taken_twice(
    sizes: tuple[int, ...], weights: tuple[float, ...], taken: tuple[int, ...]
) -> None:
    sets = [Rows.of([index, row] for row in range(size)) for index, size in enumerate(sizes)]

    mixed = list(reading.blend(sets, weights, 3))

    assert tuple(Counter(index for index, _ in mixed).values()) == taken
    assert len({tuple(prompt) for prompt in mixed}) == len(mixed)
    assert mixed == list(reading.blend(sets, weights, 3))
    if taken[-1] < sizes[-1]:
        assert mixed != list(reading.blend(sets, weights, 4))


@pytest.mark.knob("dataset.path", "dataset.weights")
@pytest.mark.usefixtures("one_rank")
def test_the_prompts_of_a_run(tmp_path: Path, tokenizer: Any) -> None:
    first = as_jsonl(tmp_path / "a", [{"prompt": "a" * i} for i in range(1, 7)])
    second = as_saved(tmp_path, [{"prompt": "b" * i} for i in range(1, 7)])
    paths = f"dataset.path=[{first}, {second}]"
    settings = tiny.settings(paths, "dataset.weights=[2, 1]", "seed=9")

    prompts = reading.load_prompts(settings, tokenizer, torch.device("cpu"))

    sets = [Rows.of(read(path, tokenizer)) for path in (first, second)]
    assert list(prompts.ids) == list(reading.blend(sets, [2, 1], 9))
    assert len(prompts.ids) == 9
    assert prompts.seed == 9


# 5. Held out.


def held_out(
    ids: list[list[int]], own: list[list[int]] | None, count: int, seed: int
) -> tuple[list[list[int]], list[list[int]]]:
    left, held = reading.hold_out(Rows.of(ids), None if own is None else Rows.of(own), count, seed)
    return list(left), list(held)


def test_held_out_prompts_never_train_and_their_doubles_neither() -> None:
    ids = [[i % 10] for i in range(30)] + [[50 + i] for i in range(10)]

    left, held = held_out(ids, None, 6, 1)

    assert len(held) == len(set(map(tuple, held))) == 6
    assert left == [prompt for prompt in ids if prompt not in held]
    assert min(map(len, (left, held))) > 0
    assert (left, held) == held_out(ids, None, 6, 1)
    assert held != held_out(ids, None, 6, 2)[1]


def test_held_out_prompts_of_their_own() -> None:
    own = [[7], [8], [9], [9], [3]]

    left, held = held_out([[1], [9], [2], [9]], own, 64, 1)

    assert sorted(held) == [[3], [7], [8], [9]], "all, each once"
    assert left == [[1], [2]]
    assert len(held_out([[1]], own, 2, 1)[1]) == 2


def test_all_held_out_leaves_nothing_to_train_on() -> None:
    with pytest.raises(TrainerError, match=r"all 3 are held out.*HL_EVALUATION_PROMPTS"):
        held_out([[1], [2], [1]], None, 2, 1)


@pytest.mark.knob("evaluation.path", "evaluation.prompts")
@pytest.mark.usefixtures("one_rank")
def test_the_held_out_prompts_of_a_run(tmp_path: Path, tokenizer: Any) -> None:
    train = as_jsonl(tmp_path / "a", [{"prompt": "a" * i} for i in range(1, 9)])
    other = as_saved(tmp_path, [{"prompt": "b" * i} for i in range(1, 7)])
    flags = (f"dataset.path={train}", "evaluation.interval=5")

    def loaded(*more: str) -> reading.Prompts:
        settings = tiny.settings(*flags, *more)
        return reading.load_prompts(settings, tokenizer, torch.device("cpu"))

    own = loaded("evaluation.prompts=3")
    assert (len(own.ids), len(own.held_out)) == (5, 3)
    assert {text[0] for text in texts(own.held_out, tokenizer)} == {"a"}
    given = loaded(f"evaluation.path={other}")
    assert (len(given.ids), len(given.held_out)) == (8, 6)
    assert {text[0] for text in texts(given.held_out, tokenizer)} == {"b"}
    never = loaded("evaluation.interval=0")
    assert (len(never.ids), len(never.held_out)) == (8, 0)


# 6. The order of a run.


@hypothesis.settings(max_examples=60)
@hypothesis.given(st.integers(1, 20), st.integers(1, 9), st.integers(0, 2**31))
def test_each_pass_takes_every_prompt_once(count: int, size: int, seed: int) -> None:
    prompts = reading.Prompts(Rows.of([i] for i in range(count)), seed)
    steps = -(-3 * count // size)

    stream = [index for step in range(steps) for index in prompts.batch(step, size)]

    for epoch in range(3):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))
    # A batch follows from its step alone, whoever asks, in whatever order.
    again = reading.Prompts(prompts.ids, seed)
    for step in reversed(range(steps)):
        assert again.batch(step, size) == stream[step * size : (step + 1) * size]


def test_passes_and_seeds_differ_in_their_order() -> None:
    prompts = reading.Prompts(Rows.of([i] for i in range(50)), 1)
    orders = [prompts.batch(step, 50) for step in range(3)]
    orders += [reading.Prompts(prompts.ids, 7).batch(0, 50), list(range(50))]

    assert len({tuple(order) for order in orders}) == len(orders)


@pytest.mark.parametrize(("multiple", "width"), [(1, 3), (4, 4), (3, 3)])
def test_prompts_are_padded_on_the_left(multiple: int, width: int) -> None:
    ids, mask = reading.pad_left([[5, 6, 7], [8]], 9, multiple)

    left = width - 3
    assert ids.tolist() == [[9] * left + [5, 6, 7], [9] * (left + 2) + [8]]
    assert mask.tolist() == [[0] * left + [1, 1, 1], [0] * (left + 2) + [1]]


# 7. Memory.


@pytest.mark.usefixtures("one_rank")
def test_what_a_rank_keeps_are_4_bytes_a_token_and_two_numbers_a_prompt(
    tmp_path: Path, tokenizer: Any
) -> None:
    path = as_jsonl(tmp_path, [{"prompt": f"{i} is a number"} for i in range(300)])
    flags = (f"dataset.path={path}", "evaluation.interval=1", "evaluation.prompts=50")

    prompts = reading.load_prompts(tiny.settings(*flags), tokenizer, torch.device("cpu"))
    prompts.batch(0, 400)  # spans two passes, each in an order of its own

    for rows, number in ((prompts.ids, 250), (prompts.held_out, 50)):
        assert len(rows) == number
        tokens = sum(map(len, rows))
        # The storage, not the view: nothing larger may be kept alive behind it.
        held = sum(part.untyped_storage().nbytes() for part in (rows.ids, rows.offsets))
        assert held == 4 * tokens + 8 * (number + 1)
    orders = prompts.__dict__["_permutations"].values()
    assert [order.untyped_storage().nbytes() for order in orders] == [8 * 250] * 2


def test_a_data_set_is_tokenized_in_parts(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    monkeypatch.setattr(reading, "SIDE_BY_SIDE", 3)
    written = ["a", "bb", "c", "dd", "e", "ff", "g"]

    assert texts(reading.tokenized(written, tokenizer), tokenizer) == written


@hypothesis.given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=4), max_size=8), st.data())
def test_rows_are_the_lists_that_they_were_made_of(rows: list[list[int]], draws: Any) -> None:
    made = Rows.of(rows)
    some = draws.draw(st.lists(st.integers(0, len(rows) - 1))) if rows else []

    assert list(made) == rows
    assert [made[index] for index in range(len(made))] == rows
    assert list(made.picked(some)) == [rows[index] for index in some]
    assert list(Rows.joined([made, made.picked(some)])) == rows + [rows[i] for i in some]
    assert made.longest == max(map(len, rows), default=0)
    keys = [made.key(index) for index in range(len(rows))]
    assert len(set(keys)) == len(set(map(tuple, rows)))


# 8. Real data.


@pytest.mark.parametrize("split", ["train", "test"])
def test_prompts_of_real_transcripts_are_the_prompts_of_the_other_style(
    split: str, tokenizer: Any
) -> None:
    if not HH.is_dir():
        pytest.skip(f"no real data: {HH} is missing (a folder `shared` next to the repository)")
    flags = ("dataset.max_prompt_tokens=100000", f"dataset.split={split}")
    lines = (HH / "rm_static_style" / f"{split}.jsonl").read_text("utf-8").splitlines()
    expected = [json.loads(line)["prompt"] for line in lines]

    from_columns = read(HH / "rm_static_style", tokenizer, *flags)
    from_transcripts = read(HH / "hh_style", tokenizer, *flags)

    assert len(expected) == (3000 if split == "train" else 300)
    assert texts(from_columns, tokenizer) == expected
    assert from_transcripts == from_columns
    one_file = read(HH / "hh_style" / f"{split}.jsonl", tokenizer, *flags)
    assert one_file == from_columns


def test_a_rank_that_reads_no_data_does_without_the_library() -> None:
    """All but the first, each with 90 MB less."""
    names = "sys.modules.keys() & {'datasets', 'pandas', 'pyarrow'}"
    code = f"import sys, hlrlhf.trainer.loop; print({names})"
    found = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=240
    )
    assert found.stdout.splitlines()[-1] == "set()"
