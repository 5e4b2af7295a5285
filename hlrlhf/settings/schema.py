"""Every setting of a run: the only list of them.

A setting's dotted name (``actor.learning_rate``) follows from where it stands below, and its
environment name (``HL_ACTOR_LEARNING_RATE``) from the dotted name, see `names`. The command-line
help, ``hlrlhf show``, the error texts and ``docs/settings.md`` are all made from these fields.

A field's ``unit`` stands in ``json_schema_extra``; a field without a default is mandatory.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints
from pydantic_core import PydanticCustomError

Device = Literal["hpu", "cuda", "cpu"]
ContainerKind = Literal["none", "apptainer", "pyxis", "docker"]


@dataclass(frozen=True)
class Allowed:
    """What a pattern allows, in words, for the error texts and the page of settings."""

    words: str


@dataclass(frozen=True)
class Place:
    """Says of a text that it names a file or a folder, and what that is to the run.

    Attributes:
        kind: what a run makes of it. Outputs and earlier runs are always paths: models and data may
            be names on the Hub, an image one in a registry, a template one on the search path, and
            a command one on PATH.
        shared: whether all nodes of a run have to see it.
        mounted: whether a container gets it, under its own path.
    """

    kind: Literal["output", "run", "model", "data", "image", "template", "command"]
    shared: bool = True
    mounted: bool = False


def _no_control(text: str) -> str:
    """Refuse control characters and line separators.

    A newline in a value that reaches a shell, an #SBATCH line or a path would start a line of
    its own, whatever the quoting.
    """
    if re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029]", text):
        raise PydanticCustomError("control", "must not hold control characters")
    return text


def _no_control_but_tab(text: str) -> str:
    _no_control(text.replace("\t", " "))
    return text


def _countable(number: int) -> int:
    """Refuse what is over 32 bits, in which Slurm counts; products then fit wherever they go."""
    if number >= 2**31:
        raise PydanticCustomError("countable", "must be at most 2147483647")
    return number


Text = Annotated[str, StringConstraints(min_length=1), AfterValidator(_no_control)]
Output = Annotated[Text, Place("output", mounted=True)]
Model = Annotated[Text, Place("model", mounted=True)]
Data = Annotated[Text, Place("data", mounted=True)]
# With newlines: it reaches settings.yaml and the trainer, never a script.
StopString = Annotated[str, StringConstraints(min_length=1)]
# The recipe cache's own setting is a list with commas.
NoComma = Annotated[str, StringConstraints(min_length=1, pattern=r"^[^\x00-\x1f\x7f,]*$")]
PythonName = Annotated[
    str,
    StringConstraints(pattern=r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*$"),
    Allowed("module:function"),
]
ShellLine = Annotated[str, AfterValidator(_no_control_but_tab)]
Tag = Annotated[
    str,
    StringConstraints(max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"),
    Allowed("up to 64 letters, digits, dots, dashes and underscores"),
]
SlurmTime = Annotated[
    str,
    StringConstraints(
        pattern=r"^(UNLIMITED|[0-9]+(:[0-9]{1,2}){0,2}|[0-9]+-[0-9]{1,2}(:[0-9]{1,2}){0,2})$"
    ),
    Allowed("minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S or UNLIMITED"),
]
SlurmMemory = Annotated[
    str,
    StringConstraints(pattern=r"^[0-9]+[KMGT]?$"),
    Allowed("a whole number, and K, M, G or T if not MB"),
]
Count = Annotated[int, Field(ge=0), AfterValidator(_countable)]
Positive = Annotated[int, Field(ge=1), AfterValidator(_countable)]
SignalLead = Annotated[int, Field(ge=1, le=65535)]  # Slurm keeps it in 16 bits
Rate = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
AtMostAYear = Annotated[float, Field(ge=0, le=525_600)]  # in minutes
Fraction = Annotated[float, Field(ge=0, lt=1)]
ZeroStage = Annotated[int, Field(ge=0, le=3)]
UpToOne = Annotated[float, Field(ge=0, le=1)]


def unit(name: str) -> dict[str, Any]:
    """The ``json_schema_extra`` that gives a field its unit."""
    return {"unit": name}


class Group(BaseModel):
    """Base of all groups of settings: frozen, no unknown names, no infinities."""

    model_config = ConfigDict(
        frozen=True,
        defer_build=True,
        extra="forbid",
        allow_inf_nan=False,
        # ``model_path`` is a setting, not one of pydantic's own attributes.
        protected_namespaces=(),
    )


class Trained(Group):
    """What actor and critic have in common."""

    model_path: Model
    learning_rate: Rate = Field(1e-5, description="Peak learning rate.")
    weight_decay: NonNegative = Field(0.0, description="AdamW weight decay, on matrices only.")
    dropout: Fraction = Field(
        0.0, description="Dropout while the model trains; refused where it has none."
    )
    cp_act: bool = Field(
        False, description="Activation checkpointing: less memory, more computation."
    )
    zero_stage: ZeroStage = Field(
        1,
        description="DeepSpeed ZeRO stage. In fp32 on one device 1 and 2 are 0, which takes less "
        "memory there, unless `optimizer.offload` is on.",
    )


class Actor(Trained):
    """The policy that is trained."""

    model_path: Model = Field(
        description="Actor checkpoint: a Hugging Face folder or Hub name; the reference is read "
        "from it too, unless `reference.model_path` is set."
    )
    tokenizer_path: Model | None = Field(
        None,
        description="The actor's tokenizer: a folder or Hub name; unset: the one in the actor's "
        "folder or, if it holds none, of the model that its config.json names in _name_or_path.",
    )


class Critic(Trained):
    """The value model that is trained."""

    model_path: Model = Field(
        description="Critic checkpoint: a DeepSpeed-Chat step-2 folder, or a Hugging Face "
        "sequence classifier with one label."
    )


class Reference(Group):
    """The frozen policy that the KL penalty is measured against."""

    model_path: Model | None = Field(
        None,
        description="Reference checkpoint, with the actor's tokenizer: name the policy that "
        "training once began with where the actor has been trained on; unset: the actor's.",
    )
    offload: bool = Field(
        False,
        description="Keep the reference in host memory and move it to the device only to score.",
    )


class Reward(Group):
    """What scores answers: a frozen model, a Python function, or the weighted sum of both."""

    model_path: Model | None = Field(
        None, description="Reward checkpoint, in the critic's formats; unset: the critic's."
    )
    model_weight: NonNegative = Field(
        1.0, description="Weight of the reward model's score; 0 loads no reward model."
    )
    own_tokenizer: bool = Field(
        False,
        description="Decode answers and encode them again with the reward model's tokenizer.",
    )
    score_at: Literal["auto", "end", "before_end"] = Field(
        "auto",
        description="Token at which the reward model is read: the answer's last one, its end "
        "token, or the one before its end token; auto: where the checkpoint learnt to be read, "
        "which is before the end token in step-2 folders of DeepSpeed-Chat other than Llama's.",
    )
    function: PythonName | None = Field(
        None,
        description="Python function, module:function, that takes prompts and answers (lists of "
        "text) and returns a score for each.",
    )
    function_weight: float = Field(1.0, description="Weight of the function's score.")
    normalize: bool = Field(
        False,
        description="Shift and scale scores by the mean and the standard deviation of all scores "
        "so far, before they are clipped.",
    )
    clip: Rate = Field(5.0, description="Scores are clipped to plus and minus this value.")
    missing_eos_penalty: NonNegative = Field(
        0.0,
        description="Subtracted from the clipped score of an answer that neither an end token nor "
        "a stop string ended.",
    )


class Lora(Group):
    """Low-rank adapters on the linear layers of actor and critic, whose own weights they freeze."""

    dim: Count = Field(0, description="Rank of the adapters; 0 trains without LoRA.")
    alpha: Rate = Field(
        1.0, description="Adapter outputs are scaled by alpha / dim; 1 is what step 3 has used."
    )
    actor_lr: Rate = Field(5e-4, description="Peak learning rate of the actor's adapters.")
    critic_lr: Rate = Field(5e-4, description="Peak learning rate of the critic's adapters.")


class Ema(Group):
    """A moving average of the actor's weights, saved beside it."""

    enabled: bool = Field(
        False,
        description="Average the actor's trained weights in fp32, and save the average as "
        "actor-ema. It takes 4 bytes for each trained parameter, shared by the devices.",
    )
    decay: Fraction = Field(0.992, description="Decay of the moving average per optimizer step.")


