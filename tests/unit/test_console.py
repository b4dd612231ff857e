"""Progress lines in a log: plain, with the speed of the work and not of its start-up, and with every notice."""

import re

import pytest

from supmer_ray import console
from supmer_ray.console import StageLine, duration


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def row(step, skipped=0):
    return {"kind": "step", "step": step, "query_loss": 2.0, "task_type": "nsp", "running_similarity": 0.5,
            "skipped": skipped}  # fmt: skip


def test_neither_start_up_nor_what_was_done_before_counts_as_speed(clock, capsys):
    line = StageLine("Meta-training", "steps", live=False)
    show = line.train_row(100)
    clock[0] += 60  # the cluster starts
    show(row(51))  # a resumed run
    assert "51/100 steps, loss 2.000 (nsp), s 0.50" in capsys.readouterr().err
    clock[0] += 20
    show(row(61, skipped=2))
    said = capsys.readouterr().err
    assert "61/100 steps, 0.50/s, 1:18 left" in said and "2 skipped" in said
    assert "\x1b" not in said


def test_lines_are_few_and_notices_are_never_left_out(clock, capsys):
    line = StageLine("Meta-training", "steps", live=False)
    show = line.train_row(100)
    for step in range(1, 101):
        clock[0] += 1
        show(row(step))
    show({"kind": "notice", "step": 100, "text": "A snapshot is damaged."})
    line.close(ok=True)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 100 // 16 + 2
    assert said[-2] == "A snapshot is damaged." and re.match(r"Meta-training: 100 steps in 1:40", said[-1])


def test_durations():
    assert [duration(seconds) for seconds in (7, 123, 3723)] == ["7 s", "2:03", "1:02:03"]
