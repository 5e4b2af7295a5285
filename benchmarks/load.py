"""The tool under load: how long its commands take with many runs, and whether it loses one.

    .venv/bin/python benchmarks/load.py [RUNS] [SUBMISSIONS]

Starts the Slurm cluster of the tests, so it needs its packages and root. Of RUNS runs (1000), Slurm
has forgotten most jobs, a third have ended, and some 20 run and 20 wait; the commands are timed
with 10 runs in the index and with all, and the Slurm commands that each calls are counted. Then
SUBMISSIONS runs (200) of one tag are submitted in a row, 20 more at the same time, and the index,
the directories and the queue are compared. Prints tables in Markdown; ends at the first run that is
lost or doubled. It takes some minutes.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cluster import Cluster, count_calls, until
from mandatory import MANDATORY

from hlrlhf import runs
from hlrlhf.jobs import start
from hlrlhf.runs import Attempt, Job, Outcome, Run
from hlrlhf.settings import layers

HLRLHF = Path(sys.executable).with_name("hlrlhf")
COMMANDS = (
    "--version",
    "status",
    "status -n 0",
    "status --json -n 0",
    "status --running",
    "status --failed",
    "status demo",
    "logs demo",
)
FEW = 10
LIVE = 20  # that run and that wait, in one call of `add` at most
REPEATS = 9
AT_ONCE = 20
STEPS = 200
STEP = {f"metric_{number}": 0.123456789 for number in range(30)}
DAY = 86400

Environ = Mapping[str, str]


def hlrlhf(environ: Environ, words: str) -> str:
    """Run the tool to its end as a user would; its standard output.

    Raises:
        SystemExit: it failed; with its standard error.
    """
    done = subprocess.run([HLRLHF, *words.split()], env=environ, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"hlrlhf {words}: exit code {done.returncode}\n{done.stderr}")
    return done.stdout


def slurm_commands(environ: Environ, counting: tuple[str, Path], words: str) -> int:
    """How many commands of Slurm's the tool calls."""
    path, calls = counting
    calls.write_text("")
    hlrlhf({**environ, "PATH": path}, words)
    return len(calls.read_text().splitlines())


def seconds(environ: Environ, words: str) -> float:
    """How long a command takes, the median of several calls."""
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        hlrlhf(environ, words)
        taken.append(time.perf_counter() - began)
    return median(taken)