class Hpz(Group):
    """ZeRO++ secondary partition inside a node."""

    enabled_actor: bool = Field(
        False, description="hpZ for the actor: a second ZeRO-3 partition within each node."
    )
    enabled_critic: bool = Field(
        False, description="hpZ for the critic: a second ZeRO-3 partition within each node."
    )


class Dataset(Group):
    """Where prompts come from."""

    path: Annotated[list[Data], Field(min_length=1)] = Field(
        description="Prompt data: folders from save_to_disk, Hub names, JSON, JSONL, parquet or "
        "CSV files; several are blended."
    )
    weights: list[Rate] | None = Field(
        None,
        description="Share of each data set in the blend, one number per path; unset: all rows "
        "of all.",
    )
    split: Text = Field("train", description="Split to read where a data set has splits.")
    prompt_column: Text | None = Field(
        None,
        description="Column that holds the prompt; unset: `prompt`, else `messages`, else the "
        "`chosen` transcript.",
    )
    max_prompt_tokens: Positive = Field(
        256,
        description="Longer prompts are dropped, and counted.",
        json_schema_extra=unit("tokens"),
    )


class Generation(Group):
    """How answers are sampled."""

    max_new_tokens: Positive = Field(
        256, description="Longest answer.", json_schema_extra=unit("tokens")
    )
    min_new_tokens: Count = Field(
        0,
        description="Shortest answer: no end token or stop string ends one before. Log-probs are "
        "those of the whole policy.",
        json_schema_extra=unit("tokens"),
    )
    stop: list[StopString] = Field(
        [],
        description="Texts that end an answer as an end token does; the tokens up to the end of "
        "the first belong to the answer.",
    )
    temperature: Rate = Field(
        1.0, description="Sampling temperature; the same one scales policy and reference log-probs."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="Nucleus sampling: smallest set of tokens with this probability; 1 is off. "
        "Log-probs are those of the whole policy.",
    )
    top_k: Count = Field(
        0,
        description="Sample among the k likeliest tokens; 0 is off. Log-probs are those of the "
        "whole policy.",
    )
    decoder: Literal["own", "compiled", "generate"] = Field(
        "own",
        description="What samples: a loop of our own, whose cache is not copied at each token, "
        "which on processors goes on without the answers that have ended and elsewhere is captured "
        "as a graph; on processors also one whose step is compiled, which needs a C++ compiler and "
        "a minute or so at the first rollouts, and pays for small models; or transformers' "
        "generate. What does not fit the model is left for the next plainer one, with a warning. "
        "The hybrid engine and Optimum for Gaudi sample in their own way.",
    )
    fast_kernels: bool = Field(
        True,
        description="Let our own loop compute what takes most of a token's time by what is "
        "measured to be the fastest at the first rollout. Products of a few rows with large "
        "weights, in bf16 with all: torch's own, one from copies of the weights in another order, "
        "which take up as much memory as they do meanwhile, or a kernel that CXX or c++ compiles "
        "there. Attention to the tokens so far: torch's own, or such a kernel. On processors.",
    )


