"""The models that a run trains and measures itself against, by their roles."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from deepspeed import DeepSpeedEngine
from torch import nn
from transformers import PreTrainedTokenizerBase

from hlrlhf.settings import Settings
from hlrlhf.settings.schema import Actor, Critic
from hlrlhf.trainer.device import Device
from hlrlhf.trainer.models import engine, frozen, loading, lora, tokenizers
from hlrlhf.trainer.models.ema import Average
from hlrlhf.trainer.models.forwards import Policy, Scorer


@dataclass(frozen=True)
class Models:
    """Actor, critic and reference, each in its place.

    Attributes:
        actor, critic: engines, which train.
        reference: the policy that the KL penalty is measured against.
        first_head: the critic's head as it began, for a reward model that shares all else.
        average: of the actor's weights, or None.
        device: what the models compute on.
    """

    actor: DeepSpeedEngine
    critic: DeepSpeedEngine
    reference: frozen.Copy
    first_head: nn.Module
    average: Average | None
    device: Device


def load(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, device: Device, updates: int
) -> Models:
    """The models as they start.

    Each is on the device before the next is read: the ranks of a node share its memory.

    Args:
        tokenizer: the actor's.
        updates: optimizer steps of the whole run.

    Raises:
        TrainerError: a checkpoint cannot be loaded, or does not fit the tokenizer.
    """
    chunk = settings.ppo.logprob_chunk
    policy = loading.load_policy(
        settings.actor.model_path, settings.dtype, settings.actor.dropout, chunk
    )
    _prepare(policy, "actor", settings.actor, settings, tokenizer)
    actor = engine.trained(policy, settings.actor, settings, device, updates)
    scorer = loading.load_scorer(
        settings.critic.model_path, settings.dtype, settings.critic.dropout
    )
    _prepare(scorer, "critic", settings.critic, settings, tokenizer)
    first_head = copy.deepcopy(scorer.head)
    critic = engine.trained(scorer, settings.critic, settings, device, updates)
    reference = frozen.reference(settings, tokenizer, actor, device)
    average = Average(actor, settings.ema.decay) if settings.ema.enabled else None
    return Models(actor, critic, reference, first_head, average, device)


def _prepare(
    model: Policy | Scorer,
    role: str,
    own: Actor | Critic,
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizers.check_vocabulary(tokenizer, role, model)
    if own.cp_act:
        model.inner.gradient_checkpointing_enable({"use_reentrant": False})
    if settings.lora.dim:
        lora.add_adapters(model, settings)
    elif isinstance(model, Policy) and settings.device == "cpu":
        add_sparsely(model)


def add_sparsely(policy: Policy) -> None:
    """Let the gradient of embeddings that are also the head's weights name the rows that it has.

    It is added to the head's, which has all rows; written out it would be another tensor of the
    vocabulary for each micro batch, of zeros but for its texts' words.
    """
    embeddings, head = policy.lm.get_input_embeddings(), policy.lm.get_output_embeddings()
    if isinstance(embeddings, nn.Embedding) and head.weight is embeddings.weight:
        embeddings.sparse = True
