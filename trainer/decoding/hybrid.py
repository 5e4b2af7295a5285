"""DeepSpeed's hybrid engine: refused where it cannot run; `agreement` checks what it says."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import deepspeed
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hlrlhf.settings import Settings
from hlrlhf.trainer.decoding.decoder import Decoded, Witness
from hlrlhf.trainer.decoding.plain import Plain
from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.models.forwards import Placed
from hlrlhf.trainer.models.loading import UNREADABLE

OFF = "set HL_HYBRID_ENGINE=0"


def check(settings: Settings) -> None:
    """Stop before any model loads when the hybrid engine cannot run here.

    Raises:
        TrainerError: naming what is missing: a compiler, a GPU that its kernels know, or kernels
            for the actor's architecture.
    """
    if not settings.hybrid_engine:
        return
    if lacking := _kernels_lack(settings.device) or _architecture_lacks(settings.actor.model_path):
        raise TrainerError(f"hybrid_engine = true, but {lacking}; {OFF}")


class Hybrid(Plain):
    """A `Decoder`: ``generate`` through the kernels that DeepSpeed's engine puts into the policy.

    The reference of an evaluation has none, and is sampled from as it is.
    """

    name = "hybrid_engine = true"

    def __call__(
        self, policy: Placed, prompts: Sequence[list[int]], witness: Witness | None = None
    ) -> Decoded:
        """Sample one answer to each prompt.

        Raises:
            TrainerError: the kernels cannot be used.
        """
        try:
            return super().__call__(policy, prompts, witness)
        except Exception as error:  # whatever kernels that do not fit the model run into
            raise TrainerError(
                f"DeepSpeed's hybrid engine cannot generate: {error!r}; {OFF}"
            ) from error


def _kernels_lack(device: str) -> str | None:
    """Why DeepSpeed cannot build its inference kernels here; None when it can."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.op_builder.builder import MissingCUDAException
    from deepspeed.ops.op_builder.transformer_inference import InferenceBuilder

    # On Gaudi there are those that this DeepSpeed brings for it, if any.
    builder = (
        get_accelerator().create_op_builder(InferenceBuilder.__name__)
        if device == "hpu"
        else InferenceBuilder()
    )
    if builder is None:
        return f"this DeepSpeed ({deepspeed.__version__}) has no inference kernels for {device}"
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
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
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
