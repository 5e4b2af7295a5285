"""How good the actor is on prompts that never train, told apart from luck.

The prompts and the random numbers are the same each time, and all that a rollout draws comes from a
state of its own: a run trains the same with and without evaluations.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hlrlhf.settings import Settings
from hlrlhf.trainer.data.rows import Rows
from hlrlhf.trainer.decoding.decoder import Decoder
from hlrlhf.trainer.device import Device
from hlrlhf.trainer.models.forwards import Placed
from hlrlhf.trainer.models.frozen import Copy
from hlrlhf.trainer.ppo import rollout as rollouts
from hlrlhf.trainer.ppo.experience import answer_logprobs
from hlrlhf.trainer.ppo.rollout import Rollout
from hlrlhf.trainer.ranks import summed


@dataclass(frozen=True)
class Answers:
    """One answer to each held-out prompt, in the prompts' order, on every rank.

    Attributes:
        scores: [n], of the rewards.
        kl: [n], log-prob less that of the reference, of whole answers, in nats.
        ended: [n], 1 where an end token or a stop string ended the answer.
        tokens: of each answer.
    """

    scores: Tensor
    kl: Tensor
    ended: Tensor
    tokens: list[list[int]]

    @property
    def length(self) -> float:
        """Mean, in tokens."""
        return sum(map(len, self.tokens)) / len(self.tokens)


class Evaluation:
    """Evaluates an actor, when it is due.

    Args:
        prompts: token ids, the same on every rank; there are some if there is an interval.
        decoder: that of the run.
    """

    def __init__(self, prompts: Rows, decoder: Decoder, settings: Settings, device: Device):
        self._prompts = prompts
        self._decoder = decoder
        self._settings = settings
        self._device = device
        self._reference: Answers | None = None
        self._last = -1

    def due(self, step: int, total_steps: int) -> bool:
        """Whether the actor is to be evaluated after so many steps, and has not been."""
        interval = self._settings.evaluation.interval
        due = interval > 0 and (step == total_steps or step % interval == 0)
        return due and step > self._last

    def state(self) -> dict[str, Any]:
        """The step of the last evaluation; the reference's answers, and to what it gave them."""
        answers = self._reference
        if answers is None:
            return {"last": self._last}
        columns = {name: getattr(answers, name).tolist() for name in ("scores", "kl", "ended")}
        columns |= {"tokens": answers.tokens, "asked": self._asked()}
        return {"last": self._last, "reference": columns}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; the reference's answers to other questions are left alone."""
        self._last = state["last"]
        kept = state.get("reference")
        if kept is not None and kept["asked"] == self._asked():
            columns = {name: torch.tensor(kept[name]) for name in ("scores", "kl", "ended")}
            self._reference = Answers(**columns, tokens=kept["tokens"])

    def __call__(
        self, step: int, actor: Placed, reference: Copy, scores: Callable[[Rollout], Tensor]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Sample an answer to every prompt and score it; all ranks have to call it.

        The reference's answers are sampled once, from the same random numbers. Where the actor
        started from the reference's own checkpoint, they are the actor's at the first call, which
        therefore has to come before the first update.

        Args:
            step: steps before it.
            actor: the engine around the policy.
            reference: the policy that the KL penalty is measured against.
            scores: gives a rollout's scores, [b].

        Returns:
            The means, and a record for each prompt.

        Raises:
            Abandoned: see `rollout.generate`; it stays due.
        """
        answers = self._answer(actor, reference, scores)
        if self._reference is None:
            # The run may have gone on from one that had another evaluation, or none.
            same = step == 0 and self._settings.starts_at_reference
            self._reference = answers if same else self._answer(reference, reference, scores)
        self._last = step
        means = {
            "evaluation_reward": answers.scores.mean().item(),
            "evaluation_kl": answers.kl.mean().item(),
            "evaluation_length": answers.length,
            "evaluation_ended": answers.ended.mean().item(),
            "evaluation_reference_reward": self._reference.scores.mean().item(),
            "evaluation_reference_length": self._reference.length,
        }
        decode = self._decoder.sampling.tokenizer.decode
        records = [
            {
                "prompt": decode(prompt),
                "answer": decode(answers.tokens[i]),
                "score": answers.scores[i].item(),
                "reference_answer": decode(self._reference.tokens[i]),
                "reference_score": self._reference.scores[i].item(),
            }
            for i, prompt in enumerate(self._prompts)
        ]
        return means, records

    def _asked(self) -> str:
        """The digest of all that the reference's answers and their scores follow from."""
        settings = self._settings
        groups = (settings.generation, settings.reward, settings.reference)
        asked = [
            *(group.model_dump(mode="json") for group in groups),
            *(settings.seed, settings.dtype, settings.actor.model_path),
            *(settings.critic.model_path, list(self._prompts)),
        ]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    @torch.no_grad()
    def _answer(
        self, actor: Placed, reference: Copy, scores: Callable[[Rollout], Tensor]
    ) -> Answers:
        settings, device, rank = self._settings, self._device, dist.get_rank()
        # Every rank takes as many rows, so that no forward of a partitioned model is one rank's
        # alone; where there are not enough prompts, the first come again and are left out below.
        share = math.ceil(len(self._prompts) / settings.world_size)
        rows = range(rank * share, (rank + 1) * share)
        # All ranks' results, one row each, of which this rank fills its own.
        longest = settings.generation.max_new_tokens
        table = torch.zeros(share * settings.world_size, 4 + longest)
        with device.seeded(settings.seed + rank):
            for begin in range(0, share, settings.per_device_batch_size):
                batch = rows[begin : begin + settings.per_device_batch_size]
                asked = [self._prompts[row % len(self._prompts)] for row in batch]
                rollout = rollouts.generate(self._decoder, actor, asked)
                kl = self._kl(rollout, actor, reference)
                columns = (scores(rollout), kl, rollout.ended, rollout.lengths)
                results = torch.stack([column.float() for column in columns], dim=1)
                answers = rollout.sequences[:, -rollout.answer_width :][:, :longest]
                table[batch.start : batch.stop, :4] = results.cpu()
                # fp32 holds every token id up to 2^24.
                table[batch.start : batch.stop, 4 : 4 + answers.shape[1]] = answers.cpu().float()
        found = summed(table.to(device.torch)).cpu()[: len(self._prompts)]
        # Rows of their own: a mean over columns that lie apart adds up in another order.
        score, kl, ended = found[:, :3].T.contiguous()
        lengths = found[:, 3].int().tolist()
        return Answers(
            scores=score,
            kl=kl,
            ended=ended,
            tokens=[
                row[:length].int().tolist()
                for row, length in zip(found[:, 4:], lengths, strict=True)
            ],
        )

    def _kl(self, rollout: Rollout, actor: Placed, reference: Copy) -> Tensor:
        """[b], the sampled estimate of the KL to the reference, in nats per answer."""
        actor.module.eval()
        own = answer_logprobs(actor, rollout, self._settings, self._device)
        before = answer_logprobs(reference, rollout, self._settings, self._device)
        return torch.where(rollout.answer_mask, own - before, 0).sum(-1)
