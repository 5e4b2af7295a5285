"""Raw scores, against plain classifiers on single rows and against functions by hand."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import EOS, PAD
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from hlrlhf.trainer import demo
from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.models import frozen, loading
from hlrlhf.trainer.ppo import scores

# fp32 sums in another order.
TOLERANCE = 2e-4

PROMPTS = [[1, 5, 6, 7, 8, 9], [1, 30], [1, 11, 12], [1, 4]]
ANSWERS = [[7, 8, EOS], [EOS], [13, PAD, 14, 15, EOS], [20, 21, 22, 23, 24]]

# Prompt, answer, and whether it ended.
TEXTS = [
    ("Human: where is the boat?\n\nAssistant:", " In the harbour.", True),
    ("Who?", "", True),
    ("Human: naïve?", " Très 日本", False),
]


@torch.no_grad()
def plain_score(classifier: Any, row: list[int]) -> float:
    # Without a padding token it reads a single row's last token.
    classifier.config.pad_token_id = None
    return float(classifier(torch.tensor([row])).logits)


def model_scores(
    folder: Path, tokenizer: Any, own: Any, score_at: str = "end"
) -> scores.ModelScores:
    settings = tiny.settings("mbs=3", "gbs=3")
    scorer = frozen.Copy(loading.load_scorer(str(folder), "fp32", 0.0).eval())
    return scores.ModelScores(scorer, tokenizer, own, score_at, settings, tiny.cpu(settings))


def found(source: Any, rollout: Any) -> list[float]:
    with torch.no_grad():
        made = source(rollout)
    assert made.dtype == torch.float32
    assert made.shape == (len(rollout.sequences),)
    return made.tolist()


# 1. Reward models.


@pytest.mark.parametrize("architecture", tiny.WITH_POSITIONS)
@pytest.mark.parametrize(
    ("score_at", "read"),
    # How much of each answer the model has seen at the token that is read.
    [("end", [3, 1, 5, 5]), ("before_end", [2, 0, 4, 5])],
)
def test_the_score_is_the_classifiers_own_at_its_token(
    tmp_path: Path, architecture: str, score_at: str, read: list[int]
) -> None:
    folder = tiny.save_classifier(tmp_path, architecture)
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    source = model_scores(folder, None, None, score_at)

    rows = zip(PROMPTS, ANSWERS, read, strict=True)
    expected = [plain_score(plain, prompt + answer[:seen]) for prompt, answer, seen in rows]
    assert len(set(expected)) == len(expected)
    assert found(source, tiny.rolled_out(PROMPTS, ANSWERS)) == pytest.approx(
        expected, abs=TOLERANCE
    )


def other_tokenizer(end_every_text: bool = False) -> Any:
    made = demo.train_tokenizer([f"{prompt}{answer}" for prompt, answer, _ in TEXTS] * 3)
    if end_every_text:
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", EOS)]
        )
    return made


def rolled_out(tokenizer: Any) -> Any:
    """The texts as the actor has written them; one answer holds a token of padding too."""
    prompts, answers = [], []
    for i, (prompt, answer, ended) in enumerate(TEXTS):
        prompts.append(tokenizer(prompt)["input_ids"])
        tokens = tokenizer(answer, add_special_tokens=False)["input_ids"]
        answers.append(tokens + [PAD] * (i == 2) + [EOS] * ended)
    return tiny.rolled_out(prompts, answers)


@pytest.mark.knob("reward.own_tokenizer")
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("score_at", ["end", "before_end"])
@pytest.mark.parametrize("end_every_text", [False, True])
def test_encoded_again_a_row_is_as_if_it_were_alone(
    tmp_path: Path, architecture: str, score_at: str, end_every_text: bool
) -> None:
    tokenizer, own = tiny.tokenizer(), other_tokenizer(end_every_text)
    folder = tiny.save_classifier(tmp_path, architecture, vocabulary=len(own))
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    source = model_scores(folder, tokenizer, own, score_at)

    expected = []
    for prompt, answer, ended in TEXTS:
        row = [1, *own(prompt + answer, add_special_tokens=False)["input_ids"]]
        assert row[1:] != tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
        expected.append(plain_score(plain, row + [EOS] * (ended and score_at == "end")))
    assert found(source, rolled_out(tokenizer)) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_tokenizer_without_special_tokens_does(tmp_path: Path, architecture: str) -> None:
    tokenizer, own = tiny.tokenizer(), other_tokenizer()
    own.pad_token = own.eos_token = None
    own.backend_tokenizer.post_processor = processors.ByteLevel()
    folder = tiny.save_classifier(tmp_path, architecture, vocabulary=len(own))
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    source = model_scores(folder, tokenizer, own)

    rows = [own(prompt + answer)["input_ids"] for prompt, answer, _ in TEXTS]
    expected = [plain_score(plain, row) for row in rows]
    assert found(source, rolled_out(tokenizer)) == pytest.approx(expected, abs=TOLERANCE)
    # Nothing but special tokens: no text at all.
    (score,) = found(source, tiny.rolled_out([[1]], [[EOS]]))
    assert score == pytest.approx(plain_score(plain, [0]), abs=TOLERANCE)


CHAT = ["<s>", "<|im_start|>", "user", "\nHi", "<|im_end|>", "<|im_start|>", "assistant", "\n"]


def with_chat_tokens(made: Any) -> Any:
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return made


def as_ids(tokenizer: Any, parts: list[str]) -> list[int]:
    """A template's text, in parts so that no tokenizer decides where a special token stands."""
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]
    return [id for part in ids for id in part]


