"""Meta-training: a store and a configuration go in, a run folder with a checkpoint comes out.

`RUN/checkpoint/` is the result, `RUN/metrics.jsonl` what happened, one JSON object a line. Ray Train
keeps its own snapshots beside them, from which `--resume` and a restarted worker go on.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from supmer_ray.cluster import Waiting, connect, require_room, reserved_cpus, settle_data_actors, waits, workers_a_node
from supmer_ray.config import RunConfig
from supmer_ray.data.store import Outline
from supmer_ray.errors import Stopped, UserError, is_disk_full
from supmer_ray.files import (
    Place,
    Where,
    held,
    parse_record,
    read_sealed,
    require_new_place,
    require_outside,
    whole_folder,
)
from supmer_ray.meta.record import METRICS_FILE, MetricsLog
from supmer_ray.meta.run import CONFIG_FILE, REFUSAL_FILE, STOP_FILE, RunPlan, snapshots_in, step_in, worker_loop
from supmer_ray.monitoring.loggers import require_loggers
from supmer_ray.reading import completed
from supmer_ray.tasks.types import require_domains

CHECKPOINT = "checkpoint"

FOLLOW_SECONDS = 0.5
"""How often the driver looks at the metrics file; at one in an object store it looks as often as that is written."""

Progress = Callable[[dict[str, Any]], None]
"""Called with every row of `metrics.jsonl` as it appears."""


@dataclass(frozen=True)
class TrainResult:
    """Where a run's outcome lies.

    Attributes:
        out: the run's folder, or its URI.
    """

    out: Place

    @property
    def checkpoint(self) -> Path:
        """Folder with θ and ψ_φ, of a run on a path."""
        return self.out.local / CHECKPOINT

    @property
    def metrics(self) -> Path:
        """The file with one row a step, of a run on a path."""
        return self.out.local / METRICS_FILE


def train(
    config: RunConfig,
    store: Where,
    out: Path | str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    at_a_time: int = 1,
) -> TrainResult:
    """Meta-train a soft prompt and a gradient regularizer with Ray Train.

    Args:
        store: what `prepare` wrote, a folder or the URI of one.
        out: the run's folder, or the URI of one (`s3://…`); on a cluster every node must see it.
        resume: go on from the last snapshot in `out`; how the run is laid out and watched may differ (`workers`,
            `schedule`, `monitoring`), but for the number of validation tasks.
        overwrite: replace what `out` holds.
        stop: set from outside, it ends the run as a signal would; unset: SIGTERM and SIGINT do, in the main thread.
        at_a_time: how many such runs share the cluster.

    Raises:
        UserError: unusable input, too few CPUs, or another run in `out`; nothing was written.
        Stopped: it was told to end; what was learned until then is kept for `resume`.
    """
    place, store = Place.of(out).resolved, Place.of(store).resolved
    opened = Outline.open(store)
    digest = opened.manifest.digest
    require_domains(opened, config.tasks.types)
    require_new_place(place, overwrite=overwrite, resume=resume, can_resume=True, marker=CONFIG_FILE)
    require_loggers(config.monitoring.loggers, place)
    if resume:
        _require_same_run(place, config, store, digest)
    if overwrite:
        require_outside(place, {"store": [store]})
    with held(place, "a run"):
        # Ray Train's trainer needs torch, whose import takes seconds: it is read while the cluster starts.
        threading.Thread(target=import_module, args=("torch",), daemon=True).start()
        resources = connect()
        require_room(resources, config.workers)
        settle_data_actors(resources)
        if overwrite:
            place.remove()
        place.filesystem()[0].create_dir(place.filesystem()[1], recursive=True)
        settings = {"store": str(store), "store_digest": digest, "config": config.model_dump(mode="json")}
        place.write(CONFIG_FILE, json.dumps(settings, indent=2) + "\n")
        (place / REFUSAL_FILE).remove()
        place.write(STOP_FILE, "")
        gpu = resources.has_gpus_for(config.workers)
        plan = RunPlan(config, store, place, beside=workers_a_node(at_a_time * config.workers.count))
        with nullcontext(stop) if stop else stop_signals() as told:
            _fit(plan, gpu, told, progress)
        return _conclude(place, config.meta.steps)


def make_trainer(plan: RunPlan, *, gpu: bool, callbacks: Sequence[Any] = ()) -> Any:
    """The Ray Train trainer of a run; its snapshots lie in the plan's folder."""
    # Without it the run does not show in the dashboard's Train view.
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    _forget_damaged_notes(plan.out)
    from supmer_ray.meta.restarts import TellRestarts

    workers = plan.config.workers
    told: list[Any] = [TellRestarts(plan.out, workers.max_failures), *callbacks]
    filesystem, path = plan.out.filesystem()
    parent, _, name = path.rpartition("/")
    return TorchTrainer(
        worker_loop,
        train_loop_config={"plan": plan},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers.count,
            use_gpu=gpu,
            # One reservation for a worker and its builders: two runs that start at once cannot each get half of theirs.
            resources_per_worker={"CPU": reserved_cpus(workers), **({"GPU": workers.gpu_share} if gpu else {})},
            # GPUs want the short way between them. A worker on CPUs shares its node's with the others that are there.
            placement_strategy="PACK" if gpu else "SPREAD",
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=parent or "/",
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=workers.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            callbacks=told,
        ),
    )


