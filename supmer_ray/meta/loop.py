"""What each worker of a run does from its start to its last snapshot.

Ray Train starts the workers of a run (`work`); a trial of a sweep that needs one worker is that worker itself
(`sweep/trial.py`). Either is a `Host`.
"""

from __future__ import annotations

import math
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed

from supmer_ray.cluster import this_node_cpus
from supmer_ray.config import RunConfig
from supmer_ray.data.store import Store
from supmer_ray.errors import UserError
from supmer_ray.files import Place, read_sealed
from supmer_ray.meta.learner import Learner
from supmer_ray.meta.record import NoRecord, Record
from supmer_ray.meta.run import CONFIG_FILE, GROUP_FILE, REFUSAL_FILE, STOP_FILE, RunPlan, snapshots_in
from supmer_ray.meta.state import MetaState
from supmer_ray.model.backbone import Backbone, load_backbone
from supmer_ray.tasks.batch import TaskBatch
from supmer_ray.tasks.builder import TaskBuilder
from supmer_ray.tasks.formats import Formats

STOP_LOOK_SECONDS = 0.5
"""How often a worker looks for `STOP_FILE`: `ray job stop` gives a driver three seconds."""

LEAVE_LOOK_SECONDS = 5.0
"""How often workers ask whether a node leaves, as Ray itself does, and how much they lose by it at most."""


class Host(Protocol):
    """What runs a worker: Ray Train, or a trial of Ray Tune.

    Attributes:
        rank, workers: this worker's number among all of the run.
        local_workers: workers on this node, who share its cores.
        device: where the backbone lies.
    """

    rank: int
    workers: int
    local_workers: int
    device: torch.device

    def snapshots(self) -> Sequence[Any]:
        """The snapshots of the run as Ray `Checkpoint`s, newest first."""

    def report(self, metrics: dict[str, Any], write: Callable[[Path], None]) -> None:
        """Tell the driver, and keep the snapshot that `write` makes in an empty folder."""

    def leaving(self) -> bool:
        """Whether a node of the run is about to be taken away. All workers ask together, and hear the same."""


class TrainHost:
    """A worker that Ray Train started."""

    def __init__(self, out: Place) -> None:
        import ray.train
        import ray.train.torch

        self._out = out
        context = ray.train.get_context()
        self.rank, self.workers = context.get_world_rank(), context.get_world_size()
        self.local_workers = context.get_local_world_size()
        self.device = ray.train.torch.get_device()

    def snapshots(self) -> Sequence[Any]:
        # Not Ray's own note of the latest: it may have been cut short itself when a disk was full.
        return snapshots_in(self._out)

    def report(self, metrics: dict[str, Any], write: Callable[[Path], None]) -> None:
        import ray.train

        if self.rank:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def leaving(self) -> bool:
        import ray.train

        return ray.train.get_preemption_info() is not None


def work(plan: RunPlan) -> None:
    """What a worker that Ray Train started does.

    What a restart would find again (settings that do not fit the backbone, a store that is not seen from here,
    gradients that are not finite) ends the run with a sentence for the driver.

    Raises:
        RuntimeError: the run's folder is not seen from here, or the workers read different snapshots; Ray Train then
            restarts them.
        RefusedAmidst: this worker refuses while the others wait for it.
    """
    if plan.out.read(REFUSAL_FILE) is not None:
        return  # Ray Train has started all workers again after one had refused to go on
    if plan.objective:
        _note_group(plan.out)
    elif plan.out.read(CONFIG_FILE) is None:
        # No refusal: what is written there would not be seen either, and a disk may only be late.
        raise RuntimeError(
            f"The node {socket.gethostname()} does not see the run's folder {plan.out}, which has to lie where all "
            "nodes see it: on a disk that they share, or in an object store (s3://…)."
        )
    try:
        meta_train(plan, TrainHost(plan.out))
    except RefusedElsewhere:
        return
    except (UserError, FloatingPointError) as error:
        plan.out.write(REFUSAL_FILE, str(error))
        if isinstance(error, RefusedAmidst):
            raise


class RefusedElsewhere(Exception):
    """Another worker of the run cannot begin, and leaves the sentence that says why."""


class RefusedAmidst(UserError):
    """What a worker refuses while the others wait for it in a step: only the end of all workers frees those."""


