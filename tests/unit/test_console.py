"""Progress lines in a log: plain, with the speed of the work and not of its start-up, and with every notice."""

import io
import re

import pytest
from rich.console import Console

from supmer_ray import console
from supmer_ray.console import StageLine, duration, speed


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


def test_a_stage_that_says_its_own_title_says_sentences_too(clock, capsys):
    line = StageLine("Comparing", "cells", live=False)
    line.named("Meta-training supmer", 3, 10, "steps")
    line.named("Meta-training supmer", 3, 10, "steps", "Worker 0 failed (it was killed).")
    line.named("Adapting and testing", 1, 2, "cells")
    assert capsys.readouterr().err.splitlines() == [
        "Worker 0 failed (it was killed).", "Meta-training supmer: 3 steps in 0 s"
    ]  # fmt: skip


def test_a_log_says_now_and_then_that_the_work_still_goes_on(clock, capsys):
    line = StageLine("Adapting and testing", "cells", live=False)
    for second in range(1, 131):
        clock[0] += 1
        line.update(0 if second < 70 else 1, 8)
    said = capsys.readouterr().err.splitlines()
    assert [text.partition(",")[0] for text in said] == [
        "Adapting and testing: 0/8 cells",  # after a minute without anything new
        "Adapting and testing: 1/8 cells",
    ]


def test_a_terminal_shows_one_line_a_stage_that_is_written_over(clock, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(console, "stderr", Console(file=screen, force_terminal=True, width=120, highlight=False))
    line = StageLine("Reading", "documents", live=True)
    for done in range(1, 51):
        clock[0] += 0.1
        line.update(done, 50)
    line.update(3, 9, title="Embedding", unit="sentences")
    clock[0] += 1
    line.update(9, 9)
    line.close(ok=True)
    # What is left on the screen after every "up a line" and "erase it".
    lines = []
    for written in re.sub(r"\x1b\[(?:\?25[lh]|[\d;]*m)", "", screen.getvalue()).split("\n"):
        for _ in range(written.count("\x1b[1A")):
            lines.pop()
        lines.append(re.sub(r"\r|\x1b\[\d?[AK]", "", written))
    shown = [text for text in lines if text.strip()]
    assert len(shown) == 2 and "Reading" in shown[0] and "50 documents in 5 s" in shown[0]
    assert "Embedding" in shown[1] and "9 sentences in 1 s" in shown[1]


def test_a_sweep_says_how_far_its_trials_are(clock, capsys):
    line = StageLine("Searching", "trials", live=False)
    clock[0] += 60
    line.trials_done(0, 8, None, 150, "")
    clock[0] += 60
    line.trials_done(1, 8, 1.25, 50, "")
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "Searching: 0/8 trials, 150 steps of the trials at work"
    assert said[1].startswith("Searching: 1/8 trials") and said[1].endswith(
        "best 1.2500, 50 steps of the trials at work"
    )


def test_durations_and_speeds():
    assert [duration(seconds) for seconds in (7, 123, 3723)] == ["7 s", "2:03", "1:02:03"]
    assert [speed(rate) for rate in (1234, 0.5, 0.02)] == ["1,234/s", "0.50/s", "1.2/min"]


@pytest.mark.parametrize("live", [False, True])
def test_what_an_error_has_in_brackets_is_said_as_it_is(capsys, live):
    """Gloo's errors begin with a path in brackets, which is no markup."""
    text = "Worker 1 failed ([/gloo/tcp/pair.cc:553] Connection closed :warning: [errno 28])"
    line = StageLine("Meta-training", "steps", live=live)
    line.train_row(8)({"kind": "notice", "step": 0, "text": text})
    line.update(1, 8, "[/a]")
    line.close(ok=True)
    said = capsys.readouterr().err
    assert text in said and "[/a]" in said
