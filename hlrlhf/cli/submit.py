"""`hlrlhf submit`"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from hlrlhf import runs
from hlrlhf.cli import options
from hlrlhf.jobs import demo, states
from hlrlhf.settings import SettingsError, hints, layers
from hlrlhf.settings.errors import printable
from hlrlhf.settings.layers import Resolved
from hlrlhf.slurm import client, script
from hlrlhf.slurm.answers import STOPPED_EARLY

# The settings outside `slurm.` that a job's request is made of.
_REQUEST = ("num_nodes", "devices_per_node", "device")


def submit(
    preset: options.Preset = None,
    config: options.Config = None,
    flags: options.Set = None,
    template: options.Template = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the script that would run; write nothing.")
    ] = False,
    test_only: Annotated[
        bool,
        typer.Option(
            "--test-only", help="Let Slurm check the job and guess its start; submit nothing."
        ),
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for the job's end, and end with its exit code.")
    ] = False,
    local: Annotated[
        bool,
        typer.Option("--local", help="Run on this machine, without Slurm, until the run ends."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Submit a run to Slurm, or start it here.

    Makes the run's directory and prints the job's id. With --wait or --local this ends with the
    exit code of the job: 0 done, 75 stopped early with its models saved, anything else failed; 1
    when Slurm ended it (cancelled, out of time...).
    """
    if sum((dry_run, test_only, wait)) > 1 or (test_only and local):
        raise typer.BadParameter("of --dry-run, --test-only, and --wait or --local, give one")
    resolved = options.resolved(preset, config, flags, template)
    if local:
        from hlrlhf.jobs import local as launcher

        launcher.check(resolved)
        hints.check_here(resolved, _made(resolved))
    else:
        for hint in hints.hints(resolved, _made(resolved), os.environ):
            _say(f"hint: {hint}")
    if not (dry_run or test_only):
        demo.prepare(resolved)
    if dry_run:
        _dry_run(resolved, local=local, as_json=as_json)
    elif test_only:
        words = _test_only(resolved)
        print(json.dumps({"slurm": words}) if as_json else words)
    elif local:
        raise typer.Exit(_local(resolved, as_json=as_json))
    else:
        run = _submit(resolved, as_json=as_json)
        if wait:
            raise typer.Exit(_wait(run))


def _say(words: str) -> None:
    print(f"hlrlhf: {words}", file=sys.stderr, flush=True)


def _made(resolved: Resolved) -> list[Path]:
    """The folders that are made before a run."""
    return [demo.MODELS.absolute()] if resolved.preset == "demo" else []


def _directory(resolved: Resolved) -> Path:
    """Where the run goes if its name is still free."""
    return Path(resolved.settings.base_out_path, resolved.settings.tag)


def _dry_run(resolved: Resolved, *, local: bool, as_json: bool) -> None:
    directory = _directory(resolved)
    text = None if local else script.render(resolved, directory, os.environ)
    _say(f"would make {directory}, or the same with -2, -3… when that is taken")
    _say(f"would start {resolved.settings.world_size} ranks here" if local else "would submit this")
    if as_json:
        print(json.dumps({"directory": str(directory), "script": text}))
    elif text:
        sys.stdout.write(text)


def _test_only(resolved: Resolved) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "job.sbatch")
        text = script.render(resolved, _directory(resolved), os.environ)
        file.write_text(text, encoding="utf-8")
        with _refusals_explained(resolved):
            return client.estimate(file)


def _submit(resolved: Resolved, *, as_json: bool) -> runs.Run:
    run = _make(resolved)
    try:
        text = script.render(resolved, run.directory, os.environ)
        run.script.write_text(text, encoding="utf-8")
    except BaseException:
        run.discard()
        raise
    # Taken before, so that Slurm's own time of submission is not earlier.
    now = int(time.time())
    try:
        with _refusals_explained(resolved):
            job_id, cluster = client.submit(run.script)
    except client.NoAnswer:
        # A job must not lose its directory.
        _say(f"{run.directory} stays; it may be submitted: squeue --name={run.name}")
        raise
    except (client.Rejected, client.SlurmError):
        run.discard()
        raise
    job = runs.Job("slurm", job_id, cluster, now)
    try:
        run.record(job)
        # By Slurm's own clock, by which it will be known again.
        submitted = states.submitted(job_id, cluster) or now
        if now - submitted > states.SKEW:
            _say(f"this machine's clock is {now - submitted} s ahead of Slurm's")
        job = replace(job, submitted=submitted)
        run.record(job)
    except runs.RunError:
        _say(f"submitted as job {job_id}, which is not written down")
        raise
    _tell(run, job, as_json=as_json)
    _say(f"follow it: hlrlhf logs -f {run.name}")
    return run


@contextlib.contextmanager
def _refusals_explained(resolved: Resolved) -> Iterator[None]:
    """Add to what Slurm refuses the settings that it was asked for with, as far as any were set."""
    try:
        yield
    except client.Rejected as error:
        asked = [
            f"{name} = {given.value!r} ({given.origin})"
            for name, given in resolved.values.items()
            if name in _REQUEST or name.startswith("slurm.")
            if not resolved.is_default(name) and given.value not in (None, [])
        ]
        words = f"set by {', '.join(asked) or 'nobody'}; `hlrlhf show` lists all settings"
        raise client.Rejected(f"{error}\n{printable(words)}") from error


def _make(resolved: Resolved) -> runs.Run:
    """A new run directory with its settings."""
    settings = resolved.settings
    run = runs.create(Path(settings.base_out_path), settings.tag)
    try:
        run.settings_file.write_text(layers.dump(resolved), encoding="utf-8")
    except BaseException:
        run.discard()
        raise
    return run


def _tell(run: runs.Run, job: runs.Job, *, as_json: bool) -> None:
    """Say what there is now."""
    whole = {"run": run.name, "directory": str(run.directory), "job": asdict(job)}
    print(json.dumps(whole) if as_json else job.id, flush=True)
    _say(f"run {run.name} in {run.directory}")


def _wait(run: runs.Run) -> int:
    """Until the job has ended; its exit code."""
    seen = ""
    for (state,) in states.poll([run]):
        if state.state != seen:
            seen = state.state
            _say(f"{run.name}: {seen}" + (f" ({state.reason})" if state.reason else ""))
        if state.state == "COMPLETED":
            return 0
        if state.ended:
            return (state.exit_code or 1) if state.state in ("FAILED", STOPPED_EARLY) else 1
    raise AssertionError("polling has no end")


def _local(resolved: Resolved, *, as_json: bool) -> int:
    """Run to the end on this machine; the run's exit code."""
    from hlrlhf.jobs import local as launcher

    if resolved.settings.environment.setup:
        _say("environment.setup is for Slurm's nodes; here, the environment is used as it is")
    run = _make(resolved)
    job = runs.Job("local", str(os.getpid()), None, int(time.time()))
    run.record(job)
    _tell(run, job, as_json=as_json)
    try:
        outcome = launcher.run(resolved, run.directory, os.environ)
    except SettingsError:
        # Nothing was started.
        run.discard()
        raise
    words = {0: "done", runs.STOPPED: outcome.why}
    failed = f"failed with exit code {outcome.code}: {outcome.why}"
    _say(f"run {run.name}: {words.get(outcome.code, failed)}")
    _say(f"everything is in {run.directory}")
    return outcome.code