@contextmanager
def begun_together(device: torch.device) -> Iterator[None]:
    """What a worker does before the first collective call; a refusal of one ends all, who would wait for it else.

    Raises:
        UserError: this worker's.
        RefusedElsewhere: another's.
    """
    refused: UserError | None = None
    try:
        yield
    except UserError as error:
        refused = error
    anyone = torch.tensor(float(refused is not None), device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(anyone)
    if refused:
        raise refused
    if anyone:
        raise RefusedElsewhere


def _require_same_step(step: int, device: torch.device) -> None:
    """Each worker reads the snapshots for itself; where one could not read the newest, all start again.

    Raises:
        RuntimeError: the workers would go on from different steps. Ray Train then restarts them.
    """
    ends = torch.tensor([step, -step], device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX)
    last, first = ends.tolist()
    if last != -first:
        raise RuntimeError(
            f"The workers found snapshots of different steps, {-first} to {last}: not all nodes read the run's folder "
            "alike."
        )


def _share(state: MetaState) -> None:
    """Give all workers the state of the first: the last bits of a new φ depend on a node's processor and threads."""
    if torch.distributed.is_initialized():
        for own in (state.prompt, *state.regularizer.parameters(), state.log_rates):
            torch.distributed.broadcast(own.data, 0)


def _note_group(out: Place) -> None:
    from ray.util.placement_group import get_current_placement_group

    if group := get_current_placement_group():
        out.write(GROUP_FILE, group.id.hex())


def meta_train(plan: RunPlan, host: Host) -> None:
    """All the meta-steps of a run that are still to do, as one worker of it.

    Raises:
        UserError: settings, store and backbone do not fit each other.
        FloatingPointError: too many steps in a row whose gradient is not finite.
    """
    from supmer_ray.tasks.stream import ShardSource, ahead, stream_shards

    config, rank = plan.config, host.rank
    reached = {"worker": time.time()}
    with begun_together(host.device):
        store = Store.open(plan.store)
        backbone = _backbone(plan, host, store)
        reached["backbone"] = time.time()
        formats = make_formats(config, backbone)

        identity = checkpoint_identity(store)
        state, damaged = restore(host.snapshots(), config, backbone, identity["corpus"])
        schedule, last = config.schedule, config.meta.steps
        source = ShardSource(
            plan.store, formats, config.tasks, config.seed, rank, host.workers, digest=store.manifest.digest
        )
        # The builders start while this worker validates.
        shards = ahead(stream_shards(source, range(state.progress.step, last), builders=config.workers.builders))
        learner = Learner(config, backbone, state, rank, host.workers)
        builder = TaskBuilder(store, formats, config.tasks, config.seed)
    _require_same_step(state.progress.step, host.device)
    _share(state)
    types = plan.validation_types or config.tasks.types
    with closing(Record(config, plan.out, state.progress.step) if rank == 0 else NoRecord()) as record:

        def validate() -> dict[str, dict[str, float]]:
            found = learner.validate(builder, types)
            record.write({"kind": "validation", "step": state.progress.step, "validation": found})
            return found

        def report(metrics: dict[str, Any]) -> None:
            record.flush()
            host.report(metrics, lambda folder: state.save(folder, identity))

        for sentence in damaged:
            text = f"{sentence} The run goes on from step {state.progress.step} instead."
            record.write({"kind": "notice", "step": state.progress.step, "text": text})
        if state.progress.step == 0:
            validate()
        if plan.objective and state.progress.step == last:
            # The sweep was killed after this trial's last snapshot and before it noted what the trial had found.
            report({"step": last, **plan.objective(learner, learner.validate(builder, types))})
        reached["validated"] = time.time()
        asked = Every(STOP_LOOK_SECONDS, lambda: rank == 0 and bool(plan.out.glance(STOP_FILE)))
        looked, announced = time.monotonic(), False
        for batch, waited in _timed(shards):
            started = time.perf_counter()
            look = rank == 0 and time.monotonic() - looked > LEAVE_LOOK_SECONDS
            metrics = learner.train_step(batch, stop=asked(), look=look)
            seconds = time.perf_counter() - started
            done = state.progress.step
            figures = {"step": done, **metrics, "step_seconds": seconds, "data_wait_seconds": waited}
            if reached:
                record.write({"kind": "start", "step": done, "reached": {**reached, "step": time.time()}})
                reached = {}
            record.write({"kind": "step", **figures})
            leaving = learner.looking and host.leaving()
            looked = time.monotonic() if learner.looking else looked
            if leaving and not announced and not plan.objective:
                announced = True
                text = f"A node of the run will leave soon; from step {done} on it has a snapshot every few seconds."
                record.write({"kind": "notice", "step": done, "text": text})
            validated = done % schedule.validate_every == 0 or done == last
            found = validate() if validated else {}
            if plan.objective:
                if validated:
                    report({"step": done, **plan.objective(learner, found)})
            elif done % schedule.checkpoint_every == 0 or done == last or learner.stopping or leaving:
                report(figures)
            if learner.stopping and done < last:
                text = f"Stopped after step {done}, as told, with a snapshot; go on with --resume."
                record.write({"kind": "notice", "step": done, "text": text})
                break


def _backbone(plan: RunPlan, host: Host, store: Store) -> Backbone:
    """The backbone that the store was prepared with, as the run's settings want it computed.

    Raises:
        UserError: it cannot be loaded, has other weights than the store was prepared with, or cannot be computed so.
    """
    workers = plan.config.workers
    if host.device.type == "cpu":
        # Builders are idle most of the time, so a CPU worker may use its whole share of the node.
        share = int(this_node_cpus()) // max(host.local_workers, plan.beside)
        torch.set_num_threads(max(1, int(workers.cpus), share))
    dtype = getattr(torch, workers.precision) if workers.precision else None
    name = store.manifest.backbone.name
    backbone = load_backbone(name, device=host.device, dtype=dtype, gpu_share=workers.gpu_share)
    require_same_backbone(store, backbone)
    if workers.checkpoint_activations:
        backbone.checkpoint_activations()
    if workers.compile_norms:
        backbone.compile_norms()
    return backbone


def restore(
    snapshots: Sequence[Any], config: RunConfig, backbone: Backbone, corpus: str
) -> tuple[MetaState, list[str]]:
    """The state to go on from: the newest snapshot that is whole, or a fresh one where there is none.

    Args:
        corpus: fingerprint of the store's text.

    Returns:
        The state, and one sentence for each damaged snapshot that was passed over.

    Raises:
        UserError: they belong to another run, or to one on another text.
    """
    damaged: list[str] = []
    for snapshot in snapshots:
        with snapshot.as_directory() as folder:
            try:
                sealed = read_sealed(Path(folder), "a checkpoint")
            except UserError as error:
                damaged.append(str(error))
                continue
            if sealed["corpus"] != corpus:
                raise UserError(
                    "The store holds another text than when this run was started; resume it on the store as it was, or "
                    "start a new run."
                )
            return MetaState.resume(Path(folder), config, backbone), damaged
    return MetaState.fresh(config, backbone), damaged


def require_same_backbone(store: Store, backbone: Backbone) -> None:
    """Refuse a backbone whose weights are not those that the store was prepared with.

    Raises:
        UserError: the fingerprints differ.
    """
    if backbone.fingerprint != store.manifest.backbone.fingerprint:
        raise UserError(
            f"The store {store.path} was prepared with other weights of '{backbone.name}' than are found here; "
            "prepare it again."
        )


def checkpoint_identity(store: Store) -> dict[str, Any]:
    """What a checkpoint made from `store` says of where it belongs."""
    manifest = store.manifest
    return {"backbone": manifest.backbone.model_dump(), "corpus": manifest.corpus}


def make_formats(config: RunConfig, backbone: Backbone) -> Formats:
    """The formats of a run's tasks.

    Raises:
        UserError: the prompt and the longest input do not fit the backbone's positions.
    """
    longest = config.prompt.length + config.tasks.max_length
    if backbone.max_positions is not None and longest > backbone.max_positions:
        raise UserError(
            f"prompt.length {config.prompt.length} and tasks.max_length {config.tasks.max_length} need {longest} "
            f"positions, but '{backbone.name}' has {backbone.max_positions}; lower one of them."
        )
    return Formats.of(backbone, config.tasks)


class Every:
    """Asks a question no more often than every so many seconds; between, the last answer stands."""

    def __init__(self, seconds: float, question: Callable[[], bool]) -> None:
        self._seconds, self._question = seconds, question
        self._asked, self._answer = -math.inf, False

    def __call__(self) -> bool:
        if time.monotonic() - self._asked >= self._seconds:
            self._asked, self._answer = time.monotonic(), self._question()
        return self._answer


def _timed(shards: Iterator[TaskBatch]) -> Iterator[tuple[TaskBatch, float]]:
    """Each shard with the seconds that the worker waited for it.

    Raises:
        RefusedAmidst: what a builder refuses.
    """
    while True:
        started = time.perf_counter()
        try:
            batch = next(shards, None)
        except UserError as error:
            raise RefusedAmidst(str(error)) from None
        if batch is None:
            return
        yield batch, time.perf_counter() - started
