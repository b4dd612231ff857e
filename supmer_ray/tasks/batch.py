"""Examples in flat arrays: what the builders make and what travels (Arrow, no Python object per token).

`TaskBatch` is what one worker takes in one meta-step. Nothing that a builder imports needs torch, whose import would
cost each of their processes seconds and hundreds of MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import chain

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class Examples:
    """n examples of one or several tasks.

    Attributes:
        tokens: (total,) int32, the encoder inputs one after the other; −1−k stands for vector k.
        offsets: (n + 1,) int64, where each input starts.
        labels: (n, T) int32, the decoder's target.
        task: (n,) int32, which task (prompt) an example belongs to.
        vectors: (tasks, K, d) float32, embeddings to insert; K is 0 where a format has none.
        choices: (tasks, C) int32, the words that a task may be answered with, −1 where it has fewer than others.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    task: np.ndarray
    vectors: np.ndarray
    choices: np.ndarray

    def __len__(self) -> int:
        return len(self.task)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @staticmethod
    def of(
        inputs: Sequence[Sequence[int]] | Sequence[np.ndarray],
        labels: Sequence[Sequence[int]],
        vectors: np.ndarray | None = None,
        choices: Sequence[int] | np.ndarray = (),
    ) -> Examples:
        """Examples of one task (number 0) from lists of ids."""
        lengths = [len(ids) for ids in inputs]
        return Examples(
            tokens=np.fromiter(chain.from_iterable(inputs), np.int32, sum(lengths)),
            offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
            labels=np.asarray(labels, np.int32),
            task=np.zeros(len(lengths), np.int32),
            vectors=np.zeros((1, 0, 0), np.float32) if vectors is None else vectors[None].astype(np.float32),
            choices=np.asarray(choices, np.int32)[None],
        )

    @staticmethod
    def concat(parts: Sequence[Examples]) -> Examples:
        """The parts one after the other, their tasks numbered on. All parts share T, K and d."""
        sizes = np.cumsum([0] + [part.offsets[-1] for part in parts])
        tasks = np.cumsum([0] + [len(part.vectors) for part in parts])
        widest = max(part.choices.shape[1] for part in parts)
        return Examples(
            tokens=np.concatenate([part.tokens for part in parts]),
            offsets=np.concatenate([[0], *(part.offsets[1:] + size for part, size in zip(parts, sizes, strict=False))]),
            labels=np.concatenate([part.labels for part in parts]),
            task=np.concatenate([part.task + first for part, first in zip(parts, tasks, strict=False)]).astype(
                np.int32
            ),
            vectors=np.concatenate([part.vectors for part in parts]),
            choices=np.concatenate([widened(part.choices, widest, -1) for part in parts]),
        )


@dataclass(frozen=True)
class TaskBatch:
    """T meta-tasks, as one worker takes them in one step.

    Attributes:
        support: the support sets, T of them.
        query, partner: the query sets and the partner domains' query sets; example i of the one is
            mixed with example i of the other.
        domain_similarity: (T,) δ of each task and its partner, in [0, 1].
        names: T task types, for the metrics.
    """

    support: Examples
    query: Examples
    partner: Examples
    domain_similarity: np.ndarray
    names: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.domain_similarity)

    @staticmethod
    def concat(parts: Sequence[TaskBatch]) -> TaskBatch:
        """The tasks of all parts, numbered on."""
        return TaskBatch(
            support=Examples.concat([part.support for part in parts]),
            query=Examples.concat([part.query for part in parts]),
            partner=Examples.concat([part.partner for part in parts]),
            domain_similarity=np.concatenate([part.domain_similarity for part in parts]),
            names=[name for part in parts for name in part.names],
        )

    def to_arrow(self) -> pa.Table:
        """One Arrow row: every array flat in a list column of its own type, its shape beside it."""
        columns: dict[str, pa.Array] = {
            "names": pa.array([list(self.names)], pa.list_(pa.string())),
            "domain_similarity": _column(self.domain_similarity),
        }
        for role in _ROLES:
            for name, values in vars(getattr(self, role)).items():
                columns[f"{role}.{name}"] = _column(values.reshape(-1))
                columns[f"{role}.{name}.shape"] = _column(np.array(values.shape, np.int64))
        return pa.table(columns)

    @staticmethod
    def from_arrow(row: pa.Table) -> TaskBatch:
        """The inverse of `to_arrow`, without a copy where Arrow allows."""

        def values(name: str) -> np.ndarray:
            return row.column(name).chunk(0)[0].values.to_numpy(zero_copy_only=False)

        def examples(role: str) -> Examples:
            names = [field.name for field in fields(Examples)]
            return Examples(**{n: values(f"{role}.{n}").reshape(values(f"{role}.{n}.shape")) for n in names})

        return TaskBatch(
            support=examples("support"),
            query=examples("query"),
            partner=examples("partner"),
            domain_similarity=values("domain_similarity"),
            names=row.column("names").chunk(0)[0].as_py(),
        )


_ROLES = ("support", "query", "partner")


def widened(values: np.ndarray, width: int, fill: int) -> np.ndarray:
    """(n, k) → (n, width), filled up on the right."""
    return np.pad(values, ((0, 0), (0, width - values.shape[1])), constant_values=fill)


def _column(values: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), pa.array(values))
