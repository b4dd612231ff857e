"""What a user is told when workers of a run fail and Ray Train starts them again."""

from __future__ import annotations

from textwrap import shorten
from typing import Any

from ray.train import UserCallback

from supmer_ray.files import Place
from supmer_ray.meta.record import add_notice
from supmer_ray.meta.run import REFUSAL_FILE

MOST_CHARACTERS = 300
"""Of an error in a notice."""


class TellRestarts(UserCallback):
    """Notes each restart among a run's rows; Ray Train's controller calls it, whose log no user sees.

    Args:
        out: the run's folder.
        most: restarts before the run ends with the failure.
    """

    def __init__(self, out: Place, most: int) -> None:
        self._out, self._most, self._failures = out, most, 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        if any(getattr(_cause(error), "preempted", False) for error in worker_exceptions.values()):
            # Its node was announced to leave, which rank 0 has said. Ray Train does not count it, and comes with it
            # again and again until the other workers have ended, of whom rank 0 still writes rows.
            return
        self._failures += 1
        if self._failures > self._most or self._out.read(REFUSAL_FILE) is not None:
            return  # the run ends, and the driver says why
        add_notice(
            self._out,
            f"{why_failed(worker_exceptions)}; the run goes on from its last snapshot, restart {self._failures} of at "
            f"most {self._most}.",
        )


def why_failed(errors: dict[int, Exception]) -> str:
    """Which worker failed and why, in a few words; the first that died, where others only miss it."""
    died = {rank: error for rank, error in errors.items() if hasattr(error, "health_check_failure")}
    rank, error = min((died or errors).items())
    error = _cause(error)
    # What Ray knows of a death: an actor's and a node's numbers, each on a line behind a tab, and a sentence.
    said = " ".join(line for line in str(error).splitlines() if not line.startswith("\t")) or type(error).__name__
    return f"Worker {rank} failed ({shorten(said, MOST_CHARACTERS, placeholder=' …').rstrip('.')})"


def _cause(error: Exception) -> Exception:
    """What lies behind an error: Ray Train says of a dead worker that its health check failed."""
    return getattr(error, "health_check_failure", error)
