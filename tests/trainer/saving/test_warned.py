"""A run that is warned while it samples gives that up, and goes on as one that never was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
from ranks import read_lines
from test_resuming import TESTS, assert_same, ends

from hlrlhf.trainer.saving.checkpoint import Checkpoint
from hlrlhf.trainer.saving.retention import every

# Two rollouts to an evaluation, so that the second one can be warned.
CHANGES: dict[str, Any] = {
    "devices_per_node": 2,
    "run_steps": 2,
    "gbs": 8,
    "mbs": 4,
    "evaluation__prompts": 16,
    "evaluation__interval": 2,
    "checkpoint__interval": 10,
    "checkpoint__keep": 5,
    "generation__max_new_tokens": 4,
    "generation__top_k": 0,
    "actor__dropout": 0.1,
    "reward__function": "interrupted:score",
    "reward__model_weight": 0,
    "reward__normalize": True,
}
# What is given up, after which call of the reward function, and what is there afterwards: steps
# done, and those with numbers of an evaluation.
ATTEMPTS = {
    "the first evaluation": (1, 0, []),
    "the rollout of the second step": (3, 1, [0]),
    "the evaluation after the last step": (2, 2, [0]),
}


def rewards(directory: Path) -> dict[int, float | None]:
    """The mean reward of the evaluation, by step; None in a step without one."""
    path = directory / "metrics.jsonl"
    lines = read_lines(path) if path.exists() else []
    return {line["step"]: line.get("evaluation_reward") for line in lines}


@pytest.mark.slow
def test_one_rank_of_two_is_warned_in_every_kind_of_rollout(
    demo_models: Path, tmp_path: Path
) -> None:
    through, warned = tmp_path / "through", tmp_path / "warned"
    for directory in (through, warned):
        ranks.prepare(directory, demo_models, **CHANGES)
    run = ranks.train(through, 2, PYTHONPATH=TESTS)
    assert run.codes == [0, 0], run.output

    for attempt, (what, (call, done, evaluated)) in enumerate(ATTEMPTS.items()):
        own = {"HLRLHF_ATTEMPT": str(attempt), "INTERRUPT": f"{call}:1:sample", "PYTHONPATH": TESTS}
        run = ranks.train(warned, 2, **own)
        assert run.codes == [75, 75], (what, run.output)
        newest, *_ = every(warned / "resume")
        assert newest.name == f"step-{done}", what
        assert max(rewards(warned), default=0) == done, what
        assert [step for step, reward in rewards(warned).items() if reward] == evaluated, what
    run = ranks.train(warned, 2, HLRLHF_ATTEMPT="9", PYTHONPATH=TESTS)

    assert run.codes == [0, 0], run.output
    assert_same(ends(warned), ends(through))
    # The checkpoints have learnt of what came late, of which the best may be kept.
    for step in (0, 2):
        reward = Checkpoint.at(warned / "resume" / f"step-{step}").manifest["reward"]
        assert reward == rewards(through)[step]
