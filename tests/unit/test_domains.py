"""Vectors that point the same way share a domain, and every item lands in exactly one place."""

from itertools import pairwise

import numpy as np
import pytest

from supmer_ray.data.domains import assigned, fitted, sampled, sorted_under_domains
from supmer_ray.data.prepare import _portions
from supmer_ray.data.store import FAMILIES, count_items


def blobs(count, directions=5, width=16, seed=0):
    """Vectors near a few directions, of very different lengths; and which direction each follows."""
    generator = np.random.default_rng(seed)
    axes = np.linalg.qr(generator.normal(size=(width, directions)))[0].T
    labels = generator.integers(directions, size=count)
    vectors = (axes[labels] + 0.02 * generator.normal(size=(count, width))) * generator.uniform(0.5, 20, (count, 1))
    return vectors.astype(np.float16), labels


def cluster(vectors, rows, *, domains, sample, seed, size=97, portions=1):
    """A family of these vectors in so many portions, read in stretches of `size`."""

    def stretches(part):
        for first in range(part.start, part.stop, size):
            yield rows[first : min(first + size, part.stop)], vectors[first : min(first + size, part.stop)]

    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.choice(len(rows), min(sample, len(rows)), replace=False))
    ends = np.linspace(0, len(rows), portions + 1).astype(int)
    parts = [range(*ends) for ends in pairwise(ends)]
    own = [chosen[(chosen >= part.start) & (chosen < part.stop)] - part.start for part in parts]
    points = [sampled(stretches(part), one) for part, one in zip(parts, own, strict=True)]
    kmeans = fitted(points, domains, seed)
    return sorted_under_domains([assigned(stretches(part), kmeans) for part in parts], generator)


@pytest.fixture(scope="module")
def family():
    vectors, labels = blobs(1000)
    rows = np.arange(1000) * 3
    return cluster(vectors, rows, domains=5, sample=400, seed=7), vectors, labels


def test_domains_are_directions(family):
    found, _, labels = family
    for domain in range(5):
        rows = np.concatenate([found.rows(domain, "train"), found.rows(domain, "validation")])
        assert len(set(labels[rows // 3])) == 1


def test_every_item_once_and_a_tenth_validates(family):
    found, _, _ = family
    assert sorted(found.items) == list(range(0, 3000, 3))
    sizes = np.diff(found.starts)
    assert ((found.starts[1:] - found.train_ends) == sizes // 10).all()


def test_items_of_the_whole_text_validate(family):
    """Within a domain they are shuffled, so that it is not the end of the text alone."""
    found, _, _ = family
    for domain in range(5):
        validation = found.rows(domain, "validation")
        assert min(validation) < 1000 and max(validation) > 2000
        assert (np.diff(found.rows(domain, "train")) < 0).any()


def test_another_seed_fits_other_centres():
    points = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)
    one, again, other = (fitted([points], 5, seed).cluster_centers_ for seed in (7, 7, 8))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other)


def test_centroids_are_means_of_the_raw_vectors(family):
    found, vectors, _ = family
    for domain in range(5):
        rows = np.concatenate([found.rows(domain, "train"), found.rows(domain, "validation")])
        np.testing.assert_allclose(found.centroids[domain], vectors[rows // 3].astype(np.float64).mean(0), rtol=1e-5)
    assert found.centroids.dtype == np.float32


@pytest.mark.parametrize(("size", "portions"), [(1000, 1), (97, 3), (20, 7)])
def test_same_seed_same_bits_however_the_items_arrive(family, size, portions):
    found, vectors, _ = family
    rows = np.arange(1000) * 3
    again = cluster(vectors, rows, domains=5, sample=400, seed=7, size=size, portions=portions)
    for name in ("items", "starts", "train_ends"):
        np.testing.assert_array_equal(getattr(found, name), getattr(again, name))
    np.testing.assert_allclose(found.centroids, again.centroids, rtol=1e-6)
    other = cluster(vectors, rows, domains=5, sample=400, seed=8)
    assert not np.array_equal(found.items, other.items)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stretches", [1, 3, 100])
def test_portions_hold_every_item_once(monkeypatch, family, stretches):
    """In the middle of these documents stand a thousand of a single sentence: stretches without a pair."""
    monkeypatch.setattr("supmer_ray.data.prepare.PORTION", stretches)
    starts = np.cumsum([0, *[20] * 50, *[1] * 1200, *[7] * 90])
    portions = _portions(family, starts)
    assert [number for portion in portions for number in portion.stretches] == list(range(6))
    count = count_items(family, starts)
    assert sum(portion.items for portion in portions) == count
    some = np.arange(0, count, 3)
    assert np.concatenate([portion.chosen(some) + portion.first for portion in portions]).tolist() == some.tolist()


def test_small_domains_keep_an_item_for_validation():
    vectors, _ = blobs(12, directions=3)
    found = cluster(vectors, np.arange(12), domains=3, sample=100, seed=0)
    sizes = np.diff(found.starts)
    assert ((found.starts[1:] - found.train_ends) == np.where(sizes >= 2, 1, 0)).all()


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_domain_without_items_is_dropped():
    vectors = np.repeat(np.eye(2, 8, dtype=np.float16), 20, axis=0)
    found = cluster(vectors, np.arange(40), domains=4, sample=40, seed=0)
    assert found.domains == 2
    assert np.diff(found.starts).tolist() == [20, 20]