def shown_to_the_model(tokenizer: Any, own: Any, prompt: list[int], answer: list[int]) -> list[int]:
    settings = tiny.settings()
    source = scores.ModelScores(None, tokenizer, own, "end", settings, tiny.cpu(settings))
    ids, mask = source._encoded_again(tiny.rolled_out([prompt], [answer]))
    return ids[mask.bool()].tolist()


@pytest.mark.parametrize("ended", [True, False])
def test_special_tokens_of_a_chat_are_text_where_the_reward_model_knows_them(ended: bool) -> None:
    actors, own = with_chat_tokens(tiny.tokenizer()), with_chat_tokens(other_tokenizer())
    answer = ["Ho", "<|im_end|>", "\n", "<s>"]

    found = shown_to_the_model(
        actors, own, as_ids(actors, CHAT), as_ids(actors, answer) + [EOS] * ended
    )

    # One BOS, as the actor's at the beginning is the tokenizer's own; the later one is text.
    assert found == as_ids(own, CHAT + answer) + [EOS] * ended


def test_a_turn_may_end_with_the_token_that_also_pads() -> None:
    actors, own = with_chat_tokens(tiny.tokenizer()), with_chat_tokens(other_tokenizer())
    actors.pad_token = actors.eos_token = "<|im_end|>"

    found = shown_to_the_model(actors, own, as_ids(actors, CHAT), [*as_ids(actors, ["Ho"]), EOS])

    assert found == [*as_ids(own, [*CHAT, "Ho"]), EOS]


def test_special_tokens_that_the_reward_model_does_not_know_are_left_out() -> None:
    actors, own = with_chat_tokens(tiny.tokenizer()), other_tokenizer()

    found = shown_to_the_model(
        actors, own, as_ids(actors, CHAT), [*as_ids(actors, ["Ho", "<|im_end|>"]), EOS]
    )

    assert found == own("user\nHiassistant\nHo")["input_ids"] + [EOS]


def test_a_stop_string_that_is_an_end_token_of_the_reward_model_is_shown_to_it() -> None:
    actors, own = with_chat_tokens(tiny.tokenizer()), with_chat_tokens(other_tokenizer())
    own.eos_token = "<|im_end|>"
    written = as_ids(actors, ["Ho", "<|im_end|>"])

    found = shown_to_the_model(actors, own, as_ids(actors, CHAT), written)

    assert found == as_ids(own, [*CHAT, "Ho", "<|im_end|>"])


def test_a_text_that_begins_with_the_reward_models_bos_gets_no_other() -> None:
    """For the actor's tokenizer it is a special token as any other."""
    actors = tiny.tokenizer()
    actors.bos_token = None
    actors.backend_tokenizer.post_processor = processors.ByteLevel()
    own = other_tokenizer()

    found = shown_to_the_model(actors, own, actors("<s>Hi")["input_ids"], [EOS])

    assert found == [own.bos_token_id, *own("Hi", add_special_tokens=False)["input_ids"], EOS]


