"""A run that is killed and goes on ends as one that never was, to the last bit."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import ranks
from safetensors.torch import load_file
from same_numbers import records

STEPS, INTERVAL = 6, 2
TESTS = str(Path(__file__).parents[2])
# A call of the reward function in the third or fourth step.
THEN = 5
EVERYTHING = {
    "reward__function": "interrupted:score",  # draws random numbers
    "generation__top_k": 0,
    "ppo__kl_controller": "adaptive",
    "reward__normalize": True,
    "ppo__epochs": 2,
    "ppo__minibatches": 2,
    "mbs": 2,
    "evaluation__interval": 2,
    "evaluation__prompts": 8,
}
ZERO_3 = {"actor__zero_stage": 3, "critic__zero_stage": 3}
ADAPTERS = {"lora__dim": 4, "only_optimize_lora": True}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {"actor__dropout": 0.1, "ema__enabled": True}),
    "2 ranks": (2, {"critic__dropout": 0.1}),
    "ZeRO 1, adapters alone": (
        2,
        {"actor__zero_stage": 1, "critic__zero_stage": 1, "ema__enabled": True, **ADAPTERS},
    ),
    "ZeRO 3": (2, {"ema__enabled": True, **ZERO_3}),
    "bf16": (
        1,
        {
            "dtype": "bf16",
            "actor__zero_stage": 2,
            "critic__zero_stage": 1,
            # Two runs may each find another product the faster one, which rounds otherwise.
            "generation__fast_kernels": False,
        },
    ),
}


def prepare(directory: Path, models: Path, changes: dict[str, Any], count: int) -> None:
    """A run directory: prompts of two sets, and texts beside them."""
    ranks.prepare(directory, models)
    prompts = str(directory / "prompts.jsonl")
    texts = {"path": prompts, "column": "prompt", "max_tokens": 16}
    own = {
        "run_steps": STEPS,
        "checkpoint__interval": INTERVAL,
        "devices_per_node": count,
        "dataset__path": [prompts, str(models / "prompts" / "train.jsonl")],
        "dataset__weights": [1, 2],
        **{f"pretraining__{name}": value for name, value in texts.items()},
    }
    ranks.prepare(directory, models, **(own | EVERYTHING | changes))


def ends(directory: Path) -> dict[str, Any]:
    """What a run has recorded and saved, but for times and attempts."""
    found: dict[str, Any] = {file.name: records(file) for file in directory.glob("*s.jsonl")}
    for file in (directory / "checkpoints" / "final").glob("*/*.safetensors"):
        for name, value in load_file(file).items():
            found[f"{file.parent.name}/{name}"] = value.view(-1).tolist()
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for part, values in expected.items():
        assert found[part] == values, part


@pytest.mark.slow
@pytest.mark.knob("checkpoint.interval")
@pytest.mark.parametrize("name", CASES)
def test_killed_and_gone_on_is_as_if_it_had_not_been(
    name: str, demo_models: Path, tmp_path: Path
) -> None:
    count, changes = CASES[name]
    through, killed = tmp_path / "through", tmp_path / "killed"
    for directory in (through, killed):
        prepare(directory, demo_models, changes, count)
    expected = ranks.train(through, count, PYTHONPATH=TESTS)
    assert expected.codes == [0] * count, expected.output

    interrupt = f"{THEN}:0:kill:{killed / 'resume' / f'step-{INTERVAL}'}"
    run = ranks.train(killed, count, PYTHONPATH=TESTS, INTERRUPT=interrupt)
    assert run.codes[0] == -signal.SIGKILL, run.output
    run = ranks.train(killed, count, HLRLHF_ATTEMPT="1", PYTHONPATH=TESTS)

    assert run.codes == [0] * count, run.output
    assert f"the run goes on after step {INTERVAL}" in run.output[0]
    assert_same(ends(killed), ends(through))
