"""Ranks in real containers: Docker on the two-node cluster, for a user who is not root."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import containers
import pytest
from cluster import LEAVE, Cluster, job_id, until, whole
from containers import Docker
from demo_run import ENDLESS, shortened
from ranks import read_lines

from hlrlhf import runs
from hlrlhf.runs import Run

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture(scope="module")
def docker() -> Iterator[Docker]:
    """The daemon; without its packages, or where it cannot start, the tests are left out."""
    lacking = containers.missing()
    if lacking:
        words = f"no containers here: missing {', '.join(lacking)}"
        if os.environ.get("CI") == "true":
            pytest.fail(words)
        pytest.skip(words)
    try:
        with Docker() as daemon:
            yield daemon
    except containers.StartError as error:
        pytest.skip(f"no containers here: Docker does not start ({error})")


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's own folder, outside of pytest's, which only root can enter."""
    folder = Path(tempfile.mkdtemp(prefix="home-"))
    shutil.chown(folder, containers.USER, containers.GROUP)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))
    monkeypatch.chdir(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def submit(
    on_slurm: Cluster,
    docker: Docker,
    home: Path,
    demo_models: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Run]:
    """Submits, as the user, a run of the demo's size on two nodes, each rank in a container."""
    monkeypatch.setenv("DOCKER_HOST", docker.host)
    models = shutil.copytree(demo_models, home / "models")
    for path in (models, *models.rglob("*")):
        shutil.chown(path, containers.USER, containers.GROUP)

    def submit(**changes: object) -> Run:
        settings = {
            "base_out_path": home / "runs",
            "actor.model_path": models / "actor",
            "critic.model_path": models / "reward",
            "dataset.path": models / "prompts" / "train.jsonl",
            "num_nodes": 2,
            "devices_per_node": 1,
            "environment.python": sys.executable,
            "container.kind": "docker",
            "container.image": containers.IMAGE,
            "container.mounts": json.dumps(containers.mounts()),
        } | {name.replace("__", "."): value for name, value in changes.items()}
        flags = [f"--set={name}={value}" for name, value in settings.items()]
        # The user reads the Python of these tests wherever it lies, and writes as a user does.
        user = [f"--reuid={containers.USER}", f"--regid={containers.GROUP}", "--clear-groups"]
        reads = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
        command = [sys.executable, "-m", "hlrlhf", "submit", "--json", "--preset=demo", *flags]
        done = subprocess.run(
            ["setpriv", *user, *reads, "--", *command], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return runs.find(json.loads(done.stdout)["run"])

    return submit


def said(run: Run) -> str:
    """All that the job wrote into its logs."""
    return "".join(file.read_text() for file in sorted(run.logs.iterdir()))


def log(run: Run) -> str:
    file = run.logs / f"{job_id(run)}.0.log"
    return file.read_text() if file.exists() else ""


def trains(run: Run) -> None:
    """Wait for the first step."""
    ends = run.logs / f"{job_id(run)}.0.exit"
    until(lambda: ends.exists() or (run.metrics.exists() and read_lines(run.metrics)), "a step")
    assert not ends.exists(), said(run)


def ended(run: Run) -> str:
    """Wait for the end of the batch script; its exit code."""
    file = run.logs / f"{job_id(run)}.0.exit"
    try:
        until(whole(file), f"the end of {run.name}")
    except TimeoutError as error:
        raise AssertionError(said(run)) from error
    return file.read_text().splitlines()[0]


def test_a_run_in_containers_trains_to_its_end(
    on_slurm: Cluster, docker: Docker, submit: Callable[..., Run]
) -> None:
    run = submit(run_steps=2)
    assert ended(run) == "0", said(run)
    on_slurm.wait(job_id(run), "COMPLETED")
    assert [record["step"] for record in read_lines(run.metrics)] == [1, 2]
    assert (run.directory / "checkpoints" / "final" / "actor" / "model.safetensors").exists()
    assert docker.of(job_id(run)) == []
    user = pwd.getpwnam(containers.USER)
    owners = {(file.lstat().st_uid, file.lstat().st_gid) for file in run.directory.rglob("*")}
    assert owners == {(user.pw_uid, user.pw_gid)}


def test_a_warned_run_in_containers_saves_is_requeued_and_goes_on(
    on_slurm: Cluster, docker: Docker, submit: Callable[..., Run]
) -> None:
    run = submit(run_steps=ENDLESS, epochs=99, slurm__signal_lead=60, slurm__requeue=True)
    trains(run)
    # To the batch shell, as Slurm warns.
    on_slurm.run("scancel", "--batch", "--signal=USR1", job_id(run))
    assert ended(run) == "75", said(run)
    assert runs.saved(run) is not None
    assert docker.of(job_id(run)) == []
    last = shortened(run)
    on_slurm.start_now(job_id(run))
    assert on_slurm.wait(job_id(run), "COMPLETED", "FAILED") == "COMPLETED", said(run)
    assert "the run goes on after step" in (run.logs / f"{job_id(run)}.1.log").read_text()
    assert [record["step"] for record in read_lines(run.metrics)] == list(range(1, last + 1))


@pytest.fixture
def stand_in(home: Path, submit: Callable[..., Run]) -> Callable[..., Run]:
    """Submits ranks that are a few lines of bash, in the containers of the trainer's."""

    def stand_in(body: str) -> Run:
        rank = home / "rank"
        rank.write_text(f"#!/bin/bash\n{LEAVE}{body}\n")
        rank.chmod(0o755)
        mounts = [*containers.mounts(), f"{rank}:{rank}:ro"]
        return submit(environment__python=rank, container__mounts=json.dumps(mounts))

    return stand_in


def test_a_rank_in_a_container_is_the_users_and_has_its_own_environment(
    docker: Docker, stand_in: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    run = stand_in(
        """env >"logs/env.$RANK"
echo "init=$(cat /proc/1/comm) user=$(id -u):$(id -g)" >>"logs/env.$RANK"
[ "$RANK" = 1 ] || until [ -e logs/env.1 ]; do sleep 0.05; done
leave 0"""
    )
    assert ended(run) == "0", said(run)
    user = pwd.getpwnam(containers.USER)
    for rank in ("0", "1"):
        found = set((run.logs / f"env.{rank}").read_text().splitlines())
        assert found >= {
            f"RANK={rank}",
            "LOCAL_RANK=0",
            "WORLD_SIZE=2",
            "LOCAL_WORLD_SIZE=1",
            "MASTER_ADDR=127.0.0.1",
            f"HLRLHF_JOB={job_id(run)}",
            "HLRLHF_ATTEMPT=0",
            "NCCL_DEBUG=INFO",
            "HOME=/tmp",
            f"PWD={run.directory}",
            f"init=docker-init user={user.pw_uid}:{user.pw_gid}",
        }
        assert "SECRET=x" not in found
    assert docker.of(job_id(run)) == []


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [("leave 1 broken", "1", "broken"), ("kill -KILL $$", "137", "was ended by SIGKILL")],
    ids=["failed", "killed"],
)
def test_a_rank_that_fails_leaves_no_container_of_the_others(
    docker: Docker, stand_in: Callable[..., Run], end: str, code: str, words: str
) -> None:
    """Slurm ends their clients only; and one may have been made that was not yet started."""
    run = stand_in(
        f"""trap '' TERM
touch "logs/up.$RANK"
until [ "$RANK" = 1 ] && [ -e logs/go ]; do sleep 0.05; done
{end}"""
    )
    until(lambda: len(list(run.logs.glob("up.*"))) == 2, "the ranks")
    assert len(docker.of(job_id(run))) == 2
    docker.run("create", f"--label=hlrlhf.job={job_id(run)}", containers.IMAGE, "true")
    (run.logs / "go").touch()
    assert ended(run) == code, said(run)
    assert words in (run.logs / f"{job_id(run)}.0.exit").read_text()
    assert docker.of(job_id(run)) == []


def test_the_epilog_of_the_docs_ends_what_a_cancelled_job_left(
    on_slurm: Cluster, docker: Docker, stand_in: Callable[..., Run]
) -> None:
    run = stand_in("""trap '' TERM
touch "logs/up.$RANK"
while :; do sleep 0.05; done""")
    job = job_id(run)
    until(lambda: len(list(run.logs.glob("up.*"))) == 2, "the ranks")
    on_slurm.run("scancel", job)
    on_slurm.wait(job, "CANCELLED")
    until(whole(run.logs / f"{job}.0.exit"), "the end of the script")
    assert len(docker.of(job)) == 2
    page = (Path(__file__).parents[2] / "docs" / "sites.md").read_text()
    (epilog,) = [part for part in page.split("```") if part.startswith("sh\n#!/bin/bash")]
    environ = os.environ | {"SLURM_JOB_ID": job}
    subprocess.run(["bash", "-c", epilog.removeprefix("sh\n")], env=environ, check=True)
    assert docker.of(job) == []