class Ppo(Group):
    """The PPO update."""

    epochs: Positive = Field(1, description="Passes over each rollout.")
    minibatches: Positive = Field(
        1,
        description="Optimizer steps of each pass, each on an equal part of the rollout; must "
        "divide the micro batches of a device.",
    )
    kl_coefficient: NonNegative = Field(
        0.1, description="Weight of the per-token KL penalty against the reference."
    )
    kl_controller: Literal["fixed", "adaptive"] = Field(
        "fixed",
        description="Whether the KL coefficient stays, or is drawn to where the KL divergence is "
        "`ppo.kl_target`.",
    )
    kl_target: Rate = Field(
        6.0,
        description="KL divergence that the adaptive controller aims at.",
        json_schema_extra=unit("nats per answer"),
    )
    kl_horizon: Positive = Field(
        10000,
        description="How slowly the adaptive controller moves.",
        json_schema_extra=unit("answers"),
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        "k1",
        description="Estimate of the KL divergence in the penalty: d, d²/2 or exp(-d) - 1 + d, "
        "where d = log p - log p_ref.",
    )
    clip_range: Rate = Field(0.2, description="Clip range of the policy ratio.")
    value_clip_range: Rate = Field(0.2, description="Clip range of the value update.")
    gamma: UpToOne = Field(1.0, description="Discount factor.")
    gae_lambda: UpToOne = Field(0.95, description="Lambda of generalised advantage estimation.")
    whiten_advantages: bool = Field(
        True, description="Shift and scale advantages to mean 0 and variance 1 over the rollout."
    )
    trim: bool = Field(
        True,
        description="Let rows of like length share a micro batch, as wide as its longest text, "
        "instead of computing on padding; off: all are as wide as the rollout, in its order.",
    )
    reuse_logprobs: bool = Field(
        True,
        description="Take the log-probs that a decoder recorded while it sampled, rather than run "
        "the actor on its own answers again; with one epoch, one minibatch and `actor.dropout` 0.",
    )
    reuse_values: bool = Field(
        True,
        description="Let the critic learn in the forward pass that gives its values, rather than "
        "in another one; with one epoch, one minibatch and `critic.dropout` 0.",
    )
    logprob_chunk: Count = Field(
        0,
        description="Compute logits for this many tokens of each answer at a time, for less "
        "memory, and under ZeRO 3 for more computation; 0: for all at once.",
        json_schema_extra=unit("tokens"),
    )


