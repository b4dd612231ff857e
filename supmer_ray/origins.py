"""Where the prompts and regularizers come from that an evaluation compares: given checkpoints, or meta-training now.

The stores and runs that the methods need and nobody gave are made below the evaluation's folder, as many runs at a
time as the cluster holds; what was begun there goes on.
"""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from supmer_ray.cluster import connect
from supmer_ray.config import RunConfig
from supmer_ray.data.sources import open_source, require_apart, require_disjoint
from supmer_ray.data.store import MANIFEST, Outline
from supmer_ray.errors import Stopped, UserError
from supmer_ray.fewshot.method import Method
from supmer_ray.fewshot.plan import RUNS, STORES, Plan, Point, file_name
from supmer_ray.files import SEAL, Place
from supmer_ray.meta.run import CONFIG_FILE
from supmer_ray.tasks.types import require_domains
from supmer_ray.train import CHECKPOINT, FOLLOW_SECONDS, stop_signals, train


class Progress(Protocol):
    """Called with what is being done, how much of it is done, of how much (if known), and in what unit.

    A `note` is a sentence of a meta-training that its user must not miss: it waits for room, or was started again.
    """

    def __call__(self, title: str, done: int, total: int | None, unit: str, note: str = "") -> None: ...


def require_sources(plan: Plan, out: Path, *, anew: bool) -> None:
    """Refuse now the text of which a store could not be made later.

    Raises:
        UserError: a source is not there, cannot be read, is named twice or holds `out`.
    """
    trained = any(method.meta is not None and method.name not in plan.given for method in plan.methods)
    made = [
        point.config.prepare.sources
        for point in plan.points()
        if trained
        and point.config.prepare
        and not plan.store
        and (anew or not (_store_folder(out, point) / MANIFEST).is_file())
    ]
    require_apart(Place.of(out), chain(*made))
    opened = {name: open_source(name) for name in {*chain(*made)}}
    for sources in made:
        require_disjoint(opened[name] for name in sources)


@dataclass(frozen=True)
class _Run:
    """A meta-training that methods need and nobody gave.

    Attributes:
        name: its method's, and what tells it apart from others along a curve.
    """

    name: str
    config: RunConfig
    store: Place
    folder: Path


def find_checkpoints(plan: Plan, out: Path, tell: Progress) -> dict[tuple[str, str], Place]:
    """Where the checkpoint of each run variant and method lies; those that are not there yet are meta-trained now."""
    places, wanted = dict[tuple[str, str], Place](), list[tuple[Point, Method, Path]]()
    for point in plan.points():
        for method in plan.methods:
            key = point.run_variant, method.name
            if method.meta is None or key in places:
                continue
            folder = out / RUNS / file_name(method.name, point.run_variant)
            places[key] = plan.given.get(method.name) or Place.of(folder / CHECKPOINT)
            if method.name not in plan.given and not (folder / CHECKPOINT / SEAL).is_file():
                wanted.append((point, method, folder))
    if not plan.store:
        # All stores before any run, and first the one that the text is likeliest too small for.
        for point in sorted((point for point, _, _ in wanted), key=_ease):
            _make_store(point, out, tell)
    missing = []
    for point, method, folder in wanted:
        config, store = method.run_config(point.config.run), plan.store or Place.of(_store_folder(out, point))
        require_domains(Outline.open(store), config.tasks.types)
        name = ", ".join(filter(None, [method.name, point.run_variant]))
        missing.append(_Run(name, config, store, folder))
    if missing:
        _meta_train(missing, out, tell)
    return places


def _meta_train(runs: Sequence[_Run], out: Path, tell: Progress) -> None:
    """Do the runs, as many at a time as the cluster holds; those that were begun go on from their snapshots.

    Once one ends otherwise than it should, the others are told to save and end, and no more are started.

    Raises:
        Exception: of the first that ended so, or of `tell`.
        Stopped: a signal came.
    """
    rows, failures = SimpleQueue[tuple[_Run, dict[str, Any]]](), list[BaseException]()
    done, steps = {run.name: 0 for run in runs}, sum(run.config.meta.steps for run in runs)
    title = f"Meta-training {runs[0].name}" if len(runs) == 1 else f"Meta-training {len(runs)} runs"

    def do(run: _Run) -> None:
        begun = (run.folder / CONFIG_FILE).is_file()
        try:
            train(
                run.config,
                run.store,
                run.folder,
                resume=begun,
                overwrite=not begun,
                progress=lambda row: rows.put((run, row)),
                stop=stop,
                at_a_time=at_a_time,
            )
        except BaseException as error:
            failures.append(error)
            stop.set()

    def show() -> None:
        while not rows.empty():
            run, row = rows.get()
            if row["kind"] == "step":
                done[run.name] = row["step"]
            elif row["kind"] == "notice":
                tell(title, sum(done.values()), steps, "steps", f"{run.name}: {row['text']}")
        tell(title, sum(done.values()), steps, "steps")

    waiting, threads = deque(runs), list[threading.Thread]()
    at_a_time = min(_room(runs), len(runs))
    with stop_signals() as stop:
        try:
            while (waiting and not stop.is_set()) or any(thread.is_alive() for thread in threads):
                if waiting and not stop.is_set() and sum(thread.is_alive() for thread in threads) < _room(runs):
                    # A daemon: it does not outlive a process that a second signal ends.
                    threads.append(threading.Thread(target=do, args=(waiting.popleft(),), daemon=True))
                    threads[-1].start()
                time.sleep(FOLLOW_SECONDS)
                show()
        except Exception:
            stop.set()
            for thread in threads:
                thread.join()
            raise
    if failures and not isinstance(failures[0], Stopped):
        raise failures[0]
    if failures or waiting or stop.is_set():
        raise Stopped(f"the evaluation in {out} was stopped; continue it with --resume.")


def _room(runs: Sequence[_Run]) -> int:
    """How many of the runs may be under way at a time.

    One that fits nowhere may, too: it says so. On a cluster that can grow, one more than fits tells it to.
    """
    resources = connect()
    holding = min(resources.holding(run.config.workers) // run.config.workers.count for run in runs)
    return max(1, holding + resources.grows)


def _ease(point: Point) -> tuple[float, int]:
    """How much text there is for the store of a point, and how few domains it shall have."""
    assert point.config.prepare
    return point.config.prepare.max_documents or math.inf, -point.config.prepare.domains


def _make_store(point: Point, out: Path, tell: Progress) -> None:
    """Make the store of a point, if it is not there yet."""
    from supmer_ray.data.prepare import prepare

    assert point.config.prepare
    folder = _store_folder(out, point)
    if (folder / MANIFEST).is_file():
        return
    for rest in folder.parent.glob(f".{folder.name}.*-*"):  # of one that was killed
        shutil.rmtree(rest, ignore_errors=True)
    config = point.config.prepare.model_copy(update={"backbone": point.config.backbone})
    try:
        prepare(config, folder, progress=tell)
    except UserError as error:
        raise UserError(f"At {point.store_variant}: {error}" if point.store_variant else str(error)) from None


def _store_folder(out: Path, point: Point) -> Path:
    return out / STORES / file_name("store", point.store_variant)
