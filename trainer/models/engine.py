"""DeepSpeed: the models that train, the ones that are frozen, and whole weights when needed."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime import bf16_optimizer
from deepspeed.utils import groups as rank_groups
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn
from torch.nn import functional

from hlrlhf.settings import Settings
from hlrlhf.settings.schema import Actor, Critic
from hlrlhf.trainer.device import Device
from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.models.forwards import Policy, Scorer, unwrapped
from hlrlhf.trainer.models.lora import is_adapter


def start(device: Device, settings: Settings) -> None:
    """Join the other ranks, by the variables that torchrun also sets.

    Args:
        device: this rank's.
        settings: of which `guard.hang` bounds what a rank waits for the others.

    Raises:
        TrainerError: the rendezvous port is taken.
    """
    deepspeed_logger.setLevel(logging.WARNING)
    # The watchdog comes first, and says who is waited for. HCCL knows no limit of its own.
    hang = settings.guard.hang
    limit = timedelta(minutes=hang + 10) if hang else timedelta(days=1000)
    # Of the groups that DeepSpeed makes without one, 10 minutes on NCCL otherwise.
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(dist.distributed_c10d, name, limit)
    try:
        deepspeed.init_distributed(dist_backend=device.backend, verbose=False, timeout=limit)
    except (dist.DistNetworkError, RuntimeError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise TrainerError(
                "the rendezvous port was taken between the start of the job and the start of the "
                "ranks (EADDRINUSE); submit again, or choose one with HL_MASTER_PORT"
            ) from error
        raise


def trained(
    model: Policy | Scorer, own: Actor | Critic, settings: Settings, device: Device, updates: int
) -> DeepSpeedEngine:
    """A DeepSpeed engine around a model that trains.

    Args:
        model: in host memory; the engine moves it.
        own: the model's own settings.
        updates: optimizer steps of the whole run, the length of the schedule.

    Raises:
        TrainerError: this DeepSpeed cannot add gradients up as it was asked to.
    """
    is_actor = isinstance(own, Actor)
    offload = settings.optimizer.offload
    optimizer = device.adamw(
        parameter_groups(
            model,
            own.learning_rate,
            settings.lora.actor_lr if is_actor else settings.lora.critic_lr,
            own.weight_decay,
        ),
        on_host=offload,
        lr=own.learning_rate,
        betas=(settings.optimizer.beta1, settings.optimizer.beta2),
        eps=settings.optimizer.epsilon,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        learning_rate_factor(settings.optimizer.lr_scheduler, settings.num_warmup_steps, updates),
    )
    # With texts to go on learning from, a micro batch of them follows each of the actor's own.
    mixed = is_actor and settings.pretraining.path is not None
    stage = own.zero_stage
    if settings.world_size == 1 and settings.dtype == "fp32" and stage < 3 and not offload:
        # A lone rank has nobody to share with. ZeRO 1 and 2 would keep its weights and gradients
        # twice, in fp32 both, for the same numbers. In bf16 their second copy is the one in fp32.
        stage = 0
    clipping = settings.optimizer.gradient_clipping
    plain = stage == 0 and settings.dtype == "fp32"
    if plain:
        optimizer.register_step_pre_hook(partial(_clip, clipping))
        clipping = 0.0
    config = _config(settings, stage) | {
        "train_batch_size": settings.gbs // settings.ppo.minibatches * (2 if mixed else 1),
        "train_micro_batch_size_per_gpu": settings.mbs,
        "gradient_clipping": clipping,
        # torch's own AdamW rather than DeepSpeed's, which would be compiled at the first start.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if settings.dtype == "bf16" and settings.optimizer.grad_accum_dtype == "fp32":
        if stage == 1 and not hasattr(bf16_optimizer, "is_invalid_grad_norm"):
            raise TrainerError(
                f"this DeepSpeed ({deepspeed.__version__}) would not skip a gradient that is not "
                "finite where it adds up in fp32 with ZeRO 1: set ZeRO 2, or "
                "HL_OPTIMIZER_GRAD_ACCUM_DTYPE=bf16"
            )
        # Between ranks too; by default what was added up would be sent in bf16.
        config |= {
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    # Allocated whole: by default 2 GB in fp32, however few gradients there are.
    gradients = sum(p.numel() for p in model.parameters() if p.requires_grad)
    config["zero_optimization"]["reduce_bucket_size"] = min(500_000_000, gradients)
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if settings.hpz.enabled_actor if is_actor else settings.hpz.enabled_critic:
        config["zero_optimization"]["zero_hpz_partition_size"] = settings.devices_per_node
    if settings.hybrid_engine and is_actor:
        config["hybrid_engine"] = {
            "enabled": True,
            "max_out_tokens": settings.dataset.max_prompt_tokens
            + settings.generation.max_new_tokens,
        }
    with _exact_buffers(model):
        if stage == 3:
            _partition(model, config, device)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, lr_scheduler=schedule, config=config
        )
    if plain and settings.world_size == 1:
        # It would copy all gradients to a buffer, add those of nobody, and copy them back.
        engine.enable_backward_allreduce = False
    # DeepSpeed keeps one group of ranks for hpZ, and every later model would have it too.
    rank_groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    return engine


def partitioned(
    model: Policy | Scorer, settings: Settings, device: Device, in_host_memory: bool
) -> DeepSpeedEngine:
    """A ZeRO-3 engine around a model that does not train.

    Args:
        model: in host memory.
        in_host_memory: whether each rank's part lies there rather than on the device.
    """
    config = _config(settings, 3) | {
        "train_micro_batch_size_per_gpu": settings.mbs,
        "train_batch_size": settings.mbs * settings.world_size,
    }
    if in_host_memory:
        config["zero_optimization"]["offload_param"] = {"device": "cpu"}
    with _exact_buffers(model):
        _partition(model, config, device)
        engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine


def _partition(model: Policy | Scorer, config: dict[str, Any], device: Device) -> None:
    """Give each rank its part of each weight, one weight after the other, under ZeRO-3.

    DeepSpeed would bring the whole model to the device first, where it may have no room.
    """
    dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # adapters are in fp32 at first
    deepspeed.zero.Init(module=model, config_dict_or_path=config)
    # A block's weights are brought together at once, not layer by layer: fewer and larger gathers,
    # and no hooks that take longer than the layers of a small model. Not with adapters: where
    # nothing before a block trains, DeepSpeed lets go of its weights before its backward pass.
    names = unwrapped(model.inner)._no_split_modules or ()
    blocks = {type(module) for module in model.modules() if type(module).__name__ in names}
    if blocks and not any(is_adapter(name) for name, _ in model.named_parameters()):
        set_z3_leaf_modules(model, list(blocks))
    model.to(device.torch)  # the buffers, by now


def descend(engine: DeepSpeedEngine, loss: Tensor) -> bool:
    """Backward pass of a micro batch, and after the last of a minibatch the optimizer's step.

    A gradient that is not finite is dropped by all ranks together, and the step skipped.

    Returns:
        False when a step was skipped.
    """
    engine.backward(loss, scale_wrt_gas=False)
    last = engine.is_gradient_accumulation_boundary()
    engine.step()
    return not last or engine.was_step_applied()


def _clip(clipping: float, optimizer: Any, *_: Any) -> None:
    """Before a step of the plain optimizer, in fp32 without ZeRO, what DeepSpeed's own ones do.

    DeepSpeed would only clip for it, whatever the gradients are, and fails where none is left. They
    are those of all ranks by now, so all ranks find the same.

    Args:
        clipping: largest norm, 0 for any.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        if parameter.grad is None:  # moments and decay move what no loss has reached
            parameter.grad = torch.zeros_like(parameter)
    norm = nn.utils.clip_grad_norm_(parameters, clipping or math.inf)
    optimizer.overflow = not bool(norm.isfinite())
    # Where DeepSpeed looks for what it tells of a step.
    optimizer._global_grad_norm = None if optimizer.overflow else norm
    if optimizer.overflow:
        for parameter in parameters:
            parameter.grad = None  # AdamW leaves such a parameter as it is


