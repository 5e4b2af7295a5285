"""What became of the jobs: queue, accounting and what the jobs themselves wrote, in one record.

Slurm forgets: the queue minutes after a job's end, and many sites have no accounting. Slurm also
uses job ids again. So each source is asked in turn, a record counts only if it was submitted no
earlier than ours, and what nobody knows is UNKNOWN, which is never an end.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import replace

from hlrlhf.runs import STOPPED, Job, Outcome, Run, RunError, attempts
from hlrlhf.slurm import client
from hlrlhf.slurm.answers import (
    STOPPED_EARLY,
    UNKNOWN,
    State,
    parse_accounting,
    parse_queue,
)
from hlrlhf.slurm.client import SlurmError

# The clocks of the machine that submitted and of the controller may differ by this many seconds.
SKEW = 60
# Jobs that one command is asked about: an argument has a largest length.
_AT_ONCE = 1000
_DELETED = "its directory is not there: it was deleted, or is not mounted here"
# With --watch, --wait and -f: pauses between two looks, and the longest one while Slurm is away.
INTERVAL = 5.0
_LONGEST = 60.0


def look(runs: Sequence[Run], environ: Mapping[str, str] = os.environ) -> list[State]:
    """The states of the runs' jobs, in the same order.

    Raises:
        SlurmError: there is a Slurm job among them, and neither queue nor accounting answer.
    """
    states = first_and_live(runs, len(runs), environ)
    return [states[run] for run in runs]


def live(runs: Sequence[Run], environ: Mapping[str, str] = os.environ) -> list[Run]:
    """Those of the runs that wait or run now, in the same order.

    Raises:
        SlurmError: there is a Slurm job among them, and a queue does not answer.
    """
    return list(first_and_live(runs, 0, environ))


def first_and_live(
    runs: Sequence[Run], count: int, environ: Mapping[str, str] = os.environ
) -> dict[Run, State]:
    """The states of the first so many runs, and of those behind them that wait or run now.

    In the same order, and by one question for each cluster, in which a job that is not to be shown
    is a number.

    Raises:
        SlurmError: there is a Slurm job among them, and neither queue nor accounting answer; or
            the queue alone does not, where `count` is 0.
    """
    first = set(runs[:count])
    states: dict[Run, State] = {}
    clusters: dict[str | None, list[tuple[Run, Job]]] = {}
    for run in runs:
        try:
            job = run.job()
        except RunError as error:
            # One run that was tampered with must not hide all others.
            if run in first:
                states[run] = State(reason=str(error))
            continue
        if job is not None and job.kind == "slurm":
            clusters.setdefault(job.cluster, []).append((run, job))
        elif run in first or (job and not run.is_deleted and run.is_held()):
            states[run] = _here(run, job)
    for cluster, pairs in clusters.items():
        for some in _batches(pairs):
            states.update(_on_cluster(some, first, cluster, environ))
    return {run: states[run] for run in runs if run in states}


def submitted(
    job_id: str, cluster: str | None, environ: Mapping[str, str] = os.environ
) -> int | None:
    """When a job was submitted by Slurm's clock, or None where the queue does not say."""
    try:
        queued = parse_queue(client.queue([job_id], cluster, environ))
    except SlurmError:
        return None
    return queued[job_id].submitted if job_id in queued else None


def poll(
    runs: Sequence[Run],
    environ: Mapping[str, str] = os.environ,
    *,
    interval: float = INTERVAL,
    meanwhile: Callable[[], None] = lambda: None,
) -> Iterator[list[State]]:
    """Look again and again, for as long as the caller goes on.

    Args:
        runs: whose jobs.
        environ: the caller's environment.
        interval: seconds between two looks; doubled, up to a minute, each time that Slurm does
            not answer.
        meanwhile: called about twice a second in between.

    Raises:
        SlurmError: the first look failed; later ones are tried again.
    """
    yield look(runs, environ)
    pause = interval
    while True:
        next_look = time.monotonic() + pause
        while (left := next_look - time.monotonic()) > 0:
            meanwhile()
            time.sleep(min(left, 0.5))
        try:
            states = look(runs, environ)
        except SlurmError:
            pause = min(2 * pause, max(_LONGEST, interval))
        else:
            pause = interval
            yield states


def _batches(pairs: Sequence[tuple[Run, Job]]) -> Iterator[Sequence[tuple[Run, Job]]]:
    for begin in range(0, len(pairs), _AT_ONCE):
        yield pairs[begin : begin + _AT_ONCE]