def _fit(plan: RunPlan, gpu: bool, stop: threading.Event, progress: Progress | None) -> None:
    """Run the trainer and pass the metrics rows on, until it ends or is told to.

    Raises:
        Exception: of `progress`, after the run was stopped with a snapshot: none goes on with nobody looking on.
    """
    trainer = make_trainer(plan, gpu=gpu)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failures.append(error)

    # Not in the main thread: Ray Train's own handler of SIGINT throws away what was not yet saved.
    thread = threading.Thread(target=run, daemon=True)
    follow = _Follow(plan.out, progress)
    follow.look()
    waiting = Waiting("The run", plan.config.workers)
    pause = MetricsLog.REMOTE_SECONDS if plan.out.remote else FOLLOW_SECONDS
    told, looked = False, time.monotonic()
    thread.start()
    try:
        while thread.is_alive():
            if told:
                thread.join(FOLLOW_SECONDS)
            elif told := stop.wait(FOLLOW_SECONDS):
                plan.out.write(STOP_FILE, "stop")
            if time.monotonic() - looked < pause:
                continue
            looked = time.monotonic()
            follow.look()
            if told and waits():
                break  # no worker reads the stop file before others make room for it
            if progress and (text := waiting.notice()):
                progress({"kind": "notice", "step": 0, "text": text})
        follow.look()
    except Exception:
        plan.out.write(STOP_FILE, "stop")
        thread.join()
        raise
    if failures and plan.out.read(REFUSAL_FILE) is None:
        if any(is_disk_full(error) for error in failures):
            raise UserError(
                f"There is no room left where {plan.out} lies; make some and go on with --resume."
            ) from failures[0]
        raise failures[0]
    if told and follow.step < plan.config.meta.steps and plan.out.read(REFUSAL_FILE) is None:
        raise Stopped(f"the run in {plan.out} was stopped; continue it with --resume.")


def _conclude(place: Place, steps: int) -> TrainResult:
    """Make the last snapshot, that of the last step, the run's checkpoint, or say why there is none."""
    from pyarrow.fs import copy_files

    sentence = place.read(REFUSAL_FILE)
    snapshots = snapshots_in(place)
    if sentence is not None:
        # What has made steps is kept: its metrics show what went wrong.
        if not snapshots and '"kind": "step"' not in (place.read(METRICS_FILE) or ""):
            place.remove()
        raise UserError(sentence)
    if not snapshots:
        raise RuntimeError(f"The run in {place} ended without a checkpoint.")
    # What a full disk or a kill has cut short stands among them, and the run went on from another.
    last = next(filter(partial(_is_whole, place, steps), snapshots), None)
    if last is None:
        raise UserError(f"The last snapshot of the run in {place} is damaged; go on from the one before by --resume.")
    if place.remote:
        filesystem, path = place.filesystem()
        copy_files(last.path, f"{path}/{CHECKPOINT}", source_filesystem=filesystem, destination_filesystem=filesystem)
    else:
        with whole_folder(place.local / CHECKPOINT) as folder:
            copy_files(last.path, str(folder))
    (place / STOP_FILE).remove()
    return TrainResult(place)


