"""`hlrlhf submit`, on a real cluster and on this machine."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from cluster import LEAVE, Cluster, job_id, until, whole
from mandatory import MANDATORY

from hlrlhf import runs
from hlrlhf.cli import main
from hlrlhf.jobs.states import look
from hlrlhf.settings.layers import load

# What stands in for the trainer: the ranks are whatever `environment.python` runs.
QUIET = ("--output=/dev/null", "--wrap=true")
RANK = 'echo "rank $RANK of $WORLD_SIZE, attempt $HLRLHF_ATTEMPT, $3"'


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The mandatory settings in the environment; the folder of the runs."""
    own = {
        "HL_TAG": "try",
        "HL_BASE_OUT_PATH": str(tmp_path / "runs"),
        "HL_DEVICES_PER_NODE": "2",
        "HL_ENVIRONMENT_PYTHON": str(rank(tmp_path)),
    }
    for name, value in (MANDATORY | own).items():
        monkeypatch.setenv(name, value)
    return tmp_path / "runs"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models and data that exist on this machine."""
    for name in ("HL_ACTOR_MODEL_PATH", "HL_CRITIC_MODEL_PATH", "HL_DATASET_PATH"):
        monkeypatch.setenv(name, str(tmp_path))


# Slurm signals all processes of a step, one after the other: what is waited for may end first, and
# what would outlive the rank holds the step.
STAY = "sleep 100 & wait; sleep 5 & wait"


def rank(folder: Path, body: str = RANK) -> Path:
    """A command that does what `body` says, in bash, and leaves."""
    file = folder / "rank"
    file.write_text(f"#!/bin/bash\n{LEAVE}\n{body}\nleave 0\n")
    file.chmod(0o755)
    return file


def submit(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hlrlhf", "submit", *arguments],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def waiting(lock: int) -> int:
    """How many processes wait for a locked file."""
    own = f":{os.fstat(lock).st_ino} "
    lines = Path("/proc/locks").read_text().splitlines()
    return sum("->" in line and own in line for line in lines)


def nothing_left(folder: Path) -> bool:
    return not folder.exists() and not runs.every()


def test_dry_run(settings: Path) -> None:
    done = submit("--dry-run")
    assert done.returncode == 0
    assert done.stdout.startswith("#!/bin/bash\n")
    assert f"would make {settings}/try" in done.stderr
    assert nothing_left(settings)


def test_dry_run_json(settings: Path) -> None:
    shown = json.loads(submit("--dry-run", "--json").stdout)
    assert shown["directory"] == f"{settings}/try"
    assert shown["script"] == submit("--dry-run").stdout


def test_hints_are_words_beside_the_script(settings: Path) -> None:
    plain = submit("--dry-run")
    hinted = submit("--dry-run", "--set", "checkpoint_path=/dev/shm/saved")
    words = "hint: checkpoint_path = '/dev/shm/saved' (flag --set): nodes may not see it"
    assert words in hinted.stderr
    assert words not in plain.stderr
    missing = "hint: dataset.path = '/data/prompts' (environment HL_DATASET_PATH): not on this"
    assert missing in plain.stderr
    assert hinted.stdout == plain.stdout
    assert json.loads(submit("--dry-run", "--json").stdout)["script"] == plain.stdout


def test_the_demos_models_are_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = submit("--preset", "demo", "--local", "--dry-run")
    assert here.returncode == 0
    assert "not on this machine" not in submit("--preset", "demo", "--dry-run").stderr
    own = ("--set", "actor.model_path=/nowhere")
    assert "not on this machine" in submit("--preset", "demo", "--local", *own).stderr
    assert not list(tmp_path.iterdir())


def test_dry_run_here(settings: Path, here: None) -> None:
    done = submit("--dry-run", "--local")
    assert (done.returncode, done.stdout) == (0, "")
    assert "would start 2 ranks" in done.stderr
    assert nothing_left(settings)


@pytest.mark.parametrize(
    "arguments", [["--dry-run", "--wait"], ["--test-only", "--local"], ["--dry-run", "--test-only"]]
)
def test_what_does_not_go_together(settings: Path, arguments: list[str]) -> None:
    done = submit(*arguments)
    assert done.returncode == 2
    assert nothing_left(settings)


@pytest.mark.slurm
def test_submit_and_wait(on_slurm: Cluster, settings: Path) -> None:
    done = submit("--set", "num_nodes=2", "--wait")
    assert done.returncode == 0, done.stderr
    run = runs.find("try")
    assert run.directory == settings / "try"
    job = run.job()
    assert job is not None
    assert done.stdout == f"{job.id}\n"
    assert (job.kind, job.cluster) == ("slurm", None)
    assert f"run try in {run.directory}" in done.stderr
    assert "hlrlhf logs -f try" in done.stderr
    assert "COMPLETED" in done.stderr
    # Every rank knew itself, on both nodes, and ran from the directory's own settings.
    lines = (run.logs / f"{job.id}.0.log").read_text().splitlines()
    assert sorted(lines) == [f"rank {n} of 4, attempt 0, {run.directory}" for n in range(4)]
    assert (run.logs / f"{job.id}.0.exit").read_text() == "0\n"
    assert (run.logs / f"{job.id}.batch.log").exists()
    assert load(run.settings_file).num_nodes == 2
    assert run.script.read_text() == submit("--set", "num_nodes=2", "--dry-run").stdout


@pytest.mark.slurm
def test_submitting_twice_makes_two_runs(on_slurm: Cluster, settings: Path) -> None:
    first = json.loads(submit("--json").stdout)
    second = json.loads(submit("--json").stdout)
    assert first["run"] == "try"
    assert second["run"] == "try-2"
    assert second["directory"] == f"{settings}/try-2"
    assert second["job"]["id"] != first["job"]["id"]
    assert json.loads((settings / "try-2" / "job.json").read_text()) == second["job"]
    shown = on_slurm.run("scontrol", "show", "job", second["job"]["id"])
    assert "JobName=try-2" in shown


@pytest.mark.slurm
def test_of_submissions_at_the_same_time_none_is_lost_or_doubled(
    on_slurm: Cluster, settings: Path
) -> None:
    lock = Path(os.environ["XDG_STATE_HOME"], "hlrlhf", "runs.lock")
    lock.parent.mkdir()
    with ThreadPoolExecutor(6) as pool:
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            done = pool.map(submit, ["--json"] * 6, ["--set=slurm.extra=--hold"] * 6)
            until(lambda: waiting(file.fileno()) == 6, "all to wait for a name")
        told = [json.loads(one.stdout) for one in done]
    assert {one["run"] for one in told} == {"try", *(f"try-{number}" for number in range(2, 7))}
    jobs = {one["job"]["id"]: one["directory"] for one in told}
    assert len(jobs) == 6
    assert {job_id(run): str(run.directory) for run in runs.every()} == jobs
    queue = on_slurm.run("squeue", "-h", "-o", "%A|%Z").split()
    assert dict(line.split("|") for line in queue if str(settings) in line) == jobs
    on_slurm.run("scancel", *jobs)


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("end", "code", "state"),
    [
        ("exit 3", 3, "FAILED (rank 1 on"),
        ("leave 1 'no such model'", 1, "FAILED (no such model)"),
        ("leave 75 warned", 75, "STOPPED_EARLY (warned)"),
        ("kill -KILL $$", 137, "FAILED (rank 1 on"),
        ("exit 0", 1, "FAILED (it ended without a word"),
    ],
    ids=["a code", "an error", "a stop", "a signal", "no word"],
)
def test_wait_ends_with_the_code_of_the_first_rank_that_ended_badly(
    on_slurm: Cluster, settings: Path, tmp_path: Path, end: str, code: int, state: str
) -> None:
    """Whatever srun says, which ends the others and tells the highest code of all."""
    others = "exit 0" if end in ("leave 75 warned", "exit 0") else "exec sleep 1000"
    rank(tmp_path, f"((RANK == 1)) || {others}\n{end}")
    done = submit("--wait")
    assert done.returncode == code, done.stderr
    assert state in done.stderr


@pytest.mark.slurm
def test_a_stop_does_not_end_the_ranks_that_leave_later(
    on_slurm: Cluster, settings: Path, tmp_path: Path
) -> None:
    """Unlike a failure, which ends those that would never leave, see above."""
    rank(tmp_path, "((RANK == 0)) && leave 75 words\nsleep 1\necho rank $RANK left")

    assert submit("--wait").returncode == 75

    (run,) = runs.every()
    job = run.job()
    assert job is not None
    assert runs.attempts(run, job) == {0: runs.Outcome(75, "words")}
    assert "rank 1 left" in (run.logs / f"{job.id}.0.log").read_text()


def test_a_job_that_may_be_queued_keeps_its_directory(settings: Path, tmp_path: Path) -> None:
    mute = tmp_path / "bin" / "sbatch"
    mute.parent.mkdir()
    mute.write_text("#!/bin/sh\n")
    mute.chmod(0o755)

    done = submit(PATH=f"{mute.parent}:{os.environ['PATH']}")

    assert (done.returncode, done.stdout) == (3, "")
    assert "sbatch printed no job id" in done.stderr
    assert "squeue --name=try" in done.stderr
    assert (settings / "try" / "job.sbatch").is_file()


def refusal(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Slurm's words, then the request, then the settings."""
    assert (done.returncode, done.stdout) == (2, "")
    said, asked, settings = done.stderr[done.stderr.index("hlrlhf: Slurm refuses") :].rsplit(
        "\nhlrlhf: ", maxsplit=2
    )
    assert said.startswith("hlrlhf: Slurm refuses this job: ")
    assert words[0] in said
    assert asked.startswith("it asked for --nodes=1 --ntasks-per-node=")
    for own in ("--job-name", "--chdir", "--output", "--open-mode"):
        assert own not in asked
    assert words[1] in asked
    assert words[2] in settings
    assert "`hlrlhf show`" in settings


