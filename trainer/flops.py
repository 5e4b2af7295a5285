"""Floating-point operations of a step: what the algorithm needs, not what a device happens to do.

Counted as in "Efficient Large-Scale Language Model Training on GPU Clusters" (arXiv 2104.04473):
matrix products alone, a multiplication and an addition being two operations. Padding, and what
activation checkpointing computes again, do not count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from hlrlhf.trainer.models.forwards import Policy, Scorer, unwrapped


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes:
        weights: numbers in the matrices that a token meets; embeddings are looked up, and of a
            mixture's experts it meets those that it is sent to.
        trainable: those of them that get a gradient.
        head: numbers in a policy's language-model head; 0 in a scorer.
        head_trainable: whether it gets a gradient.
        attention: operations for each pair of a token and one that it sees, itself included.
    """

    weights: int
    trainable: int
    head: int
    head_trainable: bool
    attention: int

    def forward(self, tokens: Tensor, pairs: Tensor, answers: Tensor) -> Tensor:
        """Operations of a forward pass.

        Args:
            tokens: that the model reads.
            pairs: of a token and one that it sees.
            answers: tokens whose logits are needed.
        """
        return 2 * self.weights * tokens + self.attention * pairs + 2 * self.head * answers

    def training(self, tokens: Tensor, pairs: Tensor, answers: Tensor) -> Tensor:
        """Operations of a forward and a backward pass.

        The backward pass has a product for the gradient of each input, and one for the gradient of
        each weight that trains.
        """
        gradients = 2 * self.trainable * tokens
        if self.head_trainable:
            gradients = gradients + 2 * self.head * answers
        # Attention has two inputs to each of its products.
        backward = self.forward(tokens, pairs, answers) + self.attention * pairs + gradients
        return self.forward(tokens, pairs, answers) + backward


def cost(model: Policy | Scorer) -> Cost:
    """The cost of a model, partitioned by ZeRO-3 or not."""
    plain = unwrapped(model.inner)
    lookups = [m.weight for m in plain.modules() if isinstance(m, nn.Embedding)]
    head = plain.get_output_embeddings() if isinstance(model, Policy) else None
    others = {id(weight) for weight in lookups} | ({id(head.weight)} if head else set())
    config = plain.config
    met = {
        parameter: _shape(parameter).numel() * (_share(config) if ".experts." in name else 1)
        for name, parameter in plain.named_parameters()
        if len(_shape(parameter)) > 1 and id(parameter) not in others
    }
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Cost(
        weights=round(sum(met.values())),
        trainable=round(sum(numbers for p, numbers in met.items() if p.requires_grad)),
        head=_shape(head.weight).numel() if head else 0,
        head_trainable=head is not None and head.weight.requires_grad,
        # Queries by keys, and weights by values.
        attention=4 * config.num_hidden_layers * config.num_attention_heads * size,
    )


def _share(config: PretrainedConfig) -> float:
    """Of a mixture's experts, the part that a token is sent to; all where that is not known."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    counts = [count for name in names if (count := getattr(config, name, None))]
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen / counts[0] if counts and chosen else 1.0


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Of the whole parameter, of which ZeRO-3 leaves a part on this rank."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def of_step(
    prompts: Tensor,
    answers: Tensor,
    actor: Cost,
    critic: Cost,
    reward: Cost | None,
    epochs: int,
    recorded: bool = False,
    learns_at_once: bool = False,
) -> Tensor:
    """Operations of a rollout, its scoring by the models, and the update.

    Args:
        prompts, answers: [b], tokens of each row, at least one of either.
        actor, critic: trained.
        reward: frozen; None when no model gives the reward. The reference costs as the actor.
        epochs: of the update.
        recorded: whether the actor's log-probs are, so that it does not score its answers.
        learns_at_once: whether the critic learns in the pass that gives its values.

    Returns:
        A scalar, float.
    """
    prompts, answers = prompts.float(), answers.float()
    lengths = prompts + answers
    tokens, logits = lengths.sum(), answers.sum()
    pairs = (lengths * (lengths + 1) / 2).sum()
    # With a cache each token is read once, but for the last, which nothing follows.
    read = lengths - 1
    total = actor.forward(read.sum(), (read * (read + 1) / 2).sum(), logits)
    policies = [actor] if recorded else [actor, actor]
    critics = [] if learns_at_once else [critic]
    for model in (*policies, *critics, *([reward] if reward else [])):
        total = total + model.forward(tokens, pairs, logits)
    for model in (actor, critic):
        total = total + epochs * model.training(tokens, pairs, logits)
    return total


def of_texts(rows: int, width: int, actor: Cost) -> Tensor:
    """Operations of a language-modelling loss on rows of text, with its backward pass.

    Args:
        rows: that the actor learns from.
        width: tokens in each.
        actor: trained.

    Returns:
        A scalar, float.
    """
    tokens, pairs, logits = torch.tensor([width, width * (width + 1) / 2, width - 1]) * rows
    return actor.training(tokens, pairs, logits)
