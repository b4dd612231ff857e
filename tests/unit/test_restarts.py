"""What is said of a worker that failed, in the errors that Ray has for it."""

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from supmer_ray.files import Place
from supmer_ray.meta.record import read_rows
from supmer_ray.meta.restarts import TellRestarts, why_failed
from supmer_ray.meta.run import REFUSAL_FILE


def death(reason=None):
    """What Ray Train hands over of a worker whose process is gone."""
    message = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"
    context = ActorDiedErrorContext(
        class_name="RayTrainWorker", actor_id=b"1" * 16, pid=9, node_ip_address="10.0.0.1", error_message=message,
        node_death_info=NodeDeathInfo(reason=reason) if reason else None,
    )  # fmt: skip
    return WorkerHealthCheckFailedError("A worker health check failed.\nWorker info: 17", ActorDiedError(context))


@pytest.fixture
def died():
    return death()


def test_why_a_worker_died_is_said(died):
    assert why_failed({0: died}) == (
        "Worker 0 failed (The actor died unexpectedly before finishing this task. The actor is dead because its worker "
        "process has died. Worker exit type: SYSTEM_ERROR)"
    )


def test_the_one_that_died_is_named_and_not_the_one_that_missed_it(died):
    missed = RuntimeError("[/gloo/tcp/pair.cc:553] Connection closed by peer\n\tsomewhere")
    assert why_failed({0: missed, 1: died}).startswith("Worker 1 failed (The actor died")
    assert why_failed({0: missed}) == "Worker 0 failed ([/gloo/tcp/pair.cc:553] Connection closed by peer)"
    assert why_failed({2: KeyError()}) == "Worker 2 failed (KeyError)"
    assert len(why_failed({0: ValueError("long " * 1000)})) < 340


def test_each_restart_is_told_and_neither_the_end_nor_a_refusal(tmp_path):
    told = TellRestarts(Place.of(tmp_path), 2)
    for _ in range(3):
        told.after_exception(None, {0: KeyError()})
    said = [
        f"Worker 0 failed (KeyError); the run goes on from its last snapshot, restart {n} of at most 2." for n in (1, 2)
    ]
    assert [row["text"] for row in read_rows(tmp_path, "notice")] == said
    (tmp_path / REFUSAL_FILE).write_text("There is no store.")
    TellRestarts(Place.of(tmp_path), 2).after_exception(None, {0: KeyError()})
    assert len(read_rows(tmp_path, "notice")) == 2


def test_a_worker_whose_node_was_to_leave_is_no_failure(tmp_path, died):
    """Ray Train does not count it, and asks again while the others work on."""
    told = TellRestarts(Place.of(tmp_path), 1)
    taken = death(NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED)
    for _ in range(3):
        told.after_exception(None, {0: taken, 1: RuntimeError("Connection closed by peer")})
    assert read_rows(tmp_path, "notice") == []
    told.after_exception(None, {0: died})
    [sentence] = [row["text"] for row in read_rows(tmp_path, "notice")]
    assert sentence.endswith("restart 1 of at most 1.")
