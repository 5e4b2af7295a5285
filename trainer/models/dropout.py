"""Dropout is the run's setting, whatever a checkpoint's configuration says."""

from __future__ import annotations

import re
from typing import Any

from transformers import PretrainedConfig

from hlrlhf.trainer.errors import TrainerError

# attention_dropout, attn_pdrop, hidden_dropout_prob, dropout_rate, ...: how configurations name it.
DROPOUT = re.compile(r"(^|_)p?drop(out)?(_(p|prob|rate))?$")

# What else changes a forward at random while a model trains. Jitter shakes what a mixture's router
# reads, so that the policy that learns would not be the one that sampled, and PPO's ratio not 1
# where nothing has been learnt yet. Layerdrop leaves out whole layers, on each rank others, for
# whose weights under ZeRO-3 the other ranks would wait.
NOISE = re.compile(r"jitter|layerdrop")


def set_dropout(config: PretrainedConfig | dict[Any, Any], rate: float) -> None:
    """Give every dropout in a configuration this rate, however deep it lies, and no noise to it.

    A field that is unset or true or false stays as it is.

    Raises:
        TrainerError: the configuration does not take such a rate.
    """
    fields = config if isinstance(config, dict) else vars(config)
    for name, value in list(fields.items()):
        if isinstance(value, (dict, PretrainedConfig)):
            set_dropout(value, rate)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            noise, dropout = NOISE.search(str(name)), DROPOUT.search(str(name))
            wanted = 0.0 if noise else rate if dropout else value
            if value != wanted:
                _set(config, name, wanted)


def _set(config: PretrainedConfig | dict[Any, Any], name: str, rate: float) -> None:
    if isinstance(config, dict):
        config[name] = rate
        return
    try:
        setattr(config, name, rate)
    except Exception as error:  # some configurations check what they are given
        reason = " ".join(str(error).split())
        raise TrainerError(
            f"{type(config).__name__} does not take {name} = {rate:g}: {reason}; set "
            "HL_ACTOR_DROPOUT=0 and HL_CRITIC_DROPOUT=0"
        ) from error
