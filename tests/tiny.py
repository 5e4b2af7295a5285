"""Real models and engines, as small as they get, for the tests of the trainer.

Weights are drawn far wider than for training, so that every token, position and layer tells.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
import torch.distributed as dist
from mandatory import MANDATORY
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
)

from hlrlhf.runs import Attempt, Run
from hlrlhf.settings import Settings, resolve
from hlrlhf.trainer import demo, device
from hlrlhf.trainer.models.roles import Models

# One architecture that rotates queries and keys by position, one that biases by distance (ALiBi).
ARCHITECTURES = ("llama", "bloom")
# And one with an embedding for each position, which shows a wrong one at once.
WITH_POSITIONS = (*ARCHITECTURES, "gpt2")
VOCABULARY, PAD, BOS, EOS = 48, 0, 1, 2
# Of a test that compiles.
compiles = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler (c++) here")
# AdamW with an epsilon far above all gradients is gradient descent: weights move by a constant
# times the gradient.
DESCENT = (
    "num_warmup_steps=0",
    "optimizer.lr_scheduler=constant",
    "optimizer.gradient_clipping=0",
    "optimizer.epsilon=1e6",
    "actor.learning_rate=1e5",
    "critic.learning_rate=1e5",
)
TEXTS = ["Human: where is the blue boat?\n\nAssistant: In the harbour.", "user assistant system"]


# DeepSpeed keeps tensors of up to 100,000 numbers whole under ZeRO-3: most of these are larger, and
# so are really partitioned.
WIDE: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 320, "intermediate_size": 336, "num_key_value_heads": 4},
    "bloom": {"hidden_size": 320},
}
for _options in WIDE.values():
    _options |= {"vocabulary": 320, "initializer_range": 0.4 * (32 / 320) ** 0.5}


def config(architecture: str, vocabulary: int = VOCABULARY, **options: Any) -> Any:
    """A configuration that asks for dropout wherever the architecture has it."""
    special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    common = {"vocab_size": vocabulary, "initializer_range": 0.4, **special, **options}
    return architectures.config(architecture, **common)


def save_policy(folder: Path, architecture: str, seed: int = 1, **options: Any) -> Path:
    """A causal language model as Hugging Face saves it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(architecture, **options))
    model.save_pretrained(folder)
    return folder


def classifier(architecture: str, seed: int = 2, **options: Any) -> Any:
    """A sequence classifier with one label."""
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(
        config(architecture, num_labels=1, **options)
    )


def save_classifier(folder: Path, architecture: str, **options: Any) -> Path:
    """A sequence classifier as Hugging Face saves it."""
    classifier(architecture, **options).save_pretrained(folder)
    return folder


def step2_weights(model: Any) -> dict[str, torch.Tensor]:
    """A classifier's weights under the names of DeepSpeed-Chat's step 2."""
    prefix = f"{model.base_model_prefix}."
    return {
        "v_head.weight"
        if name == "score.weight"
        else f"rwtransformer.{name.removeprefix(prefix)}": value.clone()
        for name, value in model.state_dict().items()
    }


def save_step2(folder: Path, architecture: str, seed: int = 2, **options: Any) -> Path:
    """The same classifier as DeepSpeed-Chat's step 2 saves it: the base model's configuration."""
    model = classifier(architecture, seed, **options)
    folder.mkdir(parents=True)
    config(architecture, **options).save_pretrained(folder)
    torch.save(step2_weights(model), folder / "pytorch_model.bin")
    return folder


def tokenizer(chat_template: str | None = None) -> Any:
    """A byte-level tokenizer: any text survives encoding and decoding; it puts BOS in front."""
    made = demo.train_tokenizer(TEXTS)
    made.chat_template = chat_template
    return made


def settings(*flags: str) -> Settings:
    """Settings of one rank on the CPU; models and data are nowhere unless flags say so."""
    base = MANDATORY | {
        "HL_DEVICE": "cpu",
        "HL_DTYPE": "fp32",
        "HL_DEVICES_PER_NODE": "1",
        "HL_MBS": "2",
        "HL_GBS": "4",
        "HL_ACTOR_ZERO_STAGE": "0",
        "HL_CRITIC_ZERO_STAGE": "0",
    }
    return resolve(environ=base, flags=flags).settings