def _on_cluster(
    pairs: Sequence[tuple[Run, Job]],
    first: Set[Run],
    cluster: str | None,
    environ: Mapping[str, str],
) -> Iterator[tuple[Run, State]]:
    """The states of one cluster's jobs that are those of `first`, or wait or run."""
    no_queue: SlurmError | None = None
    queued: dict[str, State] = {}
    try:
        queued = parse_queue(client.queue([job.id for _, job in pairs], cluster, environ))
    except SlurmError as error:
        no_queue = error
    live = {job.id: queued[job.id] for _, job in pairs if _is_ours(job, queued.get(job.id))}
    if no_queue and not first:
        raise no_queue
    pairs = [
        (run, job)
        for run, job in pairs
        if run in first or (job.id in live and not live[job.id].ended)
    ]
    # The queue says all about a job that is in its first attempt.
    asked = [job for _, job in pairs if not _is_first_attempt(job, live.get(job.id))]
    recorded: dict[str, list[State]] = {}
    if asked:
        try:
            since = min(*(job.submitted for job in asked), int(time.time())) - 3600
            recorded = parse_accounting(
                client.accounting(
                    [job.id for job in asked],
                    time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since)),
                    cluster,
                    environ,
                )
            )
        except SlurmError:
            if no_queue:
                raise no_queue from None
    for run, job in pairs:
        ours = [state for state in recorded.get(job.id, []) if _is_ours(job, state)]
        state = merge(live.get(job.id), ours, attempts(run, job), queue_answered=no_queue is None)
        known = [queued.get(job.id), *recorded.get(job.id, [])]
        before = max((other.submitted or 0 for other in known if other), default=0)
        if state.state == UNKNOWN and before and not _is_ours(job, State(submitted=before)):
            early = job.submitted - before
            reason = (
                f"Slurm's job {job.id} was submitted {early} s before this run was: it is another "
                "job, or the clock of the machine that submitted was ahead"
            )
            state = replace(state, reason=reason)
        if run.is_deleted:
            state = _adding(state, _DELETED)
        yield run, state


def merge(
    queued: State | None,
    recorded: Sequence[State],
    traces: Mapping[int, Outcome | None],
    *,
    queue_answered: bool = True,
) -> State:
    """One state from all that is known of one job.

    Args:
        queued: what the queue says.
        recorded: what accounting says, one for each attempt, the last one last.
        traces: the attempts that wrote a log or their outcome, see `runs.attempts`.
        queue_answered: whether a job that is not in `queued` is not in the queue.
    """
    restarts = max([len(recorded) - 1, *traces, 0])
    last = recorded[-1] if recorded else None
    outcome = traces.get(restarts)
    if queued and not queued.ended:
        return replace(queued, restarts=restarts)
    if last and last.ended:
        known = replace(last, reason=queued.reason) if queued and queued.reason else last
        return _told(replace(known, restarts=restarts), outcome)
    if queued:
        code = 0 if queued.state == "COMPLETED" else None
        return _told(replace(queued, restarts=restarts, exit_code=code), outcome)
    if last and not queue_answered:
        return replace(last, restarts=restarts)
    # Not in the queue, and accounting knows of no end. A controller that was restarted, or
    # accounting that lags, may leave it so; what the run itself said of its end is an end.
    known = replace(last or State(), restarts=restarts)
    if outcome is not None:
        return _told(replace(known, state="FAILED"), outcome)
    if last:
        reason = f"accounting says {last.state}, but it is not in the queue"
    else:
        reason = "neither queue nor accounting know it"
    return replace(known, state=UNKNOWN, reason=reason)


def _told(state: State, outcome: Outcome | None) -> State:
    """The state of a job that has ended, with what its run said of the end."""
    if outcome is None:
        return state
    if state.state in ("COMPLETED", "FAILED"):
        words = {0: "COMPLETED", STOPPED: STOPPED_EARLY}
        return replace(
            state,
            state=words.get(outcome.code, "FAILED"),
            exit_code=outcome.code,
            reason=outcome.why,
        )
    # Slurm ended the job, and says so; the run may have stopped well meanwhile.
    return replace(_adding(state, outcome.why), exit_code=outcome.code or None)


def _adding(state: State, words: str) -> State:
    """The state with more words to its reason; either may be empty."""
    return replace(state, reason="; ".join(filter(None, (state.reason, words))))


def _is_ours(job: Job, state: State | None) -> bool:
    return state is not None and (state.submitted or 0) >= job.submitted - SKEW


def _is_first_attempt(job: Job, state: State | None) -> bool:
    # A requeue counts as a new submission.
    return state is not None and not state.ended and (state.submitted or 0) <= job.submitted + 1


def _here(run: Run, job: Job | None) -> State:
    """A run without Slurm: the lock says that it runs, its exit code how it ended."""
    if job is None:
        return State(reason="was not submitted")
    if run.is_deleted:
        return State(reason=_DELETED)
    known = State(submitted=job.submitted, started=job.submitted, nodes=1)
    if run.is_held():
        elapsed = max(0, int(time.time()) - job.submitted)
        return replace(known, state="RUNNING", elapsed=elapsed)
    traces = attempts(run, job)
    outcome = traces[max(traces)] if traces else None
    return _told(replace(known, state="FAILED", reason="the launcher was killed"), outcome)
