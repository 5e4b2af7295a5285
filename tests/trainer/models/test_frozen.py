"""The models that only score: against separate copies of the same checkpoints."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import EOS, one_rank  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

from hlrlhf.trainer.decoding.decoder import Sampling
from hlrlhf.trainer.decoding.plain import Plain
from hlrlhf.trainer.models import engine, forwards, frozen, loading, lora
from hlrlhf.trainer.ppo import experience, rollout, update
from hlrlhf.trainer.ppo.rewards import Rewards
from hlrlhf.trainer.ppo.scores import ModelScores

pytestmark = pytest.mark.usefixtures("one_rank")

PROMPTS = [[1, 5, 6, 7, 8, 9], [1, 30], [1, 11, 12], [1, 4]]
ANSWERS = [[7, 8, EOS], [9], [13, 14, 15], [20, EOS]]
ADAPTERS = ("lora.dim=3", "lora.alpha=6", "lora.actor_lr=0.05", "lora.critic_lr=0.05")
ADAPTERS_ONLY = (*ADAPTERS, "only_optimize_lora=true")

architectures = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
stages = pytest.mark.parametrize("stage", [0, 1, 3])


@dataclass
class Case:
    """Folders of an actor and a critic, and settings that name them."""

    folder: Path
    settings: Any

    @property
    def device(self) -> Any:
        return tiny.cpu(self.settings)

    def load(self) -> tuple[Any, Any, Any]:
        """Actor and critic in their engines, with dropout; and the critic's first head."""
        own = self.settings
        policy = loading.load_policy(own.actor.model_path, "fp32", 0.3)
        scorer = loading.load_scorer(own.critic.model_path, "fp32", 0.3)
        head = copy.deepcopy(scorer.head)
        torch.manual_seed(3)
        for model in (policy, scorer):
            if own.lora.dim:
                lora.add_adapters(model, own)
        actor = engine.trained(policy, own.actor, own, self.device, 10)
        critic = engine.trained(scorer, own.critic, own, self.device, 10)
        return actor, critic, head

    def shared(self, actor: Any, critic: Any, head: Any) -> tuple[frozen.Copy, frozen.Copy]:
        return (
            frozen.reference(self.settings, tiny.tokenizer(), actor, self.device),
            frozen.reward_model(self.settings, tiny.tokenizer(), critic, head, self.device),
        )

    def copies(self) -> tuple[frozen.Copy, frozen.Copy]:
        own = self.settings
        policy = loading.load_policy(own.actor.model_path, "fp32", 0.0)
        scorer = loading.load_scorer(own.critic.model_path, "fp32", 0.0)
        return (
            frozen.copy(policy, own.actor.zero_stage, own, self.device),
            frozen.copy(scorer, own.critic.zero_stage, own, self.device),
        )


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Case]:
    def make(architecture: str, stage: int, *flags: str) -> Case:
        # The tokenizer of the tests has more tokens than the other tests' models.
        shape = tiny.WIDE[architecture] if stage == 3 else {"vocabulary": len(tiny.tokenizer())}
        actor = tiny.save_policy(tmp_path / "actor", architecture, **shape)
        critic = tiny.save_classifier(tmp_path / "critic", architecture, **shape)
        settings = tiny.settings(
            f"actor.model_path={actor}",
            f"critic.model_path={critic}",
            f"actor.zero_stage={stage}",
            f"critic.zero_stage={stage}",
            "num_warmup_steps=0",
            "actor.learning_rate=0.01",
            "critic.learning_rate=0.01",
            # Above nearly all gradients: weights move in proportion to them, roundings included.
            "optimizer.epsilon=0.01",
            *flags,
        )
        return Case(tmp_path, settings)

    return make


def rolled_out() -> rollout.Rollout:
    made: rollout.Rollout = tiny.rolled_out(PROMPTS, ANSWERS)
    return made


def scored(
    case: Case, actor: Any, critic: Any, reference: Any, reward: Any
) -> experience.Experience:
    # Nothing is decoded here, so no tokenizer is needed.
    scores = ModelScores(reward, None, None, "end", case.settings, case.device)
    rewards = Rewards([(1.0, scores)], case.settings)
    return experience.score(
        rolled_out(), tiny.models(actor, critic, reference), rewards, case.settings, 0.1
    )


@torch.no_grad()
def says(model: Any) -> Any:
    """What a policy or a scorer says of the rollout."""
    made = rolled_out()
    arguments = (made.sequences, made.attention_mask, made.answer_width)
    return (
        model(*arguments, 1.0) if isinstance(model.module, forwards.Policy) else model(*arguments)
    )


def answers(model: Any, case: Case) -> list[list[int]]:
    config = tiny.generation(max_new_tokens=6, do_sample=False)
    made = rollout.generate(Plain(Sampling(config, [], None), case.device), model, PROMPTS)
    return made.sequences.tolist()