class Pretraining(Group):
    """A language-modelling loss beside the actor's, against forgetting (PPO-ptx)."""

    path: Data | None = Field(
        None,
        description="Texts to go on learning from, in the forms of `dataset.path`; unset: none.",
    )
    column: Text = Field("text", description="Column that holds the texts.")
    coefficient: NonNegative = Field(
        27.8, description="Weight of their mean loss per token beside the PPO loss."
    )
    max_tokens: Annotated[int, Field(ge=2)] = Field(
        256,
        description="Texts are joined, and cut into rows of this length.",
        json_schema_extra=unit("tokens"),
    )


class Evaluation(Group):
    """The actor on held-out prompts, while it trains."""

    interval: Count = Field(
        0,
        description="Evaluate the actor on held-out prompts every so many steps, before the first "
        "and after the last; 0 never does.",
        json_schema_extra=unit("steps"),
    )
    path: Data | None = Field(
        None,
        description="Held-out prompts, in the forms of dataset.path; unset: taken out of the "
        "training prompts.",
    )
    prompts: Positive = Field(
        64, description="Held-out prompts to evaluate on; of fewer, all. None of them trains."
    )


class Checkpoint(Group):
    """What a run goes on from when it has been interrupted, to the last bit.

    Its folders stand in the run directory's ``resume/``, or in that of ``checkpoint_path``.
    """

    interval: Count = Field(
        0,
        description="Save a checkpoint every so many steps; 0 goes by the time alone.",
        json_schema_extra=unit("steps"),
    )
    minutes: NonNegative = Field(
        30.0,
        description="Save a checkpoint when the last one, or the start, is so long ago; 0 goes by "
        "the steps alone. Where both are 0, only a warned run saves one, or keep_best does.",
        json_schema_extra=unit("minutes"),
    )
    keep: Positive = Field(2, description="Checkpoints to keep, the newest ones.")
    keep_best: bool = Field(
        False,
        description="Save a checkpoint after the evaluation with the highest reward so far, and "
        "keep it beside the newest.",
    )
    memory: NonNegative = Field(
        8.0,
        description="Host memory that a rank may copy its part of a checkpoint to, to train on "
        "while it is written; where the part is larger, training waits. 0 always waits.",
        json_schema_extra=unit("GB"),
    )


