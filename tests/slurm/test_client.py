"""Running Slurm's commands."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import pytest
from cluster import Cluster, until
from hypothesis import given
from hypothesis import strategies as st

from hlrlhf.slurm import client
from hlrlhf.slurm.answers import (
    ENDS,
    UNKNOWN,
    duration,
    exit_code,
    first_word,
    parse_accounting,
    parse_queue,
    seconds,
)
from hlrlhf.slurm.client import Rejected, SlurmError


def script(folder: Path, body: str, *directives: str) -> Path:
    path = folder / "job's script.sbatch"
    lines = ["#!/bin/bash", *(f"#SBATCH {directive}" for directive in directives), body]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_cluster_that_does_not_start_keeps_its_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own: without them nobody could tell why."""

    def break_down(cluster: Cluster) -> None:
        (cluster.folder / "munged.out").write_text("why")
        raise TimeoutError

    monkeypatch.setattr(Cluster, "_start", break_down)
    cluster = Cluster()
    with pytest.raises(TimeoutError), cluster:
        pass
    assert (cluster.folder / "munged.out").read_text() == "why"
    shutil.rmtree(cluster.folder)


@pytest.mark.slurm
def test_a_job_gets_the_users_environment_but_not_that_of_a_surrounding_job(
    on_slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CPU_BIND", "quiet,mask_cpu:0x1")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SBATCH_PARTITION", "nowhere")
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("MY_OWN", "kept")
    out = tmp_path / "out"
    job_id, cluster = client.submit(script(tmp_path, f"env > '{out}'", "--output=/dev/null"))
    assert cluster is None
    on_slurm.wait(job_id, "COMPLETED")
    environ = dict(line.split("=", 1) for line in out.read_text().splitlines() if "=" in line)
    assert environ["MY_OWN"] == "kept"
    assert environ["SLURM_JOB_ID"] == job_id
    assert environ["SLURM_CONF"]
    assert not {"SLURM_CPU_BIND", "PMI_RANK", "SBATCH_PARTITION"} & environ.keys()


@pytest.mark.slurm
def test_a_refused_job_is_refused_in_sbatchs_words(on_slurm: Cluster, tmp_path: Path) -> None:
    words = ("true\n#SBATCH --hold", "--partition=nowhere", "--output=/dev/null", "--job-name=x")
    wrong = script(tmp_path, *words)
    with pytest.raises(Rejected, match="invalid partition specified: nowhere") as error:
        client.submit(wrong)
    assert str(error.value).splitlines()[-1] == "it asked for --partition=nowhere"
    with pytest.raises(Rejected, match="invalid partition specified: nowhere"):
        client.estimate(wrong)
    with pytest.raises(Rejected, match="not available"):
        client.submit(script(tmp_path, "true", "--gres=hpu:9"))


@pytest.mark.slurm
def test_an_estimate_submits_nothing(on_slurm: Cluster, tmp_path: Path) -> None:
    before = on_slurm.run("squeue", "-h", "-t", "all", "-o", "%A").split()
    assert "to start at" in client.estimate(script(tmp_path, "true", "--nodes=2"))
    # The queue may have forgotten older ones meanwhile.
    assert {*on_slurm.run("squeue", "-h", "-t", "all", "-o", "%A").split()} <= {*before}


