"""A meta-task is a pure function of (store, mixture, seed, index).

Task indices go in, `TaskBatch`es come out. Step t takes the tasks t·T … t·T + T − 1, and the workers
share them in order, so any number of workers and builders makes the same tasks, and the only state of
the stream is the next step.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from supmer_ray.config import TASK_TYPES, TasksConfig
from supmer_ray.data.store import Store
from supmer_ray.tasks.batch import TaskBatch
from supmer_ray.tasks.formats import Formats
from supmer_ray.tasks.types import TaskDraw, domain_similarity

_TYPE_STREAM = 0x7A5C
_TASK_STREAM = 0x1A5C
_VALIDATION_STREAM = 0xE7A1


def task_type_of_step(mixture: Mapping[str, float], seed: int, step: int) -> str:
    """The task type that every task of meta-step `step` has, drawn from the mixture."""
    weights = np.array([mixture.get(name, 0.0) for name in TASK_TYPES])
    generator = np.random.default_rng([seed, step, _TYPE_STREAM])
    return TASK_TYPES[generator.choice(len(TASK_TYPES), p=weights / weights.sum())]


@dataclass(frozen=True)
class TaskBuilder:
    """Builds meta-tasks from a store.

    Args:
        store: the prepared text.
        formats: in the vocabulary of the backbone that will read the tasks.
        config: mixture and sizes.
        seed: of the whole stream.
    """

    store: Store
    formats: Formats
    config: TasksConfig
    seed: int

    def task(self, index: int) -> TaskBatch:
        """The training task of a global index, as a batch of one."""
        name = task_type_of_step(self.config.mixture, self.seed, index // self.config.tasks_per_step)
        return self._build(name, "train", np.random.default_rng([self.seed, index, _TASK_STREAM]))

    def validation_task(self, name: str, index: int) -> TaskBatch:
        """Validation task number `index` of a type: the same whatever the mixture."""
        number = zlib.crc32(name.encode())
        return self._build(name, "validation", np.random.default_rng([self.seed, number, index, _VALIDATION_STREAM]))

    def shard(self, step: int, rank: int, workers: int) -> TaskBatch:
        """The tasks of one worker in one meta-step."""
        each = self.config.tasks_per_step // workers
        first = step * self.config.tasks_per_step + rank * each
        return TaskBatch.concat([self.task(index) for index in range(first, first + each)])

    def _build(self, name: str, split: str, generator: np.random.Generator) -> TaskBatch:
        draw = TaskDraw(self.store, self.formats, name, split, generator)
        own, partner = draw.domains()
        support, query = draw.examples(own, [self.config.support, self.config.query])
        (partner_query,) = draw.examples(partner, [self.config.query])
        centroids = draw.family.centroids
        similarity = domain_similarity(centroids[own], centroids[partner])
        return TaskBatch(support, query, partner_query, np.array([similarity], np.float32), [name])