NOWHERE = (
    "invalid partition specified: nowhere",
    "=2 --gres=hpu:2 --partition=nowhere --no-requeue --licenses=a#b",
    "set by devices_per_node = 2 (environment HL_DEVICES_PER_NODE), "
    "slurm.partition = 'nowhere' (flag --set), slurm.extra = ['--licenses=a#b'] (flag --set); ",
)


@pytest.mark.slurm
def test_what_slurm_refuses_is_what_was_asked_for(on_slurm: Cluster, settings: Path) -> None:
    flags = ("--set", "slurm.partition=nowhere", "--set", "slurm.extra=--licenses=a#b")
    refusal(submit(*flags), *NOWHERE)
    refusal(submit("--test-only", *flags), *NOWHERE)
    assert nothing_left(settings)


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("devices", "arguments"),
    # With more tasks than processors too, Slurm lets the job wait for a partition that has them.
    [(16, []), (16, ["--test-only"]), (100, ["--test-only"])],
)
def test_a_request_that_no_node_can_meet(
    on_slurm: Cluster, settings: Path, devices: int, arguments: list[str]
) -> None:
    flags = (f"devices_per_node={devices}", f"gbs={devices * 4}")
    done = submit(*arguments, *(word for flag in flags for word in ("--set", flag)))
    request = f"={devices} --gres=hpu:{devices} "
    refusal(done, "not available", request, f"devices_per_node = {devices} (flag --set)")
    assert nothing_left(settings)


