"""The whole training story on one page: prompts → rollout → experience → update, and again."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto

import torch.distributed as dist

from hlrlhf.runs import Attempt
from hlrlhf.settings import Settings
from hlrlhf.trainer import flops, formulas, lengths, measures, paths, ranks
from hlrlhf.trainer.data import reading
from hlrlhf.trainer.deadline import Deadline
from hlrlhf.trainer.decoding import choice, hybrid
from hlrlhf.trainer.device import Device
from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.metrics import Recorder, means
from hlrlhf.trainer.models import forwards, frozen, roles, tokenizers
from hlrlhf.trainer.ppo import experience as experiences
from hlrlhf.trainer.ppo import pretraining
from hlrlhf.trainer.ppo import rollout as rollouts
from hlrlhf.trainer.ppo.agreement import Agreement
from hlrlhf.trainer.ppo.evaluation import Evaluation
from hlrlhf.trainer.ppo.guards import Guard
from hlrlhf.trainer.ppo.rewards import check_rewards, load_rewards
from hlrlhf.trainer.ppo.update import update
from hlrlhf.trainer.saving import export
from hlrlhf.trainer.saving.export import Exports
from hlrlhf.trainer.saving.keeping import Checkpoints
from hlrlhf.trainer.state import State


class End(Enum):
    """How a run ends that does not fail."""

    COMPLETE = auto()
    WARNED = auto()
    OUT_OF_TIME = auto()


def train(
    settings: Settings,
    attempt: Attempt,
    device: Device,
    warnings: Callable[[], int],
    alive: Callable[[], None],
) -> End:
    """Train actor and critic, and save them.

    Args:
        attempt: at the run.
        device: this rank's.
        warnings: how often this rank has been asked to stop early.
        alive: called at each end of a step, an evaluation or a save, where the ranks have just
            met: the run does not hang.

    Returns:
        How it ended: with its models saved, unless a checkpoint is and the run is started again.

    Raises:
        TrainerError: the models or the data do not allow it.
    """
    paths.check_paths(settings)
    hybrid.check(settings)
    tokenizer = tokenizers.actor_tokenizer(settings)
    check_rewards(settings, tokenizer)
    frozen.check_reference(settings, tokenizer)
    prompts = reading.load_prompts(settings, tokenizer, device.torch)
    lengths.check_lengths(settings, prompts)
    mix = pretraining.load_mix(settings, tokenizer, device)
    alive()
    total_steps = _total_steps(settings, prompts)
    rank = dist.get_rank()
    checkpoints = Checkpoints(settings, attempt)
    found = checkpoints.newest(total_steps)
    done = export.final(settings, attempt) if rank == 0 else None
    if found is not None and found.step >= total_steps and ranks.agreed(done is not None, device):
        if rank == 0:
            print(f"all {total_steps} steps are done, and actor and critic are in {done}")
        return End.COMPLETE

    device.seed(settings.seed)
    updates = total_steps * settings.ppo.epochs * settings.ppo.minibatches
    models = roles.load(settings, tokenizer, device, updates)
    rewards = load_rewards(settings, tokenizer, models)
    decoder = choice.decoder(
        settings, models.actor.module, tokenizer, device, lambda: warnings() > 0
    )
    # From here on the ranks must differ: the same seed would sample the same answers.
    device.seed(settings.seed + rank)
    kl = formulas.KlController(
        settings.ppo.kl_coefficient,
        settings.ppo.kl_target if settings.ppo.kl_controller == "adaptive" else None,
        settings.ppo.kl_horizon,
    )
    guard = Guard(settings, attempt, device)
    evaluation = Evaluation(prompts.held_out, decoder, settings, device)
    state = State(models, rewards, kl, mix, guard, decoder, evaluation)
    if found is not None:
        checkpoints.restore(state, found)
    ranks.meet(device)
    alive()

    exports = Exports(settings, models, tokenizer, attempt)
    engines = {"actor": models.actor, "critic": models.critic}
    trained = {role: forwards.parameters(engine.module) for role, engine in engines.items()}
    recorder = None
    if rank == 0:
        board = attempt.run.tensorboard
        if settings.tensorboard_path:
            board = attempt.run.within(settings.tensorboard_path)
        attempt.goes_on(state.step)
        recorder = Recorder(attempt, board, total_steps, found.step if found else None)
        recorder.models(trained)
        print(f"{total_steps} steps of {settings.gbs} prompts on {settings.world_size} ranks")
        if found is not None:
            print(f"{found.folder}: the run goes on after step {state.step}")

    def evaluated() -> dict[str, float]:
        """The numbers of an evaluation after the steps that are done; none where none is due.

        None either where a warning ended it: it stays due, for when the run goes on.
        """
        if not evaluation.due(state.step, total_steps):
            return {}
        try:
            numbers, records = evaluation(
                state.step, models.actor, models.reference, rewards.scores
            )
        except rollouts.Abandoned:
            return {}
        alive()
        if recorder is not None:
            recorder.evaluation(state.step, numbers, records)
        return numbers

    numbers = evaluated()
    if numbers and found is not None and checkpoints.on:
        # The checkpoint was saved without it.
        checkpoints.save(state, numbers["evaluation_reward"])
        ranks.meet(device)
        alive()
    agreement = Agreement(settings, device)
    pace = measures.Pace(
        settings, flops.cost(models.actor.module), flops.cost(models.critic.module), rewards.cost
    )
    clock = measures.Clock(device)
    warned = late = False
    deadline = Deadline(settings, attempt, [*trained.values()])
    while state.step < total_steps:
        # 1. Take the step's prompts: in turn, so that a part of each rank's rows is a part of the
        # global batch's, in order.
        clock.start()
        rates = measures.learning_rates(models)
        batch = prompts.batch(state.step, settings.gbs)[rank :: settings.world_size]
        # 2. Sample answers, the first ones in sight of a witness: they must be the policy's own.
        asked = [prompts.ids[i] for i in batch]
        try:
            with device.undrawn_on_error():
                rollout = agreement.rollout(decoder, models.actor, asked)
        except rollouts.Abandoned:  # after a warning: the step has not begun
            alive()
            break
        clock.lap("generate_seconds")
        # 3. Score them: log-probs, values, rewards, advantages. Where that is exact, the critic
        # learns from its values at once.
        learn = settings.critic_learns_at_once
        experience = experiences.score(rollout, models, rewards, settings, kl.coefficient, learn)
        clock.lap("score_seconds")
        # 4. Update actor and, if it has not learnt yet, critic, unless a number is not finite.
        totals = measures.totals(rollout, experience) | rewards.totals()
        if applied := guard.usable(experience):
            stats, applied = update(experience, models, mix, settings)
            totals |= stats
        guard.judge(state.step + 1, applied, experience)
        clock.lap("update_seconds")
        state.step += 1

        # 5. Measure, evaluate, record.
        values = means(totals) | rates | measures.of_update(models, experience)
        values |= {"skipped_steps": guard.skipped, "kl_coefficient": kl.coefficient}
        if applied:
            kl.update(values["kl"], settings.gbs)
        if numbers := evaluated():
            values |= numbers
            clock.lap("evaluate_seconds")
        values |= clock.step()
        values |= pace(rollout, values["seconds"])
        values["peak_memory_bytes"] = device.peak_memory()
        if recorder is not None:
            recorder.step(values)
            for warning in guard.warnings(values):
                recorder.warn(warning)
            interval = settings.print_answers_interval
            aloud = interval > 0 and state.step % interval == 0
            recorder.samples(measures.samples(rollout, experience, tokenizer), aloud=aloud)
        # 6. Stop after a warning, or save and go on.
        reward = numbers.get("evaluation_reward")
        wanted = rank == 0 and checkpoints.wanted(state.step, reward)
        late = deadline.near(values["seconds"], checkpoints.seconds)
        warned, late, save = ranks.votes([warnings() > 0, late, wanted], device)
        alive()
        if warned or late or state.step == total_steps:  # saved below
            break
        if save:
            clock.start()
            checkpoints.save(state, reward)
            clock.lap("checkpoint_seconds")
            ranks.meet(device)
            alive()
        exports.at(state.step)
        alive()

    complete = state.step >= total_steps and not evaluation.due(state.step, total_steps)
    heard = warnings()
    if checkpoints.on or not complete:
        checkpoints.save(state, numbers.get("evaluation_reward"), wait=True)
        ranks.meet(device)
        alive()

    def asked_to_stop() -> bool:
        """Whether any rank is, while they wait for room on a disk."""
        asked = ranks.agreed(warnings() > heard, device)
        alive()
        return asked

    # A run that is started again needs its state alone, and may have little time to save.
    again = not complete and settings.slurm.requeue and attempt.is_of_slurm
    place = None
    if not (again and checkpoints.has(state.step)):
        place = exports.last(export.FINAL if complete else f"step-{state.step}", asked_to_stop)
    if recorder is not None:
        print(recorder.close())
        if place is not None:
            print(f"actor and critic are in {place}", flush=True)
    if complete:
        return End.COMPLETE
    return End.OUT_OF_TIME if late and not warned else End.WARNED


def _total_steps(settings: Settings, prompts: reading.Prompts) -> int:
    steps = settings.epochs * len(prompts.ids) // settings.gbs
    if steps == 0:
        raise TrainerError(
            f"{len(prompts.ids)} prompts make no global batch of {settings.gbs} (HL_GBS) in "
            f"{settings.epochs} epochs (HL_EPOCHS)"
        )
    return min(steps, settings.run_steps) if settings.run_steps else steps