def test_widths_are_those_that_the_device_asks_for(tmp_path: Path) -> None:
    tokenizer, own = tiny.tokenizer(), other_tokenizer()
    folder = tiny.save_classifier(tmp_path, "llama", vocabulary=len(own))
    narrow = model_scores(folder, tokenizer, own)
    wide = model_scores(folder, tokenizer, own)
    wide._device.pad_to = 50
    widths = []
    wide._model.module.register_forward_pre_hook(
        lambda _, inputs: widths.append(inputs[0].shape[1])
    )

    expected = found(narrow, rolled_out(tokenizer))

    assert found(wide, rolled_out(tokenizer)) == pytest.approx(expected, abs=TOLERANCE)
    assert widths == [50]


# 2. What a function gets.


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """Writes a module that can be imported; returns its name, of which no other test has one."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(code: str) -> str:
        name = f"module_of_{abs(hash(request.node.nodeid))}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(code), encoding="utf-8")
        return name

    return write


def seen_by_a_function(module: Any, rollout: Any, tokenizer: Any) -> tuple[list[str], list[str]]:
    name = module("""
        seen = []
        def score(asked, said):
            seen.append((asked, said))
            return [0.5] * len(said)
    """)
    source = scores.FunctionScores(f"{name}:score", tokenizer)
    assert found(source, rollout) == [0.5] * len(rollout.sequences)
    (texts,) = __import__(name).seen
    return texts


def test_a_function_gets_text_without_padding_and_special_tokens(module: Any) -> None:
    tokenizer = tiny.tokenizer()

    rollout = rolled_out(tokenizer)
    # Where a tokenizer has no padding, any end token of the actor's stands in for it.
    letters = rollout.sequences.masked_fill(rollout.attention_mask == 0, 100)
    rollout = replace(rollout, sequences=letters)

    prompts, answers = seen_by_a_function(module, rollout, tokenizer)

    assert list(zip(prompts, answers, strict=True)) == [text[:2] for text in TEXTS]


def test_an_answer_keeps_the_space_that_it_begins_with(module: Any) -> None:
    # As in the tokenizers of Llama 2: a word carries its space, and a text loses its first one.
    words = ["<pad>", "<s>", "</s>", "▁why", "▁because", "?"]
    made = Tokenizer(tokenizer_models.WordLevel({word: i for i, word in enumerate(words)}, "?"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    assert tokenizer.decode([4]) == "because"

    texts = seen_by_a_function(module, tiny.rolled_out([[1, 3, 5]], [[4, EOS]]), tokenizer)

    assert texts == (["why?"], [" because"])


def test_a_letter_that_a_prompt_begins_and_an_answer_ends(module: Any) -> None:
    tokenizer = tiny.tokenizer()
    first, second = tokenizer("é", add_special_tokens=False)["input_ids"]
    before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in "ab")

    rollout = tiny.rolled_out([[1, *before, first]], [[second, *after]])

    assert seen_by_a_function(module, rollout, tokenizer) == (["a�"], ["éb"])


# 3. What a function returns.


@pytest.mark.parametrize(
    "returned",
    [
        "[1, 0, 1]",
        "(True, False, True)",
        "numpy.array([1.0, 0.0, 1.0])",
        "torch.tensor([1.0, 0.0, 1.0], requires_grad=True)",
        "[torch.tensor(1.0), numpy.float64(0), 1]",
    ],
)
def test_scores_may_come_as_any_row_of_numbers(module: Any, returned: str) -> None:
    name = module(f"""
        import numpy, torch
        def score(prompts, answers):
            return {returned}
    """)
    source = scores.FunctionScores(f"{name}:score", tiny.tokenizer())

    assert found(source, rolled_out(tiny.tokenizer())) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("[1.0, 2.0]", r"returned scores of shape \[2\]; .* a list of 3 numbers"),
        ("[[1.0], [2.0], [3.0]]", r"returned scores of shape \[3, 1\];"),
        ("1.0", r"returned scores of shape \[\];"),
        ("None", r"returned None .*a list of 3 numbers"),
        ("[1.0, None, 2.0]", r"returned \[1\.0, None, 2\.0\]"),
        ("['1', '2', '3']", r"returned \['1', '2', '3'\]"),
        ("(1.0 for _ in answers)", r"returned <generator"),
    ],
)
def test_what_is_no_score_is_refused(module: Any, returned: str, words: str) -> None:
    name = module(f"""
        def score(prompts, answers):
            return {returned}
    """)
    source = scores.FunctionScores(f"{name}:score", tiny.tokenizer())

    with pytest.raises(TrainerError, match=rf"^reward\.function = {name}:score {words}"):
        source(rolled_out(tiny.tokenizer()))


def test_an_error_in_the_function_is_told_with_its_place(module: Any) -> None:
    name = module("""
        def score(prompts, answers):
            return [{}[answer] for answer in answers]  # the faulty line
    """)
    source = scores.FunctionScores(f"{name}:score", tiny.tokenizer())

    with pytest.raises(TrainerError) as caught:
        source(rolled_out(tiny.tokenizer()))

    assert str(caught.value).startswith(f"reward.function = {name}:score raised KeyError:\n")
    assert "# the faulty line" in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("code", "attribute", "words"),
    [
        ("def score(:", "score", r"cannot be imported: SyntaxError: .*PYTHONPATH=FOLDER"),
        ("import not_there_at_all", "score", r"ModuleNotFoundError: .*not_there_at_all.*"),
        ("raise OSError('no word list')", "score", r"OSError: no word list; .*PYTHONPATH"),
        ("def other(): ...", "score", r".*\.py has no function score \(HL_REWARD_FUNCTION\)"),
        ("score = 5", "score", r".*\.py has no function score \(HL_REWARD_FUNCTION\)"),
        (
            "import sys; sys.exit()",
            "score",
            r"module_of_\d+ calls sys\.exit\(None\) when it is imp",
        ),
        ("def score(a): ...", "score", r"score\(a\) cannot be called with .*: too many positional"),
        (
            "def score(a, b, c): ...",
            "score",
            r"cannot be called .*missing a required argument: 'c'",
        ),
        ("def score(*, a, b): ...", "score", r"\(\*, a, b\) cannot be called"),
        ("def score(answers, prompts, c): ...", "score", r"missing a required argument: 'c'"),
        ("class score:\n    def f(self): ...", "score", r"cannot be called with a list of prompts"),
    ],
)
def test_a_function_that_is_not_there(module: Any, code: str, attribute: str, words: str) -> None:
    name = module(code)

    with pytest.raises(TrainerError, match=words):
        scores.FunctionScores(f"{name}:{attribute}", tiny.tokenizer())


@pytest.mark.parametrize(
    "code",
    [
        "def score(a, b, c=1): ...",
        "def score(*texts, **more): ...",
        "class Scores:\n    def __call__(self, prompts, answers): ...\nscore = Scores()",
        "score = max  # a builtin that does not say what it takes",
    ],
)
def test_whatever_takes_two_lists_is_a_function(module: Any, code: str) -> None:
    assert callable(scores.imported(f"{module(code)}:score"))


@pytest.mark.parametrize("parameters", ["a, b", "answers, prompts", "*, answers, prompts, c=1"])
def test_prompts_and_answers_are_told_apart_by_name_or_else_by_place(
    module: Any, parameters: str
) -> None:
    first, second = ("prompts", "answers") if "prompts" in parameters else ("a", "b")
    function = scores.imported(
        f"{module(f'def score({parameters}): return {first}, {second}')}:score"
    )
    assert function(["p"], ["a"]) == (["p"], ["a"])


def test_a_function_that_leaves_does_not_end_the_rank_without_a_word(module: Any) -> None:
    name = module("""
        import sys
        def score(prompts, answers):
            sys.exit(0)
    """)
    source = scores.FunctionScores(f"{name}:score", tiny.tokenizer())

    with pytest.raises(TrainerError, match=rf"reward\.function = {name}:score raised SystemExit"):
        source(rolled_out(tiny.tokenizer()))