def add(cluster: Cluster, environ: Environ, count: int) -> None:
    """Make runs as they are after months of work, those that are live anywhere among them."""
    live = min(count // 10, LIVE)
    kinds = ["running"] * live + ["waiting"] * live + ["ended"] * (count // 3)
    kinds += ["forgotten"] * (count - len(kinds))
    random.Random(1).shuffle(kinds)
    resolved = layers.resolve(environ=environ)
    over = []
    for number, kind in enumerate(kinds):
        run = start.make(resolved, environ)
        if kind == "forgotten":
            age = random.Random(number).randrange(DAY, 100 * DAY)
            run.record(Job("slurm", f"{10_000_000 + number}", None, int(time.time()) - age))
        else:
            held = [] if kind == "running" else ["--hold"]
            options = (f"--job-name={run.name}", f"--chdir={run.directory}", "--output=/dev/null")
            job_id = cluster.run(
                "sbatch", "--parsable", *options, *held, "--wrap=exec sleep 1d"
            ).strip()
            run.record(Job("slurm", job_id, None, int(time.time())))
            over += [job_id] if kind == "ended" else []
        if kind != "waiting":
            leave_traces(run, ended=kind != "running")
    cluster.run("scancel", *over)
    # Like jobs of yesterday, those that have ended are to be in accounting alone.
    until(lambda: not set(over) & set(queued(cluster)), "the controller to forget", 120)


def leave_traces(run: Run, *, ended: bool) -> None:
    """What a run has written after some steps."""
    job = run.job()
    assert job is not None
    attempt = Attempt(run, job.log_id, 0)
    lines = [f"step {step}/{STEPS}  reward 0.123\n" for step in range(1, STEPS + 1)]
    attempt.log.write_text("".join(lines))
    run.batch_log(job).write_text("")
    steps = [
        {"step": n, "total_steps": STEPS, "attempt": 0, "reward": 0.1} | STEP for n in range(STEPS)
    ]
    run.metrics.write_text("".join(f"{json.dumps(step)}\n" for step in steps))
    run.newest_checkpoint.write_text(json.dumps({"step": STEPS}))
    if ended:
        attempt.say(Outcome(0))
        attempt.ended.write_text("0\n")


def queued(cluster: Cluster) -> dict[str, tuple[str, str]]:
    """Name and directory of every job that the controller knows, by its id."""
    lines = cluster.run("squeue", "-h", "-t", "all", "-o", "%A|%j|%Z").splitlines()
    return {job_id: (name, folder) for job_id, name, folder in (line.split("|") for line in lines)}


def time_commands(
    cluster: Cluster, environ: Environ, counting: tuple[str, Path], total: int
) -> None:
    """Print how long commands take, and how many Slurm commands they call."""
    columns = []
    for size in (FEW, total):
        add(cluster, environ, size - len(runs.every(environ)))
        columns.append(
            [
                (seconds(environ, words), slurm_commands(environ, counting, words))
                for words in COMMANDS
            ]
        )
    print(f"| hlrlhf | {FEW} runs | {total} runs | Slurm commands |")
    print("| --- | ---: | ---: | ---: |")
    for words, (few, few_calls), (many, many_calls) in zip(COMMANDS, *columns, strict=True):
        print(f"| `{words}` | {few:.2f} s | {many:.2f} s | {few_calls}, {many_calls} |")


def submit(environ: Environ) -> dict[str, Any]:
    """Submit a run; what is told of it."""
    told: dict[str, Any] = json.loads(hlrlhf(environ, "submit --json"))
    return told


def submit_many(cluster: Cluster, environ: Environ, count: int) -> None:
    """Submit in a row and at the same time, print how fast, and see that all are there, once."""
    runs_before, jobs_before = set(runs.every(environ)), queued(cluster)
    began = time.perf_counter()
    told = [submit(environ) for _ in range(count)]
    between = time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        told += pool.map(submit, [environ] * AT_ONCE)
    ended = time.perf_counter()
    print("\n| submissions | a second |\n| --- | ---: |")
    print(f"| {count} in a row | {count / (between - began):.1f} |")
    print(f"| {AT_ONCE} at the same time | {AT_ONCE / (ended - between):.1f} |")

    jobs = {answer["job"]["id"]: (answer["run"], answer["directory"]) for answer in told}
    new = [run for run in runs.every(environ) if run not in runs_before]
    records = {job.id: (run.name, str(run.directory)) for run in new if (job := run.job())}
    in_queue = {key: value for key, value in queued(cluster).items() if key not in jobs_before}
    compared = {"answers": jobs, "directories": records, "queue": in_queue}
    if not len(told) == len(new) == len(dict(jobs.values())) == len(jobs):
        sys.exit(f"{len(told)} submissions, {len(new)} runs, {len(jobs)} jobs")
    for name, found in compared.items():
        if found != jobs:
            sys.exit(f"the {name} differ: {sorted(set(found.items()) ^ set(jobs.items()))}")


def main() -> None:
    """Measure and tell."""
    total = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    submissions = int(sys.argv[2]) if len(sys.argv) > 2 else 200
    with tempfile.TemporaryDirectory() as name, Cluster(min_job_age=2) as cluster:
        folder = Path(name).resolve()
        environ = (
            cluster.environ
            | MANDATORY
            | {
                "HL_TAG": "demo",
                "HL_BASE_OUT_PATH": str(folder / "runs"),
                "HL_SLURM_EXTRA": "[--hold]",
                "XDG_STATE_HOME": str(folder / "state"),
            }
        )
        counting = count_calls(folder / "bin", environ["PATH"])
        time_commands(cluster, environ, counting, total)
        submit_many(cluster, environ, submissions)
        began = time.perf_counter()
        calls = slurm_commands(environ, counting, "cancel --all")
        taken = time.perf_counter() - began
        print(f"\n`cancel --all`: {taken:.2f} s, Slurm commands: {calls}")


if __name__ == "__main__":
    main()