def attempt(directory: Path, number: int = 0) -> Attempt:
    """An attempt at a run in a folder, started by hand."""
    return Attempt(Run(directory), None, number)


def cpu(chosen: Settings) -> device.Device:
    """The device of the only rank."""
    return device.select(chosen, 0)


@contextmanager
def only_rank() -> Iterator[None]:
    """This process is the only rank of a gloo group."""
    if dist.is_initialized():
        yield
        return
    from hlrlhf.trainer.models import engine

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (names | {"MASTER_ADDR": "127.0.0.1"}).items():
            patch.setenv(name, str(value))
        engine.start(cpu(settings()), settings())
        yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def one_rank() -> Iterator[None]:
    """`only_rank` for tests."""
    with only_rank():
        yield


def padded(rows: list[list[int]], width: int | None = None) -> tuple[Any, Any]:
    """Rows of tokens padded on the left, and their mask."""
    width = width or max(len(row) for row in rows)
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def begun_together(rows: list[list[int]], answer_width: int) -> tuple[Any, Any]:
    """Rows of tokens padded on the right, and where answers of so many tokens begin in each."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    return ids, torch.tensor([len(row) - answer_width for row in rows])


def generation(**options: Any) -> Any:
    """A generation configuration with the tiny models' special tokens."""
    return GenerationConfig(**{"pad_token_id": PAD, "eos_token_id": [EOS]} | options)


def rolled_out(prompts: list[list[int]], answers: list[list[int]]) -> Any:
    """A rollout of these tokens."""
    from hlrlhf.trainer.ppo import rollout

    ids, mask = padded(prompts)
    width = max(len(answer) for answer in answers)
    right = torch.tensor([answer + [PAD] * (width - len(answer)) for answer in answers])
    return rollout.from_sequences(torch.cat([ids, right], 1), mask, generation())


def partitioned(engine: Any) -> int:
    """How many of a ZeRO-3 engine's large tensors are not whole on this rank between forwards."""
    large = [p for p in engine.module.parameters() if p.ds_numel > 100_000]
    return sum(parameter.numel() < parameter.ds_numel for parameter in large)


def draw_adapters(model: Any) -> None:
    """Let adapters, which begin at 0, say something."""
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3)


class Engine:
    """What rollouts and scoring need of a DeepSpeed engine whose weights are not partitioned."""

    def __init__(self, module: Any):
        self.module = module

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return self.module(*inputs, **named)

    def eval(self) -> None:
        self.module.eval()

    def train(self) -> None:
        self.module.train()

    def zero_optimization_stage(self) -> int:
        return 0


def models(actor: Any, critic: Any = None, reference: Any = None, average: Any = None) -> Models:
    """As of a run that is loaded, on the CPU."""
    return Models(actor, critic, reference, torch.nn.Identity(), average, cpu(settings()))


# Makes the logits of a head's own and of its input.
Kernel = Callable[[Any, Any], Any]


def as_it_is(logits: Any, hidden: Any) -> Any:
    return logits


def shifted(logits: Any, hidden: Any) -> Any:
    return logits.roll(1, -1)


class Kernels:
    """An engine that puts a kernel in for the head between eval() and train(), as the hybrid does.

    Args:
        engine: around a policy.
        kernel: takes the place of the head.
    """

    def __init__(self, engine: Any, kernel: Kernel):
        self._engine = engine
        self._kernel = kernel
        self._head = engine.module.lm.get_output_embeddings()
        self._plain = self._head.forward

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        assert self._head.forward == self._plain, "scoring goes without the kernels"
        return self._engine(*inputs, **named)

    def eval(self) -> None:
        self._head.forward = lambda hidden: self._kernel(self._plain(hidden), hidden)
        self._engine.eval()

    def train(self) -> None:
        self._head.forward = self._plain
        self._engine.train()