class Optimizer(Group):
    """AdamW, for actor and critic."""

    beta1: Fraction = Field(0.9, description="AdamW's first-moment decay.")
    beta2: Fraction = Field(0.95, description="AdamW's second-moment decay.")
    epsilon: Rate = Field(1e-8, description="AdamW's epsilon.")
    gradient_clipping: NonNegative = Field(
        1.0, description="Largest global gradient norm of each model; 0 is off."
    )
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Learning-rate schedule after the warm-up."
    )
    grad_accum_dtype: Literal["bf16", "fp32"] = Field(
        "bf16",
        description="Precision in which the gradients of micro batches and ranks are added up in "
        "bf16 runs. fp32 takes 4 bytes for each trained parameter, on every device with ZeRO 1, "
        "shared by the devices with 2 and 3.",
    )
    offload: bool = Field(False, description="Keep optimizer states in host memory (ZeRO-Offload).")


class Guard(Group):
    """What happens when a run's numbers go wrong, or it hangs."""

    max_skipped: Positive = Field(
        5,
        description="Stop after this many steps in a row whose loss, gradient or reward is not "
        "finite; each is skipped, and counted.",
        json_schema_extra=unit("steps"),
    )
    ratio: NonNegative = Field(
        0.5,
        description="Warn when the mean policy ratio is farther from 1 than this; 0 never does.",
    )
    kl: NonNegative = Field(
        50.0,
        description="Warn when the KL divergence from the reference is over this; 0 never does.",
        json_schema_extra=unit("nats per answer"),
    )
    entropy: NonNegative = Field(
        0.02,
        description="Warn when the entropy of the policy is under this; 0 never does.",
        json_schema_extra=unit("nats per token"),
    )
    hang: AtMostAYear = Field(
        60.0,
        description="End a run of which no step, evaluation or save has ended for so long, and say "
        "which ranks do not answer; 0 never does.",
        json_schema_extra=unit("minutes"),
    )


class Hpu(Group):
    """Intel Gaudi."""

    lazy_mode: bool = Field(
        False, description="Run in lazy mode (PT_HPU_LAZY_MODE=1) rather than eager mode."
    )
    # Each node's own.
    recipe_cache_path: Annotated[NoComma, Place("output", shared=False)] | None = Field(
        None,
        description="Folder on a node-local disk for compiled recipes, without a comma; unset: "
        "no cache.",
    )
    recipe_cache_size: Positive = Field(
        4096, description="Largest size of the recipe cache.", json_schema_extra=unit("MB")
    )


class Slurm(Group):
    """Directives of the batch script; each is left out when unset."""

    partition: Text | None = Field(None, description="--partition")
    account: Text | None = Field(None, description="--account")
    qos: Text | None = Field(None, description="--qos")
    time: SlurmTime | None = Field(
        None,
        description="--time: the limit after which Slurm ends the job.",
    )
    gres_name: Text | None = Field(
        "auto",
        description="Name in --gres; auto: hpu or gpu after the device, none on CPU; empty: no "
        "--gres.",
    )
    gres_type: Text | None = Field(
        None, description="Type in --gres, as in gpu:HL-225:8; needs a name."
    )
    constraint: Text | None = Field(None, description="--constraint")
    reservation: Text | None = Field(None, description="--reservation")
    exclude: Text | None = Field(None, description="--exclude: nodes to avoid.")
    nodelist: Text | None = Field(None, description="--nodelist: nodes to have.")
    exclusive: bool = Field(False, description="--exclusive: whole nodes.")
    mem: SlurmMemory | None = Field(None, description="--mem: memory per node; 0 is all of it.")
    mem_per_cpu: SlurmMemory | None = Field(None, description="--mem-per-cpu")
    mem_per_gpu: SlurmMemory | None = Field(None, description="--mem-per-gpu")
    cpus_per_task: Positive | None = Field(
        None, description="--cpus-per-task: cores of each rank, given to sbatch and srun."
    )
    mail_type: Text | None = Field(None, description="--mail-type")
    mail_user: Text | None = Field(None, description="--mail-user")
    comment: Text | None = Field(None, description="--comment")
    dependency: Text | None = Field(
        None, description="--dependency; a job whose dependency failed is ended, not kept."
    )
    requeue: bool = Field(
        False,
        description="Start the job again after a node failure, a preemption, or when it was warned "
        "of its end; it goes on from its last checkpoint. This or the next sets --requeue.",
    )
    requeue_on_failure: bool = Field(
        False,
        description="Start the job again also after a failure that may pass: a rank that was "
        "killed, or an error that is not the settings' or the data's.",
    )
    max_attempts: Positive = Field(
        10,
        description="Attempts of a job before its script does not start it again; nor does it when "
        "two in a row end after the same step, unless it was preempted.",
    )
    signal_lead: SignalLead | None = Field(
        None,
        description="Warn the run this long before its time limit, so that it finishes the step "
        "in hand, or gives it up while it still samples, and saves its state.",
        json_schema_extra=unit("seconds"),
    )
    extra: list[Text] = Field(
        [],
        description="Further directives, each as it stands after #SBATCH; none that a setting or "
        "the script itself gives.",
    )
    srun_args: list[Text] = Field(
        [], description="Further arguments of srun, one each; none that the script gives."
    )
    # Read where the script is made.
    template: Annotated[Text, Place("template", shared=False)] | None = Field(
        None, description="Site template, a path or a name on the search path; unset: ours."
    )


