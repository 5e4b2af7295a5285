"""The line that each attempt leaves in attempts.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hlrlhf import runs
from hlrlhf.runs import Attempt, Outcome, Run, ledger
from hlrlhf.runs.ledger import Entry


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return runs.create(tmp_path, "run")


def test_what_an_attempt_leaves_is_in_its_line(run: Run) -> None:
    attempt = Attempt(run, "7", 1)
    attempt.began.write_text("1000\nn[1-2]\n")
    attempt.goes_on(4)
    attempt.say(Outcome(1, 'a "word"\\', may_pass=True, at_fault="n2"))
    run.metrics.write_text('{"step": 6, "reward": 1.0}\n')
    ledger.enter(run)
    (entry,) = ledger.entries(run)
    assert entry.ended is not None
    known = Entry("7", 1, "n[1-2]", 1000, entry.ended, 5, 6, 1, "n2", 'a "word"\\')
    assert entry == known
    assert entry.ended > 1000


def test_an_attempt_has_one_line_and_the_one_that_runs_has_none(run: Run) -> None:
    for number in range(3):
        Attempt(run, "7", number).began.write_text("1000\nn1\n")
    Attempt(run, "7", 0).ended.write_text("75\nwarned\n")
    now = Attempt(run, "7", 2, ends=1e12)
    for _ in range(2):
        ledger.enter(run, but=now)
    first, second = ledger.entries(run)
    assert (first.attempt, first.exit_code, first.why) == (0, 75, "warned")
    assert (second.attempt, second.exit_code, second.ended) == (1, None, None)
    assert "left no word" in second.why
    assert len(run.attempts.read_text().splitlines()) == 2


def test_attempts_that_took_no_step_have_no_first_one(run: Run) -> None:
    attempt = Attempt(run, "7", 0)
    attempt.began.write_text("1000\nn1\n")
    ledger.enter(run, but=attempt)
    assert ledger.entries(run) == []
    attempt.goes_on(3)
    run.metrics.write_text('{"step": 3}\n')
    attempt.ended.write_text("1\n")
    ledger.enter(run)
    (entry,) = ledger.entries(run)
    assert (entry.first_step, entry.last_step) == (None, 3)


def test_what_is_no_line_of_ours_is_passed_by_and_a_later_line_counts(run: Run) -> None:
    lines: list[object] = [
        {"job": "7", "attempt": 0, "why": "first"},
        {"job": "8", "attempt": 0, "began": "late"},
        {"attempt": 0},
        ["job"],
        None,
        {"job": "9", "attempt": 0, "exit_code": 0},
        {"job": "7", "attempt": 0, "why": "again"},
    ]
    run.attempts.write_text("{\n" + "".join(json.dumps(line) + "\n" for line in lines))
    said = [(entry.job, entry.why) for entry in ledger.entries(run)]
    assert said == [("9", ""), ("7", "again")]