@pytest.mark.slurm
def test_test_only(on_slurm: Cluster, settings: Path) -> None:
    good = submit("--test-only")
    assert good.returncode == 0
    assert re.search(r"Job \d+ to start at", good.stdout)
    assert nothing_left(settings)


@pytest.mark.slurm
def test_slurm_away(on_slurm: Cluster, settings: Path, tmp_path: Path) -> None:
    conf = (on_slurm.folder / "slurm.conf").read_text()
    away = tmp_path / "slurm.conf"
    away.write_text(re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=1\nMessageTimeout=2", conf))
    done = submit(SLURM_CONF=str(away))
    assert (done.returncode, done.stdout) == (3, "")
    assert nothing_left(settings)


@pytest.mark.slurm
def test_a_clock_that_is_ahead_of_slurms(
    on_slurm: Cluster,
    settings: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is said, and the job is found again: its time of submission is Slurm's own."""
    ahead = time.time() + 7200
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: ahead)
        patch.setattr("sys.argv", ["hlrlhf", "submit"])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 0
    assert re.search(r"clock is 7\d\d\d s ahead of Slurm's", capsys.readouterr().err)
    (run,) = runs.every()
    (state,) = look([run])
    assert state.state in ("PENDING", "RUNNING", "COMPLETED")


@pytest.mark.slurm
def test_submitting_from_inside_a_job(on_slurm: Cluster, settings: Path) -> None:
    """The surrounding job's own variables do not reach this one."""
    inside = {"SLURM_NTASKS_PER_NODE": "7", "SBATCH_PARTITION": "nowhere", "SLURM_CPU_BIND": "x"}
    done = submit("--wait", **inside)
    assert done.returncode == 0, done.stderr


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("number", "words"), [("USR1", "warned"), ("TERM", "ended")], ids=["USR1", "TERM"]
)
def test_a_warning_reaches_every_rank(
    on_slurm: Cluster, settings: Path, tmp_path: Path, number: str, words: str
) -> None:
    """Slurm warns the batch shell; the ranks' own exit code is the job's."""
    rank(
        tmp_path,
        f"trap 'echo {words} $RANK; leave 75' {number}\necho ready\n{STAY}",
    )
    job = submit("--set", "num_nodes=2", "--set", "slurm.signal_lead=60").stdout.strip()
    logs = settings / "try" / "logs"
    log = logs / f"{job}.0.log"
    until(lambda: log.exists() and log.read_text().count("ready") == 4, "the ranks")
    on_slurm.run("scancel", "--batch", f"--signal={number}", job)
    until(whole(logs / f"{job}.0.exit"), "the end of the job")
    assert (logs / f"{job}.0.exit").read_text() == "75\n"
    assert "scancel: error" not in (logs / f"{job}.batch.log").read_text()
    # Where Slurm signals all processes of a task, a rank hears it twice.
    assert {f"{words} {number}" for number in range(4)} < set(log.read_text().splitlines())


