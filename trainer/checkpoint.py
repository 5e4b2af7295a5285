"""Saving actor and critic as Hugging Face folders that anything else can load."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from hlrlhf.trainer import lora
from hlrlhf.trainer.ema import Average
from hlrlhf.trainer.engine import whole_weights
from hlrlhf.trainer.loading import ROLE
from hlrlhf.trainer.models import Policy, Scorer, unwrapped


def save_models(
    folder: Path, actor: Any, critic: Any, tokenizer: Any, average: Average | None = None
) -> None:
    """Write ``actor/`` and ``critic/``, LoRA merged, and ``*-adapter/`` beside them.

    The folder appears whole or not at all; one that is there already is replaced. All ranks have
    to call it.

    Args:
        folder: where.
        actor, critic: engines.
        tokenizer: the actor's.
        average: of the actor, for ``actor-ema/``.
    """
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)

    def save(role: str, model: Policy | Scorer, weights: dict[str, Tensor]) -> None:
        if dist.get_rank() == 0:
            _save(unfinished, role, model, weights, tokenizer)

    save("actor", actor.module, whole_weights(actor))
    save("critic", critic.module, whole_weights(critic))
    if average is not None:
        save("actor-ema", actor.module, average.whole_weights())
    if dist.get_rank() == 0:
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
    dist.barrier()


def _save(
    folder: Path, role: str, model: Policy | Scorer, weights: dict[str, Tensor], tokenizer: Any
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
