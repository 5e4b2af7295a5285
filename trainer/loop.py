"""The whole training story on one page: prompts → rollout → experience → update, and again."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hlrlhf.runs import Attempt
from hlrlhf.settings import Settings
from hlrlhf.settings.schema import Actor, Critic
from hlrlhf.trainer import flops, formulas, lengths, measures, paths, ranks
from hlrlhf.trainer.data import reading
from hlrlhf.trainer.decoding import hybrid
from hlrlhf.trainer.device import Device
from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.metrics import Recorder, means
from hlrlhf.trainer.models import ema, engine, forwards, frozen, loading, lora, tokenizers
from hlrlhf.trainer.ppo import agreement, pretraining
from hlrlhf.trainer.ppo import experience as experiences
from hlrlhf.trainer.ppo import rollout as rollouts
from hlrlhf.trainer.ppo.agreement import Witness
from hlrlhf.trainer.ppo.evaluation import Evaluation
from hlrlhf.trainer.ppo.guards import Guard
from hlrlhf.trainer.ppo.rewards import Rewards, check_rewards, load_rewards
from hlrlhf.trainer.ppo.update import update
from hlrlhf.trainer.saving import export


def train(
    settings: Settings, attempt: Attempt, device: Device, warnings: Callable[[], int]
) -> bool:
    """Train actor and critic, and save them.

    Args:
        settings: of the run.
        attempt: at the run.
        device: this rank's.
        warnings: how often this rank has been asked to stop early.

    Returns:
        Whether the run is complete; False when it stopped after a warning, models saved.

    Raises:
        TrainerError: the models or the data do not allow it.
    """
    rank, run = dist.get_rank(), attempt.run.directory
    paths.check_paths(settings)
    hybrid.check(settings)
    tokenizer = tokenizers.actor_tokenizer(settings)
    check_rewards(settings, tokenizer)
    frozen.check_reference(settings, tokenizer)
    prompts = reading.load_prompts(settings, tokenizer, device.torch)
    lengths.check_lengths(settings, prompts)
    mix = pretraining.load_mix(settings, tokenizer, device)
    total_steps = settings.epochs * len(prompts.ids) // settings.gbs
    if settings.run_steps:
        total_steps = min(total_steps, settings.run_steps)
    if total_steps == 0:
        raise TrainerError(
            f"{len(prompts.ids)} prompts make no global batch of {settings.gbs} (HL_GBS) in "
            f"{settings.epochs} epochs (HL_EPOCHS)"
        )

    device.seed(settings.seed)
    updates = total_steps * settings.ppo.epochs * settings.ppo.minibatches
    actor, critic, reference, rewards = _load(settings, tokenizer, device, updates)
    average = ema.Average(actor, settings.ema.decay) if settings.ema.enabled else None
    end_tokens = tokenizers.end_tokens(actor.module, tokenizer)
    padding = end_tokens[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    sampling = rollouts.sampling(settings, tokenizer, end_tokens, padding, device)
    # From here on the ranks must differ: the same seed would sample the same answers.
    device.seed(settings.seed + rank)

    # Folders outside the run directory may be shared by runs, whose names differ.
    saved_models = attempt.run.checkpoints
    if settings.checkpoint_path:
        saved_models = Path(settings.checkpoint_path, run.name)
    recorder = None
    if rank == 0:
        board = attempt.run.tensorboard
        if settings.tensorboard_path:
            board = Path(settings.tensorboard_path, run.name)
        recorder = Recorder(attempt, board, total_steps)
        trained = {"actor": actor.module, "critic": critic.module}
        recorder.models({role: forwards.parameters(model) for role, model in trained.items()})
        print(f"{total_steps} steps of {settings.gbs} prompts on {settings.world_size} ranks")

    kl = formulas.KlController(
        settings.ppo.kl_coefficient,
        settings.ppo.kl_target if settings.ppo.kl_controller == "adaptive" else None,
        settings.ppo.kl_horizon,
    )
    guard = Guard(settings, attempt, device)
    costs = (flops.cost(actor.module), flops.cost(critic.module), rewards.cost)
    evaluation = Evaluation(prompts.held_out, sampling, settings, device)

    def evaluated(step: int) -> dict[str, float]:
        """The numbers of an evaluation after so many steps; none where none is due."""
        if not evaluation.due(step, total_steps):
            return {}
        found, records = evaluation(actor, reference, rewards.scores)
        if recorder is not None:
            recorder.evaluation(step, found, records)
        return found

    def save(folder: Path) -> None:
        export.save_models(folder, actor, critic, tokenizer, attempt, average)

    complete = True
    for step in range(total_steps):
        rates = measures.learning_rates(actor, critic)
        # 1. Take the step's prompts: in turn, so that a part of each rank's rows is a part of the
        # global batch's, in order.
        batch = prompts.batch(step, settings.gbs)[rank :: settings.world_size]
        asked = [prompts.ids[i] for i in batch]
        if step == 0:
            evaluated(0)
            began = time.perf_counter()
        clock = measures.Clock(device)
        # 2. Sample answers. The first show whether generation is the policy's own; those after the
        # first update, whether kernels with copies of the weights have learnt of it.
        witness = Witness(settings) if step < 1 + settings.hybrid_engine else None
        with hybrid.generating(settings):
            rollout = rollouts.generate(actor, asked, sampling, device, witness)
        if witness is not None:
            agreement.check(witness, actor, rollout, sampling, settings, device)
        clock.lap("generate_seconds")
        # 3. Score them: log-probs, values, rewards, advantages.
        experience = experiences.score(
            rollout, actor, critic, reference, rewards, settings, device, kl.coefficient
        )
        clock.lap("score_seconds")
        # 4. Update actor and critic, unless a number is not finite.
        totals = measures.totals(rollout, experience) | rewards.totals()
        if applied := guard.usable(experience):
            stats, applied = update(experience, actor, critic, mix, settings, device, average)
            totals |= stats
        guard.judge(step + 1, applied, experience)
        clock.lap("update_seconds")

        # 5. Measure, evaluate, record.
        values = means(totals) | rates | measures.gradient_norms(actor, critic)
        values["explained_variance"] = measures.explained_variance(experience)
        values["skipped_steps"] = guard.skipped
        values["kl_coefficient"] = kl.coefficient
        if applied:
            kl.update(values["kl"], settings.gbs)
        if found := evaluated(step + 1):
            values |= found
            clock.lap("evaluate_seconds")
        values |= clock.laps
        # From one record to the next: nothing that a step costs is left out.
        values["seconds"] = time.perf_counter() - began
        began = time.perf_counter()
        values |= measures.pace(rollout, costs, settings, values["seconds"])
        values["peak_memory_bytes"] = device.peak_memory()
        if recorder is not None:
            recorder.step(values)
            for warning in guard.warnings(values):
                recorder.warn(warning)
            interval = settings.print_answers_interval
            aloud = interval > 0 and (step + 1) % interval == 0
            recorder.samples(measures.samples(rollout, experience, tokenizer), aloud=aloud)
        # 6. Stop after a warning, or save and go on.
        if step + 1 < total_steps and ranks.agreed(warnings() > 0, device):
            complete = False
            break
        interval = settings.save_interval
        if interval and (step + 1) % interval == 0 and step + 1 < total_steps:
            export.save_if_possible(saved_models / f"step-{step + 1}", save)

    name = "final" if complete else f"step-{step + 1}"
    # One folder, unless the setting names another file system than the run directory's.
    folders = dict.fromkeys([saved_models / name, attempt.run.checkpoints / name])
    heard = warnings()
    place = export.save_at_last([*folders], save, lambda: ranks.agreed(warnings() > heard, device))
    if recorder is not None:
        print(recorder.close())
        print(f"actor and critic are in {place}", flush=True)
    return complete


def _load(
    settings: Settings, tokenizer: Any, device: Device, updates: int
) -> tuple[Any, Any, frozen.Copy, Rewards]:
    """Actor, critic and reference, as they start, each in its engine; and what scores answers.

    Each is on the device before the next is read: the ranks of a node share its memory.
    """

    def prepared(role: str, own: Actor | Critic) -> Any:
        if isinstance(own, Actor):
            chunk = settings.ppo.logprob_chunk
            model: Any = loading.load_policy(own.model_path, settings.dtype, own.dropout, chunk)
        else:
            model = loading.load_scorer(own.model_path, settings.dtype, own.dropout)
        tokenizers.check_vocabulary(tokenizer, role, model)
        if own.cp_act:
            model.inner.gradient_checkpointing_enable({"use_reentrant": False})
        if settings.lora.dim:
            lora.add_adapters(model, settings)
        return model

    policy = prepared("actor", settings.actor)
    actor = engine.trained(policy, settings.actor, settings, device, updates)
    scorer = prepared("critic", settings.critic)
    first_head = copy.deepcopy(scorer.head)
    critic = engine.trained(scorer, settings.critic, settings, device, updates)
    reference = frozen.reference(settings, tokenizer, actor, device)
    rewards = load_rewards(settings, tokenizer, critic, first_head, device)
    return actor, critic, reference, rewards
