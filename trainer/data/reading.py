"""Prompts: read by one rank, given to all, taken step by step.

Only rank 0 touches the data sets and their caches; the others receive token ids. So no two ranks
ever write one file, and every rank sees the same prompts in the same order.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hlrlhf.settings import Settings
from hlrlhf.trainer.data.rows import Rows
from hlrlhf.trainer.data.sources import CellError, column
from hlrlhf.trainer.errors import TrainerError

# Where the last answer of a transcript begins, in the format of Anthropic's hh-rlhf.
TRANSCRIPT_TURN = "\n\nAssistant:"
# Texts that are tokenized in one call, enough for all processors to have work.
SIDE_BY_SIDE = 10_000


class Chat(str):
    """A text that a chat template has written, with its special tokens."""


@dataclass(frozen=True)
class Prompts:
    """Tokenized prompts and the order in which a run takes them.

    Attributes:
        ids: the prompts' token ids.
        seed: of the order.
        held_out: prompts that never train, to evaluate on.
    """

    ids: Rows
    seed: int
    held_out: Rows = field(default_factory=lambda: Rows.of([]))

    def batch(self, step: int, size: int) -> list[int]:
        """Indices of the global batch of a step.

        The run walks one endless stream, a new permutation for each pass over the prompts, so a
        batch may span two passes and no prompt is lost at a pass's end. The batch follows from the
        step alone.

        Args:
            step: counted from 0.
            size: of the global batch.
        """
        return [self._at(position) for position in range(step * size, (step + 1) * size)]

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.ids))
        return int(self._permutation(epoch)[offset])

    def _permutation(self, epoch: int) -> Tensor:
        cached: dict[int, Tensor] = self.__dict__.setdefault("_permutations", {})
        if epoch not in cached:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            cached[epoch] = torch.randperm(len(self.ids), generator=generator)
            cached.pop(epoch - 2, None)
        return cached[epoch]


def load_prompts(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Prompts:
    """Every prompt of the run, on every rank.

    Rank 0 prints how many there are, and how many were dropped as too long or are held out.

    Raises:
        TrainerError: on rank 0, when a data set cannot be read, lacks the column, or leaves no
            prompt.
    """
    ids, held_out = Rows.of([]), Rows.of([])
    evaluation = settings.evaluation
    if dist.get_rank() == 0:
        ids = blend(
            [read(path, settings, tokenizer) for path in settings.dataset.path],
            settings.dataset.weights,
            settings.seed,
        )
        if evaluation.interval:
            own = read(evaluation.path, settings, tokenizer) if evaluation.path else None
            ids, held_out = hold_out(ids, own, evaluation.prompts, settings.seed)
            print(f"{len(held_out)} prompts are held out to evaluate on, {len(ids)} train")
    ids = to_all_ranks(ids, device)
    if evaluation.interval:
        held_out = to_all_ranks(held_out, device)
    return Prompts(ids, settings.seed, held_out)


def read(path: str, settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """The prompts of one data set as token ids, those that are too long left out and counted.

    Raises:
        TrainerError: see `load_prompts`.
    """
    wanted = settings.dataset.prompt_column
    candidates = [wanted] if wanted else ["prompt", "messages", "chosen"]
    convert = partial(_prompt, tokenizer)
    prompts = column(path, settings.dataset.split, candidates, "HL_DATASET_PROMPT_COLUMN", convert)
    ids = Rows.of(tokenized(prompts, tokenizer))
    limit = settings.dataset.max_prompt_tokens
    fits = (ids.lengths > 0) & (ids.lengths <= limit)
    kept = ids.picked(fits.nonzero().flatten().tolist())
    print(
        f"{path}: {len(kept)} prompts, {len(ids) - len(kept)} dropped: empty or over {limit} tokens"
    )
    if len(kept) == 0:
        raise TrainerError(
            f"{path}: none of its {len(ids)} prompts has at most {limit} tokens "
            "(HL_DATASET_MAX_PROMPT_TOKENS)"
        )
    return kept


def read_texts(path: str, split: str, name: str) -> list[str]:
    """The texts in a column of one data set.

    Raises:
        TrainerError: it cannot be read, or has no such column of texts.
    """
    return column(path, split, [name], "HL_PRETRAINING_COLUMN", _text)


def blend(sets: Sequence[Rows], weights: Sequence[float] | None, seed: int) -> Rows:
    """One set of prompts from several.

    Args:
        sets: prompts of each data set.
        weights: the share of each in the blend, up to a common factor. The blend is as large as it
            can be without taking a prompt twice; None takes all of all.
        seed: of the choice within a set.
    """
    if weights is None:
        return Rows.joined(sets)
    scale = min(len(prompts) / weight for prompts, weight in zip(sets, weights, strict=True))
    mixed = []
    for index, (prompts, weight) in enumerate(zip(sets, weights, strict=True)):
        generator = torch.Generator().manual_seed(seed + index)
        chosen = torch.randperm(len(prompts), generator=generator)[: round(scale * weight)]
        mixed.append(prompts.picked(chosen.tolist()))
    return Rows.joined(mixed)


def hold_out(ids: Rows, own: Rows | None, count: int, seed: int) -> tuple[Rows, Rows]:
    """The prompts that train and those that do not, without one that is in both.

    Args:
        ids: prompts to train on.
        own: prompts to evaluate on; None takes them out of `ids`.
        count: how many to evaluate on, at most.
        seed: of the choice.

    Raises:
        TrainerError: none is left to train on.
    """
    source = ids if own is None else own
    first: dict[bytes, int] = {}
    for index in range(len(source)):
        first.setdefault(source.key(index), index)
    pool = list(first.values())
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    chosen = [pool[position] for position in order[:count].tolist()]
    held = {source.key(index) for index in chosen}
    left = [index for index in range(len(ids)) if ids.key(index) not in held]
    if not left:
        raise TrainerError(
            f"no prompt is left to train on: all {len(ids)} are held out to evaluate on; lower "
            "HL_EVALUATION_PROMPTS, or give others with HL_EVALUATION_PATH"
        )
    return ids.picked(left), source.picked(chosen)


def pad_left(prompts: Sequence[list[int]], pad: int, multiple: int) -> tuple[Tensor, Tensor]:
    """Prompts as one batch.

    Args:
        prompts: token ids.
        pad: the id that fills up.
        multiple: the width is rounded up to a multiple of this.

    Returns:
        ids and attention mask, both [b, l].
    """
    widest = max(len(prompt) for prompt in prompts)
    width = -(-widest // multiple) * multiple
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise CellError(f"holds {reprlib.repr(value)}, which is no text")
    return value


def _prompt(tokenizer: PreTrainedTokenizerBase, name: str, value: Any) -> str:
    """The prompt in a cell: text as it is, a transcript or a chat up to its last answer."""
    if isinstance(value, str):
        if name != "chosen":
            return value
        head, turn, _ = value.rpartition(TRANSCRIPT_TURN)
        if not turn:
            raise CellError(f"holds a transcript without a turn {TRANSCRIPT_TURN!r}")
        return head + turn
    if not (isinstance(value, list) and value and all(map(_is_turn, value))):
        raise CellError(f"holds neither text nor chat messages: {reprlib.repr(value)}")
    if tokenizer.chat_template is None:
        raise CellError("holds chat messages, but the actor's tokenizer has no chat template")
    asked = value[:-1] if value[-1]["role"] == "assistant" else value
    try:
        return Chat(
            tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        )
    except Exception as error:  # templates raise what they like
        raise CellError(
            f"holds a chat that the actor's chat template does not take: {error}"
        ) from error


def _is_turn(turn: Any) -> bool:
    """Whether it is a message of a chat; one that calls a tool may have no text."""
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        return False
    return isinstance(turn.get("content"), str | list) or bool(turn.get("tool_calls"))


def tokenized(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """All texts of a data set as token ids, see `tokenize`; few are in memory at once."""
    for begin in range(0, len(prompts), SIDE_BY_SIDE):
        yield from tokenize(prompts[begin : begin + SIDE_BY_SIDE], tokenizer)


def tokenize(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Texts, or chats alone, as token ids, in one call: tokenizers work on many side by side.

    No text ends with an end token, which an answer cannot follow.
    """
    if not prompts:
        return []
    if isinstance(prompts[0], Chat):
        # The template has written the special tokens already.
        chats: list[list[int]] = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
        return _with_one_bos(chats, tokenizer)
    end = tokenizer.eos_token_id
    texts = encode(list(prompts), tokenizer)
    return [ids[:-1] if ids and ids[-1] == end else ids for ids in texts]


def encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Texts as token ids, with what the tokenizer puts in front, without an end that it puts.

    A text that begins with BOS already gets no other one.
    """
    rows: list[list[int]] = tokenizer(texts)["input_ids"]
    alone: list[int] = tokenizer("a")["input_ids"]
    if alone[0] == tokenizer.bos_token_id:
        rows = _with_one_bos(rows, tokenizer)
    if alone[-1] == tokenizer.eos_token_id:
        rows = [ids[:-1] for ids in rows]
    return rows


def _with_one_bos(rows: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    twice = [tokenizer.bos_token_id] * 2
    return [ids[1:] if ids[:2] == twice else ids for ids in rows]


def to_all_ranks(rows: Rows, device: torch.device) -> Rows:
    """Rank 0's rows on every rank: one tensor of lengths, one of ids."""
    count = torch.tensor([len(rows), len(rows.ids)], device=device)
    dist.broadcast(count, src=0)
    number, tokens = count.tolist()
    lengths = torch.empty(number, dtype=torch.int32, device=device)
    ids = torch.empty(tokens, dtype=torch.int32, device=device)
    if len(rows):
        lengths.copy_(rows.lengths)
        ids.copy_(rows.ids)
    dist.broadcast(lengths, src=0)
    dist.broadcast(ids, src=0)
    return Rows.with_lengths(ids.cpu(), lengths.cpu().long())
