"""The whole way, nothing left out: `hlrlhf submit` on a real two-node cluster, to saved models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import smollm2
import torch
from cluster import Cluster
from ranks import read_lines
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hlrlhf import runs
from hlrlhf.trainer.models.loading import load_scorer

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def submit_and_wait(*arguments: str, seconds: int) -> runs.Run:
    """Submit, wait for a good end, and find the run again by what was printed."""
    done = subprocess.run(
        [sys.executable, "-m", "hlrlhf", "submit", "--wait", "--json", *arguments],
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr + logs()
    return runs.find(json.loads(done.stdout)["run"])


def hlrlhf(*arguments: str) -> str:
    command = [sys.executable, "-m", "hlrlhf", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def logs() -> str:
    return "".join(hlrlhf("logs", run.name) for run in runs.every())


def answer(folder: Path, prompt: str) -> str:
    """What a saved actor says, in this process, which knows nothing of the run."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    actor = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    width = inputs["input_ids"].shape[1]
    tokens = actor.generate(**inputs, do_sample=False, max_new_tokens=16)[0, width:]
    return tokenizer.decode(tokens, skip_special_tokens=True)


def test_demo_on_two_nodes(
    on_slurm: Cluster, demo_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changes = {
        "base_out_path": tmp_path / "runs",
        "actor.model_path": demo_models / "actor",
        "critic.model_path": demo_models / "reward",
        "dataset.path": demo_models / "prompts" / "train.jsonl",
        "environment.python": sys.executable,
        "num_nodes": 2,
        "mbs": 16,
        "run_steps": 4,
    }
    flags = [f"--set={name}={value}" for name, value in changes.items()]
    run = submit_and_wait("--preset", "demo", *flags, seconds=400)

    (shown,) = json.loads(hlrlhf("status", "--json", run.name))
    assert shown["state"] == "COMPLETED"
    assert (shown["step"], shown["total_steps"], shown["nodes"]) == (4, 4, 2)
    assert "step 4/4  reward" in hlrlhf("logs", run.name)
    record: Any = run.job()
    steps = on_slurm.run("sacct", "-n", "-P", "-j", record.id, "-o", "JobID,NTasks,NNodes")
    assert f"{record.id}.0|4|2" in steps.splitlines()
    assert answer(run.directory / "checkpoints" / "final" / "actor", "Human: Hello\n\nAssistant:")


@pytest.fixture(scope="module")
def real_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M as actor, and a reward model on the same base."""
    lacking = smollm2.missing()
    if lacking:
        pytest.skip(f"no real input here: missing {' and '.join(lacking)}")
    folder = tmp_path_factory.mktemp("smollm2")
    smollm2.make(folder)
    return folder


def test_smollm2_on_real_preference_data(
    on_slurm: Cluster, real_models: Path, tmp_path: Path
) -> None:
    site = tmp_path / "run.yaml"
    site.write_text(
        f"""
tag: smollm2
base_out_path: {tmp_path / "runs"}
num_nodes: 2
devices_per_node: 1
device: cpu
dtype: fp32
mbs: 2
gbs: 4
run_steps: 2
num_warmup_steps: 0
actor: {{model_path: {real_models / "actor"}, learning_rate: 1e-5}}
critic: {{model_path: {real_models / "reward"}, learning_rate: 1e-5}}
dataset:
  path:
    - {smollm2.HH_RLHF / "rm_static_style"}
    - {smollm2.HH_RLHF / "hh_style" / "train.jsonl"}
  weights: [1, 2]
  max_prompt_tokens: 40
generation: {{max_new_tokens: 16}}
environment: {{python: {sys.executable}}}
"""
    )
    run = submit_and_wait("--config", str(site), seconds=900)

    records = read_lines(run.metrics)
    assert [record["step"] for record in records] == [1, 2]
    for record in records:
        assert all(torch.isfinite(torch.tensor(float(value))) for value in record.values())
        assert record["actor_gradient_norm"] > 0
        assert record["critic_gradient_norm"] > 0
    # Before the first update, actor and reference are one model.
    assert records[0]["kl"] == pytest.approx(0, abs=1e-3)
    log = hlrlhf("logs", run.name)
    assert "1120 prompts, 1880 dropped" in log
    for sample in read_lines(run.directory / "samples.jsonl"):
        # pad and eos are one token here: an answer still ends with it, and has it once.
        assert sample["answer"].count("<|im_end|>") <= 1
        assert sample["prompt"].endswith("\n\nAssistant:")
    final = run.directory / "checkpoints" / "final"
    before = load_file(real_models / "actor" / "model.safetensors")
    after = load_file(final / "actor" / "model.safetensors")
    # Embedding and head are one weight in this model, and stay so.
    assert not before.keys() ^ after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert answer(final / "actor", "\n\nHuman: What is the capital of France?\n\nAssistant:")
    # Loads strictly, or not at all.
    assert load_scorer(str(final / "critic"), "fp32", 0.0)
