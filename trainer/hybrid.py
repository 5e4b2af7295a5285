"""DeepSpeed's hybrid engine: refused where it cannot run, and never believed unchecked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from hlrlhf.settings import Settings
from hlrlhf.trainer import data
from hlrlhf.trainer.device import Device
from hlrlhf.trainer.engine import summed
from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.loading import UNREADABLE
from hlrlhf.trainer.rollout import Sampling

# Nats. bf16 has 8 bits: logits near 30 are apart by an eighth, and two kernels round each sum
# another way. What a wrong kernel prefers is many nats below the best.
MARGIN = 1.0
OFF = "set HL_HYBRID_ENGINE=0"


def check(settings: Settings) -> None:
    """Stop before any model loads when the hybrid engine cannot run here.

    Raises:
        TrainerError: naming what is missing: a compiler, a GPU that its kernels know, or kernels
            for the actor's architecture.
    """
    if not settings.hybrid_engine:
        return
    if lacking := _kernels_lack() or _architecture_lacks(settings.actor.model_path):
        raise TrainerError(f"hybrid_engine = true, but {lacking}; {OFF}")


def check_first_tokens(
    actor: Any, prompts: list[list[int]], sampling: Sampling, settings: Settings, device: Device
) -> None:
    """Stop when the hybrid engine would begin an answer otherwise than the model itself.

    Its kernels hold copies of the weights, so an update is reason to ask again. All ranks have to
    call it; without the hybrid engine it does nothing.

    Args:
        actor: the engine around the policy.
        prompts: token ids, this rank's.
        sampling: names the padding and the end tokens.
        settings: all of them.
        device: the rank's.

    Raises:
        TrainerError: on all ranks, when a likeliest token is wrong on any: its log-prob under the
            model itself is more than `MARGIN` below the best.
    """
    if not settings.hybrid_engine:
        return
    wrong = (_first_token_gaps(actor, prompts, sampling.config, device) > MARGIN).sum()
    if total := int(summed(wrong.float())):
        raise TrainerError(
            f"the first token that DeepSpeed's hybrid engine generates is wrong for {total} of "
            f"{settings.gbs} prompts: more than {MARGIN:g} nats less likely than the one that the "
            f"model itself generates; {OFF}"
        )


@torch.no_grad()
def _first_token_gaps(
    actor: Any, prompts: list[list[int]], config: GenerationConfig, device: Device
) -> Tensor:
    """[b], nats by which the hybrid engine's likeliest tokens are less likely than the best."""
    ids, mask = data.pad_left(prompts, config.pad_token_id, device.pad_to)
    ids, mask = ids.to(device.torch), mask.to(device.torch)
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=1,
        pad_token_id=config.pad_token_id,
        eos_token_id=config.eos_token_id,
    )
    policy = actor.module
    # Here too generate() would fill in from the checkpoint what a call leaves unset.
    policy.lm.generation_config = greedy
    arguments = {"input_ids": ids, "attention_mask": mask, "generation_config": greedy}
    # Through the engine, which puts its kernels in for eval() and takes them out for train().
    actor.eval()
    try:
        fast = policy.generate(**arguments)
    except Exception as error:  # whatever kernels that do not fit the model run into
        raise TrainerError(
            f"DeepSpeed's hybrid engine cannot generate: {error!r}; {OFF}"
        ) from error
    actor.train()
    policy.eval()
    plain = policy.lm.generate(**arguments)
    attended = pad(mask, (0, 1), value=1)
    best, found = (policy(sequences, attended, 1, 1.0).squeeze(-1) for sequences in (plain, fast))
    gaps: Tensor = best - found
    return gaps


def _kernels_lack() -> str | None:
    """Why DeepSpeed cannot build its inference kernels here; None when it can."""
    from deepspeed.ops.op_builder.builder import MissingCUDAException
    from deepspeed.ops.op_builder.transformer_inference import InferenceBuilder

    builder = InferenceBuilder()
    try:
        if builder.is_compatible(verbose=True):
            return None
        reason = builder.error_log
    except MissingCUDAException as error:
        reason = str(error)
    return f"DeepSpeed cannot build its inference kernels here: {reason}"


def _architecture_lacks(path: str) -> str | None:
    """Why DeepSpeed has no kernels for a checkpoint, from its configuration; None when it has."""
    from deepspeed.inference.config import DeepSpeedInferenceConfig
    from deepspeed.module_inject.utils import policy_to_ds_container
    from deepspeed.runtime.hybrid_engine import DeepSpeedHybridEngine

    try:
        config = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except UNREADABLE as error:
        raise TrainerError(f"{path}: no causal language model can be made: {error}") from error
    # The engine itself says for which layers it has kernels.
    engine = SimpleNamespace(module=model, new_inference_container="kernels")
    DeepSpeedHybridEngine.populate_all_inference_policies(engine)
    policies = {
        layer: entry[-1]
        for layer, entry in engine.inference_policies.items()
        if entry[0] == "kernels"
    }
    layer = next((part for part in model.modules() if type(part) in policies), None)
    if layer is None:
        return f"DeepSpeed has no inference kernels for {config.model_type}"
    try:
        policy_to_ds_container(
            policy=policies[type(layer)](layer, inference=True),
            config=DeepSpeedInferenceConfig(),
            model_config=None,
            layer_id=0,
            child=layer,
        ).create_ds_model_config()
    except Exception as error:  # each architecture has refusals and assumptions of its own
        return f"DeepSpeed's inference kernels do not take {config.model_type}: {error!r}"
    return None