def _is_whole(run: Place, steps: int, snapshot: Any) -> bool:
    """Whether a snapshot is that of the last step, and all of it is there."""
    place = run / snapshot.path.rpartition("/")[2]
    try:
        read_sealed(place, "a snapshot")
    except UserError:
        return False
    return step_in(place) == steps


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """While the block runs, SIGTERM and SIGINT set the event that is yielded; a second one ends at once.

    In another thread than the main one no signal does.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_signal(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _forget_damaged_notes(place: Place) -> None:
    """Remove Ray Train's note of a run's snapshots where it is damaged, or names some that are gone.

    A disk that was full, or a kill in the middle of writing, leaves such a note, and Ray Train refuses to
    start with it. Our workers find the snapshots without it.
    """
    note = "checkpoint_manager_snapshot.json"
    text = place.read(note)
    if text is None:
        return
    here = set(place.listed())
    try:
        named = [entry["checkpoint_dir_name"] for entry in json.loads(text)["checkpoint_results"]]
        whole = here.issuperset(named)
    except (json.JSONDecodeError, KeyError, TypeError):
        whole = False
    if not whole:
        (place / note).remove()


def _require_same_run(out: Place, config: RunConfig, store: Place, digest: str) -> None:
    """Refuse to resume under another configuration, or on another store, than the run was started with."""
    text = out.read(CONFIG_FILE)
    if text is None:
        raise UserError(f"{out} holds no run to resume ({CONFIG_FILE} is missing); start without --resume.")
    try:
        started = parse_record(text)
        settings, started_on = started["config"], started["store"]
    except (ValueError, KeyError):
        raise UserError(f"{out}/{CONFIG_FILE} is damaged; start the run anew with --overwrite.") from None
    now = config.model_dump(mode="json")
    before = completed(RunConfig, settings, f"{out}/{CONFIG_FILE}")
    for section, values in before.items():
        if section not in ("workers", "schedule", "monitoring") and now[section] != values:
            raise UserError(
                f"The run in {out} was started with other values under '{section}'; resume with the same "
                "configuration, or start a new run."
            )
    tasks = before["schedule"]["validation_tasks"]
    if now["schedule"]["validation_tasks"] != tasks:
        raise UserError(
            f"The run in {out} was started with schedule.validation_tasks: {tasks}, and its validation losses are "
            "compared with each other; resume with as many."
        )
    if started_on != str(store):
        raise UserError(f"The run in {out} was started on the store {started_on}; resume with that one.")
    # Runs of earlier versions have no digest.
    if started.get("store_digest", digest) != digest:
        raise UserError(f"The store {store} was made anew since the run in {out} was started; start a new run.")


class _Follow:
    """Passes the new rows of a growing metrics file on, at each look.

    Attributes:
        step: the last one that was seen.
    """

    def __init__(self, out: Place, progress: Progress | None) -> None:
        self._out, self._progress = out, progress
        self._read = self.step = 0
        self._told: set[str] = set()

    def look(self) -> None:
        new = self._new()
        complete, newline, _ = new.rpartition(b"\n")
        self._read += len(complete) + len(newline)
        for line in complete.splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                self._read = 0  # a restarted worker has rewritten the file, and it is longer again already
                return
            if row["kind"] == "notice":
                if row["text"] in self._told:
                    continue  # read again, because the file was rewritten
                self._told.add(row["text"])
            else:
                self.step = row["step"]
            if self._progress:
                self._progress(row)

    def _new(self) -> bytes:
        """What stands behind the bytes read so far, or everything after the file got shorter.

        A restarted worker drops the rows of its lost steps.
        """
        if self._out.remote:
            text = self._out.glance(METRICS_FILE)
            if text is None:
                return b""
            whole = text.encode()
            self._read = 0 if len(whole) < self._read else self._read
            return whole[self._read :]
        file = self._out.local / METRICS_FILE
        if not file.exists():
            return b""
        with file.open("rb") as stream:
            if stream.seek(0, 2) < self._read:
                self._read = 0
            stream.seek(self._read)
            return stream.read()
