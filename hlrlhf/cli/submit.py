"""`hlrlhf submit`"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hlrlhf.cli import options
from hlrlhf.errors import shortened
from hlrlhf.jobs import batch, demo
from hlrlhf.jobs.start import Place, Started, directory
from hlrlhf.settings import hints
from hlrlhf.settings.layers import Resolved
from hlrlhf.slurm import script


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
    place = place_for(local)
    place.check(resolved)
    if local:
        hints.check_here(resolved, _made(resolved))
    else:
        for hint in hints.hints(resolved, _made(resolved), os.environ):
            say(f"hint: {hint}")
    if dry_run:
        _dry_run(resolved, local=local, as_json=as_json)
    elif test_only:
        words = batch.estimate(resolved, os.environ)
        print(json.dumps({"slurm": words}) if as_json else words)
    else:
        demo.prepare(resolved)
        started = place.start(resolved, os.environ)
        tell(started, as_json=as_json)
        if not local:
            say(f"follow it: hlrlhf logs -f {started.run.name}")
        if wait or local:
            raise typer.Exit(place.finish(resolved, started, os.environ, say))


def place_for(local: bool) -> Place:
    """Where a run goes."""
    if local:
        from hlrlhf.jobs import local as here

        return here
    return batch


def say(words: str) -> None:
    """A sentence for people."""
    print(f"hlrlhf: {shortened(words)}", file=sys.stderr, flush=True)


def _made(resolved: Resolved) -> list[Path]:
    """The folders that are made before a run."""
    return [demo.MODELS.absolute()] if resolved.preset == "demo" else []


def _dry_run(resolved: Resolved, *, local: bool, as_json: bool) -> None:
    place = directory(resolved)
    text = None if local else script.render(resolved, place, os.environ)
    say(f"would make {place}, or the same with -2, -3… when that is taken")
    say(f"would start {resolved.settings.world_size} ranks here" if local else "would submit this")
    if as_json:
        print(json.dumps({"directory": str(place), "script": text}))
    elif text:
        sys.stdout.write(text)


def tell(started: Started, *, as_json: bool) -> None:
    """Say what there is now."""
    run, job = started.run, started.job
    whole = {"run": run.name, "directory": str(run.directory), "job": asdict(job)}
    print(json.dumps(whole) if as_json else job.id, flush=True)
    say(f"run {run.name} in {run.directory}")
    if started.clock_ahead:
        say(f"this machine's clock is {started.clock_ahead} s ahead of Slurm's")