@pytest.mark.slurm
def test_a_run_that_was_asked_to_stop_is_not_requeued(
    on_slurm: Cluster, settings: Path, tmp_path: Path
) -> None:
    """By its user, who signals the ranks as a preemption does."""
    rank(tmp_path, f"trap 'leave 75 warned' USR1\necho ready\n{STAY}")
    job = submit("--set", "slurm.requeue=true").stdout.strip()
    log = settings / "try" / "logs" / f"{job}.0.log"
    until(lambda: log.exists() and log.read_text().count("ready") == 2, "the ranks")
    on_slurm.run("scancel", "--signal=USR1", job)
    on_slurm.wait(job, "FAILED", "PENDING")
    assert on_slurm.job(job)["JobState"] == "FAILED"


@pytest.mark.slurm
def test_a_cancelled_job_says_nothing_false(
    on_slurm: Cluster, settings: Path, tmp_path: Path
) -> None:
    rank(tmp_path, "echo ready\nsleep 100 & wait")
    job = submit().stdout.strip()
    logs = settings / "try" / "logs"
    log = logs / f"{job}.0.log"
    until(lambda: log.exists() and log.read_text().count("ready") == 2, "the ranks")
    on_slurm.run("scancel", job)
    on_slurm.wait(job, "CANCELLED")
    until(whole(logs / f"{job}.0.exit"), "the end of the script")
    assert "scancel: error" not in (logs / f"{job}.batch.log").read_text()
    until(lambda: look([runs.find("try")])[0].finished, "accounting")
    (state,) = look([runs.find("try")])
    assert (state.state, state.exit_code) == ("CANCELLED", 143)


