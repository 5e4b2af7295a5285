"""The models that only score: a copy, a copy in host memory, or a trained model as it began."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hlrlhf.settings import Settings
from hlrlhf.trainer.device import Device
from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.models import engine, loading, tokenizers
from hlrlhf.trainer.models.forwards import Placed, Policy, Scorer


class Copy:
    """A model of its own: whole on the device or, under ZeRO-3, partitioned over the ranks.

    It is called as the model is, and stands where an engine does for `rollout.generate`.

    Attributes:
        module: the `Policy` or `Scorer`.
    """

    def __init__(self, model: Placed | Policy | Scorer):
        """Of an engine or of a model."""
        self._model: Any = model
        self.module: Any = getattr(model, "module", model)
        self._generation = contextlib.ExitStack()

    def __call__(self, *inputs: Any, **named: Any) -> Tensor:
        """What the model says of sequences, as fp32; see its ``forward``."""
        with self.ready():
            scores: Tensor = self._model(*inputs, **named)
        return scores

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Be what scores; a call does it too, but once for many calls is cheaper."""
        yield

    def eval(self) -> None:
        """Begin to generate."""
        self._generation.enter_context(self.ready())

    def train(self) -> None:
        """Have generated; nothing here trains."""
        self._generation.close()

    def zero_optimization_stage(self) -> int:
        """The stage of the engine, 0 without one."""
        return 0 if self._model is self.module else int(self._model.zero_optimization_stage())

    @property
    def optimizer(self) -> Any:
        """The engine's, which under ZeRO-3 knows where the weights are."""
        return self._model.optimizer


class InHostMemory(Copy):
    """A whole copy that is on the device while it scores or generates, and in host memory else.

    Its weights never change, so none is ever copied back: the device lets go of its own.
    """

    def __init__(self, model: Policy | Scorer, device: Device):
        super().__init__(model.cpu())
        self._device = device.torch
        tensors = [*model.parameters(), *model.buffers()]
        for tensor in tensors:
            tensor.data = device.pinned(tensor.data)
        self._host = [(tensor, tensor.detach()) for tensor in tensors]
        self._here = False

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        if self._here:
            yield
            return
        self._here = True
        try:
            for tensor, host in self._host:
                tensor.data = host.to(self._device, non_blocking=True)
            yield
        finally:
            for tensor, host in self._host:
                tensor.data = host
            self._here = False


class WithoutAdapters(Copy):
    """A trained model as it began, where adapters alone train: with these off, dropout too.

    A scorer's head trains beside its adapters, so its first one takes its place.
    """

    def __init__(self, trained: Placed, first_head: nn.Module | None = None):
        super().__init__(trained)
        self._head = () if first_head is None else (first_head,)

    def __call__(self, *inputs: Any, **named: Any) -> Tensor:
        return super().__call__(*inputs, *self._head, **named)

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        training = self.module.training
        self.module.eval()
        try:
            with self.module.inner.disable_adapter():
                yield
        finally:
            self.module.train(training)


def reference(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, actor: DeepSpeedEngine, device: Device
) -> Copy:
    """The policy that the KL penalty is measured against.

    Args:
        tokenizer: the actor's.
        actor: the engine around the policy that trains.

    Raises:
        TrainerError: the checkpoint cannot be loaded, or does not fit the tokenizer.
    """
    path = reference_path(settings)
    if dist.get_rank() == 0 and loading.saved_as(path) and settings.reference.model_path is None:
        print(
            f"the reference is {path}, which hlrlhf has trained: the KL penalty begins at 0 again; "
            "HL_REFERENCE_MODEL_PATH names another"
        )
    if settings.shares_reference:
        return WithoutAdapters(actor)
    model = loading.load_policy(path, settings.dtype, 0.0, settings.ppo.logprob_chunk)
    tokenizers.check_vocabulary(tokenizer, "reference", model)
    return copy(model, settings.actor.zero_stage, settings, device, settings.reference.offload)


def reference_path(settings: Settings) -> str:
    """The checkpoint of the reference."""
    return settings.reference.model_path or settings.actor.model_path


def check_reference(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> None:
    """Stop before any model loads when a reference of its own reads other tokens than the actor's.

    Raises:
        TrainerError: it does.
    """
    path = settings.reference.model_path
    if path is not None and tokenizers.foreign(tokenizers.held_tokenizer(path), tokenizer):
        raise TrainerError(
            f"{path}: the reference's tokenizer is not the actor's, whose tokens it scores; set "
            "HL_REFERENCE_MODEL_PATH to a model that shares it"
        )


def reward_path(settings: Settings) -> str:
    """The checkpoint of the reward model."""
    return settings.reward.model_path or settings.critic.model_path


def reward_model(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    critic: DeepSpeedEngine,
    first_head: nn.Module,
    device: Device,
) -> Copy:
    """The scorer of answers: `reward.model_path`, or what the critic started from.

    Args:
        tokenizer: the one whose tokens the model is given.
        critic: the engine around the scorer that trains.
        first_head: a copy of the critic's head from before training.

    Raises:
        TrainerError: the checkpoint cannot be loaded, or does not fit the tokenizer.
    """
    path = reward_path(settings)
    if settings.adapters_only and path == settings.critic.model_path:
        return WithoutAdapters(critic, first_head.requires_grad_(False).to(device.torch))
    model = loading.load_scorer(path, settings.dtype, 0.0)
    tokenizers.check_vocabulary(tokenizer, "reward model", model)
    return copy(model, settings.critic.zero_stage, settings, device)


def copy(
    model: Policy | Scorer,
    zero_stage: int,
    settings: Settings,
    device: Device,
    in_host_memory: bool = False,
) -> Copy:
    """A model that does not train, in its place.

    Args:
        model: on any device.
        zero_stage: that of the trained model which this one is a sibling of.
        in_host_memory: whether the device holds its weights only while it scores.
    """
    model.requires_grad_(False).eval()
    if zero_stage == 3:
        return Copy(engine.partitioned(model, settings, device, in_host_memory))
    return InHostMemory(model, device) if in_host_memory else Copy(model.to(device.torch))
