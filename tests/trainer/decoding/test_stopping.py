"""Stop strings: the token that completes one, whatever the tokens are."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, StopStringCriteria

from hlrlhf.trainer.decoding.stopping import StopStrings, Warned

BYTES = tiny.tokenizer()
PIECES = ["▁", "a", "b", "▁the", "he", "t", "Human", ":"]


def llama_like() -> Any:
    """Pieces with a mark for the space before them, and tokens of one byte for all the rest."""
    words = ["<unk>", *PIECES, *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


PIECEWISE = llama_like()


def ends(
    answers: list[list[int]],
    strings: list[str],
    tokenizer: Any = BYTES,
    prompt: list[int] | None = None,
    shortest: int = 0,
) -> list[int]:
    """Where answers of one length end, token after token as ``generate`` asks."""
    prompt = prompt or [5, 6]
    stops = StopStrings(strings, tokenizer, len(prompt), shortest)
    sequences = torch.tensor([prompt + answer for answer in answers])
    for written in range(len(prompt) + 1, sequences.shape[1] + 1):
        asked = stops(sequences[:, :written], None)
        assert asked.tolist() == [end >= 0 for end in stops.ends]
    return stops.ends


def tokens(text: str, tokenizer: Any = BYTES) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def slow_end(answer: list[int], strings: list[str], shortest: int) -> int:
    """From the whole text after each token, for a tokenizer of which it only grows."""
    texts = [BYTES.decode(answer[:n]) for n in range(len(answer) + 1)]
    for n in range(max(1, shortest), len(answer) + 1):
        if any(texts[n].rfind(s) > texts[n - 1].rfind(s) for s in strings):
            return n - 1
    return -1


# Pieces of the stop strings below: single bytes of é among them, and tokens that hold a whole one.
ALPHABET = [*tokens("é"), *tokens("\n"), *tokens("a"), *tokens(" the"), *tokens("the"), 70]
STRINGS = ["\n\na", "é", " the", "aa", "he\n", "aéa"]


@hypothesis_settings(max_examples=300)
@given(
    st.integers(1, 12).flatmap(
        lambda n: st.lists(
            st.lists(st.sampled_from(ALPHABET), min_size=n, max_size=n), min_size=1, max_size=3
        )
    ),
    st.lists(st.sampled_from(STRINGS), min_size=1, max_size=3, unique=True),
    st.integers(0, 5),
)
def test_any_answers(answers: list[list[int]], strings: list[str], shortest: int) -> None:
    expected = [slow_end(answer, strings, shortest) for answer in answers]
    assert ends(answers, strings, shortest=shortest) == expected


def test_the_token_that_completes_the_string_is_the_last() -> None:
    answer = tokens("In the\n\nHuman is")
    pieces = [BYTES.decode([token]) for token in answer]
    assert pieces[2:5] == ["\n", "\n", "Human"], pieces

    assert ends([answer], ["\n\nHu"]) == [4]


def test_rows_end_apart_and_stay_where_they_ended() -> None:
    rows = [tokens("abcbab"), tokens("bababb"), tokens("cccccc")]
    assert ends(rows, ["ab", "bb"]) == [1, 2, -1]


def test_a_string_that_begins_in_the_prompt_ends_nothing() -> None:
    prompt = tokens("x\n\n")
    human = tokens("Human")

    assert ends([human * 2], ["\n\nHuman"], prompt=prompt) == [-1]
    # transformers' own does not know where the prompt ends.
    theirs = StopStringCriteria(BYTES, ["\n\nHuman"])
    assert theirs(torch.tensor([prompt + human]), None).tolist() == [True]


def test_a_character_of_several_tokens() -> None:
    (first, second) = tokens("é")
    assert ends([[first, second, first]], ["é"]) == [1]
    assert ends([[second, first, first]], ["é"]) == [-1]


def test_pieces_that_carry_the_space_before_them() -> None:
    ids = {piece: PIECES.index(piece) + 1 for piece in PIECES}
    newline = PIECEWISE.convert_tokens_to_ids("<0x0A>")
    assert PIECEWISE.decode([ids["▁the"]]) == "the", "a text's first space is dropped"

    assert ends([[ids["▁the"], ids["a"]]], [" the"], PIECEWISE) == [0]
    assert ends([[ids["a"], ids["he"], ids["▁the"]]], [" the"], PIECEWISE) == [2]
    turn = [ids["a"], newline, newline, ids["Human"], ids[":"], ids["a"]]
    assert ends([turn], ["\n\nHuman:"], PIECEWISE) == [4]


def test_before_the_shortest_answer_a_string_ends_nothing() -> None:
    answer = tokens("abxxabx")
    assert [ends([answer], ["ab"], shortest=n) for n in (0, 2, 3, 6, 7)] == [
        [1],
        [1],
        [5],
        [5],
        [-1],
    ]


def test_a_warning_ends_all_answers() -> None:
    for heard in (False, True):
        warned = Warned(lambda heard=heard: heard)
        assert warned(torch.ones(3, 4), None).tolist() == [heard] * 3
        assert warned(torch.ones(3, 4), None, needs_tensor_output=False) is heard


def test_tensors_of_one_shape_with_a_place_to_write() -> None:
    """Optimum for Gaudi passes whole tensors and the number of columns written; see its
    stopping_criteria.py."""
    stops = StopStrings(["ab"], BYTES, 2, 0)
    rows = torch.full((2, 9), 70)
    rows[:, 2:5] = torch.tensor([tokens("abx"), tokens("xab")])
    how = {"needs_tensor_output": False}

    asked = [stops(rows, None, token_idx=torch.tensor(n), **how) for n in (3, 4, 5)]

    assert asked == [False, False, True]
    assert stops.ends == [1, 2]
