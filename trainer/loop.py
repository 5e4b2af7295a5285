"""The whole training story on one page: prompts → rollout → experience → update, and again."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hlrlhf.settings import Settings
from hlrlhf.settings.schema import Actor, Critic
from hlrlhf.trainer import (
    checkpoint,
    data,
    ema,
    engine,
    flops,
    frozen,
    hybrid,
    lora,
    models,
    ppo,
    pretraining,
)
from hlrlhf.trainer import experience as experiences
from hlrlhf.trainer import rollout as rollouts
from hlrlhf.trainer.device import Device
from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.evaluation import Evaluation
from hlrlhf.trainer.experience import Experience
from hlrlhf.trainer.flops import Cost
from hlrlhf.trainer.guards import Guard
from hlrlhf.trainer.metrics import Recorder, means
from hlrlhf.trainer.rewards import Rewards, check_rewards, load_rewards
from hlrlhf.trainer.rollout import Rollout
from hlrlhf.trainer.update import update


def train(settings: Settings, run: Path, device: Device, warned: Callable[[], bool]) -> bool:
    """Train actor and critic, and save them.

    Args:
        settings: of the run.
        run: its directory, absolute.
        device: this rank's.
        warned: whether this rank has been asked to stop early.

    Returns:
        Whether the run is complete; False when it stopped after a warning, models saved.

    Raises:
        TrainerError: the models or the data do not allow it.
    """
    rank = dist.get_rank()
    hybrid.check(settings)
    tokenizer = models.load_tokenizer(settings.actor.model_path)
    check_rewards(settings, tokenizer)
    prompts = data.load_prompts(settings, tokenizer, device.torch)
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
    end_tokens = models.end_tokens(actor.module, tokenizer)
    padding = end_tokens[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    sampling = rollouts.sampling(settings, tokenizer, end_tokens, padding, device)
    # From here on the ranks must differ: the same seed would sample the same answers.
    device.seed(settings.seed + rank)

    # Folders outside the run directory may be shared by runs, whose names differ.
    saved_models = run / "checkpoints"
    if settings.checkpoint_path:
        saved_models = Path(settings.checkpoint_path, run.name)
    recorder = None
    if rank == 0:
        board = run / "tensorboard"
        if settings.tensorboard_path:
            board = Path(settings.tensorboard_path, run.name)
        recorder = Recorder(run, board, total_steps)
        print(f"{total_steps} steps of {settings.gbs} prompts on {settings.world_size} ranks")

    kl = ppo.KlController(
        settings.ppo.kl_coefficient,
        settings.ppo.kl_target if settings.ppo.kl_controller == "adaptive" else None,
        settings.ppo.kl_horizon,
    )
    guard = Guard(settings, run, device)
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

    complete = True
    for step in range(total_steps):
        rates = _learning_rates(actor, critic)
        # In turn, so that a part of each rank's rows is a part of the global batch's, in order.
        batch = prompts.batch(step, settings.gbs)[rank :: settings.world_size]
        asked = [prompts.ids[i] for i in batch]
        if step < 2:  # the weights as loaded, and as the first update left them
            hybrid.check_first_tokens(actor, asked, sampling, settings, device)
        if step == 0:
            evaluated(0)
            began = time.perf_counter()
        clock = Clock(device)
        rollout = rollouts.generate(actor, asked, sampling, device)
        clock.lap("generate_seconds")
        experience = experiences.score(
            rollout, actor, critic, reference, rewards, settings, device, kl.coefficient
        )
        clock.lap("score_seconds")
        totals = _totals(rollout, experience)
        if whole := guard.usable(experience):
            told, whole = update(experience, actor, critic, mix, settings, device, average)
            totals |= told
        guard.judge(step + 1, whole, experience)
        clock.lap("update_seconds")

        values = means(totals) | rates | _gradient_norms(actor, critic)
        values["explained_variance"] = _explained_variance(experience)
        values["skipped_steps"] = guard.skipped
        values["kl_coefficient"] = kl.coefficient
        if whole:
            kl.update(values["kl"], settings.gbs)
        if found := evaluated(step + 1):
            values |= found
            clock.lap("evaluate_seconds")
        values |= clock.laps
        tokens, operations = _work(rollout, costs, settings.ppo.epochs)
        # From one record to the next: nothing that a step costs is left out.
        values["seconds"] = time.perf_counter() - began
        began = time.perf_counter()
        values["samples_per_second"] = settings.gbs / values["seconds"]
        values["tokens_per_second"] = tokens / values["seconds"]
        on_device = operations / settings.world_size / 1e12
        values["tflops_per_device"] = on_device / values["seconds"]
        values["peak_memory_bytes"] = device.peak_memory()
        if recorder is not None:
            recorder.step(values)
            for warning in guard.warnings(values):
                recorder.warn(warning)
            interval = settings.print_answers_interval
            aloud = interval > 0 and (step + 1) % interval == 0
            recorder.samples(_samples(rollout, experience, tokenizer), aloud=aloud)
        if step + 1 < total_steps and engine.agreed(warned(), device):
            complete = False
            break
        interval = settings.save_interval
        if interval and (step + 1) % interval == 0 and step + 1 < total_steps:
            folder = saved_models / f"step-{step + 1}"
            checkpoint.save_models(folder, actor, critic, tokenizer, average)

    name = "final" if complete else f"step-{step + 1}"
    checkpoint.save_models(saved_models / name, actor, critic, tokenizer, average)
    if recorder is not None:
        print(recorder.close())
        print(f"actor and critic are in {saved_models / name}", flush=True)
    return complete


class Clock:
    """Seconds of each part of a step."""

    def __init__(self, device: Device):
        self._device = device
        self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """End the part that began with the last lap."""
        self._device.synchronize()
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now


def _load(
    settings: Settings, tokenizer: Any, device: Device, updates: int
) -> tuple[Any, Any, frozen.Copy, Rewards]:
    """Actor, critic and reference, as they start, each in its engine; and what scores answers.

    Each is on the device before the next is read: the ranks of a node share its memory.
    """

    def prepared(role: str, own: Actor | Critic) -> Any:
        if isinstance(own, Actor):
            chunk = settings.ppo.logprob_chunk
            model: Any = models.load_policy(own.model_path, settings.dtype, own.dropout, chunk)
        else:
            model = models.load_scorer(own.model_path, settings.dtype, own.dropout)
        models.check_vocabulary(tokenizer, role, model)
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


def _totals(
    rollout: Rollout, experience: Experience
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """This rank's sums and weights of what a rollout shows, for `means`."""
    mask = rollout.answer_mask
    rows = torch.tensor(len(mask), device=mask.device)
    tokens = mask.sum()
    kl = ppo.kl_estimate(experience.logprobs, experience.reference)
    return {
        "reward": (experience.scores.sum(), rows),
        # Of whole answers: the sum over tokens.
        "kl": (kl.sum(), rows),
        "length": (tokens, rows),
        "ended": (rollout.ended.sum(), rows),
        # The sampled estimate, in nats per token.
        "entropy": (-experience.logprobs.sum(), tokens),
        "value": ((experience.values * mask).sum(), tokens),
        "return": (experience.returns.sum(), tokens),
    }


