"""The engine: parameter groups, the schedule, and one rank's updates against plain torch."""

from __future__ import annotations

import contextlib
import copy
import math
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import tiny
import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import (
    PartitionedParameterCoordinator,
)
from ranks import together
from tiny import one_rank  # noqa: F401
from torch import nn
from torch.nn import functional

from hlrlhf.trainer.models import engine, forwards, loading, lora
from hlrlhf.trainer.ranks import agreed, summed

ROWS = [[1, 5, 6, 7], [1, 30, 31]]

# AdamW divides by a gradient's own size, so that a rounding of one near zero moves its weight by as
# much as the rate. With an epsilon as large as the rate it moves it by no more than itself. Clipped
# to a norm of 1, gradients of these models round to some 1e-6, after a hundred operations of 2^-24;
# three steps of that, and six roundings of a weight below 4, 1e-7 each, stay below SAME_WEIGHTS.
GENTLE = ("actor.learning_rate=0.01", "critic.learning_rate=0.01", "optimizer.epsilon=0.01")
SAME_WEIGHTS = {"rtol": 0, "atol": 5e-6}


def policy(folder: Path, architecture: str = "llama") -> forwards.Policy:
    return loading.load_policy(str(tiny.save_policy(folder, architecture)), "fp32", 0.0)


def scorer(folder: Path, architecture: str = "llama") -> forwards.Scorer:
    return loading.load_scorer(str(tiny.save_classifier(folder, architecture)), "fp32", 0.0)


# 1. Parameter groups.


def names_by_group(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("load", [policy, scorer])
def test_groups_without_adapters(tmp_path: Path, architecture: str, load: Any) -> None:
    model = load(tmp_path, architecture)

    groups = engine.parameter_groups(model, 1e-3, 5e-3, 0.1)

    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("decay", 1e-3, 0.1),
        ("no_decay", 1e-3, 0.0),
    ]
    found = names_by_group(model, groups)
    everything = {name for name, _ in model.named_parameters()}
    assert found["decay"] | found["no_decay"] == everything
    # Biases and norms, and nothing else.
    assert found["no_decay"] == {
        name for name in everything if name.endswith(".bias") or "norm" in name or "ln_f" in name
    }


