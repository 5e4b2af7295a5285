"""What no single setting can say: settings that do not go together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from hlrlhf.settings.directives import refused_arguments, refused_lines
from hlrlhf.settings.names import settings_by_name
from hlrlhf.settings.origins import Given
from hlrlhf.settings.schema import Settings

Contradiction = tuple[tuple[str, ...], str]

# Settings that have no effect unless others are so, those others, and what to say. Somebody who
# asks for one would otherwise take it for granted and not be told.
_IDLE: tuple[tuple[tuple[str, ...], tuple[str, ...], Callable[[Settings], bool], str], ...] = (
    (
        ("enable_hpu_graphs",),
        ("device", "hpu.lazy_mode"),
        lambda settings: settings.device == "hpu" and settings.hpu.lazy_mode,
        "graphs are made with device=hpu and hpu.lazy_mode only",
    ),
    (
        ("hpu.lazy_mode", "hpu.recipe_cache_path", "hpu.recipe_cache_size"),
        ("device",),
        lambda settings: settings.device == "hpu",
        "has no effect but on device=hpu",
    ),
    (
        ("hpu.recipe_cache_size",),
        ("hpu.recipe_cache_path",),
        lambda settings: settings.device != "hpu" or settings.hpu.recipe_cache_path is not None,
        "there is no recipe cache: set hpu.recipe_cache_path",
    ),
    (
        ("ppo.kl_target", "ppo.kl_horizon"),
        ("ppo.kl_controller",),
        lambda settings: settings.ppo.kl_controller == "adaptive",
        "the KL coefficient stays: set ppo.kl_controller=adaptive",
    ),
    (
        ("ppo.reuse_logprobs",),
        ("ppo.epochs", "ppo.minibatches", "actor.dropout"),
        lambda settings: settings.trains_on_policy,
        "with several optimizer steps a rollout, or with dropout, log-probs have to be computed",
    ),
    (
        ("ppo.reuse_values",),
        ("ppo.epochs", "ppo.minibatches", "critic.dropout"),
        lambda settings: settings.critic_learns_at_once or not settings.ppo.reuse_values,
        "with several optimizer steps a rollout, or with dropout, the critic runs once for each",
    ),
    (
        ("ema.decay",),
        ("ema.enabled",),
        lambda settings: settings.ema.enabled,
        "nothing is averaged: set ema.enabled",
    ),
    (
        ("only_optimize_lora", "lora.alpha", "lora.actor_lr", "lora.critic_lr"),
        ("lora.dim",),
        lambda settings: settings.lora.dim > 0,
        "there is no LoRA to optimize: set lora.dim",
    ),
    (
        ("pretraining.column", "pretraining.coefficient", "pretraining.max_tokens"),
        ("pretraining.path",),
        lambda settings: settings.pretraining.path is not None,
        "there are no texts to go on learning from: set pretraining.path",
    ),
    (
        ("reward.function_weight",),
        ("reward.function",),
        lambda settings: settings.reward.function is not None,
        "no function scores the answers: set reward.function",
    ),
    (
        ("reward.model_path", "reward.own_tokenizer", "reward.score_at"),
        ("reward.model_weight",),
        lambda settings: settings.reward.model_weight > 0,
        "no reward model is loaded: give it a weight",
    ),
    (
        ("evaluation.path", "evaluation.prompts"),
        ("evaluation.interval",),
        lambda settings: settings.evaluation.interval > 0,
        "nothing is evaluated: set evaluation.interval",
    ),
    (
        ("checkpoint.keep_best",),
        ("evaluation.interval",),
        lambda settings: settings.evaluation.interval > 0,
        "without evaluations none is the best: set evaluation.interval",
    ),
    (
        ("generation.fast_kernels",),
        ("generation.decoder",),
        lambda settings: settings.generation.decoder != "generate",
        "it is our own loop that samples with them",
    ),
    (
        ("optimizer.grad_accum_dtype",),
        ("dtype",),
        lambda settings: settings.dtype == "bf16",
        "without bf16, gradients are fp32 anyway",
    ),
    (
        ("reference.offload",),
        ("only_optimize_lora", "lora.dim", "reference.model_path"),
        lambda settings: not settings.shares_reference,
        "with adapters alone to train, the reference is the actor without them and takes no memory "
        "of its own",
    ),
)


def idle(settings: Settings) -> set[str]:
    """Settings that have no effect, because others are not so."""
    return {name for names, _, effective, _ in _IDLE if not effective(settings) for name in names}


def contradictions(settings: Settings, values: Mapping[str, Given]) -> Iterator[Contradiction]:
    """Every group of settings that contradict each other: their names, and what to do.

    Args:
        settings: valid one by one.
        values: the same with origins, by dotted name.
    """

    def asked(name: str) -> bool:
        """Whether a person wants it now; presets and files may foresee more than a run has."""
        return values[name].origin.kind in ("environment", "flag")

    per_step = settings.world_size * settings.mbs
    if settings.gbs % per_step:
        below = settings.gbs // per_step * per_step
        fitting = [str(size) for size in (below, below + per_step) if size]
        yield (
            ("gbs", "mbs", "num_nodes", "devices_per_node"),
            f"the global batch must be a multiple of nodes x devices x micro batch = {per_step}; "
            f"nearest: {' or '.join(fitting)}",
        )
    elif settings.gradient_accumulation_steps % settings.ppo.minibatches:
        count = settings.gradient_accumulation_steps
        small = [one for one in range(1, math.isqrt(count) + 1) if count % one == 0]
        divisors = [str(one) for one in sorted({*small, *(count // one for one in small)})]
        yield (
            ("ppo.minibatches", "gbs", "mbs", "num_nodes", "devices_per_node"),
            f"a device has {count} micro batches, which can make {', '.join(divisors)} minibatches",
        )
    if settings.ppo.kl_controller == "adaptive" and settings.ppo.kl_coefficient == 0:
        yield (
            ("ppo.kl_controller", "ppo.kl_coefficient"),
            "the adaptive controller multiplies the coefficient, and 0 stays 0",
        )
    memory = tuple(
        name
        for name in ("slurm.mem", "slurm.mem_per_cpu", "slurm.mem_per_gpu")
        if values[name].value is not None
    )
    if len(memory) > 1:
        yield memory, "Slurm takes one of the three; set the others to nothing"
    for what in refused_lines(settings.slurm.extra, gres=bool(settings.gres_name)):
        yield ("slurm.extra",), what
    for what in refused_arguments(settings.slurm.srun_args):
        yield ("slurm.srun_args",), what
    if settings.container.kind == "pyxis":  # whose arguments are srun's
        for what in refused_arguments(settings.container.args):
            yield ("container.args", "container.kind"), what
    if settings.slurm.gres_type and not settings.gres_name:
        yield ("slurm.gres_type", "slurm.gres_name", "device"), "a type needs a gres name"
    for model, enabled in (
        ("actor", settings.hpz.enabled_actor),
        ("critic", settings.hpz.enabled_critic),
    ):
        stage = f"{model}.zero_stage"
        if enabled and values[stage].value != 3:
            yield (f"hpz.enabled_{model}", stage), "hpZ needs ZeRO stage 3"
        elif enabled and settings.devices_per_node == 1:
            yield (f"hpz.enabled_{model}", "devices_per_node"), "hpZ needs several devices per node"
        if settings.optimizer.offload and values[stage].value == 0:
            yield ("optimizer.offload", stage), "optimizer offload needs ZeRO stage 1 or more"
        in_fp32 = settings.dtype == "bf16" and settings.optimizer.grad_accum_dtype == "fp32"
        if in_fp32 and values[stage].value == 0:
            yield ("optimizer.grad_accum_dtype", stage), "adding up in fp32 needs ZeRO 1 or more"
        elif in_fp32 and values[stage].value < 3 and settings.optimizer.offload:
            # DeepSpeed would keep a gradient that is not finite, and skip all steps from then on.
            yield (
                ("optimizer.grad_accum_dtype", "optimizer.offload", stage),
                "adding up in fp32 beside offloaded states needs ZeRO 3",
            )
    if settings.container.kind == "none":
        for name in ("container.image", "container.mounts", "container.args"):
            if values[name].value:
                yield (name, "container.kind"), "has no effect without a container"
    elif settings.container.image is None:
        yield ("container.kind", "container.image"), "a container needs an image"
    for names, others, effective, why in _IDLE:
        for name in names:
            value, default = values[name].value, settings_by_name()[name].default
            wanted = value is True or (value and value != default)
            if asked(name) and wanted and not effective(settings):
                yield (name, *others), why
    weights = settings.dataset.weights
    if weights is not None and len(weights) != len(settings.dataset.path):
        yield ("dataset.weights", "dataset.path"), "give one weight per data set, or none"
    if settings.reward.model_weight == 0 and settings.reward.function is None:
        yield (
            ("reward.model_weight", "reward.function"),
            "nothing scores the answers: give the reward model a weight, or set a function",
        )
    if settings.reward.own_tokenizer and settings.reward.model_path is None:
        yield (
            ("reward.own_tokenizer", "reward.model_path"),
            "the critic's checkpoint works on the actor's tokens: set the reward model's path",
        )
    if settings.generation.min_new_tokens > settings.generation.max_new_tokens:
        names = ("generation.min_new_tokens", "generation.max_new_tokens")
        yield names, "the shortest answer must not be longer than the longest"
    if settings.generation.decoder == "compiled" and settings.device != "cpu":
        names = "generation.decoder", "device"
        yield names, "a step is compiled on processors; elsewhere decoder = own captures it"
    if settings.hybrid_engine and settings.device == "cpu":
        yield ("hybrid_engine", "device"), "DeepSpeed's hybrid engine does not run on processors"
    if settings.hybrid_engine and settings.actor.zero_stage == 3:
        yield ("hybrid_engine", "actor.zero_stage"), "the hybrid engine needs the actor's ZeRO < 3"
    if settings.hybrid_engine and settings.lora.dim:
        yield ("hybrid_engine", "lora.dim"), "the hybrid engine goes without LoRA here"