def _work(rollout: Rollout, costs: tuple[Cost, Cost, Cost | None], epochs: int) -> list[float]:
    """Tokens of all ranks' sequences, and floating-point operations of the step."""
    answers = rollout.lengths
    prompts = rollout.attention_mask.sum(-1) - answers
    tokens = (prompts + answers).sum().float()
    both = torch.stack([tokens, flops.of_step(prompts, answers, *costs, epochs)])
    found: list[float] = engine.summed(both).tolist()
    return found


def _explained_variance(experience: Experience) -> float:
    """Of the returns by the values that the critic gave before the update, 1 at best."""
    both = torch.stack([experience.returns, experience.returns - experience.values])
    _, (returns, errors) = experiences.moments(both, experience.answer_mask)
    return 1 - float(errors / returns) if returns else 0.0


def _learning_rates(actor: Any, critic: Any) -> dict[str, float]:
    """Learning rates of the coming update, those of adapters apart."""
    rates = {}
    for role, trained in (("actor", actor), ("critic", critic)):
        for group in trained.optimizer.param_groups:
            kind = "lora_learning_rate" if group["name"] == "lora" else "learning_rate"
            rates[f"{role}_{kind}"] = group["lr"]
    return rates


def _gradient_norms(actor: Any, critic: Any) -> dict[str, float]:
    """Gradient norms of the last update, where DeepSpeed keeps them.

    It does not in fp32 without ZeRO.
    """
    norms = {}
    for role, trained in (("actor", actor), ("critic", critic)):
        if (norm := trained.get_global_grad_norm()) is not None:
            norms[f"{role}_gradient_norm"] = float(norm)
    return norms


def _samples(rollout: Rollout, experience: Experience, tokenizer: Any) -> list[dict[str, Any]]:
    """The first row of this rank's rollout."""
    # Picked out on the CPU: elsewhere, each length would be a shape to compile.
    tokens, mask = rollout.sequences[0].cpu(), rollout.attention_mask[0].bool().cpu()
    width = len(tokens) - rollout.answer_width
    prompt, answer = tokens[:width][mask[:width]], tokens[width:][mask[width:]]
    return [
        {
            "prompt": tokenizer.decode(prompt),
            "answer": tokenizer.decode(answer),
            "score": experience.scores[0].item(),
        }
    ]