@pytest.mark.parametrize("only", [False, True])
def test_groups_with_adapters(tmp_path: Path, only: bool) -> None:
    model = scorer(tmp_path, "bloom")
    flag = f"only_optimize_lora={str(only).lower()}"
    lora.add_adapters(model, tiny.settings("lora.dim=2", flag))

    groups = engine.parameter_groups(model, 1e-3, 5e-3, 0.1)

    options = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    found = names_by_group(model, groups)
    assert found["lora"] == {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert options["lora"] == (5e-3, 0.1)
    if only:
        assert set(found) == {"decay", "lora"}
        (head,) = found["decay"]
        assert head.endswith("score.weight")
    else:
        assert set(found) == {"decay", "lora", "no_decay"}
    count = sum(len(names) for names in found.values())
    assert count == sum(parameter.requires_grad for parameter in model.parameters())


# 2. The schedule.


def test_the_schedule_by_hand() -> None:
    factor = engine.learning_rate_factor("cosine", 4, 12)
    assert [factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factor(8) == pytest.approx(0.5)
    assert factor(6) == pytest.approx(0.5 * (1 + math.sqrt(0.5)))
    assert factor(12) == pytest.approx(0.0)

    factor = engine.learning_rate_factor("linear", 0, 4)
    assert [factor(step) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]

    factor = engine.learning_rate_factor("constant", 2, 4)
    assert [factor(step) for step in range(6)] == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("warmup", "updates"), [(0, 1), (3, 3), (10, 4), (5, 50)])
def test_the_schedule_rises_then_falls(kind: str, warmup: int, updates: int) -> None:
    factor = engine.learning_rate_factor(kind, warmup, updates)
    rates = [factor(step) for step in range(updates)]

    assert all(0 < rate <= 1 for rate in rates)
    rise, fall = rates[:warmup], rates[warmup:]
    assert rise == sorted(set(rise))
    assert fall == sorted(fall, reverse=True)


# 3. One rank.


def loss_of(model: Any, rows: list[list[int]]) -> Any:
    ids, mask = tiny.padded(rows, width=4)
    out = (
        model(ids, mask, 2, 1.0)
        if isinstance(getattr(model, "module", model), forwards.Policy)
        else model(ids, mask, 2)
    )
    return out.square().sum()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.knob("actor.zero_stage", "optimizer.offload")
@pytest.mark.parametrize(
    ("asked", "flags", "found"),
    [
        (0, (), 0),
        (1, (), 0),
        (2, (), 0),
        (3, (), 3),
        (1, ("optimizer.offload=true",), 1),
        (2, ("dtype=bf16",), 2),
    ],
)
def test_a_lone_rank_in_fp32_holds_nothing_twice(
    tmp_path: Path, asked: int, flags: tuple[str, ...], found: int
) -> None:
    settings = tiny.settings(f"actor.zero_stage={asked}", f"critic.zero_stage={asked}", *flags)
    folder = tiny.save_policy(tmp_path, "llama")
    model = loading.load_policy(str(folder), settings.dtype, 0.0)

    trained = engine.trained(model, settings.actor, settings, tiny.cpu(settings), 10)

    assert trained.zero_optimization_stage() == found
    # The optimizer moves the weights themselves, rather than a copy of them.
    moved = {
        p.data_ptr() for group in trained.basic_optimizer.param_groups for p in group["params"]
    }
    assert (moved == {p.data_ptr() for p in model.parameters()}) is (found == 0)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("trains", [True, False])
def test_under_zero_3_no_device_ever_holds_a_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trains: bool, dtype: str
) -> None:
    """DeepSpeed brings what is whole there, so nothing may be when it begins."""
    settings = tiny.settings("actor.zero_stage=3", "lora.dim=2", f"dtype={dtype}")
    model = loading.load_policy(str(tiny.save_policy(tmp_path, "llama")), dtype, 0.0)
    lora.add_adapters(model, settings)
    sizes = [parameter.numel() for parameter in model.parameters()]
    before: list[int] = []
    initialize = deepspeed.initialize

    def recorded(**arguments: Any) -> Any:
        before.extend(parameter.numel() for parameter in arguments["model"].parameters())
        return initialize(**arguments)

    monkeypatch.setattr(deepspeed, "initialize", recorded)

    made = (
        engine.trained(model, settings.actor, settings, tiny.cpu(settings), 10)
        if trains
        else engine.partitioned(model, settings, tiny.cpu(settings), in_host_memory=False)
    )

    assert before == [0] * len(sizes)
    assert [parameter.ds_numel for parameter in made.module.parameters()] == sizes
    assert {parameter.ds_tensor.dtype for parameter in made.module.parameters()} == {
        loading.DTYPES[dtype]
    }


