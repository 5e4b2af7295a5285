"""How long a text a model can read, and whether a run's texts are longer."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from hlrlhf.settings import Settings
from hlrlhf.trainer.data import reading
from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.models import frozen, loading


def longest(config: PretrainedConfig) -> int | None:
    """Tokens that a model can tell the places of, None where that has no end (ALiBi, recurrence).

    Learned embeddings have no more rows. Rotary ones could go on, but no further than this has
    the model been trained, unless its scaling stretches them.

    Args:
        config: the model's, of transformers.
    """
    text = config.get_text_config()
    # MPT biases by distance, and all the same has a limit, under a name of its own.
    places: int | None = getattr(
        text, "max_position_embeddings", getattr(text, "max_seq_len", None)
    )
    if places is None or getattr(text, "alibi", False):
        return None
    ropes = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    # One for each kind of layer, or one for all.
    each = [rope for rope in ropes.values() if isinstance(rope, dict)] or [ropes]
    stretched = [_stretched(rope, places) for rope in each]
    return max(places, min(stretched))


def _stretched(rope: dict[str, Any], places: int) -> int:
    began = rope.get("original_max_position_embeddings") or places
    return int(began * (rope.get("factor") or 1.0))


def check_lengths(settings: Settings, prompts: reading.Prompts) -> None:
    """Stop before any model loads when the texts of a run are too long for one.

    A reward model with a tokenizer of its own is left out: it reads other tokens, see
    `scores.ModelScores`.

    Args:
        prompts: those of the run; what counts is the longest, not how long one might be.

    Raises:
        TrainerError: prompts and answers, or rows of the pretraining mix, are too long for a model.
    """
    models = {"actor": settings.actor.model_path, "critic": settings.critic.model_path}
    if settings.reference.model_path is not None:
        models["reference"] = settings.reference.model_path
    if settings.reward.model_weight and not settings.reward.own_tokenizer:
        models["reward model"] = frozen.reward_path(settings)
    prompt = max(prompts.ids.longest, prompts.held_out.longest)
    answer = settings.generation.max_new_tokens
    for role, path in models.items():
        places = _of_checkpoint(path)
        if places is None:
            continue
        told = f"{path}: the {role} can read {places} tokens at most, by its config.json"
        if prompt + answer > places:
            raise TrainerError(
                f"{told}, but the longest prompt has {prompt} and an answer up to {answer} "
                f"(generation.max_new_tokens): set {_remedy(places, prompt, answer)}"
            )
        row = settings.pretraining.max_tokens
        if role == "actor" and settings.pretraining.path is not None and row > places:
            raise TrainerError(
                f"{told}, but a row of the pretraining mix has {row} (pretraining.max_tokens): "
                f"set HL_PRETRAINING_MAX_TOKENS to {places} at most"
            )


def _remedy(places: int, prompt: int, answer: int) -> str:
    ways = []
    if answer < places:
        ways.append(f"HL_DATASET_MAX_PROMPT_TOKENS to {places - answer} at most")
    if prompt < places:
        ways.append(f"HL_GENERATION_MAX_NEW_TOKENS to {places - prompt} at most")
    both = "HL_DATASET_MAX_PROMPT_TOKENS and HL_GENERATION_MAX_NEW_TOKENS to less"
    return ", or ".join(ways) or both


def _of_checkpoint(path: str) -> int | None:
    try:
        return longest(AutoConfig.from_pretrained(path, trust_remote_code=False))
    except loading.UNREADABLE:
        return None  # loading the model will say why