@pytest.mark.slurm
def test_a_failing_setup_line_is_named(on_slurm: Cluster, settings: Path) -> None:
    done = submit("--wait", "--set", "environment.setup=['false # no such module']")
    assert done.returncode == 1
    assert "environment.setup failed with exit code 1: false # no such module" in done.stderr


@pytest.mark.slurm
def test_a_requeued_job_logs_apart(on_slurm: Cluster, settings: Path, tmp_path: Path) -> None:
    go = tmp_path / "go"
    rank(tmp_path, f'{RANK}\n[ -e "{go}" ] || exec sleep 100')
    job = submit("--set", "slurm.requeue=true").stdout.strip()
    logs = settings / "try" / "logs"
    first, second = (logs / f"{job}.{attempt}.log" for attempt in (0, 1))
    until(lambda: first.exists() and first.read_text().count("rank") == 2, "the first attempt")
    go.touch()
    on_slurm.run("scontrol", "requeue", job)
    until(lambda: "JobState=PENDING" in on_slurm.run("scontrol", "show", "job", job), "the requeue")

    def started() -> object:
        # A requeued job waits two minutes, unless told otherwise.
        on_slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
        return whole(logs / f"{job}.1.exit")()

    until(started, "the second attempt")
    assert (logs / f"{job}.1.exit").read_text() == "0\n"
    assert "attempt 0" in first.read_text()
    assert "attempt 1" not in first.read_text()
    assert second.read_text().count("attempt 1") == 2


@pytest.mark.slurm
@pytest.mark.parametrize("requeue", [True, False], ids=["may be requeued", "may not"])
def test_a_preempted_job_stops_within_its_grace(
    on_slurm: Cluster, settings: Path, tmp_path: Path, requeue: bool
) -> None:
    """Slurm asks the ranks alone, by SIGTERM, and would requeue the job at the end of the grace."""
    rank(
        tmp_path,
        f"((HLRLHF_ATTEMPT)) && leave 0\ntrap 'leave 75 saved' TERM\necho ready\n{STAY}",
    )
    flags = ("slurm.partition=low", "slurm.exclusive=true", f"slurm.requeue={requeue}")
    job = submit(*(f"--set={flag}" for flag in flags)).stdout.strip()
    log = settings / "try" / "logs" / f"{job}.0.log"
    until(lambda: log.exists() and log.read_text().count("ready") == 2, "the ranks")
    on_slurm.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", *QUIET)
    said = log.with_suffix(".exit")
    until(whole(said), "the end of the attempt")
    assert said.read_text() == "75\nsaved\n"
    if requeue:
        on_slurm.start_now(job)
        assert on_slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED"
    else:
        on_slurm.wait(job, "FAILED")
        until(lambda: look([runs.find("try")])[0].finished, "accounting")
        (state,) = look([runs.find("try")])
        assert (state.state, state.exit_code, state.reason) == ("STOPPED_EARLY", 75, "saved")


@pytest.mark.slurm
def test_a_lost_node_is_no_success(on_slurm: Cluster, settings: Path, tmp_path: Path) -> None:
    """srun then ends with 0, and the batch script did."""
    rank(tmp_path, "trap '' TERM\necho ready\nsleep 100 & wait")
    flags = ("num_nodes=2", "devices_per_node=1")
    job = submit(*(f"--set={flag}" for flag in flags)).stdout.strip()
    log = settings / "try" / "logs" / f"{job}.0.log"
    until(lambda: log.exists() and log.read_text().count("ready") == 2, "the ranks")
    try:
        on_slurm.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=broken")
        on_slurm.wait(job, "NODE_FAIL")
    finally:
        # The node, which lives, may have come back by itself.
        on_slurm.run("scontrol", "update", "NodeName=n2", "State=RESUME", check=False)
    run = runs.find("try")
    until(whole(log.with_suffix(".exit")), "the end of the script")
    until(lambda: look([run])[0].finished, "accounting")
    (state,) = look([run])
    assert (state.state, state.exit_code) == ("NODE_FAIL", 1)
    # And where Slurm has forgotten the job.
    run.record(replace(run.job(), submitted=int(time.time()) + 3600))  # type: ignore[type-var]
    (state,) = look([run])
    assert (state.state, state.exit_code) == ("FAILED", 1)
    assert "without a word from the ranks" in state.reason


