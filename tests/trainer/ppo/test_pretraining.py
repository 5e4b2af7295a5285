"""The texts of the pretraining mix: how they become rows, and who takes which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import one_rank  # noqa: F401

from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.ppo import pretraining

pytestmark = pytest.mark.usefixtures("one_rank")


def load(path: Path, *flags: str) -> pretraining.Mix | None:
    settings = tiny.settings(f"pretraining.path={path}", *flags)
    return pretraining.load_mix(settings, tiny.tokenizer(), tiny.cpu(settings))


def as_jsonl(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Recorder:
    """An actor that notes what it is shown and finds each token as likely as its half."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []

    def __call__(self, tokens: Any, mask: Any, width: int, temperature: float, loss: Any) -> Any:
        assert mask.all()
        assert temperature == 1.0
        assert width == tokens.shape[1] - 1
        self.rows += tokens.tolist()
        return loss(torch.full((len(tokens), width), -0.5), slice(None))


@pytest.mark.knob("pretraining.max_tokens", "pretraining.column")
def test_texts_are_joined_by_end_tokens_and_cut_into_rows(tmp_path: Path) -> None:
    texts = ["Human: where is the blue boat?", "user", "In the harbour."]
    path = as_jsonl(tmp_path, [{"story": text} for text in texts])
    mix = load(path, "pretraining.column=story", "pretraining.max_tokens=6", "mbs=2", "gbs=2")
    assert mix is not None
    tokenizer = tiny.tokenizer()
    joined = [
        id for text in texts for id in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    ]
    expected = [joined[i : i + 6] for i in range(0, len(joined) - 5, 6)]

    actor = Recorder()
    while len(actor.rows) < len(expected):
        loss, seen = mix.loss(actor)
        # The mean over the minibatch's tokens, weighted.
        assert loss.item() == pytest.approx(27.8 * 0.5)
        assert seen.tolist() == [0.5 * 2 * 5, 2 * 5]

    # Every row once, in an order of its own.
    assert sorted(actor.rows[: len(expected)]) == sorted(expected)
    assert actor.rows[: len(expected)] != expected


def test_without_a_path_there_is_no_mix() -> None:
    settings = tiny.settings()

    assert pretraining.load_mix(settings, tiny.tokenizer(), tiny.cpu(settings)) is None


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"story": "x"}], "has no column text; it has story .HL_PRETRAINING_COLUMN"),
        ([{"text": 3}], "holds 3, which is no text"),
        ([{"text": "x"}], "less than a row of 256 .HL_PRETRAINING_MAX_TOKENS"),
    ],
)
def test_texts_that_cannot_be_used(tmp_path: Path, rows: Any, words: str) -> None:
    with pytest.raises(TrainerError, match=words):
        load(as_jsonl(tmp_path, rows))
