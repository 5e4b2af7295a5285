"""A task whose best policy is known: answer with the prompt's first letter, again and again.

The vocabulary is four letters and an end token, which is the padding too. The actor starts with a
head of zeros, so that the reference gives each token the same probability, whatever came before.
An answer of up to four tokens scores the share of the four that are the prompt's first letter.

Of all policies, ``reference * exp(score / beta) / Z`` has the largest mean score less beta times
its KL divergence from the reference (arXiv 2205.11275). There are few enough answers to write it
down.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

LETTERS, END = "abcd", "</s>"
LENGTH = 4  # tokens of the longest answer
STEPS, BATCH = 60, 128


def score(prompts: list[str], answers: list[str]) -> list[float]:
    """The reward function of the runs."""
    return [
        answer.count(prompt[0]) / LENGTH for prompt, answer in zip(prompts, answers, strict=True)
    ]


@dataclass(frozen=True)
class Best:
    """What the best policy has on average: score, and KL divergence in nats per answer."""

    reward: float
    kl: float


def best(kl_coefficient: float) -> Best:
    """The best policy for a KL coefficient; for 0, the one nearest to the reference."""
    answers = []  # of each: its share before normalisation, its score, policy over reference
    for length in range(LENGTH + 1):
        reference = (len(LETTERS) + 1) ** -min(length + 1, LENGTH)  # a short one has its end token
        for letters in itertools.product(LETTERS, repeat=length):
            (value,) = score([LETTERS[0]], ["".join(letters)])
            gain = math.exp((value - 1) / kl_coefficient) if kl_coefficient else float(value == 1)
            answers.append((reference * gain, value, gain))
    total = sum(share for share, _, _ in answers)
    reward = sum(share * value for share, value, _ in answers) / total
    kl = sum(share * math.log(gain / total) for share, _, gain in answers if gain) / total
    return Best(reward, kl)


def make(folder: Path, *, frozen_head: bool = False) -> None:
    """Write actor, critic and prompts, which are two or three letters long.

    Args:
        folder: which exists.
        frozen_head: whether the actor is to learn without training its head, which therefore tells
            letters apart from the start; the reference then prefers some.
    """
    vocabulary = {token: index for index, token in enumerate([END, *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=END, eos_token=END)
    config: dict[str, Any] = {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
        "initializer_range": 0.2,
        "pad_token_id": vocabulary[END],
        "eos_token_id": vocabulary[END],
        "bos_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        actor = LlamaForCausalLM(LlamaConfig(**config))
        critic = LlamaForSequenceClassification(LlamaConfig(**config, num_labels=1))
    if not frozen_head:
        torch.nn.init.zeros_(actor.lm_head.weight)
    torch.nn.init.zeros_(critic.score.weight)
    for name, model in (("actor", actor), ("critic", critic)):
        model.save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    rng = random.Random(1)
    prompts = [
        rng.choice(LETTERS[:2]) + "".join(rng.choices(LETTERS, k=rng.randint(1, 2)))
        for _ in range(STEPS * BATCH)
    ]
    lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    (folder / "prompts.jsonl").write_text(lines, encoding="utf-8")


def flags(folder: Path, out: Path, seed: int, kl_coefficient: float) -> list[str]:
    """Settings of a run on the models in `folder`, as ``NAME=VALUE``."""
    values = {
        "tag": f"echo-{kl_coefficient:g}-{seed}",
        "base_out_path": out,
        "devices_per_node": 1,
        "device": "cpu",
        "dtype": "fp32",
        "seed": seed,
        "mbs": BATCH,
        "gbs": BATCH,
        "num_warmup_steps": 0,
        "actor.model_path": folder / "actor",
        "actor.learning_rate": 1e-2,
        "critic.model_path": folder / "critic",
        "critic.learning_rate": 1e-2,
        "reward.function": "echo:score",
        "reward.model_weight": 0,
        "dataset.path": folder / "prompts.jsonl",
        "generation.max_new_tokens": LENGTH,
        "ppo.kl_coefficient": kl_coefficient,
        "optimizer.lr_scheduler": "constant",
    }
    return [f"{name}={value}" for name, value in values.items()]
