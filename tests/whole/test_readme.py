"""The README's first submission, word for word, on a real cluster."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

README = Path(__file__).parents[2] / "README.md"
INSTALL = "python3 -m venv ~/hlrlhf && ~/hlrlhf/bin/pip install /path/to/hlrlhf\n"
# What the tests' cluster has instead of Gaudi cards, and the demo's models of Llama's size.
SMALLER = {
    "HL_DEVICE": "cpu",
    "HL_DEVICES_PER_NODE": "2",
    "HL_RUN_STEPS": "2",
    "HL_GENERATION_MAX_NEW_TOKENS": "16",
    "HL_DATASET_MAX_PROMPT_TOKENS": "128",
}


def replaced(text: str, **others: object) -> str:
    """`text` with each of `others` in place of what stands in the README."""
    for old, new in others.items():
        assert old in text, f"the README does not say {old} any more"
        text = text.replace(old, str(new))
    return text


def test_the_first_submission(on_slurm: Cluster, demo_models: Path, tmp_path: Path) -> None:
    section = README.read_text(encoding="utf-8").partition("## A first real submission")[2]
    section = section.partition("\n## ")[0]
    blocks = re.findall(r"```(sh|yaml)\n(.*?)```", section, re.DOTALL)
    (site,) = (text for kind, text in blocks if kind == "yaml")
    commands = "".join(text for kind, text in blocks if kind == "sh")
    # What the installation makes is here already, and the users' own places are elsewhere.
    (tmp_path / "hlrlhf").symlink_to(sys.prefix)
    (tmp_path / "site.yaml").write_text(replaced(site, **{"/home/me": tmp_path}))
    commands = replaced(
        commands,
        **{
            INSTALL: "",
            "/scratch/me": tmp_path,
            "/models/llama-2-7b-sft": demo_models / "actor",
            "/models/llama-2-7b-rm": demo_models / "reward",
            "/data/prompts.jsonl": demo_models / "prompts" / "train.jsonl",
        },
    )

    done = subprocess.run(
        ["bash", "-e"],
        input=f"module() {{ echo loaded $2; }}\nexport -f module\n{commands}",
        cwd=tmp_path,
        env=os.environ | SMALLER | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "hint" in done.stderr, "the tests' folder is in /tmp"
    assert re.search(r"first-try +[0-9]+ +COMPLETED +2/2", done.stdout), done.stdout
    assert "step 2/2  reward" in done.stdout
    assert "loaded gaudi" in done.stdout, "a line of environment.setup"
    assert "first-try: has ended already: COMPLETED" in done.stderr
    final = tmp_path / "runs" / "first-try" / "checkpoints" / "final"
    for role in ("actor", "critic", "actor-adapter", "critic-adapter"):
        assert (final / role).is_dir()
    trained = json.loads((final.parents[1] / "parameters.json").read_text())
    assert set(trained) == {"actor", "critic"}
