"""What PPO takes for granted of a model, tried on a few tokens when it is loaded.

The weights of a large model pass through the processors once for each forward, on every rank of a
node at a time; how many tokens they meet hardly matters as long as it is a few.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.models.forwards import Policy, Scorer

# Two texts that differ in their last token alone.
TEXTS = ((1, 2, 1), (1, 2, 2))


@torch.no_grad()
def check(path: str, model: Policy | Scorer, dropout: float) -> None:
    """Two forwards, one of them as in training.

    Args:
        path: where the model came from.
        model: on the CPU, whole.
        dropout: the rate that was set.

    Raises:
        TrainerError: the model sees what comes after a token; it drops though `dropout` is 0; or it
            has no dropout though one was set.
    """
    training = model.training
    try:
        with torch.random.fork_rng(devices=[]):
            calm = _forward(model.eval())
            before = torch.random.get_rng_state()
            trained = _forward(model.train())
            drew = not before.equal(torch.random.get_rng_state())
    except Exception as error:  # Optimum for Gaudi gives some models forwards for Gaudi alone
        print(f"warning: {path}: not tried before training, for want of a forward: {error!r}")
        return
    finally:
        model.train(training)
    name, eps = type(model.inner).__name__, torch.finfo(next(model.parameters()).dtype).eps

    def close(one: Tensor, other: Tensor) -> bool:
        """But for rounding: some tens of sums, each another way."""
        return torch.allclose(one, other, rtol=32 * eps, atol=32 * eps, equal_nan=True)

    if not close(calm[0, :-1], calm[1, :-1]):
        raise TrainerError(
            f"{path}: {name} as configured reads both ways: a token that follows changes what it "
            "says of those before; PPO needs a model that has seen no more than the text so far"
        )
    if dropout == 0 and not calm.equal(trained) and (drew or not close(calm, trained)):
        raise TrainerError(
            f"{path}: {name} computes otherwise while it trains, here by up to "
            f"{float((calm - trained).abs().max()):.2g}, though dropout is 0: something in its "
            "config.json drops, under a name that is not known here; set it to 0 there"
        )
    if dropout > 0 and not drew:
        variable = "HL_ACTOR_DROPOUT" if isinstance(model, Policy) else "HL_CRITIC_DROPOUT"
        raise TrainerError(
            f"{path}: dropout is {dropout:g}, but {name} has none to set; set {variable}=0"
        )


@torch.no_grad()
def check_chunks(path: str, policy: Policy) -> None:
    """Some architectures scale or cap what their head gives; those logits need the whole model.

    Where they do not, the same sums give the same logits to the last bit.

    Args:
        path: where the model came from.
        policy: without adapters.

    Raises:
        TrainerError: the logits are not those of the head.
    """
    training, lm = policy.training, policy.lm.eval()
    tokens = torch.tensor(TEXTS)
    arguments = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    logits = lm(**arguments).logits
    of_head = lm.get_output_embeddings()(lm.base_model(**arguments).last_hidden_state)
    policy.train(training)
    if not torch.allclose(of_head.to(logits.dtype), logits, rtol=0, atol=0, equal_nan=True):
        raise TrainerError(
            f"{path}: {type(lm).__name__} changes the logits after its head, so they cannot "
            "be computed in chunks; set HL_PPO_LOGPROB_CHUNK=0"
        )


def _forward(model: Policy | Scorer) -> Tensor:
    """Log-probs of all tokens but the first, or scalars for all."""
    tokens = torch.tensor(TEXTS)
    mask, width = torch.ones_like(tokens), tokens.shape[1] - 1
    found: Tensor = (
        model(tokens, mask, width, 1.0) if isinstance(model, Policy) else model(tokens, mask, width)
    )
    return found