def parameter_groups(
    model: nn.Module, rate: float, adapter_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """AdamW's groups: matrices with decay, adapters at their own rate, vectors without decay.

    Biases and norms are vectors. Empty groups and parameters that do not train are left out.
    """
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "lora": [], "no_decay": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "lora" if is_adapter(name) else "decay" if parameter.ndim > 1 else "no_decay"
            groups[kind].append(parameter)
    options = {
        "decay": {"lr": rate, "weight_decay": weight_decay},
        "lora": {"lr": adapter_rate, "weight_decay": weight_decay},
        "no_decay": {"lr": rate, "weight_decay": 0.0},
    }
    return [
        {"name": kind, "params": parameters, **options[kind]}
        for kind, parameters in groups.items()
        if parameters
    ]


def learning_rate_factor(kind: str, warmup: int, updates: int) -> Callable[[int], float]:
    """The share of the peak learning rate at each optimizer step, counted from 0.

    It rises linearly over `warmup` steps; then it falls to 0 at step `updates` along half a cosine
    or a line, or stays. A run that is shorter than its warm-up only rises.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, updates - warmup))
        if kind == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return 1 - done if kind == "linear" else 1.0

    return factor


def whole_weights(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """A model's weights by name, whole, on the CPU of rank 0; all ranks have to call it.

    Returns:
        Empty on the other ranks. Names of tied weights share one tensor.
    """
    weights = {}
    copies: dict[int, Tensor] = {}
    for name, value in engine.module.state_dict(keep_vars=True).items():
        with deepspeed.zero.GatheredParameters([value], enabled=hasattr(value, "ds_id")):
            if dist.get_rank() == 0:
                if id(value) not in copies:
                    copies[id(value)] = value.detach().cpu().clone()
                weights[name] = copies[id(value)]
    return weights


@contextlib.contextmanager
def gathered(engine: DeepSpeedEngine) -> Iterator[None]:
    """Under ZeRO-3 hold every weight on every rank, so that a rollout runs without collectives.

    Gathering layer by layer at each token would be slow, and would hang as soon as one rank's
    answers end before another's. DeepSpeed's hooks would let go of the weights after each layer, so
    they are off meanwhile; so is its linear function, which for a backward pass remembers no
    weights, and takes longer than the product of a small layer.
    """
    if engine.zero_optimization_stage() < 3:
        yield
        return
    parameters = list(engine.module.parameters())
    # A model that does not train has no optimizer around it.
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    with deepspeed.zero.GatheredParameters(parameters):
        for parameter in parameters:
            parameter.ds_active_sub_modules.clear()
        for hooks in (offload.forward_hooks, offload.backward_hooks):
            for hook in hooks:
                hook.remove()
            hooks.clear()
        deepspeeds, functional.linear = functional.linear, torch._C._nn.linear
        try:
            yield
        finally:
            functional.linear = deepspeeds
            # The method's name changed between the releases that Gaudi and PyPI have.
            register = getattr(offload, "_register_deepspeed_module", None)
            (register or offload._register_hooks_recursively)(offload.module)


@contextlib.contextmanager
def _exact_buffers(model: nn.Module) -> Iterator[None]:
    """Keep buffers in their own precision.

    DeepSpeed before 0.19.3 casts them with the weights, and rotary frequencies in bf16 are those of
    other positions.
    """
    kept = [
        (module, name, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    yield
    for module, name, buffer in kept:
        setattr(module, name, buffer.to(getattr(module, name).device))


def _config(settings: Settings, zero_stage: int) -> dict[str, Any]:
    return {
        "bf16": {"enabled": settings.dtype == "bf16", "check_grad_overflow": True},
        "zero_optimization": {"stage": zero_stage},
        "steps_per_print": math.inf,
    }
