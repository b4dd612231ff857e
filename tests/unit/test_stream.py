"""The stream's first item is made before it is asked for."""

import threading
from types import SimpleNamespace

import pytest

from supmer_ray.errors import UserError
from supmer_ray.files import Place
from supmer_ray.tasks.stream import _open_store, ahead


@pytest.fixture(autouse=True)
def forget_stores():
    yield
    _open_store.cache_clear()


def test_the_first_item_is_made_before_it_is_asked_for():
    begun = threading.Event()

    def items():
        begun.set()
        yield from range(3)

    stream = ahead(items())
    assert begun.wait(10)
    assert list(stream) == [0, 1, 2]


def test_a_store_that_was_made_anew_is_opened_anew(monkeypatch):
    there = ["a"]

    def opened(place):
        return SimpleNamespace(manifest=SimpleNamespace(digest=there[0]))

    monkeypatch.setattr("supmer_ray.tasks.stream.Store.open", opened)
    place = Place("/runs/store")
    first = _open_store(place, "a")
    assert _open_store(place, "a") is first
    there[0] = "b"
    assert _open_store(place, "b") is not first
    with pytest.raises(UserError, match=r"^The store /runs/store was made anew while a run read it"):
        _open_store(place, "a")


def test_an_empty_stream_ends():
    assert list(ahead(iter(()))) == []


def test_a_failure_reaches_the_one_who_asks():
    def items():
        raise ValueError("no store")
        yield

    stream = ahead(items())
    with pytest.raises(ValueError, match="no store"):
        next(stream)
