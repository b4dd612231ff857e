"""What a user is told when workers of a run fail and Ray Train starts them again."""

from __future__ import annotations

from typing import Any

from ray.train import UserCallback

from supmer_ray.errors import first_line
from supmer_ray.files import Place
from supmer_ray.meta.record import add_notice
from supmer_ray.meta.run import REFUSAL_FILE


class TellRestarts(UserCallback):
    """Notes each restart among a run's rows; Ray Train's controller calls it, whose log no user sees.

    Args:
        out: the run's folder.
        most: restarts before the run ends with the failure.
    """

    def __init__(self, out: Place, most: int) -> None:
        self._out, self._most, self._failures = out, most, 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self._failures += 1
        if self._failures > self._most or self._out.read(REFUSAL_FILE) is not None:
            return  # the run ends, and the driver says why
        rank, error = min(worker_exceptions.items())
        add_notice(
            self._out,
            f"Worker {rank} failed ({first_line(error)}); the run goes on from its last snapshot, restart "
            f"{self._failures} of at most {self._most}.",
        )