@pytest.mark.usefixtures("one_rank")
def test_under_zero_3_what_scores_is_whole_and_computes_as_torch_does(tmp_path: Path) -> None:
    """DeepSpeed's own linear function takes a tenth of a millisecond, whatever it multiplies."""
    settings = tiny.settings("actor.zero_stage=3")
    model = tiny.save_policy(tmp_path, "llama", **tiny.WIDE["llama"])
    policy = loading.load_policy(str(model), "fp32", 0.0)
    sizes = [parameter.numel() for parameter in policy.parameters()]
    trained = engine.trained(policy, settings.actor, settings, tiny.cpu(settings), 1)
    deepspeeds = functional.linear
    assert deepspeeds is not torch._C._nn.linear
    assert [parameter.numel() for parameter in policy.parameters()] != sizes

    with contextlib.suppress(KeyError), engine.gathered(trained):
        assert functional.linear is torch._C._nn.linear
        assert [parameter.numel() for parameter in policy.parameters()] == sizes
        raise KeyError  # however it ends

    assert functional.linear is deepspeeds
    assert [parameter.numel() for parameter in policy.parameters()] != sizes


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_under_zero_3_a_block_is_brought_together_at_once(
    tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny.settings("actor.zero_stage=3")
    model = tiny.save_policy(tmp_path, architecture, **tiny.WIDE[architecture])
    policy = loading.load_policy(str(model), "fp32", 0.0)
    trained = engine.trained(policy, settings.actor, settings, tiny.cpu(settings), 1)
    fetched: list[Any] = []
    fetch = PartitionedParameterCoordinator.fetch_sub_module

    def noted(self: Any, module: Any, *more: Any, **named: Any) -> None:
        fetched.append(module)
        fetch(self, module, *more, **named)

    monkeypatch.setattr(PartitionedParameterCoordinator, "fetch_sub_module", noted)

    loss_of(trained, [[1, 5, 6]])

    blocks = [m for m in policy.modules() if type(m).__name__ in policy.lm._no_split_modules]
    within = {part for block in blocks for part in block.modules() if part is not block}
    assert len(blocks) == 2
    assert set(blocks) <= set(fetched)
    assert not within & set(fetched)


@pytest.mark.usefixtures("one_rank")
def test_a_lone_rank_copies_no_gradients_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny.settings("mbs=1", "gbs=1")
    model = policy(tmp_path)
    trained = engine.trained(model, settings.actor, settings, tiny.cpu(settings), 10)
    shared: list[Any] = []
    monkeypatch.setattr(trained, "flatten", shared.append)

    assert engine.descend(trained, loss_of(trained, ROWS[:1]))

    assert not shared


@pytest.mark.usefixtures("one_rank")
def test_moments_and_decay_move_a_weight_that_no_loss_has_reached(tmp_path: Path) -> None:
    """As an expert that no token was sent to, however many ranks there are."""
    settings = tiny.settings(
        *("mbs=2", "gbs=2", "num_warmup_steps=0", "optimizer.lr_scheduler=constant"),
        *("actor.learning_rate=0.01", "actor.weight_decay=0.5", "optimizer.gradient_clipping=0"),
    )
    model = policy(tmp_path)
    gradients = given_gradients(model)[:2]
    gradients[1][1:] = [torch.zeros_like(gradient) for gradient in gradients[1][1:]]
    options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.5}
    expected = by_plain_adamw(model, gradients, options, None, [1, 1])

    trained = engine.trained(model, settings.actor, settings, tiny.cpu(settings), 2)
    engine.descend(trained, linear(trained.module, gradients[0]))
    first = next(trained.module.parameters())
    engine.descend(trained, (first * gradients[1][0]).sum())

    for name, value in engine.whole_weights(trained).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=ADAMW_ROUNDING)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_gradients_get_as_much_room_as_they_need(tmp_path: Path, zero_stage: int) -> None:
    settings = tiny.settings(f"actor.zero_stage={zero_stage}", "dtype=bf16")
    model = policy(tmp_path).bfloat16()
    weights = sum(parameter.numel() for parameter in model.parameters())

    trained = engine.trained(model, settings.actor, settings, tiny.cpu(settings), 10)

    assert trained.optimizer.reduce_bucket_size == weights


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("zero_stage", "offload"), [(0, 0), (1, 0), (1, 1), (2, 1), (3, 0)])
def test_updates_are_those_of_plain_adamw(tmp_path: Path, zero_stage: int, offload: int) -> None:
    """Two steps with warm-up, clipping and decay, each accumulated over two micro batches."""
    settings = tiny.settings(
        "mbs=1",
        "gbs=2",
        f"actor.zero_stage={zero_stage}",
        f"critic.zero_stage={zero_stage}",
        f"optimizer.offload={offload}",
        *GENTLE,
        "actor.weight_decay=0.1",
        "num_warmup_steps=2",
        "optimizer.gradient_clipping=0.5",
    )
    model = policy(tmp_path)
    plain = copy.deepcopy(model)
    matrices = [p for p in plain.parameters() if p.ndim > 1]
    vectors = [p for p in plain.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=0.01,
        betas=(0.9, 0.95),
        eps=0.01,
    )

    trained = engine.trained(model, settings.actor, settings, tiny.cpu(settings), 10)
    for step in range(2):
        for row in ROWS:
            trained.backward(loss_of(trained, [row]), scale_wrt_gas=False)
            trained.step()
        optimizer.zero_grad()
        loss_of(plain, ROWS).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (step + 1) / 2
        optimizer.step()

    expected = plain.state_dict()
    found = engine.whole_weights(trained)
    assert set(found) == set(expected)
    start = loading.load_policy(str(tmp_path), "fp32", 0.0).state_dict()
    for name, value in found.items():
        assert not value.equal(start[name])
        torch.testing.assert_close(value, expected[name], **SAME_WEIGHTS)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.knob("optimizer.grad_accum_dtype")
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize(("kind", "expected"), [("bf16", 1.0), ("fp32", 1 + 64 / 1024)])
def test_small_gradients_add_up_in_fp32_and_are_lost_in_bf16(
    tmp_path: Path, kind: str, expected: float, zero_stage: int
) -> None:
    """To a gradient, 64 times a 1024th: a sum in 8 bits does not move by less than a 512th."""
    settings = tiny.settings(
        "mbs=1",
        "gbs=65",
        "dtype=bf16",
        f"actor.zero_stage={zero_stage}",
        "critic.zero_stage=1",
        f"optimizer.grad_accum_dtype={kind}",
    )
    norms = []
    for shares in ([1.0] + [0.0] * 64, [1.0] + [1 / 1024] * 64):
        model = loading.load_policy(str(tiny.save_policy(tmp_path, "llama")), "bf16", 0.0)
        trained = engine.trained(model, settings.actor, settings, tiny.cpu(settings), 10)
        for share in shares:
            engine.descend(trained, loss_of(trained, ROWS[:1]) * share)
        norms.append(float(trained.get_global_grad_norm()))
    # Powers of two scale a backward pass without rounding it.
    assert norms[1] / norms[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.knob("optimizer.offload", "actor.zero_stage", "critic.zero_stage")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("role", ["actor", "critic"])
def test_optimizer_states_in_host_memory_change_no_weight(
    tmp_path: Path, role: str, zero_stage: int, dtype: str
) -> None:
    """Three steps; in bf16 within its rounding."""
    load = loading.load_policy if role == "actor" else loading.load_scorer
    save = tiny.save_policy if role == "actor" else tiny.save_classifier
    folder = str(save(tmp_path, "llama"))
    weights = {}
    for offload in (False, True):
        settings = tiny.settings(
            "mbs=1",
            "gbs=2",
            f"dtype={dtype}",
            f"actor.zero_stage={zero_stage}",
            f"critic.zero_stage={zero_stage}",
            *GENTLE,
            "num_warmup_steps=0",
            f"optimizer.offload={offload}",
        )
        own = getattr(settings, role)
        model = load(folder, dtype, 0.0)
        trained = engine.trained(model, own, settings, tiny.cpu(settings), 10)
        assert trained.zero_cpu_offload() is offload
        name = "offload_optimizer" if zero_stage == 3 else "cpu_offload"
        assert getattr(trained.optimizer, name, False) is offload
        assert type(trained.basic_optimizer) is torch.optim.AdamW
        for _ in range(3):
            for row in ROWS:
                trained.backward(loss_of(trained, [row]), scale_wrt_gas=False)
                trained.step()
        weights[offload] = engine.whole_weights(trained)
    start = load(folder, dtype, 0.0).state_dict()
    # Two fp32 weights on either side of a rounding to bf16 end a share of 2^-7 apart, and so do the
    # next gradients.
    tolerance = SAME_WEIGHTS if dtype == "fp32" else {"rtol": 2**-6, "atol": 1e-3}
    for name, value in weights[True].items():
        assert not value.equal(start[name])
        torch.testing.assert_close(value, weights[False][name], **tolerance)


CASES = ((), ("actor",), ("critic",))


def over_two_nodes(folder: Path) -> list[tuple[dict[str, Any], list[str]]]:
    """Three updates of actor and critic on 2 x 2 ranks, and a pass of a frozen copy.

    Returns:
        For each case, rank 0's weights of the two, and which of the models have a second partition
        within each node.
    """
    rank = torch.distributed.get_rank()
    found = []
    for enabled in CASES:
        settings = tiny.settings(
            "num_nodes=2",
            "devices_per_node=2",
            "mbs=1",
            "gbs=4",
            "actor.zero_stage=3",
            "critic.zero_stage=3",
            *GENTLE,
            "num_warmup_steps=0",
            *(f"hpz.enabled_{role}=true" for role in enabled),
        )
        device = tiny.cpu(settings)
        actor = loading.load_policy(str(folder / "actor"), "fp32", 0.0)
        critic = loading.load_scorer(str(folder / "critic"), "fp32", 0.0)
        copied = copy.deepcopy(actor)
        trained = {
            "actor": engine.trained(actor, settings.actor, settings, device, 10),
            "critic": engine.trained(critic, settings.critic, settings, device, 10),
        }
        others = {"copy": engine.partitioned(copied, settings, device, in_host_memory=False)}
        weights = {}
        for model in trained.values():
            assert tiny.partitioned(model) >= 14, "the matrices of two layers"
            for _ in range(3):
                model.backward(loss_of(model, [[1, 5 + rank, 6]]), scale_wrt_gas=False)
                model.step()
            weights |= engine.whole_weights(model)
        second = []
        for role, model in (trained | others).items():
            with torch.no_grad():
                loss_of(model, ROWS)
            parts = {
                parameter.ds_secondary_tensor.numel() / parameter.ds_tensor.numel()
                for parameter in model.module.parameters()
                if parameter.ds_secondary_tensor is not None
            }
            # Half a weight on each of a node's two ranks, beside a quarter on each of all four.
            assert parts <= {2}
            second += [role] if parts else []
        found.append((weights, second))
    return found


@pytest.mark.slow
@pytest.mark.knob("hpz.enabled_actor", "hpz.enabled_critic")
def test_a_second_partition_within_each_node(tmp_path: Path) -> None:
    """The model that asks for it has it, no other, and no weight changes by it."""
    tiny.save_policy(tmp_path / "actor", "llama", **tiny.WIDE["llama"])
    tiny.save_classifier(tmp_path / "critic", "llama", **tiny.WIDE["llama"])

    found, *_ = together(4, over_two_nodes, tmp_path)

    expected, _ = found[0]
    for enabled, (weights, second) in zip(CASES, found, strict=True):
        assert tuple(second) == enabled
        assert weights.keys() == expected.keys()
        for name, value in weights.items():
            torch.testing.assert_close(value, expected[name], **SAME_WEIGHTS)


# What three steps of AdamW at a rate of up to 0.05 may differ by when computed in another order. No
# gradient below is more than nine times another, so that a step is at most nine times the rate and
# divides by nothing near zero. Each of its ten roundings changes it by a share of 2^-24:
# 3 * 10 * 9 * 0.05 * 2^-24 = 8e-7. Six roundings of a weight below 4 add 7e-7.
# Both sides round.
ADAMW_ROUNDING = 4e-6


def given_gradients(model: nn.Module) -> list[list[Any]]:
    """For each of three steps a gradient for each weight, of either sign, as large as it is."""
    generator = torch.Generator().manual_seed(1)

    def draw(shape: Any, scale: float) -> Any:
        sign = torch.randint(2, shape, generator=generator) * 2 - 1
        return scale * sign * (0.5 + torch.rand(shape, generator=generator))

    return [[draw(p.shape, scale) for p in model.parameters()] for scale in (1.0, 3.0, 1.0)]


def linear(model: nn.Module, gradients: list[Any]) -> Any:
    """A loss with exactly these gradients, whatever the weights and the order of the sums."""
    weights = model.parameters()
    return sum((p * gradient).sum() for p, gradient in zip(weights, gradients, strict=True))


def by_plain_adamw(
    model: nn.Module,
    gradients: list[list[Any]],
    options: dict[str, Any],
    clipping: float | None,
    rates: list[float],
) -> dict[str, Any]:
    """The weights after these steps with torch's own optimizer; `rates` are shares of `lr`."""
    model = copy.deepcopy(model)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, **options)
    for step, share in zip(gradients, rates, strict=True):
        for parameter, gradient in zip(model.parameters(), step, strict=True):
            parameter.grad = gradient.clone()
        if clipping:
            nn.utils.clip_grad_norm_(model.parameters(), clipping)
        for group in optimizer.param_groups:
            group["lr"] = options["lr"] * share
        optimizer.step()
    return model.state_dict()


