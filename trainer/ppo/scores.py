"""Raw scores of a rollout's answers: by a reward model, or by a Python function."""

from __future__ import annotations

import importlib
import inspect
import os
import reprlib
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hlrlhf.settings import Settings
from hlrlhf.trainer.data import reading
from hlrlhf.trainer.device import Device
from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.models.forwards import Placed
from hlrlhf.trainer.ppo.batches import outputs
from hlrlhf.trainer.ppo.rollout import Rollout


class ModelScores:
    """Scores by a reward model.

    Args:
        model: an engine or a module, which gives scalars as `models.Scorer` does.
        tokenizer: the actor's.
        own: the reward model's tokenizer, if answers are to be encoded again with it.
        score_at: ``end`` or ``before_end``, the token at which the model is read.
        longest: tokens that the model can read, None where there is no end; in tokens of its own, a
            text that is longer keeps its end, where the answer is, and its BOS.

    Attributes:
        cut: [b], which texts of the last rollout were too long; None where none can be.
    """

    def __init__(
        self,
        model: Placed,
        tokenizer: PreTrainedTokenizerBase,
        own: PreTrainedTokenizerBase | None,
        score_at: str,
        settings: Settings,
        device: Device,
        longest: int | None = None,
    ):
        self._model = model
        self._tokenizer = tokenizer
        self._own = own
        self._score_at = score_at
        self._settings = settings
        self._device = device
        self._longest = longest
        self.cut: Tensor | None = None

    def __call__(self, rollout: Rollout) -> Tensor:
        """Scores of a rollout's answers, [b] in fp32."""
        if self._own is None:
            sequences, mask, width = (
                rollout.sequences,
                rollout.attention_mask,
                rollout.answer_width,
            )
            # The model's first scalar is that of the prompt, before any token of the answer.
            left_out = rollout.has_end_token.long() if self._score_at == "before_end" else 0
            position = rollout.lengths - left_out
        else:
            sequences, mask = self._encoded_again(rollout)
            width, position = 0, torch.zeros_like(rollout.lengths)
        scores = outputs(self._model, sequences, mask, width, self._settings, self._device)
        return scores.gather(-1, position.unsqueeze(-1)).squeeze(-1)

    def _encoded_again(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """The same text in the reward model's tokens, and its mask, [b, t]: padded on the left."""
        assert self._own is not None
        end = self._own.eos_token_id
        # Without an end; here one stands where the actor put it.
        rows = reading.encode(texts_for(self._own, rollout, self._tokenizer), self._own)
        if end is not None and self._score_at == "end":
            has_end = rollout.has_end_token.tolist()
            rows = [ids + [end] * has for ids, has in zip(rows, has_end, strict=True)]
        if self._longest is not None:
            too_long = [len(ids) > self._longest for ids in rows]
            self.cut = torch.tensor(too_long, device=rollout.sequences.device)
            rows = [self._end_of(ids, self._longest) for ids in rows]
        # The mask hides what fills up; any token does where there is none for it. A row with no
        # text at all must still have a last token.
        named = (self._own.pad_token_id, end, 0)
        fill = next(token for token in named if token is not None)
        ids, mask = reading.pad_left([row or [fill] for row in rows], fill, self._device.pad_to)
        return ids.to(rollout.sequences.device), mask.to(rollout.sequences.device)

    def _end_of(self, ids: list[int], longest: int) -> list[int]:
        assert self._own is not None
        if len(ids) <= longest:
            return ids
        begin = ids[:1] if ids[0] == self._own.bos_token_id else []
        return begin + ids[len(ids) - longest + len(begin) :]


class FunctionScores:
    """Scores by a Python function, which is called with the texts of a rank's whole rollout.

    Args:
        name: ``module:function``.
        tokenizer: the actor's.

    Raises:
        TrainerError: see `imported`.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase):
        self._name = name
        self._function = imported(name)
        self._tokenizer = tokenizer

    def __call__(self, rollout: Rollout) -> Tensor:
        """Scores of a rollout's answers, [b] in fp32.

        Raises:
            TrainerError: the function raised an error, or did not return a number for each answer.
                One that is not finite is left to the guard.
        """
        whole = texts(rollout, self._tokenizer)
        prompts = texts(rollout, self._tokenizer, answers=False)
        # Decoded alone, an answer may lose the space that it begins with.
        answers = [
            text[len(os.path.commonprefix([prompt, text])) :]  # noqa: RUF071 - texts, not paths
            for prompt, text in zip(prompts, whole, strict=True)
        ]
        try:
            found = self._function(prompts, answers)
        except (Exception, SystemExit) as error:  # not our code
            trace = "".join(traceback.format_exception(error))
            raise TrainerError(
                f"reward.function = {self._name} raised {type(error).__name__}:\n{trace}"
            ) from error
        try:
            scores = torch.as_tensor(found, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise self._returned(f"{reprlib.repr(found)} ({error})", len(answers)) from error
        if scores.shape != (len(answers),):
            raise self._returned(f"scores of shape {list(scores.shape)}", len(answers))
        return scores.to(rollout.sequences.device)

    def _returned(self, what: str, answers: int) -> TrainerError:
        return TrainerError(
            f"reward.function = {self._name} returned {what}; it has to return a list of {answers} "
            "numbers here, one for each answer"
        )


def imported(name: str) -> Callable[[list[str], list[str]], Any]:
    """The function that ``module:function`` names, as one of prompts and answers in this order.

    Raises:
        TrainerError: there is none, or it does not take prompts and answers.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except SystemExit as error:
        raise TrainerError(
            f"reward.function = {name}: {module_name} calls sys.exit({error.code!r}) when it is "
            'imported; keep what it does as a program under `if __name__ == "__main__":`'
        ) from error
    except Exception as error:  # not our code
        raise TrainerError(
            f"reward.function = {name}: {module_name} cannot be imported: {type(error).__name__}: "
            f"{error}; every rank needs its folder on PYTHONPATH, for instance by the line `export "
            "PYTHONPATH=FOLDER` in environment.setup (HL_ENVIRONMENT_SETUP)"
        ) from error
    function: Callable[..., Any] | None = getattr(module, attribute, None)
    if function is None or not callable(function):
        raise TrainerError(
            f"reward.function = {name}: {getattr(module, '__file__', module_name)} has no function "
            f"{attribute} (HL_REWARD_FUNCTION)"
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin does not always say
        return function
    by_name = {
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    named = by_name >= {"prompts", "answers"}
    try:
        if named:
            signature.bind(prompts=[], answers=[])
        else:
            signature.bind([], [])
    except TypeError as error:
        raise TrainerError(
            f"reward.function = {name}: {attribute}{signature} cannot be called with a list of "
            f"prompts and a list of answers: {error}"
        ) from error
    if named:  # in whatever order
        return lambda prompts, answers: function(prompts=prompts, answers=answers)
    return function


def texts(
    rollout: Rollout, tokenizer: PreTrainedTokenizerBase, *, answers: bool = True
) -> list[str]:
    """Prompts with their answers as text, or prompts alone: no padding, no special tokens.

    Args:
        rollout: b rows.
        tokenizer: the actor's.
        answers: whether they are part of the text.
    """
    width = rollout.sequences.shape[1] - (0 if answers else rollout.answer_width)
    decoded: list[str] = tokenizer.batch_decode(
        _tokens(rollout, width), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return decoded


def texts_for(
    own: PreTrainedTokenizerBase, rollout: Rollout, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Prompts with their answers as text for another tokenizer to encode.

    The BOS that begins a text and the end token that ends it are left out: `own` has its own. So
    is padding, even if the actor sampled it, where it has a token to itself. Other special tokens,
    such as a chat template's, are text that the reward model knows from its training if `own` has
    them; where it has not, they would be spelt out, and are left out.

    Args:
        own: the reward model's tokenizer.
        rollout: b rows.
        tokenizer: the actor's.
    """
    known = {token.content for token in own.added_tokens_decoder.values()}
    foreign = {
        id
        for id, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content not in known
    }
    if tokenizer.pad_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        foreign.add(tokenizer.pad_token_id)
    rows = []
    every = _tokens(rollout, rollout.sequences.shape[1])
    for row, ends in zip(every, rollout.has_end_token.tolist(), strict=True):
        begin = int(row[:1] == [tokenizer.bos_token_id])
        rows.append([id for id in row[begin : len(row) - ends] if id not in foreign])
    decoded: list[str] = tokenizer.batch_decode(
        rows, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return decoded


def _tokens(rollout: Rollout, width: int) -> list[list[int]]:
    """Those of each row's first `width` columns that the mask shows."""
    # Picked out on the CPU: elsewhere, each length would be a shape to compile.
    ids, mask = rollout.sequences.cpu(), rollout.attention_mask.bool().cpu()
    return [row[kept].tolist() for row, kept in zip(ids[:, :width], mask[:, :width], strict=True)]
