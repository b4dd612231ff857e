"""A full disk is recognized wherever in Ray Train it shows itself."""

import errno
import pickle

import pyarrow.fs
import pytest
from ray.train import ControllerError, WorkerGroupError

from supmer_ray.train import _is_disk_full


@pytest.fixture(scope="module")
def no_room():
    """What pyarrow, by which Ray Train writes, raises on a full disk."""
    stream = pyarrow.fs.LocalFileSystem().open_output_stream("/dev/full")
    with pytest.raises(OSError) as raised:
        stream.write(b"notes")
    stream.close()
    return raised.value


def test_the_notes_of_the_controller_find_no_room(no_room):
    assert _is_disk_full(pickle.loads(pickle.dumps(ControllerError(no_room))))


def test_a_worker_finds_no_room(no_room):
    failed = {0: RuntimeError("ended with the others"), 1: no_room}
    assert _is_disk_full(WorkerGroupError("one of two workers failed", failed))


def test_other_failures_are_none_of_the_disk():
    assert not _is_disk_full(ControllerError(OSError(errno.EACCES, "Permission denied")))
    assert not _is_disk_full(WorkerGroupError("a worker failed", {0: ValueError("28")}))
