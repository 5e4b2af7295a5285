"""What became of jobs, as a real Slurm tells it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cluster import Cluster, job_id, until

from hlrlhf import runs
from hlrlhf.jobs import states
from hlrlhf.jobs.states import look, merge
from hlrlhf.runs import Job, Outcome, Run
from hlrlhf.slurm.answers import UNKNOWN, State
from hlrlhf.slurm.client import SlurmError

Submit = Callable[..., Run]

EXIT = "trap 'echo $? >\"logs/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.exit\"' EXIT\n"


@pytest.mark.slurm
def test_every_kind_of_job_in_one_look(on_slurm: Cluster, submit: Submit) -> None:
    """Pending, running, completed, failed, killed by a signal, cancelled, requeued, unknown."""
    pending = submit("true", "--begin=now+1hour")
    running = submit("sleep 600")
    completed = submit("true")
    failed = submit("exit 3")
    killed = submit("kill -SEGV $$")
    cancelled = submit("sleep 600")
    requeued = submit("[ $SLURM_RESTART_COUNT ] || sleep 600; sleep 600", "--requeue")
    waiting = submit("sleep 600", "--requeue")
    began = time.time()
    unknown = runs.create(pending.directory.parent, "unknown")
    unknown.record(Job("slurm", "999999", None, 0))
    bare = runs.create(pending.directory.parent, "bare")
    for run in (running, cancelled, requeued, waiting):
        on_slurm.wait(job_id(run), "RUNNING")
    on_slurm.run("scancel", job_id(cancelled))
    # Within the second of its submission a requeue cannot be told from it.
    until(lambda: time.time() > began + 3, "the next second")
    on_slurm.run("scontrol", "requeue", job_id(requeued))
    on_slurm.run("scontrol", "requeue", job_id(waiting))
    on_slurm.start_now(job_id(requeued))
    on_slurm.wait(job_id(requeued), "RUNNING")
    on_slurm.wait(job_id(waiting), "PENDING")
    for run in (completed, failed, killed, cancelled):
        on_slurm.wait(job_id(run), "COMPLETED", "FAILED", "CANCELLED")

    every = [
        pending, running, completed, failed, killed, cancelled, requeued, waiting, unknown, bare
    ]  # fmt: skip
    # Accounting follows the queue within seconds.
    lagging = [requeued, waiting]
    until(
        lambda: look([killed])[0].finished and all(state.restarts for state in look(lagging)),
        "accounting",
    )
    seen = look(every)

    assert [(state.state, state.ended, state.exit_code, state.restarts) for state in seen] == [
        ("PENDING", False, None, 0),
        ("RUNNING", False, None, 0),
        ("COMPLETED", True, 0, 0),
        ("FAILED", True, 3, 0),
        ("FAILED", True, 128 + 11, 0),
        ("CANCELLED", True, None, 0),
        ("RUNNING", False, None, 1),
        ("PENDING", False, None, 1),
        (UNKNOWN, False, None, 0),
        (UNKNOWN, False, None, 0),
    ]
    assert seen[0].started is None
    assert seen[0].reason == "BeginTime"
    assert seen[1].node_list in ("n1", "n2")
    assert seen[1].elapsed is not None
    assert seen[1].nodes == 1
    assert seen[-1].reason == "was not submitted"
    for run in every[:8]:
        on_slurm.run("scancel", job_id(run))


@pytest.mark.slurm
@pytest.mark.slow
def test_a_time_out(on_slurm: Cluster, submit: Submit) -> None:
    run = submit("sleep 600", "--time=5")
    on_slurm.wait(job_id(run), "RUNNING")
    on_slurm.run("scontrol", "update", f"JobId={job_id(run)}", "TimeLimit=0")
    on_slurm.wait(job_id(run), "TIMEOUT")
    (state,) = look([run])
    assert state.state == "TIMEOUT"
    assert state.ended


@pytest.mark.slurm
def test_an_id_that_slurm_used_before_is_another_job(on_slurm: Cluster, submit: Submit) -> None:
    run = submit("true")
    on_slurm.wait(job_id(run), "COMPLETED")
    job = run.job()
    assert job is not None
    # As if ours had been submitted two hours after the job that Slurm knows by this id.
    run.record(replace(job, submitted=job.submitted + 7200))
    (state,) = look([run])
    assert state.state == UNKNOWN
    assert re.search(r"submitted 7\d\d\d s before .* clock .* was ahead", state.reason)


@pytest.mark.slurm
def test_a_job_on_a_named_cluster(on_slurm: Cluster, submit: Submit) -> None:
    run = submit("exit 4", "--clusters=test")
    job = run.job()
    assert job is not None
    assert job.cluster == "test"
    on_slurm.wait(job.id, "FAILED")
    until(lambda: look([run])[0].exit_code == 4, "accounting")


@pytest.mark.slurm
@pytest.mark.slow
def test_a_site_without_accounting(on_slurm_without_accounting: Cluster, submit: Submit) -> None:
    """What the queue forgets, the exit code in the run directory still tells."""
    cluster = on_slurm_without_accounting
    good, bad, mute = submit(EXIT + "true"), submit(EXIT + "exit 5"), submit("exit 5")
    running = submit(EXIT + "sleep 600")
    cluster.wait(job_id(running), "RUNNING")
    for run in (good, bad):  # the queue may have forgotten the third
        until(lambda run=run: look([run])[0].ended, "the end")
    assert [state.state for state in look([good, bad])] == ["COMPLETED", "FAILED"]
    until(lambda: not cluster.job(job_id(mute)), "the queue to forget")
    until(lambda: not cluster.job(job_id(bad)), "the queue to forget")
    until(lambda: not cluster.job(job_id(good)), "the queue to forget")
    seen = look([good, bad, mute, running])
    assert [(state.state, state.exit_code) for state in seen] == [
        ("COMPLETED", 0),
        ("FAILED", 5),
        (UNKNOWN, None),
        ("RUNNING", None),
    ]
    cluster.run("scancel", job_id(running))


@pytest.mark.slurm
@pytest.mark.slow
def test_accounting_answers_while_the_controller_does_not(
    on_slurm: Cluster, submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed, running = submit("exit 6"), submit("sleep 600")
    on_slurm.wait(job_id(failed), "FAILED")
    on_slurm.wait(job_id(running), "RUNNING")
    until(lambda: "6:0" in on_slurm.run("sacct", "-nXPo", "ExitCode", "-j", job_id(failed)), "it")
    until(lambda: "RUN" in on_slurm.run("sacct", "-nXPo", "State", "-j", job_id(running)), "it")
    monkeypatch.setenv("SLURM_CONF", str(without(on_slurm, tmp_path, "SlurmctldPort", "1")))
    assert [(s.state, s.exit_code) for s in look([failed, running])] == [
        ("FAILED", 6),
        ("RUNNING", None),
    ]
    on_slurm.run("scancel", job_id(running))


@pytest.mark.slurm
def test_an_unreachable_slurm_is_an_error_but_no_hindrance_to_runs_on_this_machine(
    on_slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.create(tmp_path, "run")
    run.record(Job("slurm", "1", None, 0))
    here = runs.create(tmp_path, "here")
    here.record(Job("local", "1", None, 0))
    conf = without(on_slurm, tmp_path, "AuthInfo", "socket=/nowhere")
    conf.write_text(conf.read_text() + "AccountingStoragePass=/nowhere\n")
    monkeypatch.setenv("SLURM_CONF", str(conf))
    with pytest.raises(SlurmError, match=r"(?i)munge"):
        look([here, run])
    assert look([here])[0].state == "FAILED"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match="squeue: not found"):
        look([run])


@pytest.mark.slurm
def test_polling_outlives_a_slurm_that_is_away(
    on_slurm: Cluster, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = submit("sleep 600")
    polled = states.poll([run], interval=0.1, meanwhile=lambda: monkeypatch.setenv("PATH", path()))
    paths = iter(["/nowhere", "/nowhere"])
    home = on_slurm.environ["PATH"]

    def path() -> str:
        return next(paths, home)

    assert not next(polled)[0].ended
    assert not next(polled)[0].ended
    on_slurm.run("scancel", job_id(run))
    on_slurm.wait(job_id(run), "CANCELLED")
    assert next(polled)[0].state == "CANCELLED"


def test_runs_on_this_machine(tmp_path: Path) -> None:
    run = runs.create(tmp_path, "run")
    run.record(Job("local", "1", None, 0))
    assert look([run])[0].reason == "the launcher was killed"
    for said, state, code, why in [
        ("75\nwarned\n", "STOPPED_EARLY", 75, "warned"),
        ("1\nno such model\n", "FAILED", 1, "no such model"),
        ("0\n", "COMPLETED", 0, ""),
    ]:
        (run.logs / "local.0.exit").write_text(said)
        (seen,) = look([run])
        assert (seen.state, seen.exit_code, seen.reason) == (state, code, why)
        assert seen.ended


def test_a_record_that_was_tampered_with_hides_no_other_run(tmp_path: Path) -> None:
    run, other = runs.create(tmp_path, "run"), runs.create(tmp_path, "other")
    run.job_file.write_text(json.dumps({"kind": "slurm", "id": "--help", "cluster": None}))
    seen = look([run, other])
    assert seen[0].state == UNKNOWN
    assert "job.json" in seen[0].reason


@pytest.mark.slurm
def test_a_script_that_its_node_cannot_start(on_slurm: Cluster, submit: Submit) -> None:
    """As when the folder of the runs is not on the node: Slurm says 0:53."""
    run = submit("true", "--output=/nowhere/at/all/log")
    on_slurm.wait(job_id(run), "FAILED")
    until(lambda: look([run])[0].finished, "accounting")
    (state,) = look([run])
    assert (state.state, state.exit_code) == ("FAILED", None)
    assert "HL_BASE_OUT_PATH" in state.reason


@pytest.mark.slurm
def test_what_the_run_says_of_its_end_beside_what_slurm_says(
    on_slurm: Cluster, submit: Submit
) -> None:
    say = "printf '%s\\n' {code} words >logs/$SLURM_JOB_ID.0.exit; {end}"
    stopped = submit(say.format(code=75, end="exit 75"))
    failed = submit(say.format(code=1, end="exit 1"))
    cancelled = submit(say.format(code=75, end="sleep 600"))
    on_slurm.wait(job_id(cancelled), "RUNNING")
    until(lambda: runs.attempts(cancelled, cancelled.job()), "its words")  # type: ignore[arg-type]
    on_slurm.run("scancel", job_id(cancelled))
    for run in (stopped, failed, cancelled):
        on_slurm.wait(job_id(run), "FAILED", "CANCELLED")
    until(lambda: all(state.finished for state in look([stopped, failed, cancelled])), "accounting")
    seen = look([stopped, failed, cancelled])
    assert [(state.state, state.exit_code) for state in seen] == [
        ("STOPPED_EARLY", 75),
        ("FAILED", 1),
        ("CANCELLED", 75),
    ]
    assert [state.reason for state in seen[:2]] == ["words", "words"]
    assert seen[2].reason.endswith("; words")


@pytest.mark.slurm
def test_more_jobs_than_fit_into_a_command(
    on_slurm: Cluster, submit: Submit, tmp_path: Path
) -> None:
    run = submit("exit 3")
    on_slurm.wait(job_id(run), "FAILED")
    until(lambda: look([run])[0].finished, "accounting")
    others = []
    for number in range(20_000):
        other = Run(tmp_path / f"{number}")
        other.directory.mkdir()
        other.record(Job("slurm", f"{10_000_000 + number}", None, 0))
        others.append(other)
    seen = look([*others, run])
    assert {state.state for state in seen[:-1]} == {UNKNOWN}
    assert (seen[-1].state, seen[-1].exit_code) == ("FAILED", 3)


FAILED = State("FAILED", exit_code=3, submitted=10)
RUNNING = State("RUNNING", submitted=10)
REQUEUED = State("REQUEUED", submitted=5)
GOOD, EARLY, BAD = Outcome(0), Outcome(75), Outcome(3)


@pytest.mark.parametrize(
    ("queued", "recorded", "traces", "state", "code", "restarts"),
    [
        pytest.param(RUNNING, [FAILED], {}, "RUNNING", None, 0, id="the queue knows best"),
        pytest.param(None, [FAILED], {}, "FAILED", 3, 0, id="accounting after the queue"),
        pytest.param(None, [REQUEUED, FAILED], {}, "FAILED", 3, 1, id="a restart"),
        pytest.param(
            replace(FAILED, exit_code=None), [RUNNING], {0: BAD}, "FAILED", 3, 0, id="lag"
        ),
        pytest.param(
            None, [RUNNING], {0: GOOD}, "COMPLETED", 0, 0, id="a runaway job that wrote 0"
        ),
        pytest.param(None, [RUNNING], {}, UNKNOWN, None, 0, id="a runaway job"),
        pytest.param(
            None,
            [],
            {0: EARLY, 1: GOOD},
            "COMPLETED",
            0,
            1,
            id="exit codes of two attempts",
        ),
        pytest.param(
            None, [REQUEUED, FAILED], {0: EARLY}, "FAILED", 3, 1, id="no word of the last"
        ),
        pytest.param(
            None, [], {0: EARLY, 1: None}, UNKNOWN, None, 1, id="no exit code of the last"
        ),
        pytest.param(None, [], {}, UNKNOWN, None, 0, id="nothing"),
    ],
)
def test_merging(
    queued: State | None,
    recorded: list[State],
    traces: dict[int, Outcome | None],
    state: str,
    code: int | None,
    restarts: int,
) -> None:
    merged = merge(queued, recorded, traces)
    assert (merged.state, merged.exit_code, merged.restarts) == (state, code, restarts)
    assert merged.ended == (state in ("FAILED", "COMPLETED"))


def without(cluster: Cluster, folder: Path, key: str, value: str) -> Path:
    """A copy of the cluster's configuration with one line changed."""
    lines = (cluster.folder / "slurm.conf").read_text().splitlines()
    changed = [f"{key}={value}" if line.startswith(f"{key}=") else line for line in lines]
    (folder / "gres.conf").write_bytes((cluster.folder / "gres.conf").read_bytes())
    (folder / "slurm.conf").write_text("\n".join(changed) + "\n")
    return folder / "slurm.conf"
