"""Settings that do not go together."""

from __future__ import annotations

from pathlib import Path

import pytest
from mandatory import MANDATORY

from hlrlhf.settings import SettingsError, resolve


def problems(*flags: str, preset: str | None = None, **environ: str) -> list[str]:
    try:
        resolve(preset, environ=MANDATORY | environ, flags=flags)
    except SettingsError as error:
        return [str(problem) for problem in error.problems]
    return []


@pytest.mark.parametrize(
    ("gbs", "mbs", "devices", "nearest"),
    [
        (33, 4, 8, "nearest: 32 or 64"),
        (63, 4, 8, "nearest: 32 or 64"),
        (31, 4, 8, "nearest: 32"),
        (1, 2, 1, "nearest: 2"),
    ],
)
def test_global_batch_that_does_not_divide(gbs: int, mbs: int, devices: int, nearest: str) -> None:
    (problem,) = problems(
        f"devices_per_node={devices}", HL_GBS=str(gbs), HL_MBS=str(mbs), HL_NUM_NODES="1"
    )
    assert problem == (
        f"gbs = {gbs} (environment HL_GBS), mbs = {mbs} (environment HL_MBS), "
        f"num_nodes = 1 (environment HL_NUM_NODES), devices_per_node = {devices} (flag --set): "
        "the global batch must be a multiple of nodes x devices x micro batch = "
        f"{mbs * devices}; {nearest}"
    )


def test_global_batch_over_several_nodes() -> None:
    assert "= 64; nearest: 64" in problems("num_nodes=2", preset="llama2-7b")[0]
    assert problems("num_nodes=2", "gbs=64", preset="llama2-7b") == []


def test_origins_are_told_for_a_preset() -> None:
    (problem,) = problems("mbs=5", preset="llama2-7b")
    assert "gbs = 32 (preset " in problem
    assert "mbs = 5 (flag --set)" in problem


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["slurm.mem=1G", "slurm.mem_per_cpu=1G"], "Slurm takes one of the three"),
        (["slurm.mem=0", "slurm.mem_per_gpu=1G"], "Slurm takes one of the three"),
        (["slurm.gres_type=HL-225", "slurm.gres_name="], "a type needs a gres name"),
        (["slurm.gres_type=HL-225", "device=cpu"], "a type needs a gres name"),
        (["hpz.enabled_actor=1"], "hpZ needs ZeRO stage 3"),
        (
            ["gbs=96", "mbs=4", "devices_per_node=2", "ppo.minibatches=5"],
            "a device has 12 micro batches, which can make 1, 2, 3, 4, 6, 12 minibatches",
        ),
        (["ppo.kl_controller=adaptive", "ppo.kl_coefficient=0"], "and 0 stays 0"),
        (["hpz.enabled_critic=1", "actor.zero_stage=3"], "hpZ needs ZeRO stage 3"),
        (["hpz.enabled_actor=1", "devices_per_node=1", "actor.zero_stage=3"], "several devices"),
        (["optimizer.offload=1", "actor.zero_stage=0"], "needs ZeRO stage 1 or more"),
        (["optimizer.offload=1", "critic.zero_stage=0"], "needs ZeRO stage 1 or more"),
        (
            ["reference.offload=1", "only_optimize_lora=1", "lora.dim=8"],
            "takes no memory of its own",
        ),
        (["container.image=x.sif"], "has no effect without a container"),
        (["container.mounts=/a:/b"], "has no effect without a container"),
        (["container.args=--net"], "has no effect without a container"),
        (["container.kind=apptainer"], "a container needs an image"),
        (["only_optimize_lora=1"], "there is no LoRA to optimize"),
        (["dataset.path=/a /b", "dataset.weights=1"], "one weight per data set"),
        (["dataset.weights=1 2"], "one weight per data set"),
        (["generation.min_new_tokens=9", "generation.max_new_tokens=8"], "must not be longer"),
        (["hybrid_engine=1", "device=cpu"], "does not run on processors"),
        (
            ["optimizer.grad_accum_dtype=fp32", "critic.zero_stage=0"],
            "adding up in fp32 needs ZeRO 1 or more",
        ),
        (
            ["optimizer.grad_accum_dtype=fp32", "optimizer.offload=1", "actor.zero_stage=3"],
            "beside offloaded states needs ZeRO 3",
        ),
        (["reward.model_weight=0"], "nothing scores the answers"),
        (["reward.own_tokenizer=1"], "set the reward model's path"),
        # Asked for, and without effect.
        (["evaluation.path=/a"], "set evaluation.interval"),
        (["evaluation.prompts=9"], "set evaluation.interval"),
        (["enable_hpu_graphs=1"], "with device=hpu and hpu.lazy_mode only"),
        (["enable_hpu_graphs=1", "device=cuda"], "with device=hpu and hpu.lazy_mode only"),
        (["hpu.lazy_mode=1", "device=cpu"], "no effect but on device=hpu"),
        (["hpu.recipe_cache_path=/tmp/cache", "device=cuda"], "no effect but on device=hpu"),
        (["hpu.recipe_cache_size=9"], "set hpu.recipe_cache_path"),
        (["ppo.kl_target=3"], "set ppo.kl_controller=adaptive"),
        (["ppo.kl_horizon=3"], "set ppo.kl_controller=adaptive"),
        (["ema.decay=0.9"], "set ema.enabled"),
        (["lora.alpha=2"], "set lora.dim"),
        (["lora.actor_lr=1e-3"], "set lora.dim"),
        (["lora.critic_lr=1e-3"], "set lora.dim"),
        (["pretraining.coefficient=1"], "set pretraining.path"),
        (["pretraining.column=body"], "set pretraining.path"),
        (["pretraining.max_tokens=9"], "set pretraining.path"),
        (["reward.function_weight=2"], "set reward.function"),
        *(
            ([f"reward.{flag}", "reward.model_weight=0", "reward.function=mine:score"], "a weight")
            for flag in ("model_path=/rm", "score_at=end")
        ),
        (["optimizer.grad_accum_dtype=fp32", "dtype=fp32"], "gradients are fp32 anyway"),
    ],
)
def test_contradiction(flags: list[str], said: str) -> None:
    (problem,) = problems(*flags)
    assert said in problem
    for flag in flags:
        name = flag.partition("=")[0]
        assert name + " = " in problem or name in ("actor.zero_stage", "reward.function")


