"""What clusters do to long jobs, done to runs of the real trainer on a real cluster.

Each run has a checkpoint after every second step, so that two steps at most are done again; four
where one was still being written when the run ended.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from itertools import pairwise
from pathlib import Path

import disks
import pytest
from cluster import Cluster, job_id, until, whole
from demo_run import Start, completed, hlrlhf, rank_of, shortened, steps

from hlrlhf import runs
from hlrlhf.jobs.states import look
from hlrlhf.runs import Attempt, Run, ledger
from hlrlhf.runs.ledger import Entry

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

OFTEN = "checkpoint.interval=2"
QUIET = ("--output=/dev/null", "--wrap=true")


def script_of(run: Run) -> int:
    """The process id of the batch script: another cluster may have a job of the same id."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes()
            if b"slurm_script" in words and (folder / "cwd").readlink() == run.directory:
                return int(folder.name)
    raise AssertionError("no script runs")


def has_no_process(run: Run) -> bool:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if str(run.directory).encode() in (folder / "cmdline").read_bytes():
                return False
    return True


def saved(run: Run) -> bool:
    return runs.saved(run) is not None


def few_again(entries: list[Entry]) -> None:
    """No attempt does more steps again than those since the checkpoint before."""
    for before, after in pairwise(entries):
        assert before.last_step is not None
        assert after.first_step is not None
        assert 0 <= before.last_step + 1 - after.first_step <= 4


def completes_when_resumed(run: Run) -> None:
    last = shortened(run)
    hlrlhf("resume", run.name, "--wait")
    assert steps(run) == list(range(1, last + 1))
    few_again(ledger.entries(run))


def test_a_daemon_that_dies_is_not_noticed_and_a_node_that_dies_gives_way_to_another(
    on_slurm: Cluster, start_demo: Start
) -> None:
    run = start_demo("dead", OFTEN)
    node = look([run])[0].node_list
    with on_slurm.away("slurmd", "-D", "-N", node):
        seen = len(steps(run))
        until(lambda: len(steps(run)) > seen and saved(run), "a step and a checkpoint")
    with on_slurm.crashed(node):
        last = shortened(run)
        on_slurm.start_now(job_id(run))
        completed(on_slurm, run, last)
    first, second = ledger.entries(run)
    assert (first.nodes, first.exit_code) == (node, None)
    assert "left no word" in first.why
    assert second.nodes != node
    few_again([first, second])


def test_a_script_that_is_killed_takes_its_ranks_along(
    on_slurm: Cluster, start_demo: Start
) -> None:
    run = start_demo("shell", OFTEN)
    until(lambda: saved(run), "a checkpoint")
    os.kill(script_of(run), signal.SIGKILL)
    on_slurm.wait(job_id(run), "FAILED")
    until(lambda: has_no_process(run), "the ranks' end")
    until(lambda: look([run])[0].finished, "accounting")
    assert look([run])[0].state in ("FAILED", "STOPPED_EARLY")
    completes_when_resumed(run)


def test_a_job_that_outlives_its_limit_is_ended_and_can_go_on(
    on_slurm: Cluster, start_demo: Start
) -> None:
    run = start_demo("limit", OFTEN)
    until(lambda: saved(run), "a checkpoint")
    os.kill(rank_of(run), signal.SIGSTOP)
    on_slurm.run("scontrol", "update", f"JobId={job_id(run)}", "TimeLimit=1", "EndTime=now+1")
    on_slurm.wait(job_id(run), "TIMEOUT")
    until(lambda: has_no_process(run), "the rank's end")
    assert look([run])[0].state == "TIMEOUT"
    completes_when_resumed(run)


def test_requeued_by_hand_a_run_goes_on_and_cancelled_it_does_not(
    on_slurm: Cluster, start_demo: Start
) -> None:
    run = start_demo("hand", OFTEN, "slurm.requeue_on_failure=true")
    until(lambda: saved(run), "a checkpoint")
    on_slurm.run("scontrol", "requeue", job_id(run))
    # Until then it goes on taking steps, which would be counted for the next attempt's.
    until(lambda: has_no_process(run), "the first attempt's end")
    seen = len(steps(run))
    on_slurm.start_now(job_id(run))
    until(lambda: len(steps(run)) > seen + 2, "steps of the next attempt")
    on_slurm.run("scancel", job_id(run))
    on_slurm.wait(job_id(run), "CANCELLED")
    until(lambda: has_no_process(run), "the rank's end")
    assert on_slurm.job(job_id(run))["JobState"] == "CANCELLED", "not started again"
    assert steps(run) == list(range(1, len(steps(run)) + 1))
    until(lambda: len(ledger.entries(run)) == 2, "the second attempt's line")
    few_again(ledger.entries(run))


def test_a_controller_that_is_away_when_a_run_asks_to_be_started_again(
    on_slurm: Cluster, start_demo: Start, tmp_path: Path
) -> None:
    run = start_demo("away", OFTEN)
    attempt, script = Attempt(run, job_id(run), 0), script_of(run)
    os.kill(script, signal.SIGSTOP)
    for pid in (script, rank_of(run)):
        os.kill(pid, signal.SIGUSR1)  # as Slurm warns them
    # A step that cannot tell the controller of its end says so again only after a minute.
    shown = ("squeue", "--noheader", "--steps", f"--jobs={job_id(run)}", "--format=%i")
    until(lambda: f"{job_id(run)}.0" not in on_slurm.run(*shown).split(), "the step's end")
    with on_slurm.away("slurmctld", by=signal.SIGTERM):
        os.kill(script, signal.SIGCONT)
        assert "RUNNING" in hlrlhf("status", "away").stdout, "as accounting says"
        again = ("submit", "--config", str(run.settings_file), "--set=tag=other")
        assert "hlrlhf: " in hlrlhf(*again, code=3).stderr
        assert [path.name for path in run.directory.parent.iterdir()] == ["away"]
        unheard = "Unable to contact slurm controller"
        log = run.batch_log(job_id(run))
        until(lambda: f"slurm_load_jobs error: {unheard}" in log.read_text(), "the question")
        assert not attempt.ended.exists()
    until(whole(attempt.ended), "the end of the attempt")
    last = shortened(run)
    on_slurm.start_now(job_id(run))
    completed(on_slurm, run, last)
    few_again(ledger.entries(run))


