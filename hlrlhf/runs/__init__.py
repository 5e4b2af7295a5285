"""Run directories: made, found again, and read."""

from hlrlhf.runs.attempt import STOPPED, Attempt, Outcome, SupersededError
from hlrlhf.runs.directory import Job, Run, RunError
from hlrlhf.runs.index import create, every, find
from hlrlhf.runs.records import Progress, Saved, attempts, log_files, progress, saved

__all__ = [
    "STOPPED",
    "Attempt",
    "Job",
    "Outcome",
    "Progress",
    "Run",
    "RunError",
    "Saved",
    "SupersededError",
    "attempts",
    "create",
    "every",
    "find",
    "log_files",
    "progress",
    "saved",
]
