"""The whole training story on one page: prompts → rollout → experience → update, and again."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hlrlhf.settings import Settings
from hlrlhf.settings.schema import Actor, Critic
from hlrlhf.trainer import checkpoint, data, engine, hybrid, lora, models, ppo
from hlrlhf.trainer import experience as experiences
from hlrlhf.trainer import rollout as rollouts
from hlrlhf.trainer.device import Device
from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.evaluation import Evaluation
from hlrlhf.trainer.experience import Experience
from hlrlhf.trainer.metrics import Recorder, means
from hlrlhf.trainer.rollout import Rollout


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
    prompts = data.load_prompts(settings, tokenizer, device.torch)
    total_steps = settings.epochs * len(prompts.ids) // settings.gbs
    if settings.run_steps:
        total_steps = min(total_steps, settings.run_steps)
    if total_steps == 0:
        raise TrainerError(
            f"{len(prompts.ids)} prompts make no global batch of {settings.gbs} (HL_GBS) in "
            f"{settings.epochs} epochs (HL_EPOCHS)"
        )

    device.seed(settings.seed)
    updates = total_steps * settings.ppo.epochs
    actor, critic, reference, reward = _load(settings, tokenizer, device, updates)
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

    evaluation = Evaluation(prompts.held_out, sampling, settings, device)

    def evaluated(step: int) -> dict[str, float]:
        """The numbers of an evaluation after so many steps; none where none is due."""
        if not evaluation.due(step, total_steps):
            return {}
        found, records = evaluation(actor, reference, _scores(reward, settings))
        if recorder is not None:
            recorder.evaluation(step, found, records)
        return found

    rows = settings.per_device_batch_size
    complete = True
    for step in range(total_steps):
        rates = _learning_rates(actor, critic)
        batch = prompts.batch(step, settings.gbs)[rank * rows : (rank + 1) * rows]
        asked = [prompts.ids[i] for i in batch]
        if step < 2:  # the weights as loaded, and as the first update left them
            hybrid.check_first_tokens(actor, asked, sampling, settings, device)
        if step == 0:
            evaluated(0)
            began = time.perf_counter()
        clock = Clock(device)
        rollout = rollouts.generate(actor, asked, sampling, device)
        clock.lap("generate_seconds")
        experience = experiences.score(rollout, actor, critic, reference, reward, settings, device)
        clock.lap("score_seconds")
        losses = update(experience, actor, critic, settings, device)
        clock.lap("update_seconds")
        values = means(_totals(rollout, experience) | losses)
        values |= rates | _gradient_norms(actor, critic)
        if found := evaluated(step + 1):
            values |= found
            clock.lap("evaluate_seconds")
        values |= clock.laps

        # From one record to the next: nothing that a step costs is left out.
        values["seconds"] = time.perf_counter() - began
        began = time.perf_counter()
        values["samples_per_second"] = settings.gbs / values["seconds"]
        values["peak_memory_bytes"] = device.peak_memory()
        if recorder is not None:
            recorder.step(values)
            interval = settings.print_answers_interval
            aloud = interval > 0 and (step + 1) % interval == 0
            recorder.samples(_samples(rollout, experience, tokenizer), aloud=aloud)
        if step + 1 < total_steps and engine.agreed(warned(), device):
            complete = False
            break

    name = "final" if complete else f"step-{step + 1}"
    checkpoint.save_models(saved_models / name, actor, critic, tokenizer)
    if recorder is not None:
        print(recorder.close())
        print(f"actor and critic are in {saved_models / name}", flush=True)
    return complete


def update(
    experience: Experience, actor: Any, critic: Any, settings: Settings, device: Device
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """One optimizer step per PPO epoch on a rollout, gradients accumulated over micro batches.

    Returns:
        This rank's sums and weights of the losses, for `means`.
    """
    actor.train()
    critic.train()
    tokens = experience.answer_mask.sum().float()
    # Each token of the global batch counts the same, however rows are spread over micro batches and
    # ranks. DeepSpeed divides by the ranks, so that is taken back.
    share = settings.world_size / engine.summed(tokens.clone())
    sums = torch.zeros(3, device=device.torch)
    for _ in range(settings.ppo.epochs):
        # One model after the other, so that the gradients of one at a time take up memory.
        for micro in experience.micro_batches(settings.mbs):
            logprobs = actor(
                micro.sequences,
                micro.attention_mask,
                micro.answer_width,
                settings.generation.temperature,
            )
            loss, clipped = ppo.policy_loss(
                logprobs,
                micro.logprobs,
                micro.advantages,
                micro.answer_mask,
                settings.ppo.clip_range,
            )
            actor.backward(loss * share, scale_wrt_gas=False)
            actor.step()
            device.step_done()
            sums[0] += loss.detach()
            sums[1] += clipped
        for micro in experience.micro_batches(settings.mbs):
            values = critic(micro.sequences, micro.attention_mask, micro.answer_width)[:, :-1]
            loss = ppo.value_loss(
                values,
                micro.values,
                micro.returns,
                micro.answer_mask,
                settings.ppo.value_clip_range,
            )
            critic.backward(loss * share, scale_wrt_gas=False)
            critic.step()
            device.step_done()
            sums[2] += loss.detach()
    names = ("actor_loss", "clip_fraction", "critic_loss")
    return {name: (sums[i], tokens * settings.ppo.epochs) for i, name in enumerate(names)}


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
) -> tuple[Any, Any, Any, Any]:
    """Actor, critic, reference and reward model, as they start, each in its engine.

    Each is on the device before the next is read: the ranks of a node share its memory.
    """
    dtype = settings.dtype

    def checked(role: str, model: Any) -> Any:
        models.check_vocabulary(tokenizer, role, model)
        return model

    def trainable(role: str, own: Actor | Critic) -> Any:
        load = models.load_policy if isinstance(own, Actor) else models.load_scorer
        model = checked(role, load(own.model_path, dtype, own.dropout))
        if own.cp_act:
            model.inner.gradient_checkpointing_enable({"use_reentrant": False})
        if settings.lora.dim:
            lora.add_adapters(model, settings)
        return engine.trained(model, own, settings, device, updates)

    actor = trainable("actor", settings.actor)
    critic = trainable("critic", settings.critic)
    policy = checked("reference", models.load_policy(settings.actor.model_path, dtype, 0.0))
    reference = engine.frozen(policy, settings.actor.zero_stage, settings, device)
    reward_path = settings.reward.model_path or settings.critic.model_path
    scorer = checked("reward model", models.load_scorer(reward_path, dtype, 0.0))
    reward = engine.frozen(scorer, settings.critic.zero_stage, settings, device)
    return actor, critic, reference, reward


def _scores(reward: Any, settings: Settings) -> Callable[[Rollout], torch.Tensor]:
    """What gives a rollout's scores, [b]: the reward model's, where each answer ends."""

    def scores(rollout: Rollout) -> torch.Tensor:
        rows = (rollout.sequences, rollout.attention_mask, rollout.lengths)
        parts = zip(*(torch.split(part, settings.mbs) for part in rows), strict=True)
        return torch.cat(
            [
                reward(sequences, mask, rollout.answer_width).gather(-1, last[:, None]).squeeze(-1)
                for sequences, mask, last in parts
            ]
        )

    return scores


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
