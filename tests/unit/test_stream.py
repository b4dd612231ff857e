"""The stream's first item is made before it is asked for."""

import threading

import pytest

from supmer_ray.tasks.stream import ahead


def test_the_first_item_is_made_before_it_is_asked_for():
    begun = threading.Event()

    def items():
        begun.set()
        yield from range(3)

    stream = ahead(items())
    assert begun.wait(10)
    assert list(stream) == [0, 1, 2]


def test_an_empty_stream_ends():
    assert list(ahead(iter(()))) == []


def test_a_failure_reaches_the_one_who_asks():
    def items():
        raise ValueError("no store")
        yield

    stream = ahead(items())
    with pytest.raises(ValueError, match="no store"):
        next(stream)