# --- without Slurm


TRAINER = """
import os, pathlib, signal, sys, time
print("rank", os.environ["RANK"], flush=True)
def leave(code, why):
    pathlib.Path("logs/local.0.rank").write_text(f"{code}\\n{why}\\n")
    os._exit(code)
"""


@pytest.fixture
def trainer(tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that stands before ours, so that `hlrlhf.trainer` is a small program."""
    import hlrlhf

    package = tmp_path / "site" / "hlrlhf"
    package.mkdir(parents=True)
    # All of ours, but the trainer.
    (package / "__init__.py").write_text(
        "import pathlib\n__version__ = '0'\n"
        f"__path__ = [str(pathlib.Path(__file__).parent), {next(iter(hlrlhf.__path__))!r}]\n"
    )
    main = package / "trainer" / "__main__.py"
    main.parent.mkdir()
    (main.parent / "__init__.py").touch()
    main.write_text(TRAINER + "leave(0, '')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("HL_DEVICE", "cpu")
    return main


def test_local(settings: Path, trainer: Path) -> None:
    done = submit("--local", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["job"]["kind"] == "local"
    run = runs.find("try")
    assert not run.script.exists()
    assert sorted((run.logs / "local.0.log").read_text().splitlines()) == ["rank 0", "rank 1"]
    assert "rank 1\n" in done.stderr
    assert f"everything is in {run.directory}" in done.stderr
    job = run.job()
    assert job is not None
    assert runs.attempts(run, job) == {0: runs.Outcome(0)}


def test_local_failure(settings: Path, trainer: Path) -> None:
    trainer.write_text(TRAINER + "leave(5, 'no such model')")
    done = submit("--local")
    assert done.returncode == 5
    assert "failed with exit code 5: no such model" in done.stderr


def test_local_with_a_taken_port_leaves_nothing(settings: Path, trainer: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = submit("--local", "--set", f"master_port={port}")
    assert done.returncode == 2
    assert f"HL_MASTER_PORT={port} is taken" in done.stderr
    assert nothing_left(settings)


def test_local_without_the_models_makes_nothing(settings: Path, trainer: Path) -> None:
    done = submit("--local", HL_CRITIC_MODEL_PATH="/models/critic")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "hlrlhf: critic.model_path = '/models/critic' (environment HL_CRITIC_MODEL_PATH): not on "
        "this machine, where --local reads it\n"
    )
    assert nothing_left(settings)


def test_local_on_two_nodes(settings: Path, trainer: Path) -> None:
    done = submit("--local", "--set", "num_nodes=2")
    assert done.returncode == 2
    assert "num_nodes = 2" in done.stderr
    assert nothing_left(settings)


def test_a_run_here_is_known_and_stopped(settings: Path, trainer: Path) -> None:
    trainer.write_text(
        TRAINER + "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})\n"
        "print('ready', flush=True)\nsignal.sigwait({signal.SIGUSR1})\nleave(75, 'warned')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "hlrlhf", "submit", "--local"], stdout=subprocess.DEVNULL
    )
    log = settings / "try" / "logs" / "local.0.log"
    until(lambda: log.exists() and log.read_text().count("ready") == 2, "the ranks")
    run = runs.find("try")
    assert run.is_held()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 75
    assert not run.is_held()
