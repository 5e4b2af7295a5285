"""Settings that do not go together."""

from __future__ import annotations

import json
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
        (["generation.decoder=compiled", "device=cuda"], "compiled on processors"),
        (["generation.decoder=generate", "generation.fast_kernels=1"], "our own loop"),
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
        (["ppo.reuse_logprobs=1", "ppo.epochs=2"], "log-probs have to be computed"),
        (["ppo.reuse_logprobs=1", "actor.dropout=0.1"], "log-probs have to be computed"),
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


def extra(line: str) -> list[str]:
    return problems(f"slurm.extra={json.dumps([line])}")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--job-name=mine", "'--job-name=mine': set tag"),
        ("-J mine", "'-J': set tag"),
        ("--nodes=2", "set num_nodes"),
        ("--ntasks=2", "set num_nodes and devices_per_node"),
        ("--tasks-per-node=2", "set devices_per_node"),
        ("--gres=gpu:1", "slurm.gres_type and devices_per_node"),
        *(
            (f"--{option}=x", f"'--{option}=x': set slurm.{option.replace('-', '_')}")
            for option in (
                *("partition", "account", "qos", "time", "constraint", "reservation", "exclude"),
                *("nodelist", "mem", "mem-per-cpu", "mem-per-gpu", "cpus-per-task", "mail-type"),
                *("mail-user", "comment", "dependency"),
            )
        ),
        ("--exclusive", "set slurm.exclusive"),
        ("--requeue", "set slurm.requeue"),
        ("--no-requeue", "set slurm.requeue"),
        ("--kill-on-invalid-dep=no", "it comes with slurm.dependency"),
        ("--signal=B:USR1@60", "set slurm.signal_lead"),
        ("--chdir=/tmp", "the run's directory depends on it"),
        ("--open-mode=truncate", "the run's directory depends on it"),
        ("--array=0-3", "two trainers would share its directory; submit once for each"),
        ("--wrap=true", "the script is hlrlhf's"),
        ("--test-only", "call hlrlhf submit --test-only"),
        ("--parsable", "hlrlhf gives it itself"),
        ("--wait", "call hlrlhf submit --wait"),
        # As getopt_long reads them.
        ("--switches=1 --output=x", "'--output=x': the run's directory"),
        ("--output x", "'--output': the run's directory"),
        ("-ox", "'-ox': the run's directory"),
        ("-HJname", "'-HJname': set tag"),
        ("-sHvW", "'-sHvW': call hlrlhf submit --wait"),
        ("--out=x", "'--out=x': write the option out"),
        ("--arr=0-3", "'--arr=0-3': write the option out"),
        # As sbatch splits a line.
        ('"--output=x"', "'--output=x': the run's directory"),
        ("--licenses='a b' '--out'put=x", "'--output=x': the run's directory"),
        (r"'--licenses=a\' b' --output=x", "'--output=x': the run's directory"),
        (r"\--output=x", "'--output=x': the run's directory"),
        ("--licenses='a", "a quote is not closed"),
        # What is no option.
        ("hetjob", "not a heterogeneous one"),
        ("--nice PackJob", "not a heterogeneous one"),
        ("switches=1", "'switches=1' is neither an option nor the value of one"),
        ("--nice=5 5", "'5' is neither"),
        ("-- --hold", "'--' is neither"),
    ],
)
def test_a_directive_that_the_script_says_itself(line: str, said: str) -> None:
    (problem,) = extra(line)
    assert problem.startswith("slurm.extra = [")
    assert "(flag --set): " in problem
    assert said in problem


@pytest.mark.parametrize("letter", "JNncpAqtCxwdDoea")
def test_a_short_directive_that_the_script_says_itself(letter: str) -> None:
    assert len(extra(f"-{letter} x")) == len(extra(f"-{letter}x")) == 1


@pytest.mark.parametrize(
    "line",
    [
        *("--switches=1@10", "--licenses=a:1", "-L a", "-La:Job", "--nice", "--nice=100", "-H"),
        *("--begin=now+1hour", "--hold", "--export=ALL,A=1", "--gpus=8", "--gpus-per-task=1"),
        *("-G 8", "--clusters=main", "-Mmain", "--propagate", "--mem-bind=local", "--hint=x"),
        *("--time-min=10", "--deadline=now+1day", "--wckey=a", "--get-user-env", "--prefer=a"),
        *("--exclu-sive-in-some-newer-slurm", "-koff", "-sHv --switches 1 -L a"),
        "--licenses='a --output=x'",
        r"--licenses=a\ --output=x",
        "--nice # --output=x",
        "--exclusive=user",
    ],
)
def test_directives_that_only_a_site_knows(line: str) -> None:
    assert extra(line) == []


def test_a_site_gives_all_of_gres_where_the_script_gives_none() -> None:
    line = "slurm.extra=['--gres=gpu:8,tmpfs:100G']"
    assert problems(line)
    assert problems(line, "slurm.gres_name=") == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes=1"], "set num_nodes"),
        (["-n", "3"], "set num_nodes and devices_per_node"),
        (["--ntasks-per-node=1"], "set devices_per_node"),
        (["-c4"], "set slurm.cpus_per_task"),
        (["--output=x"], "set log_file"),
        (["-lo", "x"], "set log_file"),
        (["-e", "x"], "set log_file"),
        (["--chdir=/tmp"], "the run's directory"),
        (["--export=NONE"], "the script gives it itself"),
        (["-K0"], "the script gives it itself"),
        (["--multi-prog"], "the script gives it itself"),
        (["--container-image=x"], "set container.kind=pyxis and container.image"),
        (["--container-mounts=/a:/b"], "set container.mounts"),
        (["--container-work=/"], "write the option out"),
        (["--label", "hostname", "true"], "'true' is neither an option nor the value of one"),
    ],
)
def test_an_argument_that_the_script_gives_srun_itself(words: list[str], said: str) -> None:
    (problem,) = problems(f"slurm.srun_args={json.dumps(words)}")
    assert problem.startswith("slurm.srun_args = [")
    assert said in problem


def test_arguments_of_srun_that_only_a_site_knows() -> None:
    words = ["--mpi", "none", "--cpu-bind=cores", "-lW30", "--container=a", "--gpus-per-task=1"]
    assert problems(f"slurm.srun_args={json.dumps(words)}") == []


def test_every_wrong_directive_is_named() -> None:
    assert len(problems("slurm.extra=['--output=x -J y', '--array=1']")) == 3


def test_pyxis_arguments_are_sruns() -> None:
    image = ("container.image=x", "container.kind=pyxis")
    (problem,) = problems(*image, "container.args=--nodes=5")
    assert "container.args = ['--nodes=5'] (flag --set)" in problem
    assert "set num_nodes" in problem
    # srun would run it instead of the trainer.
    assert "neither an option" in problems(*image, "container.args=touch")[0]
    assert problems(*image, "container.args=--container-mount-home") == []
    assert problems("container.image=x", "container.kind=docker", "container.args=-e NAME") == []


def test_numbers_that_are_too_large_to_count_with() -> None:
    """Python writes no number of more than 4300 digits, which their product would be."""
    for huge in ("2147483648", "9" * 4000):
        both = problems(f"num_nodes={huge}", f"devices_per_node={huge}")
        assert all("must be at most 2147483647" in problem for problem in both)
        assert len(both) == 2


def test_a_large_batch_that_no_minibatches_divide_is_told_at_once() -> None:
    flags = ("gbs=2147483646", "mbs=1", "devices_per_node=1", "ppo.minibatches=4")
    assert "can make 1, 2, 3, 6, 7, 9, " in problems(*flags)[0]
