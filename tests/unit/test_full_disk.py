"""A full disk is recognized wherever in Ray Train it shows itself, and what it has cut short is passed over."""

import errno
import json
import pickle

import pyarrow.fs
import pytest
from ray.train import ControllerError, WorkerGroupError

from supmer_ray.errors import UserError, is_disk_full
from supmer_ray.files import Place, seal
from supmer_ray.meta.state import PROGRESS
from supmer_ray.train import _conclude


@pytest.fixture(scope="module")
def no_room():
    """What pyarrow, by which Ray Train writes, raises on a full disk."""
    stream = pyarrow.fs.LocalFileSystem().open_output_stream("/dev/full")
    with pytest.raises(OSError) as raised:
        stream.write(b"notes")
    stream.close()
    return raised.value


def test_the_notes_of_the_controller_find_no_room(no_room):
    assert is_disk_full(pickle.loads(pickle.dumps(ControllerError(no_room))))


def test_a_worker_finds_no_room(no_room):
    failed = {0: RuntimeError("ended with the others"), 1: no_room}
    assert is_disk_full(WorkerGroupError("one of two workers failed", failed))


def test_other_failures_are_none_of_the_disk():
    assert not is_disk_full(ControllerError(OSError(errno.EACCES, "Permission denied")))
    assert not is_disk_full(WorkerGroupError("a worker failed", {0: ValueError("28")}))


def snapshot(run, name, step):
    folder = run / f"checkpoint_{name}"
    folder.mkdir(parents=True)
    (folder / PROGRESS).write_text(json.dumps({"step": step}))
    (folder / "prompt.safetensors").write_text(f"after {step}")
    seal(folder, {})
    return folder


def test_a_snapshot_that_was_cut_short_does_not_keep_a_run_from_its_end(tmp_path):
    snapshot(tmp_path, "1", 50)
    (tmp_path / "checkpoint_2").mkdir()
    (tmp_path / "checkpoint_2" / PROGRESS).write_text("")
    last = snapshot(tmp_path, "3", 100)
    checkpoint = _conclude(Place(str(tmp_path)), 100).checkpoint
    assert (checkpoint / "prompt.safetensors").read_text() == "after 100"
    (last / "prompt.safetensors").write_text("cut")
    with pytest.raises(UserError, match=r"^The last snapshot of the run in .* is damaged; go on .* by --resume"):
        _conclude(Place(str(tmp_path)), 100)