def steps(case: Case, actor: Any, critic: Any, reference: Any, reward: Any) -> None:
    """Three optimizer steps of actor and critic."""
    for step in range(3):
        torch.manual_seed(step)
        found = scored(case, actor, critic, reference, reward)
        update.update(found, tiny.models(actor, critic), None, case.settings)


@pytest.mark.knob("only_optimize_lora")
@stages
@architectures
def test_with_its_adapters_off_a_model_is_what_it_was(
    make: Callable[..., Case], architecture: str, stage: int
) -> None:
    """Bit for bit, before training and after it; and training is that beside separate copies."""
    case = make(architecture, stage, *ADAPTERS_ONLY)
    copies = case.copies()
    before = [says(model) for model in copies]
    *apart, _ = case.load()
    *trained, head = case.load()
    if stage == 3:
        assert all(tiny.partitioned(model) >= 8 for model in (*apart, *trained))
    # No checkpoint can be read once more.
    shutil.rmtree(case.folder / "actor")
    shutil.rmtree(case.folder / "critic")
    shared = case.shared(*trained, head)
    start = [engine.whole_weights(model) for model in trained]
    for model, its, expected in zip(shared, trained, before, strict=True):
        assert model.module is its.module
        its.train()
        assert says(model).equal(expected)
        assert its.module.training, "with dropout, as it was"

    steps(case, *apart, *copies)
    steps(case, *trained, *shared)

    for model, its, expected in zip(shared, trained, before, strict=True):
        its.eval()
        assert not torch.allclose(says(its), expected, atol=1e-3), "it has learnt"
        assert says(model).equal(expected)
        assert not its.module.training
    for its, other, was in zip(trained, apart, start, strict=True):
        expected = engine.whole_weights(other)
        found = engine.whole_weights(its)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            # Three times a hundred operations, each off by a share of 2^-24.
            allowed = 5e-5 * float(value.norm())
            assert float((found[name] - value).norm()) == pytest.approx(0, abs=allowed), name
        moved = {name for name, value in found.items() if not value.equal(was[name])}
        assert {name for name in moved if ".lora_" not in name} == (
            {"classifier.base_model.model.score.weight"} if its is trained[1] else set()
        )
        assert {name for name in found if ".lora_" in name} <= moved
        assert {name for name, p in its.module.named_parameters() if p.requires_grad} == moved


@pytest.mark.parametrize(
    ("flags", "kinds"),
    [
        (ADAPTERS_ONLY, (frozen.WithoutAdapters, frozen.WithoutAdapters)),
        ((*ADAPTERS_ONLY, "reward.model_path={0}/critic"), (frozen.WithoutAdapters,) * 2),
        ((*ADAPTERS_ONLY, "reward.model_path={0}/other"), (frozen.WithoutAdapters, frozen.Copy)),
        (("lora.dim=3",), (frozen.Copy, frozen.Copy)),
        (("reference.offload=true",), (frozen.InHostMemory, frozen.Copy)),
    ],
)
def test_what_is_shared(
    make: Callable[..., Case], tmp_path: Path, flags: tuple[str, ...], kinds: tuple[type, ...]
) -> None:
    case = make("llama", 0, *(flag.format(tmp_path) for flag in flags))
    tiny.save_classifier(tmp_path / "other", "llama", seed=7, vocabulary=len(tiny.tokenizer()))
    actor, critic, head = case.load()

    models_that_score = case.shared(actor, critic, head)

    assert tuple(type(model) for model in models_that_score) == kinds
    for model, trained in zip(models_that_score, (actor, critic), strict=True):
        theirs = {parameter.data_ptr() for parameter in model.module.parameters()}
        common = theirs & {parameter.data_ptr() for parameter in trained.module.parameters()}
        assert common == (theirs if isinstance(model, frozen.WithoutAdapters) else set())


@stages
@pytest.mark.parametrize("kind", ["shared", "copy", "in host memory"])
def test_answers_of_the_reference(make: Callable[..., Case], stage: int, kind: str) -> None:
    flags = {"shared": ADAPTERS_ONLY, "copy": (), "in host memory": ("reference.offload=true",)}
    case = make("llama", stage, *flags[kind])
    plain, reward = case.copies()
    expected = answers(plain, case)
    actor, critic, head = case.load()
    reference, _ = case.shared(actor, critic, head)
    assert answers(reference, case) == expected
    steps(case, actor, critic, reference, reward)
    own = answers(actor, case)
    assert own != expected

    assert answers(reference, case) == expected

    assert answers(actor, case) == own
    assert says(reference).equal(says(plain))
    steps(case, actor, critic, reference, reward)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_copy_only_scores(make: Callable[..., Case], stage: int) -> None:
    case = make("llama", stage)
    model = loading.load_scorer(case.settings.critic.model_path, "fp32", 0.3)
    expected = says(tiny.Engine(copy.deepcopy(model).eval().requires_grad_(False)))
    model.train()

    scorer = frozen.copy(model, stage, case.settings, case.device)

    made = rolled_out()
    found = scorer(made.sequences, made.attention_mask, made.answer_width)
    assert not found.requires_grad
    assert found.equal(expected)
    scorer.eval()
    scorer.train()
    assert not model.training


