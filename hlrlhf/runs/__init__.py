"""Run directories: made, found again, and read."""

from hlrlhf.runs.directory import Job, Run, RunError
from hlrlhf.runs.index import create, every, find
from hlrlhf.runs.records import Progress, attempts, log_files, progress

__all__ = [
    "Job",
    "Progress",
    "Run",
    "RunError",
    "attempts",
    "create",
    "every",
    "find",
    "log_files",
    "progress",
]
