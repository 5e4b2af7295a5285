"""Prompts: read by one rank, given to all, taken step by step.

Only rank 0 touches the data sets and their caches; the others receive token ids. So no two ranks
ever write one file, and every rank sees the same prompts in the same order.
"""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from torch import Tensor

from hlrlhf.settings import Settings
from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.rows import Rows

# Where the last answer of a transcript begins, in the format of Anthropic's hh-rlhf.
TRANSCRIPT_TURN = "\n\nAssistant:"
# Texts that are tokenized in one call, enough for all processors to have work.
SIDE_BY_SIDE = 10_000
BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


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


def load_prompts(settings: Settings, tokenizer: Any, device: torch.device) -> Prompts:
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


def read(path: str, settings: Settings, tokenizer: Any) -> Rows:
    """The prompts of one data set as token ids, those that are too long left out and counted.

    Raises:
        TrainerError: see `load_prompts`.
    """
    with tempfile.TemporaryDirectory() as cache:
        rows = _open(path, settings.dataset.split, cache)
        wanted = settings.dataset.prompt_column
        candidates = [wanted] if wanted else ["prompt", "messages", "chosen"]
        column = _column(path, rows, candidates, "HL_DATASET_PROMPT_COLUMN")
        prompts = [_prompt(path, column, value) for value in rows[column]]
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


def read_texts(path: str, split: str, column: str) -> list[str]:
    """The texts in a column of one data set.

    Raises:
        TrainerError: it cannot be read, or has no such column of texts.
    """
    with tempfile.TemporaryDirectory() as cache:
        rows = _open(path, split, cache)
        texts: list[str] = list(rows[_column(path, rows, [column], "HL_PRETRAINING_COLUMN")])
    for text in texts:
        if not isinstance(text, str):
            raise TrainerError(f"{path}: column {column} holds {text!r}, which is no text")
    return texts


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


def _open(path: str, split: str, cache: str) -> Any:
    """One data set; files are converted in a cache of their own, which goes with this process."""
    local = Path(path)
    try:
        if not local.exists():
            return load_dataset(path, split=split)
        if local.is_file():
            if local.suffix not in BUILDERS:
                raise TrainerError(f"{path}: not one of {', '.join(BUILDERS)}")
            # The library takes names of files for patterns.
            name = glob.escape(path)
            builder = BUILDERS[local.suffix]
            return load_dataset(builder, data_files=name, split="train", cache_dir=cache)
        if not any((local / name).exists() for name in ("state.json", "dataset_dict.json")):
            return load_dataset(path, split=split, cache_dir=cache)
        saved = load_from_disk(path)
    except TrainerError:
        raise
    except Exception as error:  # the library raises types of its own, many of them
        raise TrainerError(f"{path}: no data set can be read from it: {error}") from error
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise TrainerError(f"{path}: no split {split}; it has {', '.join(saved)}")
        return saved[split]
    return saved


def _column(path: str, rows: Dataset, candidates: list[str], variable: str) -> str:
    for column in candidates:
        if column in rows.column_names:
            return column
    raise TrainerError(
        f"{path}: has no column {' or '.join(candidates)}; it has {', '.join(rows.column_names)} "
        f"({variable})"
    )


def _prompt(path: str, column: str, value: Any) -> str | list[dict[str, str]]:
    """The prompt in a cell: text as it is, a transcript or a chat up to its last answer."""
    if isinstance(value, str):
        if column != "chosen":
            return value
        head, turn, _ = value.rpartition(TRANSCRIPT_TURN)
        if not turn:
            raise TrainerError(
                f"{path}: a transcript in column {column} has no turn {TRANSCRIPT_TURN!r}"
            )
        return head + turn
    if isinstance(value, list) and value and all("role" in turn for turn in value):
        return value[:-1] if value[-1]["role"] == "assistant" else value
    raise TrainerError(f"{path}: column {column} holds neither text nor chat messages: {value!r}")


def tokenized(prompts: Sequence[str | list[dict[str, str]]], tokenizer: Any) -> Iterator[list[int]]:
    """All texts or chats of a data set as token ids, see `tokenize`; few are in memory at once."""
    for begin in range(0, len(prompts), SIDE_BY_SIDE):
        yield from tokenize(prompts[begin : begin + SIDE_BY_SIDE], tokenizer)


def tokenize(prompts: Sequence[str | list[dict[str, str]]], tokenizer: Any) -> list[list[int]]:
    """Texts or chats as token ids, in one call: tokenizers work on many texts side by side.

    None ends with an end token, which an answer cannot follow.
    """
    if not prompts:
        return []
    if isinstance(prompts[0], str):
        end = tokenizer.eos_token_id
        texts = encode([str(text) for text in prompts], tokenizer)
        return [ids[:-1] if ids and ids[-1] == end else ids for ids in texts]
    if tokenizer.chat_template is None:
        raise TrainerError(
            "the data holds chat messages, but the actor's tokenizer has no chat template"
        )
    chats = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        for chat in prompts
    ]
    # The template has written the special tokens already.
    encoded: list[list[int]] = tokenizer(chats, add_special_tokens=False)["input_ids"]
    return _with_one_bos(encoded, tokenizer)


def encode(texts: list[str], tokenizer: Any) -> list[list[int]]:
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


def _with_one_bos(rows: list[list[int]], tokenizer: Any) -> list[list[int]]:
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
