"""What no single setting can say: settings that do not go together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from hlrlhf.settings.schema import Settings

if TYPE_CHECKING:
    from hlrlhf.settings.layers import Given

Contradiction = tuple[tuple[str, ...], str]


def contradictions(settings: Settings, values: Mapping[str, Given]) -> Iterator[Contradiction]:
    """Every group of settings that contradict each other: their names, and what to do.

    Args:
        settings: valid one by one.
        values: the same with origins, by dotted name.
    """

    def asked(name: str) -> bool:
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
        divisors = [str(one) for one in range(1, count + 1) if count % one == 0]
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
    if settings.container.kind == "none":
        for name in ("container.image", "container.mounts", "container.args"):
            if values[name].value:
                yield (name, "container.kind"), "has no effect without a container"
    elif settings.container.image is None:
        yield ("container.kind", "container.image"), "a container needs an image"
    # A preset may say what LoRA trains before anyone turns LoRA on; a person who asks for
    # adapters alone without having any would train all weights and not be told. So with prompts
    # for an evaluation that never is.
    if settings.only_optimize_lora and asked("only_optimize_lora") and settings.lora.dim == 0:
        yield ("only_optimize_lora", "lora.dim"), "there is no LoRA to optimize: set lora.dim"
    for name in ("evaluation.path", "evaluation.prompts"):
        if asked(name) and values[name].value is not None and settings.evaluation.interval == 0:
            yield (name, "evaluation.interval"), "nothing is evaluated: set evaluation.interval"
    if settings.adapters_only and settings.reference.offload and asked("reference.offload"):
        yield (
            ("reference.offload", "only_optimize_lora", "lora.dim"),
            "with adapters alone to train, the reference is the actor without them and takes no "
            "memory of its own",
        )
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
    if settings.hybrid_engine and settings.device != "cuda":
        yield ("hybrid_engine", "device"), "DeepSpeed's hybrid engine runs on device=cuda only"
    if settings.hybrid_engine and settings.actor.zero_stage == 3:
        yield ("hybrid_engine", "actor.zero_stage"), "the hybrid engine needs the actor's ZeRO < 3"
    if settings.hybrid_engine and settings.lora.dim:
        yield ("hybrid_engine", "lora.dim"), "the hybrid engine goes without LoRA here"
