"""What ends a run that no longer gets on."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from ranks import finish, prepare, running
from tiny import one_rank  # noqa: F401

from hlrlhf.runs import Attempt, Outcome, Run
from hlrlhf.settings.layers import load
from hlrlhf.trainer import loop
from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.saving import export

pytestmark = [pytest.mark.slow, pytest.mark.knob("guard.hang")]


@pytest.mark.parametrize(
    ("act", "who", "rank", "stands"),
    [
        ("os.kill(os.getpid(), signal.SIGSTOP)", "rank 1 does not answer", 0, r"loop\.py"),
        ("time.sleep(3600)", "all ranks answer", 1, r"stuck\.py., line 3 in score"),
    ],
    ids=["stopped", "asleep"],
)
def test_a_run_that_hangs_is_ended_and_says_who_does_not_answer(
    act: str, who: str, rank: int, stands: str, demo_models: Path, tmp_path: Path
) -> None:
    (tmp_path / "stuck.py").write_text(
        "import os, signal, time\n"
        "def score(prompts, answers):\n"
        f"    if os.environ['RANK'] == '1': {act}\n"
        "    return [0.0 for _ in answers]\n"
    )
    reward = {"reward__function": "stuck:score", "reward__model_weight": 0}
    # Time enough to load, and for the first rollout without a compiler's.
    settings = {"guard__hang": 0.5, "generation__fast_kernels": False, **reward}
    prepare(tmp_path, demo_models, devices_per_node=2, mbs=2, **settings)
    with running(tmp_path, ranks=2, HLRLHF_JOB="7", PYTHONPATH=str(tmp_path)) as processes:
        # The launcher, or srun, ends the other one.
        first = finish(tmp_path, processes[:1])
    words = (
        f"no step, evaluation or save has ended for 0.5 minutes (guard.hang): {who}; "
        "where those that answer stand is in the log"
    )
    assert first.codes == [1], first.output
    assert f"error: {words}\n" in first.output[0]
    assert Attempt(Run(tmp_path), "7", 0).heard() == Outcome(1, words, may_pass=True)
    log = (tmp_path / f"rank-{rank}.log").read_text()
    assert re.search(rf"^rank {rank} stands here:\n(.*\n)*  File .*{stands}", log, re.MULTILINE)


@pytest.mark.usefixtures("one_rank")
def test_no_group_of_ranks_gives_up_before_that() -> None:
    """Not even one of which DeepSpeed does not say how long it waits."""
    for group in (dist.group.WORLD, dist.new_group()):
        backend = group._get_backend(torch.device("cpu"))
        assert backend.options._timeout == timedelta(minutes=70)


@pytest.mark.usefixtures("one_rank")
def test_a_run_that_waits_for_room_on_a_disk_does_not_hang(
    demo_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path, demo_models, run_steps=1)
    (tmp_path / "checkpoints").write_text("in the way")
    monkeypatch.setattr(export, "PAUSE", 0)
    called = []

    def alive() -> None:
        called.append("alive")

    def warnings() -> int:
        called.append("warnings")
        # Decoding asks for each token; then come one after the step, one before the save, and more.
        return int(called[-11:] == ["warnings", "alive"] * 5 + ["warnings"])

    settings = load(tmp_path / "settings.yaml")
    with pytest.raises(TrainerError, match="the models are lost"):
        loop.train(settings, tiny.attempt(tmp_path), tiny.cpu(settings), warnings, alive)
    assert called[-8:] == ["warnings", "alive"] * 4
