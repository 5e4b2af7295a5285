"""Checkpoints that hold programs: none runs, whatever is loaded, even where somebody says yes."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from hlrlhf.trainer import lengths
from hlrlhf.trainer.decoding import hybrid
from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.models import loading, tokenizers

CODE = """
open({sprung!r}, "w").close()
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers import PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "theirs"
class Causal(LlamaForCausalLM):
    config_class = Config
class Classifier(LlamaForSequenceClassification):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
CLASSES = {
    "AutoConfig": "theirs.Config",
    "AutoModelForCausalLM": "theirs.Causal",
    "AutoModelForSequenceClassification": "theirs.Classifier",
    "AutoTokenizer": [None, "theirs.Tokenizer"],
}
LOAD: dict[str, Callable[[str], Any]] = {
    "policy": lambda path: loading.load_policy(path, "fp32", 0.0),
    "scorer": lambda path: loading.load_scorer(path, "fp32", 0.0),
}


class Trap:
    """An object whose unpickling makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def sprung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the programs make; transformers asks at the terminal, where yes is the answer."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hub"))
    return tmp_path / "sprung"


def with_code(folder: Path, sprung: Path, *, known: bool) -> str:
    """Let a folder name classes of its own, of a kind of model that transformers knows, or not."""
    tiny.tokenizer().save_pretrained(folder)
    (folder / "theirs.py").write_text(CODE.format(sprung=str(sprung)))
    for name in ("config.json", "tokenizer_config.json"):
        file = folder / name
        raw = json.loads(file.read_text())
        if name == "config.json" and not known:
            raw["model_type"] = "theirs"
        if name == "tokenizer_config.json" and not known:
            raw["tokenizer_class"] = "Tokenizer"
        file.write_text(json.dumps(raw | {"auto_map": CLASSES}))
    return str(folder)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("load", [*LOAD, "tokenizer", "length", "hybrid"])
def test_code_that_a_checkpoint_names_is_not_imported(
    tmp_path: Path, sprung: Path, known: bool, load: str
) -> None:
    save = tiny.save_classifier if load == "scorer" else tiny.save_policy
    path = with_code(save(tmp_path / "model", "llama"), sprung, known=known)
    calls = LOAD | {
        "tokenizer": tokenizers.load_tokenizer,
        "length": lengths._of_checkpoint,
        "hybrid": hybrid._architecture_lacks,
    }
    # What cannot be loaded without its code is refused, but where only a length is asked for.
    with contextlib.nullcontext() if known or load == "length" else pytest.raises(TrainerError):
        calls[load](path)
    assert not sprung.exists()


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("load", LOAD)
def test_a_pickle_that_would_run_a_program_is_refused(
    tmp_path: Path, sprung: Path, load: str, sharded: bool
) -> None:
    save = tiny.save_classifier if load == "scorer" else tiny.save_policy
    folder = save(tmp_path / "model", "llama")
    (folder / "model.safetensors").unlink()
    file = folder / ("pytorch_model-00001-of-00001.bin" if sharded else "pytorch_model.bin")
    torch.save({"model.embed_tokens.weight": Trap(sprung)}, file)
    if sharded:
        index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": file.name}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(TrainerError, match="model"):
        LOAD[load](str(folder))
    assert not sprung.exists()


def test_safetensors_come_before_a_pickle_beside_them(tmp_path: Path, sprung: Path) -> None:
    folder = tiny.save_classifier(tmp_path / "model", "llama")
    for name in ("pytorch_model.bin", "reward_model.bin", "training_args.bin"):
        torch.save({"v_head.weight": Trap(sprung)}, folder / name)
    loading.load_scorer(str(folder), "fp32", 0.0)
    assert not sprung.exists()


def test_a_reward_model_of_step_2_that_would_run_a_program(tmp_path: Path, sprung: Path) -> None:
    folder = tiny.save_step2(tmp_path / "model", "llama")
    weights = folder / "pytorch_model.bin"
    kept = torch.load(weights, weights_only=True)
    torch.save({**kept, "v_head.weight": Trap(sprung)}, folder / "reward_model.bin")
    loading.load_scorer(str(folder), "fp32", 0.0)  # which is not of its files
    (folder / "reward_model.bin").replace(weights)
    with pytest.raises(TrainerError, match=r"pytorch_model\.bin: cannot be read"):
        loading.load_scorer(str(folder), "fp32", 0.0)
    assert not sprung.exists()
