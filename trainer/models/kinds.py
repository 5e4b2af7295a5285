"""What a checkpoint is, from its configuration: told before any of its weights are read."""

from __future__ import annotations

from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto

from hlrlhf.trainer.errors import TrainerError

# What the name of a class ends with that is neither a language model nor gives one score.
HEADS = {
    "ForSequenceClassification": "a sequence classifier",
    "ForTokenClassification": "a token classifier",
    "ForQuestionAnswering": "a model that finds answers in a text",
    "ForMultipleChoice": "a model that chooses among texts",
}
NEEDED = "a critic or reward model is a causal model's backbone with a head that scores"


def check_policy(path: str, config: PretrainedConfig) -> None:
    """Stop when a checkpoint is certainly no causal language model.

    Raises:
        TrainerError: saying what it is.
    """
    reads = _reads(config)
    head = _head(config)
    if reads is None and head is not None:
        reads = f"is {head} ({name(config)}), which cannot write"
    if reads is not None:
        raise TrainerError(
            f"{path}: {reads}; the actor is a causal language model (HL_ACTOR_MODEL_PATH)"
        )


def check_scorer(path: str, config: PretrainedConfig, step2: bool) -> None:
    """Stop when a checkpoint is certainly no causal model with a head that scores.

    Args:
        path: of the checkpoint.
        config: its own.
        step2: whether its weights are those of DeepSpeed-Chat's step 2, whose configuration is that
            of the model below the head.

    Raises:
        TrainerError: saying what it is.
    """
    reads = _reads(config)
    if reads is not None:
        raise TrainerError(f"{path}: {reads}; {NEEDED}")
    if step2:
        return
    head = _head(config)
    if _is_causal(config):
        raise TrainerError(
            f"{path}: is a causal language model ({name(config)}), without a head that scores; "
            "step 2 makes a reward model of it (HL_CRITIC_MODEL_PATH, HL_REWARD_MODEL_PATH)"
        )
    if head is not None and head != HEADS["ForSequenceClassification"]:
        raise TrainerError(f"{path}: is {head} ({name(config)}); {NEEDED}")
    if config.num_labels != 1:
        raise TrainerError(
            f"{path}: is a classifier with {config.num_labels} labels ({name(config)}); a reward "
            "model has one"
        )


def may_be_step2(config: PretrainedConfig) -> bool:
    """Whether a folder with this configuration can be one of step 2, which its weights tell."""
    return _reads(config) is None and _head(config) is None


def name(config: PretrainedConfig) -> str:
    """The class that a configuration names, or the architecture where it names none."""
    return str((config.architectures or [config.model_type])[0])


def _reads(config: PretrainedConfig) -> str | None:
    """How a model reads that is no decoder alone."""
    if getattr(config, "is_encoder_decoder", False):
        return f"is an encoder-decoder ({name(config)}), which reads prompts both ways"
    # Those that learn by filling in gaps, some of which can be told to be decoders.
    encoders = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if config.model_type in encoders and not getattr(config, "is_decoder", False):
        return f"is an encoder ({name(config)}), which reads both ways"
    return None


def _head(config: PretrainedConfig) -> str | None:
    return next((head for end, head in HEADS.items() if name(config).endswith(end)), None)


def _is_causal(config: PretrainedConfig) -> bool:
    """Whether the configuration names a causal language model."""
    return name(config) in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
