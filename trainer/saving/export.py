"""Saving actor and critic as Hugging Face folders that anything else can load.

A disk may be full, over a quota or read-only when the models are to be written; training can have
taken days by then, so nothing is given up that can still be saved elsewhere or later.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hlrlhf.runs import Attempt
from hlrlhf.settings import Settings
from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.models import lora
from hlrlhf.trainer.models.engine import whole_weights
from hlrlhf.trainer.models.forwards import Policy, Scorer, unwrapped
from hlrlhf.trainer.models.loading import ROLE
from hlrlhf.trainer.models.roles import Models
from hlrlhf.trainer.ranks import summed
from hlrlhf.trainer.records import warn

# Seconds until a last save that failed is tried again.
PAUSE = 60
FINAL = "final"


class NotSavedError(TrainerError):
    """The disk did not take the models; nothing of them is left there."""


class Exports:
    """The Hugging Face folders that a run leaves: at an interval, and in the end.

    Args:
        models: what is saved.
        tokenizer: the actor's.
        attempt: at the run.
    """

    def __init__(
        self,
        settings: Settings,
        models: Models,
        tokenizer: PreTrainedTokenizerBase,
        attempt: Attempt,
    ):
        self._interval = settings.save_interval
        self._save = lambda folder: save_models(folder, models, tokenizer, attempt)
        self._folders = _folders(settings, attempt)

    def at(self, step: int) -> None:
        """Save after so many steps, if it is time; a disk that is full costs the save alone."""
        if self._interval and step % self._interval == 0:
            save_if_possible(self._folders[0] / f"step-{step}", self._save)

    def last(self, name: str, asked_to_stop: Callable[[], bool]) -> Path:
        """Save before the run ends, see `save_at_last`.

        Args:
            name: the folder's.
            asked_to_stop: whether any rank is.

        Raises:
            TrainerError: no folder took the models.
        """
        return save_at_last([folder / name for folder in self._folders], self._save, asked_to_stop)


def final(settings: Settings, attempt: Attempt) -> Path | None:
    """Where the models of a run's end are, if it has come to that."""
    folders = [folder / FINAL for folder in _folders(settings, attempt)]
    return next((folder for folder in folders if folder.exists()), None)


def _folders(settings: Settings, attempt: Attempt) -> list[Path]:
    run, path = attempt.run, settings.checkpoint_path
    return [*([run.within(path)] if path else []), run.checkpoints]


def save_models(
    folder: Path, models: Models, tokenizer: PreTrainedTokenizerBase, attempt: Attempt
) -> None:
    """Write ``actor/`` and ``critic/``, LoRA merged, and ``*-adapter/`` beside them.

    The folder appears whole or not at all; one that is there already is replaced. All ranks have
    to call it.

    Args:
        folder: where.
        models: of which actor, critic and, as ``actor-ema/``, the average are written.
        tokenizer: the actor's.
        attempt: at the run.

    Raises:
        NotSavedError: on all ranks, when the disk did not take them.
        SupersededError: on rank 0, when a newer attempt has begun.
    """
    actor, critic, average = models.actor, models.critic, models.average
    unfinished = folder.with_name(f".{folder.name}.{attempt.number}.unfinished")
    failure: Exception | None = None

    def on_disk(write: Callable[[], None]) -> None:
        """Write on rank 0; once this failed, ranks only gather, which all have to do together."""
        nonlocal failure
        if dist.get_rank() > 0 or failure is not None:
            return
        try:
            attempt.check()
            write()
        except Exception as error:  # the libraries raise types of their own
            shutil.rmtree(unfinished, ignore_errors=True)
            if not _of_the_disk(error):
                raise
            failure = error

    def save(role: str, model: Policy | Scorer, weights: dict[str, Tensor]) -> None:
        on_disk(lambda: _save(unfinished, role, model, weights, tokenizer))

    on_disk(lambda: _begin(unfinished, attempt.number))
    save("actor", actor.module, whole_weights(actor))
    save("critic", critic.module, whole_weights(critic))
    if average is not None:
        save("actor-ema", actor.module, average.whole_weights())
    on_disk(lambda: _finish(unfinished, folder))
    number = torch.tensor([float(_of_the_disk(failure) if failure else 0)], device=actor.device)
    if reason := int(summed(number).item()):  # rank 0's alone is not 0
        needed = _size(actor) * (1 if average is None else 2) + _size(critic)
        raise NotSavedError(
            f"{folder}: the models cannot be saved: {os.strerror(reason)}; they need "
            f"{_readable(needed)}{_free(folder)}"
        )


