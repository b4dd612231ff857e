"""Beside a sweep: tells how far it is, frees what stopped trials leave behind, and ends it when it is told to."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import tune as ray_tune

from supmer_ray.cluster import Waiting
from supmer_ray.config import SweepConfig
from supmer_ray.files import Place
from supmer_ray.meta.run import GROUP_FILE
from supmer_ray.sweep.trial import RUNS

RELEASE_SECONDS = 5.0
"""How long a stopped trial's run is given to die."""

LOOK_SECONDS = 1.0
"""How often a sweep whose trials have not reported is looked at: whether they wait for room."""

Progress = Callable[[int, int, float | None, int, str], None]
"""Called with the trials that are done, their number, the best objective so far, the steps of those at work, and what
else is to be known."""


class Watch:
    """Follows the trials of a sweep: tells the progress, and frees what a stopped trial has left behind.

    A trial of several workers that is stopped early dies before its Ray Train run, which leaves that run's
    placement group to a cleaner of Ray Train's. The cleaner gives up where the machine has no dashboard
    process or several clusters, and the sweep would wait for the resources for ever.
    """

    def __init__(self, config: SweepConfig, out: Path, progress: Progress | None) -> None:
        self._config, self._out, self._progress = config, out, progress
        self._ended: dict[str, float] = {}
        self._lost: dict[str, float] = {}
        self._reached: dict[str, int] = {}
        self._waiting, self._looked = Waiting("The sweep", config.base.workers), time.monotonic()

    def stepped(self, trials: Sequence[Any]) -> None:
        """Between two events: free what is due, and say where not one trial has found room yet."""
        self.release()
        if self._progress and not self._reached and time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()
            if sentence := self._waiting.notice():
                self.tell(trials, note=sentence)

    def ended(self, trials: Sequence[Any], last: Any) -> None:
        self._ended[last.trial_id] = time.monotonic()
        self.tell(trials, last)

    def recovers(self, trial: Any) -> None:
        """A trial whose driver was lost is tried again, in a new group: the one that is noted now is a dead run's."""
        if group := self._group(trial.trial_id):
            self._lost[group] = time.monotonic()

    def reported(self, trials: Sequence[Any], trial: Any, result: Mapping[str, Any]) -> None:
        self._reached[trial.trial_id] = result.get("step", 0)
        self.tell(trials)

    def tell(self, trials: Sequence[Any], last: Any = None, note: str = "") -> None:
        """Tell how far the sweep is; `last` has just ended, whatever its status still says."""
        if self._progress:
            ended = [trial for trial in trials if trial is last or trial.is_finished()]
            steps = sum(self._reached.get(trial.trial_id, 0) for trial in trials if trial not in ended)
            # One that was stopped early cannot be the best: best.yaml is of those that came to their end.
            results = [trial.last_result or {} for trial in ended]
            whole = [found for found in results if found.get("step", 0) >= self._config.base.meta.steps]
            values = [found["objective"] for found in whole]
            best = min if self._config.objective.mode == "min" else max
            self._progress(len(ended), self._config.samples, best(values, default=None), steps, note)

    def release(self, *, at_once: bool = False) -> None:
        """Remove the groups of trials that ended or were lost a while ago: their runs are dead and make no new ones."""
        from ray._raylet import PlacementGroupID
        from ray.util.placement_group import PlacementGroup, remove_placement_group

        def due(since: dict[str, float]) -> list[str]:
            now = time.monotonic()
            names = [name for name, then in since.items() if at_once or now - then > RELEASE_SECONDS]
            for name in names:
                del since[name]
            return names

        for group in {*due(self._lost), *map(self._group, due(self._ended))}:
            if group:
                remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group)))

    def _group(self, trial: str) -> str | None:
        """The placement group that the trial's last run has noted."""
        return Place(str(self._out / RUNS / trial)).read(GROUP_FILE)


_watch: Watch | None = None
"""Of the sweep that this process runs."""


class Listener(ray_tune.Callback):
    """Hands events to the watch. It has no state of its own, because Ray Tune saves it with the search."""

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        if _watch:
            _watch.reported(trials, trial, result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if _watch:
            _watch.ended(trials, trial)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if _watch:
            _watch.recovers(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if _watch:
            _watch.ended(trials, trial)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if _watch:
            _watch.stepped(trials)


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    global _watch
    _watch = watch
    try:
        yield
    finally:
        _watch = None
        watch.release(at_once=True)


@contextmanager
def sigterm_as_sigint() -> Iterator[None]:
    """While the block runs, SIGTERM is what SIGINT is: Ray Tune saves its state and ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: os.kill(os.getpid(), signal.SIGINT))
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)  # Ray Tune leaves its own, which would swallow the next one