@pytest.mark.knob(
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.epsilon",
    "optimizer.gradient_clipping",
    "optimizer.lr_scheduler",
    "num_warmup_steps",
    "actor.learning_rate",
    "actor.weight_decay",
)
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("flag", "options", "clipping", "rates"),
    [
        (None, {}, None, [1, 1, 1]),
        ("optimizer.beta1=0.5", {"betas": (0.5, 0.95)}, None, [1, 1, 1]),
        ("optimizer.beta2=0.5", {"betas": (0.9, 0.5)}, None, [1, 1, 1]),
        ("optimizer.epsilon=10", {"eps": 10}, None, [1, 1, 1]),
        ("optimizer.gradient_clipping=0.01", {}, 0.01, [1, 1, 1]),
        ("optimizer.lr_scheduler=linear", {}, None, [1, 2 / 3, 1 / 3]),
        ("num_warmup_steps=4", {}, None, [1 / 4, 2 / 4, 3 / 4]),
        ("actor.learning_rate=0.05", {"lr": 0.05}, None, [1, 1, 1]),
        ("actor.weight_decay=0.5", {"weight_decay": 0.5}, None, [1, 1, 1]),
    ],
)
def test_each_setting_of_the_optimizer_is_plain_adamws(
    tmp_path: Path,
    flag: str | None,
    options: dict[str, Any],
    clipping: float | None,
    rates: list[float],
) -> None:
    base = ("mbs=2", "gbs=2", "actor.learning_rate=0.01", "num_warmup_steps=0")
    base += ("optimizer.lr_scheduler=constant", "optimizer.gradient_clipping=0")
    settings = tiny.settings(*base, *([flag] if flag else []))
    model = policy(tmp_path)
    gradients = given_gradients(model)
    plain = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    expected = by_plain_adamw(model, gradients, plain | options, clipping, rates)
    others = by_plain_adamw(model, gradients, plain, None, [1, 1, 1])

    trained = engine.trained(model, settings.actor, settings, tiny.cpu(settings), len(rates))
    for step in gradients:
        engine.descend(trained, linear(trained.module, step))

    found = engine.whole_weights(trained)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=ADAMW_ROUNDING)
    if flag:
        differences = [float((found[name] - others[name]).abs().max()) for name in found]
        assert max(differences) > 100 * ADAMW_ROUNDING