class Container(Group):
    """The container that each rank runs in."""

    kind: ContainerKind = Field("none", description="Container runtime.")
    image: Annotated[Text, Place("image")] | None = Field(
        None, description="Image: a file, a name or a URI."
    )
    mounts: list[Text] = Field(
        [],
        description="Further mounts, source:target; the run, the models and the data are mounted "
        "anyway.",
    )
    args: list[Text] = Field([], description="Further arguments of the runtime, one each.")


class Environment(Group):
    """The environment of each rank."""

    setup: list[ShellLine] = Field(
        [],
        description="Shell lines to run first on the first node, such as module load; the first "
        "that fails ends the job.",
    )
    python: Annotated[Text, Place("command")] = Field(
        "python3",
        description="Python that has hlrlhf[train]; with a container, the container's own.",
    )


class Settings(Group):
    """All settings of a run."""

    tag: Tag = Field(description="Name of the run; its directory has this name, its job too.")
    # A container gets the run's directory alone.
    base_out_path: Annotated[Text, Place("output")] = Field(
        description="Folder in which each run gets its directory."
    )
    num_nodes: Positive = Field(1, description="Nodes.")
    devices_per_node: Positive = Field(8, description="Devices, and so ranks, on each node.")
    device: Device = Field("hpu", description="What the ranks run on.")
    dtype: Literal["bf16", "fp32"] = Field(
        "bf16", description="Precision of the models; losses are always fp32."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(1, description="Seed of everything random.")
    mbs: Positive = Field(
        4, description="Micro batch on one device.", json_schema_extra=unit("rows")
    )
    gbs: Positive = Field(
        32,
        description="Global batch: prompts per rollout over all devices; devices times micro "
        "batch must divide it.",
        json_schema_extra=unit("rows"),
    )
    epochs: Positive = Field(1, description="Passes over the prompts.")
    run_steps: Count = Field(
        0, description="Stop after this many steps; 0 runs all.", json_schema_extra=unit("steps")
    )
    num_warmup_steps: Count = Field(
        100, description="Learning-rate warm-up.", json_schema_extra=unit("optimizer steps")
    )
    print_answers_interval: Count = Field(
        0,
        description="Print prompts and answers every so many steps; 0 never does.",
        json_schema_extra=unit("steps"),
    )
    save_interval: Count = Field(
        0,
        description="Save actor and critic every so many steps; 0 saves at the end only.",
        json_schema_extra=unit("steps"),
    )
    only_optimize_lora: bool = Field(
        False,
        description="With LoRA, train the adapters and the critic's head only; otherwise all "
        "weights train that have no adapter: embeddings, norms, biases and heads.",
    )
    hybrid_engine: bool = Field(
        False, description="Generate with DeepSpeed's hybrid engine, where it is supported."
    )
    enable_hpu_graphs: bool = Field(
        True, description="In lazy mode on Gaudi, run generation as HPU graphs."
    )
    master_port: Annotated[int, Field(ge=1024, le=65535)] = Field(
        29500,
        description="Rendezvous port on the first node; one that you set is kept or the job "
        "fails, the default gives way when it is taken.",
    )
    master_addr: Text | None = Field(
        None, description="Rendezvous address; unset: the job's first node."
    )
    network_interface: Text | None = Field(
        None, description="Network interface for the collectives; unset: they find their own."
    )
    tensorboard_path: Output | None = Field(
        None,
        description="TensorBoard folder, in which the run gets one of its own; unset: tensorboard/ "
        "in the run directory.",
    )
    # The batch script's shell writes it, outside of a container.
    log_file: Annotated[Text, Place("output")] | None = Field(
        None, description="Log of the ranks; unset: one file per attempt in the run directory."
    )
    checkpoint_path: Output | None = Field(
        None,
        description="Folder of saved models, in which the run gets one of its own; unset: "
        "checkpoints/ in the run directory.",
    )
    resume_from: Annotated[Text, Place("run", mounted=True)] | None = Field(
        None,
        description="An earlier run's directory, or one of its checkpoints, to begin from instead "
        "of the models' own weights: its steps count as done. gbs, lora.dim and only_optimize_lora "
        "must be its own; other settings may differ.",
    )
    actor: Actor
    critic: Critic
    reference: Reference = Field(default_factory=Reference)
    reward: Reward = Field(default_factory=Reward)
    lora: Lora = Field(default_factory=Lora)
    ema: Ema = Field(default_factory=Ema)
    hpz: Hpz = Field(default_factory=Hpz)
    dataset: Dataset
    generation: Generation = Field(default_factory=Generation)
    ppo: Ppo = Field(default_factory=Ppo)
    pretraining: Pretraining = Field(default_factory=Pretraining)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    guard: Guard = Field(default_factory=Guard)
    hpu: Hpu = Field(default_factory=Hpu)
    slurm: Slurm = Field(default_factory=Slurm)
    container: Container = Field(default_factory=Container)
    environment: Environment = Field(default_factory=Environment)

    @property
    def world_size(self) -> int:
        """Ranks of the run, one per device."""
        return self.num_nodes * self.devices_per_node

    @property
    def per_device_batch_size(self) -> int:
        """Rows of the global batch on one device."""
        return self.gbs // self.world_size

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro batches that make one device's part of the global batch."""
        return self.per_device_batch_size // self.mbs

    @property
    def adapters_only(self) -> bool:
        """Whether the models' own weights stay as they were, the critic's head excepted."""
        return self.only_optimize_lora and self.lora.dim > 0

    @property
    def shares_reference(self) -> bool:
        """Whether the actor, without its adapters, is the reference too."""
        return self.adapters_only and self.starts_at_reference

    @property
    def starts_at_reference(self) -> bool:
        """Whether actor and reference are read from one checkpoint."""
        return self.reference.model_path in (None, self.actor.model_path)

    @property
    def updates_once(self) -> bool:
        """Whether a rollout makes one optimizer step."""
        return self.ppo.epochs * self.ppo.minibatches == 1

    @property
    def trains_on_policy(self) -> bool:
        """Whether the actor learns from a rollout as the very policy that sampled it.

        It does in one optimizer step without dropout: PPO's ratio is then 1.
        """
        return self.updates_once and self.actor.dropout == 0

    @property
    def critic_learns_at_once(self) -> bool:
        """Whether the critic learns in the forward pass that gives its values."""
        return self.ppo.reuse_values and self.updates_once and self.critic.dropout == 0

    @property
    def gres_name(self) -> str | None:
        """The name to ask for in --gres, ``auto`` resolved; None asks for nothing."""
        if self.slurm.gres_name == "auto":
            return {"hpu": "hpu", "cuda": "gpu", "cpu": None}[self.device]
        return self.slurm.gres_name
