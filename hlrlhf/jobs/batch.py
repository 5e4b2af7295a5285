"""Runs as jobs of Slurm's; a place to run at, see `hlrlhf.jobs.start`."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from hlrlhf.jobs import start as starting
from hlrlhf.jobs import states
from hlrlhf.jobs.start import Started
from hlrlhf.runs import Job, Run, RunError
from hlrlhf.settings.errors import printable
from hlrlhf.settings.layers import Resolved
from hlrlhf.settings.names import settings_by_name
from hlrlhf.slurm import client, script
from hlrlhf.slurm.answers import STOPPED_EARLY

# The settings outside `slurm.` that a job's request is made of.
_REQUEST = ("num_nodes", "devices_per_node", "device")


def check(resolved: Resolved) -> None:
    """Slurm itself says what it does not take."""


def estimate(resolved: Resolved, environ: Mapping[str, str]) -> str:
    """What Slurm would do with the run; nothing is submitted or left.

    Raises:
        SettingsError: the settings make no script.
        Rejected, SlurmError: Slurm would refuse the job, or could not be reached.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Run(Path(folder)).script
        text = script.render(resolved, starting.directory(resolved), environ)
        file.write_text(text, encoding="utf-8")
        with _refusals_explained(resolved):
            return client.estimate(file, environ)


def start(resolved: Resolved, environ: Mapping[str, str]) -> Started:
    """See `Place.start`. A job that may have been submitted keeps its directory.

    Raises:
        NoAnswer: Slurm may have taken the job, or not; the error says how to find out.
        RunError: also when the job was submitted and cannot be written down; says its id.
    """
    # Settings that make no script leave no trace; only the run's own name may be another one.
    script.render(resolved, starting.directory(resolved), environ)
    run = starting.make(resolved, environ)
    try:
        run.write_script(script.render(resolved, run.directory, environ))
    except BaseException:
        run.discard()
        raise
    try:
        return _submit(resolved, run, environ)
    except (client.Rejected, client.SlurmError) as error:
        if not isinstance(error, client.NoAnswer):  # a job must not lose its directory
            run.discard()
        raise


def resume(resolved: Resolved, run: Run, environ: Mapping[str, str]) -> Started:
    """See `Place.resume`. The script is made again: settings.yaml may have been changed."""
    run.write_script(script.render(resolved, run.directory, environ))
    run.set_job_aside()
    try:
        return _submit(resolved, run, environ)
    except client.NoAnswer:
        raise  # there may be a job now, which the old record would keep from running
    except (client.Rejected, client.SlurmError):
        run.take_job_back()
        raise


def _submit(resolved: Resolved, run: Run, environ: Mapping[str, str]) -> Started:
    # Taken before, so that Slurm's own time of submission is not earlier.
    now = int(time.time())
    try:
        with _refusals_explained(resolved):
            job_id, cluster = client.submit(run.script, environ)
    except client.NoAnswer as error:
        words = f"{run.directory} stays; it may be submitted: squeue --name={run.name}"
        raise client.NoAnswer(f"{error}\n{words}") from error
    job = Job("slurm", job_id, cluster, now)
    try:
        run.record(job)
        # By Slurm's own clock, by which it will be known again.
        job = replace(job, submitted=states.submitted(job_id, cluster, environ) or now)
        run.record(job)
    except RunError as error:
        words = f"submitted as job {job_id}, which is not written down"
        raise RunError(f"{error}\n{words}") from error
    ahead = now - job.submitted
    return Started(run, job, ahead if ahead > states.SKEW else 0)


def finish(
    resolved: Resolved, started: Started, environ: Mapping[str, str], say: Callable[[str], None]
) -> int:
    """See `Place.finish`; 1 where Slurm ended the job."""
    seen = ""
    for (state,) in states.poll([started.run], environ):
        if state.state != seen:
            seen = state.state
            say(f"{started.run.name}: {seen}" + (f" ({state.reason})" if state.reason else ""))
        if state.state == "COMPLETED":
            return 0
        if state.ended:
            return (state.exit_code or 1) if state.state in ("FAILED", STOPPED_EARLY) else 1
    raise AssertionError("polling has no end")


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
            # A run that goes on has all settings from its file.
            if not resolved.is_default(name) and given.value != settings_by_name()[name].default
        ]
        words = f"set by {', '.join(asked) or 'nobody'}; `hlrlhf show` lists all settings"
        raise client.Rejected(f"{error}\n{printable(words)}") from error
