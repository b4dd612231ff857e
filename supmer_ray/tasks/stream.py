"""The stream of meta-tasks as a Ray Data source.

A range of meta-steps goes in, one `TaskBatch` a step comes out, in order, built ahead of time by as
many tasks as there are builders. Each worker draws a stream of its own from the step where it stands:
Ray Data's shared split promises neither order nor which worker gets which row, and a resumed worker
would have to skip.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar

import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from supmer_ray.config import TasksConfig
from supmer_ray.data.store import Store
from supmer_ray.errors import UserError
from supmer_ray.files import Place
from supmer_ray.tasks.batch import TaskBatch
from supmer_ray.tasks.builder import TaskBuilder
from supmer_ray.tasks.formats import Formats

STEPS_A_TASK = 4
"""Steps that one Ray task builds: few, so that a worker's first step comes soon."""

PREFETCHED = 4
"""Batches that are kept ready in the process that takes them."""

MOST_TASKS = 2000
"""Long runs are cut into no more than about this many Ray tasks, unless one would build over 64 steps."""

Item = TypeVar("Item")


@lru_cache(maxsize=1)
def _open_store(place: Place, digest: str) -> Store:
    """A Ray worker process builds task after task from the same memory-mapped store.

    Raises:
        UserError: it is no longer the store of that digest.
    """
    store = Store.open(place)
    if store.manifest.digest != digest:
        raise UserError(f"The store {place} was made anew while a run read it; start the run anew.")
    return store


@dataclass(frozen=True)
class ShardSource:
    """What every builder must know to make the shards of one training worker.

    Attributes:
        digest: the store manifest's: what was opened under the same name before may be another store.
    """

    store: Place
    formats: Formats
    config: TasksConfig
    seed: int
    rank: int
    workers: int
    digest: str

    def shards(self, steps: range) -> Iterator[pa.Table]:
        """The shards of `steps`, packed, one a table."""
        builder = TaskBuilder(_open_store(self.store, self.digest), self.formats, self.config, self.seed)
        for step in steps:
            yield builder.shard(step, self.rank, self.workers).to_arrow()


class MetaTasks(Datasource):
    """A Ray Data source whose rows are the packed shards of a range of meta-steps."""

    def __init__(self, source: ShardSource, steps: range) -> None:
        super().__init__()
        self._source, self._steps = source, steps

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """One task for every few steps, whatever parallelism Ray Data would like."""
        return [
            ReadTask(
                partial(self._source.shards, part), BlockMetadata(len(part), None, None, None), None, per_task_row_limit
            )
            for part in _parts(self._steps)
        ]


def _parts(steps: range) -> list[range]:
    size = min(64, max(STEPS_A_TASK, len(steps) // MOST_TASKS))
    return [steps[first : first + size] for first in range(0, len(steps), size)]


def stream_shards(source: ShardSource, steps: range, *, builders: int = 1) -> Iterator[TaskBatch]:
    """The shards of `steps`, in order.

    Args:
        builders: Ray tasks that build at a time, on this process's node and with CPUs that it has reserved for them.

    Raises:
        UserError: a builder's.
    """
    if not steps:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    here = ray.get_runtime_context().get_node_id()
    # As many blocks as tasks: Ray Data would otherwise split each task's output once more.
    blocks = len(_parts(steps))
    rows = ray.data.read_datasource(
        MetaTasks(source, steps),
        # Ray Data shares out what a cluster has left, per node and rounded down: often nothing.
        num_cpus=0,
        concurrency=builders,
        override_num_blocks=blocks,
        # Elsewhere each would start a process, open the store and send its tasks over the network. That is what is left
        # when this node is about to leave and takes no more tasks.
        ray_remote_args={"scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=True)},
    )
    try:
        for row in rows.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=PREFETCHED):
            yield TaskBatch.from_arrow(row.combine_chunks())
    except RayTaskError as error:
        # What a builder refuses (its node does not see the store) is a sentence, without Ray's traceback around it and
        # without the lines on retries that Ray Data adds to it.
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause).splitlines()[0]) from None
        raise


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, the first of which is asked for at once, beside what the caller does until it needs it.

    What makes the items is lazy: builders would start only when the training loop stands still for them.
    """
    first: Future[list[Item]] = Future()

    def fetch() -> None:
        try:
            first.set_result([item for item in (next(items, None),) if item is not None])
        except BaseException as error:
            first.set_exception(error)

    # A daemon: a run that is refused meanwhile does not wait for its builders.
    threading.Thread(target=fetch, daemon=True, name="first-meta-task").start()

    def rest() -> Iterator[Item]:
        yield from first.result()
        yield from items

    return rest()