@pytest.mark.parametrize("signalled", [False, True], ids=["TERM", "USR1"])
def test_a_preempted_run_goes_on_when_there_is_room(
    on_slurm: Cluster, start_demo: Start, signalled: bool
) -> None:
    """Slurm sends the signal that a job has asked for only where the site says so."""
    with on_slurm.configured("SlurmctldParameters=preempt_send_user_signal" if signalled else ""):
        run = start_demo("low", OFTEN, "slurm.partition=low", "slurm.signal_lead=30")
        high = ("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", *QUIET)
        first = on_slurm.run(*high).strip()
        on_slurm.wait(first, "COMPLETED")
        last = shortened(run)
        on_slurm.start_now(job_id(run))
        completed(on_slurm, run, last)
    before, _ = entries = ledger.entries(run)
    assert before.exit_code == 75
    assert ("SIGUSR1" if signalled else "SIGTERM") in before.why
    few_again(entries)
    assert before.last_step == (entries[1].first_step or 0) - 1, "it had saved"


def test_a_full_disk_costs_checkpoints_and_records_but_not_the_run(
    on_slurm: Cluster, start_demo: Start, tmp_path: Path
) -> None:
    log = tmp_path / "log"

    def said(what: str) -> int:
        return log.read_text().count(what)

    with disks.disk(tmp_path / "small", "50m") as small:
        run = start_demo("full", OFTEN, f"base_out_path={small}", f"log_file={log}")
        lost = "metrics.jsonl: cannot be written"
        for what in (lost, "the checkpoint of step"):
            # Again and again: a checkpoint that was not finished is removed, which makes room.
            until(lambda what=what: disks.fill(small) and said(what), f"the warning: {what}")
        disks.fill(small).unlink()
        again = "metrics.jsonl: can be written again; records lost: "
        until(lambda: said(again) == said(lost), "records")
        hlrlhf("cancel", "--save", "full")
        done, last = steps(run)[-1], shortened(run)
        hlrlhf("resume", "full", "--wait")
        assert steps(run)[-3:] == [done + 1, done + 2, last]
        first, second = ledger.entries(run)
        assert (first.last_step, second.first_step) == (done, done + 1)
        assert look([run])[0].state == "COMPLETED"
        assert "is complete" in hlrlhf("resume", "full").stderr


def test_a_run_whose_directory_is_deleted_ends(on_slurm: Cluster, start_demo: Start) -> None:
    run = start_demo("gone", OFTEN, "slurm.requeue_on_failure=true")
    rank = rank_of(run)
    os.kill(rank, signal.SIGSTOP)  # what it makes meanwhile would be in the way
    shutil.rmtree(run.directory)
    os.kill(rank, signal.SIGCONT)
    on_slurm.wait(runs.find("gone").job().id, "FAILED")  # type: ignore[union-attr]
    assert not run.directory.exists()


def test_a_rank_that_hangs_is_named_and_the_run_started_again(
    on_slurm: Cluster, start_demo: Start
) -> None:
    two = ("devices_per_node=2", "mbs=8", "guard.hang=0.5", "slurm.requeue_on_failure=true")
    run = start_demo("hung", OFTEN, *two)
    until(lambda: saved(run), "a checkpoint")
    os.kill(rank_of(run, 1), signal.SIGSTOP)
    until(whole(Attempt(run, job_id(run), 0).ended), "the end of the attempt")
    last = shortened(run)
    on_slurm.start_now(job_id(run))
    completed(on_slurm, run, last)
    first, second = ledger.entries(run)
    assert "rank 1 does not answer" in first.why
    assert second.exit_code == 0
    few_again([first, second])


def test_a_device_that_does_not_answer_costs_its_node_the_next_attempt(
    on_slurm: Cluster, start_demo: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Gaudi's software is a stand-in, which finds no device on the first node that is taken."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "gaudi"))
    broken = tmp_path / "broken"
    setup = (
        f"[ -e {broken} ] || echo $SLURMD_NODENAME >{broken}",
        f'[ "$(cat {broken})" != $SLURMD_NODENAME ] || export STAND_IN_DEVICES=0',
        f"export PYTHONPATH={os.environ['PYTHONPATH']} STAND_IN_CALLS={tmp_path / 'calls'}",
    )
    run = start_demo(
        "device",
        OFTEN,
        "device=hpu",
        "run_steps=3",
        "slurm.requeue_on_failure=true",
        f"environment.setup={list(setup)!r}",
        wait=False,
    )
    until(whole(Attempt(run, job_id(run), 0).ended), "the end of the attempt")
    on_slurm.start_now(job_id(run))
    completed(on_slurm, run, 3)
    first, second = ledger.entries(run)
    assert "sees no device on this node" in first.why
    assert (first.at_fault, first.first_step) == (broken.read_text().strip(), None)
    assert second.nodes != first.nodes
