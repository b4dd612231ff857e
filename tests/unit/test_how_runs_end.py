"""How a driver ends a run, and an evaluation its runs: told, failing, refused, without room. Ray Train is made up."""

import errno
import json
import signal
import threading
import time
from types import SimpleNamespace

import pytest
from ray.train import ControllerError

from supmer_ray import origins, train
from supmer_ray.config import RunConfig
from supmer_ray.errors import Stopped, UserError
from supmer_ray.files import Place
from supmer_ray.meta.record import METRICS_FILE
from supmer_ray.meta.run import STOP_FILE, RunPlan


@pytest.fixture
def run(tmp_path, monkeypatch):
    """What follows a run whose trainer's `fit` is given: it gets the run's place, and may look at `ended`."""
    place = Place(str(tmp_path))
    monkeypatch.setattr(train, "FOLLOW_SECONDS", 0.01)
    monkeypatch.setattr(train, "waits", lambda: False)
    monkeypatch.setattr(train, "Waiting", lambda *_: SimpleNamespace(notice=lambda: None))

    def follow(fit, stop, progress=None):
        trainer = SimpleNamespace(fit=lambda: fit(place))
        monkeypatch.setattr(train, "make_trainer", lambda plan, *, gpu: trainer)
        train._fit(RunPlan(RunConfig(), Place(str(tmp_path)), place), False, stop, progress)

    place.write(STOP_FILE, "")
    return SimpleNamespace(place=place, follow=follow)


def obedient(place, ended):
    """Makes a step, and ends when it is told to."""
    place.write(METRICS_FILE, json.dumps({"kind": "step", "step": 3}) + "\n")
    while place.read(STOP_FILE) != "stop":
        time.sleep(0.01)
    ended.append(True)


def told():
    event = threading.Event()
    event.set()
    return event


def test_a_run_that_is_told_ends_after_its_step(run):
    ended = []
    with pytest.raises(Stopped, match=r"was stopped; continue it with --resume"):
        run.follow(lambda place: obedient(place, ended), told())
    assert ended


def test_a_run_that_nobody_can_look_at_is_stopped_first(run):
    ended = []

    def broken(row):
        raise BrokenPipeError("nobody reads")

    with pytest.raises(BrokenPipeError, match="nobody reads"):
        run.follow(lambda place: obedient(place, ended), threading.Event(), broken)
    assert ended and run.place.read(STOP_FILE) == "stop"


@pytest.mark.parametrize("begun", [False, True], ids=["before it begins", "after it has lost its workers"])
def test_a_run_without_room_ends_at_once_when_told(run, monkeypatch, begun):
    monkeypatch.setattr(train, "waits", lambda: True)
    if begun:
        run.place.write(METRICS_FILE, json.dumps({"kind": "step", "step": 3}) + "\n")
    over = threading.Event()
    try:
        with pytest.raises(Stopped):
            run.follow(lambda place: over.wait(60), told())
        assert not over.is_set()
    finally:
        over.set()


def test_a_full_disk_is_a_sentence(run):
    def full(place):
        raise ControllerError(OSError(errno.ENOSPC, "No space left on device"))

    with pytest.raises(UserError, match=r"^There is no room left where .* lies; make some and go on with --resume\.$"):
        run.follow(full, threading.Event())


def test_what_one_of_several_runs_refuses_ends_the_others_and_starts_no_more(tmp_path, monkeypatch):
    begun, saved, second = [], [], threading.Event()

    def fake(config, store, folder, *, stop, **_):
        begun.append(folder.name)
        if folder.name == "a":
            assert second.wait(10)
            raise UserError("Mend it.")
        second.set()
        assert stop.wait(10)
        saved.append(folder.name)
        raise Stopped("told")

    monkeypatch.setattr(origins, "train", fake)
    monkeypatch.setattr(origins, "_room", lambda runs: 2)
    monkeypatch.setattr(origins, "FOLLOW_SECONDS", 0.01)
    runs = [origins._Run(name, RunConfig(), Place("/store"), tmp_path / name) for name in "abc"]
    with pytest.raises(UserError, match=r"^Mend it\.$"):
        origins._meta_train(runs, tmp_path, lambda *_: None)
    assert begun == ["a", "b"] and saved == ["b"]


def test_a_stop_in_the_last_moments_of_a_meta_training_is_not_forgotten(tmp_path, monkeypatch):
    """The run itself ends well: its last step was done."""
    monkeypatch.setattr(origins, "train", lambda *_, stop, **__: stop.wait(10))
    monkeypatch.setattr(origins, "_room", lambda runs: 1)
    monkeypatch.setattr(origins, "FOLLOW_SECONDS", 0.01)
    run = origins._Run("a", RunConfig(), Place("/store"), tmp_path / "a")
    shown = []

    def tell(*_):
        if not shown:
            shown.append(True)
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped, match=r"the evaluation in .* was stopped; continue it with --resume"):
        origins._meta_train([run], tmp_path, tell)


def test_a_second_signal_ends_at_once_and_the_handlers_are_as_before():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), train.stop_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_set()
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_note_of_snapshots_that_are_gone_is_forgotten(tmp_path):
    note = tmp_path / "checkpoint_manager_snapshot.json"
    note.write_text(json.dumps({"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_1"}]}))
    (tmp_path / "checkpoint_1").mkdir()
    train._forget_damaged_notes(Place(str(tmp_path)))
    assert note.exists()
    (tmp_path / "checkpoint_1").rmdir()
    train._forget_damaged_notes(Place(str(tmp_path)))
    assert not note.exists()