@pytest.mark.parametrize(
    "flags",
    [
        ["slurm.mem=0"],
        ["slurm.gres_type=HL-225"],
        ["slurm.gres_type=HL-225", "device=cpu", "slurm.gres_name=gpu"],
        ["slurm.mail_type=END", "slurm.mail_user=me"],
        ["hpz.enabled_actor=1", "actor.zero_stage=3"],
        ["optimizer.offload=1"],
        ["reference.offload=1", "lora.dim=8"],
        ["container.kind=docker", "container.image=x", "container.mounts=/a:/b"],
        ["only_optimize_lora=1", "lora.dim=8"],
        ["dataset.path=/a /b", "dataset.weights=1 2"],
        ["generation.min_new_tokens=8", "generation.max_new_tokens=8"],
        ["hybrid_engine=1", "device=cuda"],
        ["hybrid_engine=1", "device=hpu"],
        ["enable_hpu_graphs=1", "hpu.lazy_mode=1"],
        ["enable_hpu_graphs=0"],
        ["only_optimize_lora=0"],
        ["reward.score_at=end"],
        ["optimizer.grad_accum_dtype=fp32"],
        ["optimizer.grad_accum_dtype=bf16", "critic.zero_stage=0"],
        ["optimizer.grad_accum_dtype=bf16", "dtype=fp32"],
        ["reward.score_at=auto", "reward.model_weight=0", "reward.function=mine:score"],
        [
            "optimizer.grad_accum_dtype=fp32",
            "optimizer.offload=1",
            "actor.zero_stage=3",
            "critic.zero_stage=3",
        ],
        [
            "reference.offload=1",
            "only_optimize_lora=1",
            "lora.dim=8",
            "reference.model_path=/sft",
        ],
        ["reward.model_weight=0", "reward.function=mine:score"],
        ["reward.own_tokenizer=1", "reward.model_path=/rm"],
        ["evaluation.path=/a", "evaluation.prompts=9", "evaluation.interval=10"],
    ],
)
def test_what_goes_together(flags: list[str]) -> None:
    assert problems(*flags) == []


def test_what_the_hybrid_engine_goes_without() -> None:
    cuda = ("hybrid_engine=1", "device=cuda")
    assert problems(*cuda) == []
    assert "needs the actor's ZeRO < 3" in problems(*cuda, "actor.zero_stage=3")[0]
    assert "goes without LoRA" in problems(*cuda, "lora.dim=4")[0]


def test_several_contradictions_at_once() -> None:
    assert len(problems("gbs=33", "dataset.weights=1 2", "hpz.enabled_actor=1")) == 3


def test_a_setting_in_doubt_contradicts_nothing() -> None:
    (problem,) = problems("mbs=0", "gbs=33")
    assert problem.startswith("mbs = '0'")


def test_a_preset_may_foresee_a_reference_of_its_own(tmp_path: Path) -> None:
    preset = tmp_path / "small.yaml"
    preset.write_text("reference: {offload: true}\nlora: {dim: 8}\n")
    assert problems("only_optimize_lora=1", preset=str(preset)) == []
    asked = problems("only_optimize_lora=1", preset=str(preset), HL_REFERENCE_OFFLOAD="1")
    assert "takes no memory of its own" in asked[0]


def test_a_preset_may_foresee_lora(tmp_path: Path) -> None:
    assert problems(preset="bloom-1.1b-560m") == []
    assert "there is no LoRA" in problems(preset="bloom-1.1b-560m", HL_ONLY_OPTIMIZE_LORA="1")[0]
    assert problems("lora.dim=8", preset="bloom-1.1b-560m", HL_ONLY_OPTIMIZE_LORA="1") == []
