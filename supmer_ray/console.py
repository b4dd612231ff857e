"""What long work shows of itself: one live line a stage in a terminal, plain lines in a log.

A line says what is worked on, how far it is, how fast, and how long it will take. It goes to standard
error, so that standard output holds results only.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

LOG_SECONDS, STILL_SECONDS = 15.0, 60.0
"""How often a stage writes a line where there is no terminal: when something was done since the last, and when not."""

# Without markup: a path in brackets, as errors have them, is text.
stderr = Console(stderr=True, highlight=False, markup=False, emoji=False)


def duration(seconds: float) -> str:
    """Seconds as "1:02:03", "2:03" or "7 s"."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"


def speed(rate: float) -> str:
    """So many a second as "12/s", "0.50/s" or, where that is few, "1.2/min"."""
    if rate >= 0.1:
        return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2f}/s"
    return f"{60 * rate:.1f}/min"


class StageLine:
    """The line of one stage. Call `update` as often as you like; it writes no more than is readable."""

    def __init__(self, title: str, unit: str, *, live: bool) -> None:
        self._bar: Progress | None = None
        if live:
            about, said = (TextColumn(what, markup=False) for what in ("{task.description}", "{task.fields[text]}"))
            self._bar = Progress(about, BarColumn(bar_width=24), said, console=stderr, refresh_per_second=4)
            self._bar.start()
        self._begin(title, unit)

    def _begin(self, title: str, unit: str) -> None:
        self.title, self.unit = title, unit
        self._started = self._written = time.monotonic()
        self._done, self._total, self._note = 0, 0, ""
        self._said = (0, "")
        self._first: tuple[int, float] | None = None
        if self._bar:
            self._task: TaskID = self._bar.add_task(title, total=None, text="starting")

    def update(
        self, done: int, total: int | None = None, note: str = "", *, title: str | None = None, unit: str | None = None
    ) -> None:
        """Say how much is done, of how much, and anything worth knowing now (a loss, for example).

        A new `title` ends the stage before it and begins the next.
        """
        if title and title != self.title:
            if self._done:
                self.end()
            elif self._bar:
                self._bar.remove_task(self._task)
            self._begin(title, unit or self.unit)
        self._done, self._total, self._note = done, total or 0, note
        self._first = self._first or (done, time.monotonic())
        if self._bar:
            self._bar.update(self._task, completed=done, total=total, text=self._text())
        elif time.monotonic() - self._written > (LOG_SECONDS if (done, note) != self._said else STILL_SECONDS):
            self._written, self._said = time.monotonic(), (done, note)
            stderr.print(f"{self.title}: {self._text()}", soft_wrap=True)

    def named(self, title: str, done: int, total: int | None, unit: str, note: str = "") -> None:
        """`update` for stages that say their own title and unit, and now and then a sentence."""
        self.update(done, total, title=title, unit=unit)
        if note:
            stderr.print(note, soft_wrap=True)

    def train_row(self, steps: int) -> Callable[[dict[str, Any]], None]:
        """A callback for the rows of a run's metrics file."""

        def show(row: dict[str, Any]) -> None:
            if row["kind"] == "step":
                note = f"loss {row['query_loss']:.3f} ({row['task_type']}), s {row['running_similarity'] or 0:.2f}"
                if row["skipped"]:
                    note += f", {row['skipped']} skipped (not finite)"
                self.update(row["step"], steps, note)
            elif row["kind"] == "notice":
                stderr.print(row["text"], soft_wrap=True)

        return show

    def trials_done(self, done: int, total: int, best: float | None, steps: int, note: str) -> None:
        """`update` for a sweep."""
        if note:
            stderr.print(note, soft_wrap=True)
        notes = [f"best {best:.4f}"] if best is not None else []
        if steps:
            notes.append(f"{steps:,} steps of the trials at work")
        self.update(done, total, ", ".join(notes))

    def _text(self) -> str:
        # Neither what was done before a resumed run nor its start-up counts as speed.
        before, since = self._first or (0, self._started)
        rate = (self._done - before) / max(1e-9, time.monotonic() - since)
        parts = [f"{self._done:,}/{self._total:,} {self.unit}" if self._total else f"{self._done:,} {self.unit}"]
        if rate > 0:
            parts.append(speed(rate))
        if self._total and rate > 0:
            parts.append(f"{duration((self._total - self._done) / rate)} left")
        return ", ".join([*parts, *([self._note] if self._note else [])])

    def end(self) -> None:
        """Leave one final line for the stage."""
        seconds = duration(time.monotonic() - self._started)
        text = ", ".join(
            filter(None, [f"{self._done:,} {self.unit} in {seconds}" if self._done else seconds, self._note])
        )
        if self._bar:
            self._bar.update(self._task, completed=self._done, total=self._done or 1, text=text)
        else:
            stderr.print(f"{self.title}: {text}", soft_wrap=True)

    def close(self, *, ok: bool) -> None:
        """End the last stage, if it ended well, and give the terminal back."""
        if ok:
            self.end()
        elif self._bar and not self._done:
            self._bar.remove_task(self._task)  # a refusal: nothing was begun
        if self._bar:
            self._bar.stop()


@contextmanager
def stage(title: str, unit: str) -> Iterator[StageLine]:
    """Show a stage while the block runs."""
    line = StageLine(title, unit, live=sys.stderr.isatty())
    try:
        yield line
    except BaseException:
        line.close(ok=False)
        raise
    line.close(ok=True)
