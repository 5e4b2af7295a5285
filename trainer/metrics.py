"""What a run says of itself: a line per step in three forms, and samples of its answers."""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hlrlhf.runs import Attempt
from hlrlhf.trainer.models.forwards import Parameters
from hlrlhf.trainer.ranks import summed
from hlrlhf.trainer.records import Board, Lines, put, warn

# Shown on the line of a step; metrics.jsonl and TensorBoard have all.
SHOWN = ("reward", "kl", "length", "actor_loss", "critic_loss")


def means(totals: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Means over all ranks, each with its own weights; all ranks have to call it.

    Args:
        totals: for each name this rank's weighted sum and its sum of weights, scalars.
    """
    pairs = summed(
        torch.stack([torch.stack([part.float() for part in v]) for v in totals.values()])
    )
    return {
        name: total / weight if weight else 0.0
        for name, (total, weight) in zip(totals, pairs.tolist(), strict=True)
    }


class Recorder:
    """Writes the lines of metrics, samples and evaluations, TensorBoard files, and the progress.

    On a terminal the progress is a bar, elsewhere a plain line per step. The files of all attempts
    read as one run: what an earlier one recorded of steps that are done again is dropped. What
    cannot be written is a warning, see `hlrlhf.trainer.records`. Rank 0 only.

    Args:
        attempt: at the run, whose directory gets the files; an older one than the newest stops
            before it writes, see `Attempt.check`.
        tensorboard: folder of the event files.
        total_steps: of the whole run.
        done: steps of earlier attempts that this one goes on from; None where it begins anew.
    """

    def __init__(
        self, attempt: Attempt, tensorboard: Path, total_steps: int, done: int | None = None
    ):
        run = attempt.run
        self._attempt = attempt
        self._parameters = run.parameters
        self._metrics = Lines(run.metrics)
        self._samples = Lines(run.samples)
        self._evaluations = Lines(run.evaluations)
        self._board = Board(tensorboard, run.directory, 0 if done is None else done + 1)
        self._total = total_steps
        self._first = self._steps = done or 0
        attempt.check()
        for file in (self._metrics, self._samples, self._evaluations):
            file.keep(done)
        rewards = (record.get("reward") for record in self._metrics.records())
        self._rewards = [reward for reward in rewards if reward is not None]
        self._began = time.perf_counter()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=self._first, unit="step")

    def models(self, trained: dict[str, Parameters]) -> None:
        """Record and print how many parameters train, by the model's role."""
        self._attempt.check()
        record = {role: parameters._asdict() for role, parameters in trained.items()}
        put(self._parameters, json.dumps(record, indent=2) + "\n")
        for role, (trainable, total) in trained.items():
            print(f"{role}: {trainable:,} of {total:,} parameters train")

    def step(self, values: dict[str, float]) -> None:
        """Record the next step.

        Args:
            values: of all ranks together; ``reward`` and ``seconds`` are among them. What is no
                number is written as null.
        """
        self._attempt.check()
        self._steps += 1
        step = self._steps
        if math.isfinite(values["reward"]):
            self._rewards.append(values["reward"])
        passed = time.perf_counter() - self._began
        left = passed / (step - self._first) * (self._total - step)
        self._metrics.write([self._head(step) | values | {"seconds_left": left}])
        self._board.scalars(values, step)
        shown = "  ".join(f"{name} {values[name]:.4g}" for name in SHOWN if name in values)
        if self._bar is not None:
            self._bar.set_postfix_str(shown)
            self._bar.update()
        else:
            ends = timedelta(seconds=round(left))
            print(
                f"step {step}/{self._total}  {shown}  {values['seconds']:.2f} s/step  {ends} left",
                flush=True,
            )

    def samples(self, records: list[dict[str, Any]], *, aloud: bool) -> None:
        """Record prompts with their answers, and print them too when `aloud`."""
        head = {"step": self._steps, "attempt": self._attempt.number}
        self._samples.write(head | record for record in records)
        if aloud:
            for record in records:
                tqdm.write(
                    f"prompt: {record['prompt']!r}\nanswer: {record['answer']!r}\n"
                    f"score: {record['score']:.4g}",
                    file=sys.stdout,
                )

    def warn(self, words: str) -> None:
        """Say that something looks wrong with the last step."""
        warn(f"step {self._steps}: {words}")

    def evaluation(
        self, step: int, values: dict[str, float], records: list[dict[str, Any]]
    ) -> None:
        """Record the answers of an evaluation, and print its numbers.

        Args:
            step: steps before it. The numbers belong to that step's, in whose line they still come
                where an earlier attempt did it; without one they make a line of their own.
            values: see `hlrlhf.trainer.ppo.evaluation`.
            records: one for each prompt.
        """
        self._attempt.check()
        head = {"step": step, "attempt": self._attempt.number}
        if step == self._steps:
            self._metrics.complete(self._head(step), values)
            self._board.scalars(values, step)
            # It may have been done before, and no checkpoint have it.
            self._evaluations.keep(step - 1)
        self._evaluations.write(head | record for record in records)
        shown = {name.removeprefix("evaluation_"): f"{value:.4g}" for name, value in values.items()}
        words = "  ".join(f"{name} {value}" for name, value in shown.items())
        when = f"after step {step}" if step else "before the first step"
        tqdm.write(f"evaluation {when}  {words}", file=sys.stdout)

    def close(self) -> str:
        """End the bar and the records; returns a sentence on how the reward moved."""
        if self._bar is not None:
            self._bar.close()
        for file in (self._metrics, self._samples, self._evaluations, self._board):
            file.close()
        if not self._rewards:
            return "no step had a reward that is a number"
        tenth = max(1, len(self._rewards) // 10)
        first = statistics.fmean(self._rewards[:tenth])
        last = statistics.fmean(self._rewards[-tenth:])
        span = "step" if tenth == 1 else f"{tenth} steps"
        return (
            f"mean reward {first:.3f} over the first {span}, {last:.3f} over the last {span} "
            f"({last - first:+.3f})"
        )

    def _head(self, step: int) -> dict[str, int]:
        return {"step": step, "total_steps": self._total, "attempt": self._attempt.number}