def save_if_possible(folder: Path, save: Callable[[Path], None]) -> None:
    """Save models that train on: where the disk does not take them, warn. All ranks call it."""
    try:
        save(folder)
    except NotSavedError as error:
        _warn(f"{error}; training goes on")


def save_at_last(
    folders: Sequence[Path], save: Callable[[Path], None], asked_to_stop: Callable[[], bool]
) -> Path:
    """Save models that would be lost otherwise: in the first folder that takes them.

    Where none does, all are tried again each minute, and once more when the run is asked to stop
    after this began. All ranks have to call it.

    Args:
        folders: one after the other.
        save: as `save_models`.
        asked_to_stop: whether any rank is; all ranks ask together.

    Returns:
        The folder that holds the models.

    Raises:
        TrainerError: on all ranks, when they are asked to stop before one could be written.
    """
    while True:
        failures = []
        for folder in folders:
            try:
                save(folder)
                return folder
            except NotSavedError as error:
                failures.append(str(error))
                _warn(str(error))
        if asked_to_stop():
            raise TrainerError(
                f"the models are lost: {'; '.join(failures)}. Make room there, or set "
                "HL_CHECKPOINT_PATH to a folder on another file system, and run again"
            )
        _warn(
            f"the run waits with the models and tries again every {PAUSE} seconds: make room in "
            f"{' or '.join(str(folder.parent) for folder in folders)}"
        )
        for _ in range(PAUSE):
            time.sleep(1)
            if asked_to_stop():
                break


def _warn(words: str) -> None:
    if dist.get_rank() == 0:
        warn(words)


def _begin(unfinished: Path, attempt: int) -> None:
    """Make the folder, and take away what this or an earlier attempt left behind."""
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    for left in unfinished.parent.iterdir():
        number = re.fullmatch(r"\..+\.(\d+)\.unfinished", left.name)
        if number and int(number[1]) <= attempt:
            shutil.rmtree(left, ignore_errors=True)
    unfinished.mkdir()


def _finish(unfinished: Path, folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)


def _save(
    folder: Path,
    role: str,
    model: Policy | Scorer,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    inner = model.inner
    prefix = "lm." if isinstance(model, Policy) else "classifier."
    weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    plain = unwrapped(inner)
    if plain is not inner:
        adapter = folder / f"{role}-adapter"
        if isinstance(model, Policy):
            # What peft's own loader of causal models asks for.
            inner.peft_config["default"].task_type = "CAUSAL_LM"
        inner.save_pretrained(adapter, state_dict=weights)
        weights = lora.merged(inner, weights)
        if isinstance(model, Scorer):
            # The head trains beside the adapter, which does not hold it.
            head = {"score.weight": weights["score.weight"]}
            save_file(head, adapter / "score.safetensors")
    setattr(plain.config, ROLE, role.removesuffix("-ema"))
    plain.save_pretrained(folder / role, state_dict=weights)
    if isinstance(model, Policy):
        # As text, not through its own save: what a checkpoint came with need not pass the checks
        # of this release of transformers.
        text = model.generation_config.to_json_string()
        (folder / role / "generation_config.json").write_text(text, encoding="utf-8")
    tokenizer.save_pretrained(folder / role)
    # safetensors writes files that their owner alone can read, whatever the umask says.
    for file in folder.rglob("*.safetensors"):
        shutil.copymode(folder / role / "config.json", file)


def _of_the_disk(error: Exception) -> int:
    """The system's number for a failed write, 0 for other errors; some hide it in their text."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    number = re.search(r"\b(?:os error|code:) (\d+)", str(error))
    return int(number[1]) if number else 0


def _size(engine: DeepSpeedEngine) -> int:
    """Bytes of a model's weights, partitioned or not, those that are tied once."""
    values = {id(value): value for value in engine.module.state_dict(keep_vars=True).values()}
    return sum(
        getattr(value, "ds_numel", value.numel()) * value.element_size()
        for value in values.values()
    )


def _free(folder: Path) -> str:
    """What is free where a folder is to be, in words; nothing where the system does not say."""
    try:
        there = next(parent for parent in folder.parents if parent.exists())
        return f", and {_readable(shutil.disk_usage(there).free)} are free there"
    except OSError:
        return ""


def _readable(size: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"
