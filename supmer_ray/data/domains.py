"""Vectors become domains: k-means on a sample, then every item sorted under its domain.

A family's embeddings are passed in portions, each twice and wherever the cluster has room: once for those of the
sample that lie in it (`sampled`, then `fitted` on all of the sample), once to assign all (`assigned`). What the
portions say flows together into a `Family` (`sorted_under_domains`). Memory holds the sample, or, where a family is
sorted, some 50 bytes an item. The paper has 250 domains; nine tenths of each train.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import MiniBatchKMeans
from threadpoolctl import threadpool_limits

from supmer_ray.data.store import Family

Stretches = Iterable[tuple[np.ndarray, np.ndarray]]
"""Items of a portion in row order: (rows (n,) int64, embeddings (n, d)), stretch by stretch."""


@dataclass(frozen=True)
class Assigned:
    """A portion's items and their domains.

    Attributes:
        rows: (n,) where each item begins.
        labels: (n,) int32 number of its domain.
        sums: (domains, d) float64 sum of each domain's raw vectors.
    """

    rows: np.ndarray
    labels: np.ndarray
    sums: np.ndarray


def sampled(stretches: Stretches, chosen: np.ndarray) -> np.ndarray:
    """The vectors that k-means is fitted on, in length 1: (len(chosen), d) float32.

    Domains are found by direction, because they are compared by their cosine.

    Args:
        chosen: sorted numbers of items, counted from the portion's first.
    """
    parts, passed = [], 0
    for rows, vectors in stretches:
        first, last = np.searchsorted(chosen, (passed, passed + len(rows)))
        parts.append(_directions(vectors[chosen[first:last] - passed]))
        passed += len(rows)
    return np.concatenate(parts)


def fitted(points: Sequence[np.ndarray], domains: int, seed: int) -> MiniBatchKMeans:
    """k-means on the sample, whose parts come in row order."""
    with _one_thread():
        kmeans = MiniBatchKMeans(domains, batch_size=4096, n_init=3, random_state=seed)
        return kmeans.fit(np.concatenate(points))


def assigned(stretches: Stretches, kmeans: MiniBatchKMeans) -> Assigned:
    """Every item of a portion with the domain whose centre is nearest to its direction."""
    rows, labels = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
    sums = np.zeros(kmeans.cluster_centers_.shape, np.float64)
    with _one_thread():
        for part, vectors in stretches:
            if len(part):
                label = kmeans.predict(_directions(vectors))
                order = np.argsort(label, kind="stable")
                found, first = np.unique(label[order], return_index=True)
                sums[found] += np.add.reduceat(vectors[order].astype(np.float64), first, axis=0)
                rows.append(part)
                labels.append(label.astype(np.int32))
    return Assigned(np.concatenate(rows), np.concatenate(labels), sums)


def sorted_under_domains(portions: Sequence[Assigned], generator: np.random.Generator) -> Family:
    """The family of all portions, which come in row order.

    The centroid that is kept is the mean of the RAW embeddings of the domain's items: the task type scc puts it
    straight into the encoder's input, where its length matters. A domain that got no item is dropped. Within a
    domain the items are shuffled; nine tenths train.
    """
    sums = portions[0].sums.copy()
    for portion in portions[1:]:  # one after the other: sums in another order would give other bits
        sums += portion.sums
    labels = np.concatenate([portion.labels for portion in portions])
    sizes = np.bincount(labels, minlength=len(sums))
    used = np.flatnonzero(sizes)
    sizes = sizes[used]
    order = generator.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    del labels
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    validation = np.where(sizes >= 2, np.maximum(sizes // 10, 1), 0)
    return Family(
        centroids=(sums[used] / sizes[:, None]).astype(np.float32),
        items=np.concatenate([portion.rows for portion in portions])[order],
        starts=starts,
        train_ends=starts[1:] - validation,
        keywords=np.zeros((len(used), 0), np.int32),
    )


def empty_family(d_model: int) -> Family:
    """The family of a text that has no items for it."""
    return Family(
        centroids=np.zeros((0, d_model), np.float32),
        items=np.zeros(0, np.int64),
        starts=np.zeros(1, np.int64),
        train_ends=np.zeros(0, np.int64),
        keywords=np.zeros((0, 0), np.int32),
    )


def _one_thread() -> threadpool_limits:
    """One thread for scikit-learn: sums in another order would give other bits."""
    return threadpool_limits(1)


def _directions(vectors: np.ndarray) -> np.ndarray:
    wide = vectors.astype(np.float32)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
