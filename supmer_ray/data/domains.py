"""Vectors become domains: k-means, then every item sorted under its domain.

Embeddings flow past twice (once for a sample to fit on, once to assign all), a `Family` flows out; memory
holds the sample and a few bytes an item. The paper has 250 domains; nine tenths of each train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from sklearn.cluster import MiniBatchKMeans
from threadpoolctl import threadpool_limits

from supmer_ray.data.store import Family

Pass = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]
"""Starts one pass over a family: (rows (n,) int64, embeddings (n, d)), stretch by stretch, in row order."""


def cluster(items: Pass, count: int, *, domains: int, sample: int, seed: int) -> Family:
    """Sort a family's `count` items into at most `domains` domains.

    Domains are found by direction (k-means on vectors of length 1), because they are compared by
    their cosine. The centroid that is kept is nevertheless the mean of the RAW embeddings of the domain's
    items: the task type scc puts it straight into the encoder's input, where its length matters. A domain
    that got no item is dropped. Within a domain the items are shuffled with the seed; nine tenths train.

    Args:
        sample: items that k-means is fitted on, drawn evenly with the seed.
    """
    generator = np.random.default_rng(seed)
    # One thread: sums in another order would give other bits.
    with threadpool_limits(1):
        points = _sample(items, count, min(sample, count), generator)
        state = int(generator.integers(2**31))
        kmeans = MiniBatchKMeans(domains, batch_size=4096, n_init=3, random_state=state).fit(points)
        del points
        rows, labels, centroids = _assign(items, kmeans)
    shuffled = generator.permutation(len(rows))
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]
    sizes = np.bincount(labels, minlength=len(centroids))
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    validation = np.where(sizes >= 2, np.maximum(sizes // 10, 1), 0)
    return Family(
        centroids=centroids,
        items=rows[order],
        starts=starts,
        train_ends=starts[1:] - validation,
        keywords=np.zeros((len(centroids), 0), np.int32),
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


def _sample(items: Pass, count: int, size: int, generator: np.random.Generator) -> np.ndarray:
    """(size, d) float32 vectors of length 1, evenly drawn."""
    chosen = np.sort(generator.choice(count, size, replace=False))
    parts, passed = [], 0
    for rows, vectors in items():
        first, last = np.searchsorted(chosen, (passed, passed + len(rows)))
        parts.append(_directions(vectors[chosen[first:last] - passed]))
        passed += len(rows)
    return np.concatenate(parts)


def _assign(items: Pass, kmeans: MiniBatchKMeans) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows and domain numbers of all items, and the domains' mean raw vectors (domains, d) float32."""
    rows, labels = [], []
    sums = np.zeros(kmeans.cluster_centers_.shape, np.float64)
    for part, vectors in items():
        if len(part):
            label = kmeans.predict(_directions(vectors))
            order = np.argsort(label, kind="stable")
            found, first = np.unique(label[order], return_index=True)
            sums[found] += np.add.reduceat(vectors[order].astype(np.float64), first, axis=0)
            rows.append(part)
            labels.append(label)
    used, numbers = np.unique(np.concatenate(labels), return_inverse=True)
    sizes = np.bincount(numbers)
    return np.concatenate(rows), numbers, (sums[used] / sizes[:, None]).astype(np.float32)


def _directions(vectors: np.ndarray) -> np.ndarray:
    wide = vectors.astype(np.float32)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
