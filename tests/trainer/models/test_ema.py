"""The moving average of the actor, against the same in float64 by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from ranks import together
from safetensors.torch import load_file
from tiny import one_rank  # noqa: F401
from transformers import AutoModelForCausalLM

from hlrlhf.trainer.models import ema, engine, loading, lora
from hlrlhf.trainer.saving import export

ROWS = [[1, 5, 6, 7], [1, 30, 31], [1, 9, 8, 20]]
LORA = ("lora.dim=2", "lora.alpha=4", "lora.actor_lr=0.05")
SCALING = 4 / 2
DECAY = 0.7
STEPS = 4


def averaged(folder: Path, ranks: int, stage: int, flags: tuple[str, ...]) -> dict[str, Any]:
    """Train a policy, average and save it; on each rank.

    Returns:
        On rank 0: the whole weights at the start and after each step, the average's own, and the
        actor's when all was saved.
    """
    settings = tiny.settings(
        "mbs=1",
        f"gbs={len(ROWS)}",
        f"devices_per_node={ranks}",
        f"actor.zero_stage={stage}",
        "actor.learning_rate=0.02",
        "num_warmup_steps=0",
        *flags,
    )
    policy = loading.load_policy(str(folder / "policy"), "fp32", 0.0)
    torch.manual_seed(4)
    if settings.lora.dim:
        lora.add_adapters(policy, settings)
    actor = engine.trained(policy, settings.actor, settings, tiny.cpu(settings), 10)
    average = ema.Average(actor, DECAY)
    history = [engine.whole_weights(actor)]
    rank = torch.distributed.get_rank()
    for _ in range(STEPS):
        for row in ROWS[rank::ranks]:
            ids, mask = tiny.padded([row])
            actor.backward(actor(ids, mask, 2, 1.0).square().sum(), scale_wrt_gas=False)
            actor.step()
        average.update()
        history.append(engine.whole_weights(actor))
    weights = average.whole_weights()
    both = tiny.models(actor, actor, average=average)
    export.save_models(folder / "saved", both, tiny.tokenizer(), tiny.attempt(folder))
    trains = [name for name, p in actor.module.named_parameters() if p.requires_grad]
    return {
        "history": history,
        "average": weights,
        "after": engine.whole_weights(actor),
        "trains": trains,
        "held": {
            name: (piece.values.tolist(), piece.start, piece.total)
            for name, piece in average.state().items()
        },
    }


@pytest.mark.knob("ema.decay", "ema.enabled")
@pytest.mark.parametrize("adapters", ["none", "beside all weights", "alone"])
@pytest.mark.parametrize("stage", [0, 3])
def test_the_average_by_hand(tmp_path: Path, stage: int, adapters: str) -> None:
    tiny.save_policy(tmp_path / "policy", "llama")
    flags = {"none": (), "beside all weights": LORA, "alone": (*LORA, "only_optimize_lora=true")}

    found, *others = together(3, averaged, tmp_path, 3, stage, flags[adapters])

    first, *after_steps = found["history"]
    expected = {name: value.double() for name, value in first.items()}
    for weights in after_steps:
        for name in found["trains"]:
            expected[name] = DECAY * expected[name] + (1 - DECAY) * weights[name].double()
    assert found["average"].keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found["average"][name].double(), value, rtol=1e-6, atol=1e-7)
        still = name not in found["trains"]
        assert value.equal(first[name].double()) is still, name
        assert value.equal(found["after"][name].double()) is still, name
    for name, value in found["history"][-1].items():
        assert found["after"][name].equal(value), "the actor's own weights are as they were"
    assert [other["average"] for other in others] == [{}, {}]
    for name in found["trains"]:
        values = found["average"][name].view(-1)
        begin = 0
        for rank in (found, *others):
            part, start, total = rank["held"].get(name, ([], begin, len(values)))
            assert (start, total) == (begin, len(values))
            assert len(part) <= math.ceil(total / 3)
            assert values[begin : begin + len(part)].tolist() == part
            begin += len(part)
        assert begin == len(values)

    saved = load_file(tmp_path / "saved" / "actor-ema" / "model.safetensors")
    merged = _merged(found["average"])
    assert saved.keys() == merged.keys()
    for name, value in merged.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-6, atol=1e-6)
    assert not all(
        value.equal(saved[name])
        for name, value in load_file(tmp_path / "saved" / "actor" / "model.safetensors").items()
    )
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved" / "actor-ema")


def _merged(weights: dict[str, Any]) -> dict[str, Any]:
    """Weights under the names of the model without adapters."""
    plain = {}
    for name, value in weights.items():
        if ".lora_" in name:
            continue
        owner, _, last = name.rpartition(".base_layer.")
        if last == "weight":
            up, down = (weights[f"{owner}.lora_{x}.default.weight"] for x in "BA")
            value = value + SCALING * up @ down
        name = name.replace(".base_layer.", ".").removeprefix("lm.")
        plain[name.removeprefix("base_model.model.")] = value
    return plain


@pytest.mark.usefixtures("one_rank")
def test_tied_weights_are_averaged_once_and_saved_in_their_own_precision(tmp_path: Path) -> None:
    tiny.save_policy(tmp_path, "bloom")
    settings = tiny.settings("dtype=bf16", "actor.zero_stage=1")
    policy = loading.load_policy(str(tmp_path), "bf16", 0.0)
    actor = engine.trained(policy, settings.actor, settings, tiny.cpu(settings), 10)
    average = ema.Average(actor, 0.5)
    tied = ("lm.lm_head.weight", "lm.transformer.word_embeddings.weight")
    start = policy.lm.lm_head.weight.detach().double()
    with torch.no_grad():
        policy.lm.lm_head.weight.fill_(2.0)

    average.update()
    average.update()

    weights = average.whole_weights()
    assert weights[tied[0]] is weights[tied[1]]
    # Rounded once, at the end.
    assert weights[tied[0]].equal((0.25 * start + 0.75 * 2.0).float().bfloat16())
