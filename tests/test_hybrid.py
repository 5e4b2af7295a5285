"""The hybrid engine: refused before any model loads, and its first tokens checked.

DeepSpeed's own needs a GPU. Its stand-in replaces a forward for eval() and puts it back for
train(), as the real one does; everything else is real.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import tiny  # noqa: E402
from ranks import prepare, read_lines  # noqa: E402
from tiny import EOS, PAD, one_rank  # noqa: E402, F401
from torch.utils import cpp_extension  # noqa: E402
from transformers import Qwen2Config  # noqa: E402

from hlrlhf.settings.layers import load  # noqa: E402
from hlrlhf.trainer import engine, hybrid, loading, loop, models, rollout  # noqa: E402
from hlrlhf.trainer.errors import TrainerError  # noqa: E402

PROMPTS = [[1, 5, 6, 7, 8, 9], [1, 30], [1, 11, 12], [1, 4]]
Kernel = Callable[[Any, Any], Any]


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


# 2. First tokens.


class StandIn:
    """An engine whose ``generate`` reads logits through `kernel` between eval() and train().

    Args:
        engine: around a policy.
        kernel: makes the logits of the head's own and its input.
    """

    def __init__(self, engine: Any, kernel: Kernel):
        self._engine = engine
        self._kernel = kernel
        self._head = engine.module.lm.get_output_embeddings()
        self._plain = self._head.forward

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, *inputs: Any) -> Any:
        return self._engine(*inputs)

    def eval(self) -> None:
        self._head.forward = lambda hidden: self._kernel(self._plain(hidden), hidden)
        self._engine.eval()

    def train(self) -> None:
        self._head.forward = self._plain
        self._engine.train()


def right(logits: Any, hidden: Any) -> Any:
    return logits


def wrong(logits: Any, hidden: Any) -> Any:
    return logits.roll(1, -1)


def second_best(logits: Any, hidden: Any) -> Any:
    return logits.masked_fill(logits == logits.max(-1, keepdim=True).values, -1e9)


def policy(tmp_path: Path) -> models.Policy:
    return loading.load_policy(str(tiny.save_policy(tmp_path, "llama")), "fp32", 0.3)


def compare(module: models.Policy, kernel: Kernel, settings: Any = None) -> None:
    settings = settings or asked()
    device = tiny.cpu(settings)
    sampling = rollout.sampling(settings, None, [EOS], PAD, device)
    actor = StandIn(tiny.Engine(module), kernel)
    hybrid.check_first_tokens(actor, PROMPTS, sampling, settings, device)
    assert actor._head.forward == actor._plain, "scoring goes without the kernels"


@pytest.mark.usefixtures("one_rank")
def test_right_tokens_pass_and_wrong_ones_stop_the_run(tmp_path: Path) -> None:
    module = policy(tmp_path)
    # A checkpoint may ask for anything: here for one token only, which would hide all mistakes.
    module.lm.generation_config.suppress_tokens = list(range(tiny.VOCABULARY - 1))
    compare(module, right)
    with pytest.raises(TrainerError, match=r"wrong for 4 of 4 prompts.*HL_HYBRID_ENGINE=0"):
        compare(module, wrong)


@pytest.mark.usefixtures("one_rank")
def test_a_token_that_is_nearly_as_likely_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second best everywhere: right with a margin as wide as the widest gap to the best."""
    module = policy(tmp_path).eval()
    gaps = []
    with torch.no_grad():
        for prompt in PROMPTS:
            best = module.lm(torch.tensor([prompt])).logits[0, -1].topk(2).values
            gaps.append(float(best[0] - best[1]))
    monkeypatch.setattr(hybrid, "MARGIN", max(gaps) + 1e-3)
    compare(module, second_best)
    monkeypatch.setattr(hybrid, "MARGIN", max(gaps) - 1e-3)
    with pytest.raises(TrainerError, match="wrong for 1 of 4"):
        compare(module, second_best)


@pytest.mark.usefixtures("one_rank")
def test_kernels_that_fail_are_told_as_such(tmp_path: Path) -> None:
    def broken(logits: Any, hidden: Any) -> Any:
        raise RuntimeError("shapes differ")

    with pytest.raises(TrainerError, match=r"cannot generate: .*shapes differ.*HL_HYBRID_ENGINE=0"):
        compare(policy(tmp_path), broken)


@pytest.mark.usefixtures("one_rank")
def test_without_the_hybrid_engine_nothing_is_compared(tmp_path: Path) -> None:
    compare(policy(tmp_path), wrong, tiny.settings())


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
        return StandIn(made, {"wrong": wrong, "right": right, "stale": StaleCopy(head)}[kernel])

    plain = engine.trained
    monkeypatch.setattr(engine, "trained", trained)
    asking = settings.model_copy(update={"hybrid_engine": True})
    device = tiny.cpu(settings)
    if kernel == "right":
        assert loop.train(asking, tmp_path, device, lambda: False)
    else:
        with pytest.raises(TrainerError, match="HL_HYBRID_ENGINE=0"):
            loop.train(asking, tmp_path, device, lambda: False)
    assert len(read_lines(tmp_path / "metrics.jsonl")) == steps