@pytest.mark.knob(
    "actor.learning_rate",
    "critic.learning_rate",
    "critic.weight_decay",
    "lora.actor_lr",
    "lora.critic_lr",
)
@pytest.mark.usefixtures("one_rank")
@pytest.mark.knob("lora.actor_lr", "lora.critic_lr")
def test_actor_and_critic_have_settings_of_their_own(tmp_path: Path) -> None:
    settings = tiny.settings(
        "actor.learning_rate=0.01",
        "critic.learning_rate=0.02",
        "critic.weight_decay=0.3",
        "lora.dim=2",
        "lora.actor_lr=0.03",
        "lora.critic_lr=0.04",
        "num_warmup_steps=0",
        "optimizer.lr_scheduler=constant",
    )
    for load, own, rate, adapter_rate, decay in (
        (policy, settings.actor, 0.01, 0.03, 0.0),
        (scorer, settings.critic, 0.02, 0.04, 0.3),
    ):
        model = load(tmp_path / type(own).__name__)
        lora.add_adapters(model, settings)

        trained = engine.trained(model, own, settings, tiny.cpu(settings), 10)

        groups = {group["name"]: group for group in trained.optimizer.param_groups}
        assert {name: group["lr"] for name, group in groups.items()} == {
            "decay": rate,
            "lora": adapter_rate,
            "no_decay": rate,
        }
        assert groups["decay"]["weight_decay"] == decay
        assert trained.get_lr()[0] == rate


@pytest.mark.usefixtures("one_rank")
def test_sums_and_votes_of_one_rank() -> None:
    device = tiny.cpu(tiny.settings())

    assert summed(torch.tensor([1.5, 2.0])).tolist() == [1.5, 2.0]
    assert agreed(True, device)
    assert not agreed(False, device)
