"""The hybrid engine: refused before any model loads, and its first tokens checked.

DeepSpeed's own needs a GPU. Its stand-in replaces a forward for eval() and puts it back for
train(), as the real one does; everything else is real.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from ranks import prepare, read_lines
from tiny import one_rank  # noqa: F401
from torch.utils import cpp_extension
from transformers import Qwen2Config

from hlrlhf.settings.layers import load
from hlrlhf.trainer import loop
from hlrlhf.trainer.decoding import hybrid
from hlrlhf.trainer.decoding.decoder import Sampling
from hlrlhf.trainer.decoding.hybrid import Hybrid
from hlrlhf.trainer.decoding.plain import Plain
from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.models import engine, loading


def asked(path: Path | str = "/nowhere") -> Any:
    """Settings that ask for the hybrid engine, which they may on a GPU only."""
    flags = ("device=cuda", "hybrid_engine=true", f"actor.model_path={path}")
    return tiny.settings(*flags).model_copy(update={"device": "cpu"})


# 1. Before any model loads.


def test_without_a_compiler_for_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a node that has a GPU and torch's own CUDA libraries, but no compiler for more.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)

    with pytest.raises(TrainerError, match=r"cannot build .*CUDA_HOME.*HL_HYBRID_ENGINE=0"):
        hybrid.check(asked())
    hybrid.check(tiny.settings())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (tiny.config("llama"), None),
        (tiny.config("gpt2"), None),
        (tiny.config("bloom"), "do not take bloom: .*Transformers version"),
        (Qwen2Config(num_hidden_layers=1), "no inference kernels for qwen2"),
    ],
)
def test_an_architecture_without_kernels_is_known_by_its_configuration(
    config: Any, words: str | None, tmp_path: Path
) -> None:
    """There are no weights to load."""
    config.save_pretrained(tmp_path)

    if words is None:
        hybrid.check(asked(tmp_path))
    else:
        with pytest.raises(TrainerError, match=f"{words}.*HL_HYBRID_ENGINE=0"):
            hybrid.check(asked(tmp_path))


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(TrainerError, match=r"/nowhere: no causal language model"):
        hybrid.check(asked())


# 2. What it generates.


@pytest.mark.usefixtures("one_rank")
def test_kernels_that_fail_are_told_as_such(tmp_path: Path) -> None:
    def failing(logits: Any, hidden: Any) -> Any:
        raise RuntimeError("shapes differ")

    policy = loading.load_policy(str(tiny.save_policy(tmp_path, "llama")), "fp32", 0.0)
    actor = tiny.Kernels(tiny.Engine(policy), failing)
    words = {
        Hybrid: r"hybrid engine cannot generate: .*shapes differ.*HL_HYBRID_ENGINE=0",
        Plain: "^shapes differ$",
    }
    for decoder, expected in words.items():
        sampling = Sampling(tiny.generation(max_new_tokens=2), [], tiny.tokenizer())
        with pytest.raises(Exception, match=expected):
            decoder(sampling, tiny.cpu(asked()))(actor, [[1, 5]])


class StaleCopy:
    """A kernel with a copy of the head's weights, taken once and never again."""

    def __init__(self, head: Any):
        self._copy = copy.deepcopy(head)

    def __call__(self, logits: Any, hidden: Any) -> Any:
        return self._copy.forward(hidden)


@pytest.mark.knob("hybrid_engine")
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("kernel", "steps"), [("wrong", 0), ("stale", 1), ("right", 3)])
def test_a_run_stops_before_it_trains_on_wrong_answers(
    kernel: str, steps: int, demo_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path, demo_models, mbs=4, gbs=4, actor__learning_rate=0.5)
    settings = load(tmp_path / "settings.yaml")

    def trained(model: Any, own: Any, *more: Any) -> Any:
        made = plain(model, own, settings, *more[1:])
        if own is not asking.actor:
            return made
        head = model.lm.get_output_embeddings()
        kernels = {"wrong": tiny.shifted, "right": tiny.as_it_is, "stale": StaleCopy(head)}
        return tiny.Kernels(made, kernels[kernel])

    plain = engine.trained
    monkeypatch.setattr(engine, "trained", trained)
    asking = settings.model_copy(update={"hybrid_engine": True})
    device = tiny.cpu(settings)
    attempt = tiny.attempt(tmp_path)
    if kernel == "right":
        assert loop.train(asking, attempt, device, lambda: 0, lambda: None) is loop.End.COMPLETE
    else:
        with pytest.raises(TrainerError, match="HL_HYBRID_ENGINE=0"):
            loop.train(asking, attempt, device, lambda: 0, lambda: None)
    metrics = tmp_path / "metrics.jsonl"
    assert len(read_lines(metrics) if metrics.exists() else []) == steps
