"""What a rollout was sampled from is what scores it, or the run stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from ranks import together
from tiny import EOS, PAD, one_rank  # noqa: F401
from transformers import AutoModelForCausalLM, GPTNeoConfig

from hlrlhf.trainer.decoding.decoder import sampling
from hlrlhf.trainer.decoding.plain import Plain
from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.models import loading, lora
from hlrlhf.trainer.ppo import agreement, rollout

PROMPTS = [[1, 5, 6, 7, 8, 9], [1, 30], [1, 11, 12], [1, 4]]


def flattened(logits: Any, hidden: Any) -> Any:
    """The likeliest tokens stay the likeliest."""
    return logits * 0.9


def checked(
    folder: Path,
    kernel: tiny.Kernel,
    *flags: str,
    dtype: str = "fp32",
    static_cache: bool = False,
) -> None:
    """A rollout and its check."""
    settings = tiny.settings(f"dtype={dtype}", "generation.max_new_tokens=12", *flags)
    device = tiny.cpu(settings)
    device.static_cache = static_cache
    policy = loading.load_policy(str(folder), dtype, 0.3)
    if settings.lora.dim:
        lora.add_adapters(policy, settings)
        torch.nn.init.normal_(dict(policy.named_parameters())[LORA_B], std=0.1)
    actor = tiny.Kernels(tiny.Engine(policy), kernel)
    decoder = Plain(sampling(settings, None, [EOS], PAD, device), device)
    witness = agreement.Witness(settings)
    torch.manual_seed(3)
    made = rollout.generate(decoder, actor, PROMPTS, witness)
    agreement.check(witness, actor, made, settings, device)


LORA_B = "lm.base_model.model.model.layers.0.mlp.down_proj.lora_B.default.weight"
ONE = pytest.mark.usefixtures("one_rank")


@ONE
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("static_cache", [False, True])
@pytest.mark.parametrize("architecture", tiny.WITH_POSITIONS)
def test_a_rollout_of_the_policys_own_passes(
    tmp_path: Path, architecture: str, static_cache: bool, dtype: str
) -> None:
    folder = tiny.save_policy(tmp_path, architecture)
    checked(folder, tiny.as_it_is, dtype=dtype, static_cache=static_cache)


@ONE
@pytest.mark.parametrize(
    "flags",
    [
        ["generation.temperature=0.5"],
        ["generation.top_k=3", "generation.top_p=0.5"],
        ["generation.min_new_tokens=8"],
        ["ppo.logprob_chunk=2"],
        ["lora.dim=2"],
    ],
)
def test_it_is_the_whole_policy_that_is_compared(tmp_path: Path, flags: list[str]) -> None:
    checked(tiny.save_policy(tmp_path, "llama"), tiny.as_it_is, *flags)


@ONE
@pytest.mark.parametrize("kernel", [tiny.shifted, flattened])
@pytest.mark.parametrize(
    ("flag", "remedy"), [("gbs=4", "cannot be used here"), ("hybrid_engine=1", "HL_HYBRID_ENG")]
)
def test_another_distribution_stops_the_run(
    tmp_path: Path, kernel: tiny.Kernel, flag: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.save_policy(tmp_path, "llama")
    more = ["device=cuda"] if "hybrid" in flag else []
    monkeypatch.setattr(tiny, "cpu", lambda settings, cpu=tiny.cpu: cpu(tiny.settings()))
    with pytest.raises(TrainerError, match=rf"apart by .* nats.*LlamaForCausalLM.*{remedy}"):
        checked(folder, kernel, flag, *more)


@ONE
def test_a_static_cache_that_an_architecture_reads_wrongly_stops_the_run(tmp_path: Path) -> None:
    """GPT-Neo's layers with a window take the cache's length for the text's."""
    config = GPTNeoConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        max_position_embeddings=64,
        initializer_range=0.4,
    )
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)

    checked(tmp_path, tiny.as_it_is)
    with pytest.raises(TrainerError, match=r"GPTNeoForCausalLM.*with a static cache"):
        checked(tmp_path, tiny.as_it_is, static_cache=True)


def on_one_of_two(folder: Path) -> str:
    """What a rank is told when rank 1 alone has a wrong kernel."""
    kernel = tiny.shifted if torch.distributed.get_rank() else tiny.as_it_is
    try:
        checked(folder, kernel, "devices_per_node=2", "gbs=4")
    except TrainerError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_all_ranks_stop_for_one(tmp_path: Path) -> None:
    folder = tiny.save_policy(tmp_path, "llama")
    first, second = together(2, on_one_of_two, folder)
    assert first == second
    assert "nats on average" in first
