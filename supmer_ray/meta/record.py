"""What a run leaves of its steps: the metrics file, and what the dashboard and the loggers are told."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from supmer_ray.config import RunConfig
from supmer_ray.files import Place, Where, parse_json
from supmer_ray.monitoring.loggers import figures, open_loggers

METRICS_FILE = "metrics.jsonl"


def whole_rows(text: str) -> Iterator[dict[str, Any]]:
    """The rows of a metrics file, up to a line that a running or killed worker has not finished."""
    for line in text.splitlines():
        try:
            yield parse_json(line)
        except ValueError:
            return


def read_rows(run: Where, kind: str) -> list[dict[str, Any]]:
    """The rows of a kind ("start", "step", "validation", "notice") of the run in a folder or at a URI.

    Raises:
        UserError: the object store does not answer.
    """
    place = Place.of(run)
    with place.answering():
        text = place.read(METRICS_FILE) or ""
    return [row for row in whole_rows(text) if row["kind"] == kind]


def add_notice(run: Place, text: str) -> None:
    """Add a sentence for the user to a run's rows, while no worker writes them.

    A row that its worker has not finished goes: behind half a line, no reader would find the sentence.
    """
    rows = run.read(METRICS_FILE) or ""
    whole = rows[: rows.rfind("\n") + 1]
    notice = json.dumps({"kind": "notice", "step": 0, "text": text})
    run.write(METRICS_FILE, f"{whole}{notice}\n")


class MetricsLog:
    """Appends rows to `metrics.jsonl`; a resumed run first drops what its lost steps had written.

    An object store cannot append: there, the file is written anew every few seconds and by `flush`.
    """

    REMOTE_SECONDS = 5.0

    def __init__(self, out: Place, step: int) -> None:
        self.out = out
        self._rows: list[str] = []
        for row in whole_rows(out.read(METRICS_FILE) or ""):
            if row["kind"] == "notice" or (row["step"] <= step and step > 0):
                self._rows.append(json.dumps(row) + "\n")
        self._write_all()

    def _write_all(self) -> None:
        self._written = time.monotonic()
        self.out.write(METRICS_FILE, "".join(self._rows))

    def flush(self) -> None:
        """Write what is still held back."""
        if self.out.remote:
            self._write_all()

    def write(self, row: dict[str, Any]) -> None:
        line = json.dumps(row) + "\n"
        if self.out.remote:
            self._rows.append(line)
            if time.monotonic() - self._written > self.REMOTE_SECONDS:
                self._write_all()
            return
        with (self.out.local / METRICS_FILE).open("a", encoding="utf-8") as stream:
            stream.write(line)


class Record:
    """Where the rows of a run go, from rank 0: its metrics file, the dashboard's series and the loggers.

    Args:
        step: the one that the run goes on from.
    """

    def __init__(self, config: RunConfig, out: Place, step: int) -> None:
        from supmer_ray.monitoring.series import RunSeries  # Ray, which those who read a run's rows can do without

        self._log = MetricsLog(out, step)
        self._loggers = open_loggers(config, out, step)
        self._series = RunSeries(out.name, config.tasks.tasks_per_step)

    def write(self, row: dict[str, Any]) -> None:
        self._log.write(row)
        self._series.row(row)
        if found := dict(figures(row)):
            for logger in self._loggers:
                logger.log(row["step"], found)

    def flush(self) -> None:
        self._log.flush()

    def close(self) -> None:
        """Write what is still held back, however the run ended."""
        self._log.flush()
        self._series.close()
        for logger in self._loggers:
            logger.close()


class NoRecord:
    """That of the other workers."""

    def write(self, row: dict[str, Any]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...