@pytest.mark.slurm
def test_a_users_own_formats_change_no_answer(
    on_slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, _ = client.submit(script(tmp_path, "exit 3", "--output=/dev/null"))
    on_slurm.wait(job_id, "FAILED")
    monkeypatch.setenv("SQUEUE_STATES", "PENDING")
    monkeypatch.setenv("SQUEUE_USERS", "nobody")
    monkeypatch.setenv("SACCT_FORMAT", "JobName")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    answer = client.queue([job_id])
    assert answer.split("|")[2].isdigit()  # no local time, which an hour in autumn has twice
    queued = parse_queue(answer)[job_id]
    assert queued.state == "FAILED"
    assert queued.submitted
    since = "2024-01-01T00:00:00"
    until(lambda: "|3:0|" in client.accounting([job_id], since), "accounting")
    recorded = parse_accounting(client.accounting([job_id], since))[job_id]
    assert [(state.exit_code, state.submitted) for state in recorded] == [(3, queued.submitted)]


@pytest.mark.slurm
def test_jobs_that_the_queue_does_not_know_are_no_error(on_slurm: Cluster) -> None:
    assert client.queue(["999998"]) == ""
    assert client.queue(["999998", "999999"]) == ""
    client.cancel(["999999"])


@pytest.mark.slurm
def test_cancelling_what_has_ended_is_no_error(on_slurm: Cluster, tmp_path: Path) -> None:
    ended, _ = client.submit(script(tmp_path, "true", "--output=/dev/null"))
    running, _ = client.submit(script(tmp_path, "sleep 600", "--output=/dev/null"))
    on_slurm.wait(ended, "COMPLETED")
    client.cancel([ended, running])
    on_slurm.wait(running, "CANCELLED")


@pytest.mark.slurm
def test_no_accounting_is_said(on_slurm_without_accounting: Cluster) -> None:
    with pytest.raises(SlurmError, match="accounting storage is disabled"):
        client.accounting(["1"], "2024-01-01T00:00:00")


@pytest.mark.slurm
@pytest.mark.slow
def test_a_controller_that_is_away_is_not_a_refusal(
    on_slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        (on_slurm.folder / "slurm.conf").read_text().replace("SlurmctldPort=", "SlurmctldPort=1#")
    )
    (tmp_path / "slurm.conf").write_text(text)
    (tmp_path / "gres.conf").write_bytes((on_slurm.folder / "gres.conf").read_bytes())
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    with pytest.raises(SlurmError, match="Unable to contact slurm controller"):
        client.submit(script(tmp_path, "true"))


def test_a_machine_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match="sbatch: not found"):
        client.submit(tmp_path / "job.sbatch")


def test_a_command_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "squeue"
    command.write_text(
        "#!/bin/bash\necho waiting for godot >&2\nread -t 600 < <(:; exec sleep 600)"
    )
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(client, "TIMEOUT", 5)
    with pytest.raises(SlurmError, match=r"within 5 s: waiting for godot"):
        client.queue(["1"])


@pytest.mark.parametrize(
    ("text", "job"),
    [
        ("123\n", ("123", None)),
        ("123;main\n", ("123", "main")),
        ("Welcome to the cluster!\n2 nodes\n123;main\n", ("123", "main")),
        ("123\nthank you\n", ("123", None)),
        ("Submitted batch job 123\n", None),
        ("", None),
    ],
)
def test_what_sbatch_prints(text: str, job: tuple[str, str | None] | None) -> None:
    assert client.parse_submitted(text) == job


def test_what_scancel_complains_of() -> None:
    ended = "scancel: error: Kill job error on job id 2: Job/step already completing or completed\n"
    assert client.already_ended(ended)
    assert not client.already_ended(
        ended + "scancel: error: Kill job error on job id 3: Access/permission denied\n"
    )
    assert not client.already_ended("")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("COMPLETED", "COMPLETED"),
        ("CANCELLED by 1000", "CANCELLED"),
        ("CANCELLED+", "CANCELLED"),
        ("OUT_OF_MEMORY", "OUT_OF_MEMORY"),
        ("EXPEDITING", UNKNOWN),
        ("", UNKNOWN),
    ],
)
def test_state_words(text: str, word: str) -> None:
    assert first_word(text) == word
    assert UNKNOWN not in ENDS


@pytest.mark.parametrize(
    ("text", "value"),
    [("0:07", 7), ("1:02:03", 3723), ("2-00:00:01", 172801), ("INVALID", None), ("", None)],
)
def test_durations(text: str, value: int | None) -> None:
    assert duration(text) == value


def test_times_and_exit_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seconds("1700000000") == 1700000000
    assert seconds("Unknown") is None
    local = seconds("2023-11-14T22:13:20")
    assert local is not None
    assert abs(local - 1700000000) <= 14 * 3600
    texts = ("3:0", "0:9", "0:0", "0:53", "", "x")
    assert [exit_code(text)[0] for text in texts] == [3, 137, 0, None, None, None]
    assert exit_code("0:9")[1] == "ended by SIGKILL"


def test_lines_of_squeue() -> None:
    line = "7|RUNNING|1700000000|1700000005|1:05|2|main|n[1-2]|a reason | with a bar"
    state = parse_queue(f"CLUSTER: main\n{line}\nnonsense\n")["7"]
    assert (state.state, state.submitted, state.elapsed) == ("RUNNING", 1700000000, 65)
    assert (state.nodes, state.node_list) == (2, "n[1-2]")
    assert state.reason == "a reason | with a bar"


@given(st.text(alphabet=st.sampled_from("0123456789|:-+ \n\x00aPENDIGé")))
def test_no_answer_breaks_the_parsers(text: str) -> None:
    for state in parse_queue(text).values():
        assert not state.ended
    for states in parse_accounting(text).values():
        assert all(not state.ended for state in states)