# Host memory. Another device is float64 here: what goes there is copied, and computes there.


class Copied(TorchDispatchMode):
    """Counts copies of tensors, and fails where one is written to.

    Args:
        tensors: that lie in host memory.
        room: how many the device has room for.
    """

    def __init__(self, tensors: list[Any], room: float = math.inf):
        super().__init__()
        self._where = {tensor.data_ptr() for tensor in tensors}
        self._room = room
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ours = args and isinstance(args[0], torch.Tensor) and args[0].data_ptr() in self._where
        if ours and func is torch.ops.aten._to_copy.default:
            self.count += 1
            if self.count > self._room:
                raise MemoryError("no room")
        assert not (ours and func is torch.ops.aten.copy_.default)
        return func(*args, **(kwargs or {}))


def tensors(model: Any) -> list[Any]:
    return [*model.module.parameters(), *model.module.buffers()]


@pytest.mark.knob("reference.offload")
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # BLOOM knows no float64
def test_a_reference_in_host_memory_is_copied_once_for_a_whole_rollout(
    make: Callable[..., Case], architecture: str
) -> None:
    """To the device, and never back."""
    case = make(architecture, 0, "reference.offload=true")
    assert case.settings.per_device_batch_size > case.settings.mbs, "several micro batches"
    actor, critic, _ = case.load()
    plain, reward = case.copies()
    plain.module.double()
    elsewhere = case.device
    elsewhere.torch = torch.float64
    elsewhere.pinned = torch.clone
    model = loading.load_policy(case.settings.actor.model_path, "fp32", 0.0)
    before = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]

    reference = frozen.copy(model, 0, case.settings, elsewhere, in_host_memory=True)

    assert tied(reference.module) == tied(plain.module)
    where = [tensor.data_ptr() for tensor in tensors(reference)]
    assert not set(where) & set(before), "they are those that the device reads fastest"
    with Copied(tensors(reference)) as copied:
        found = scored(case, actor, critic, reference, reward)
    expected = torch.where(found.answer_mask, says(plain), 0)
    # Batches of another size are multiplied in another order where there are several threads.
    torch.testing.assert_close(found.reference, expected, rtol=1e-6, atol=1e-6)
    assert copied.count == len(where)
    with Copied(tensors(reference)) as copied:
        assert answers(reference, case) == answers(plain, case)
    assert copied.count == len(where)
    with Copied(tensors(reference)) as copied:
        assert says(reference).equal(says(plain))
    assert copied.count == len(where)
    assert [tensor.data_ptr() for tensor in tensors(reference)] == where
    assert all(tensor.dtype != torch.float64 for tensor in tensors(reference))


def tied(model: Any) -> bool:
    return model.lm.get_input_embeddings().weight is model.lm.get_output_embeddings().weight


@pytest.mark.knob("reference.offload")
def test_where_host_and_device_are_one_nothing_is_copied(make: Callable[..., Case]) -> None:
    case = make("llama", 0, "reference.offload=true")
    model = loading.load_policy(case.settings.actor.model_path, "fp32", 0.0)
    before = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    reference = frozen.copy(model, 0, case.settings, case.device, in_host_memory=True)

    with reference.ready():
        assert [tensor.data_ptr() for tensor in tensors(reference)] == before


@pytest.mark.knob("reference.offload")
def test_a_device_without_room_leaves_a_reference_in_host_memory(
    make: Callable[..., Case],
) -> None:
    case = make("llama", 0, "reference.offload=true")
    model = loading.load_policy(case.settings.actor.model_path, "fp32", 0.0)
    elsewhere = case.device
    elsewhere.torch = torch.float64
    reference = frozen.copy(model, 0, case.settings, elsewhere, in_host_memory=True)

    with (
        Copied(tensors(reference), room=3),
        pytest.raises(MemoryError),
        reference.ready(),
    ):
        pass

    assert all(tensor.dtype != torch.float64 for tensor in tensors(reference))
    with reference.ready():
        assert all(tensor.dtype == torch.float64 for tensor in tensors(reference))


@pytest.mark.knob("reference.offload")
@pytest.mark.parametrize("offload", [False, True])
def test_under_zero_3_deepspeed_keeps_the_parts_in_host_memory(
    make: Callable[..., Case], offload: bool
) -> None:
    case = make("bloom", 3, f"reference.offload={offload}")
    expected, _ = case.copies()

    reference = frozen.reference(case.settings, tiny.tokenizer(), None, case.device)

    assert says(reference).equal(says(expected))
    where = reference.optimizer.offload_device
    assert (where == "cpu") is offload, where
