"""Short runs to disturb, and what a disturbed one is compared with."""

import json
import os
import signal
import threading
from contextlib import contextmanager, suppress

import psutil
import torch
from safetensors.torch import load_file

SETTINGS = [
    "prompt.length=5",
    "meta.steps=12",
    "meta.prompt_rate=0.3",
    "meta.inner_rate=0.3",
    "tasks.tasks_per_step=2",
    "tasks.support=6",
    "tasks.query=6",
    "tasks.max_length=120",
    "schedule.validate_every=12",
    "schedule.checkpoint_every=3",
    "schedule.validation_tasks=2",
]


def rows_of(file, kind):
    return [row for row in map(json.loads, file.read_text().splitlines()) if row["kind"] == kind]


def whole_rows(file):
    """The rows of a metrics file that is being written: without the line that is not whole yet."""
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def assert_same_weights(one, other):
    for name in ("prompt.safetensors", "regularizer.safetensors", "optimizer.safetensors"):
        first, second = load_file(one / name), load_file(other / name)
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert torch.equal(value, second[key]), (name, key)


def assert_nearly_same_weights(one, other):
    """As what adds up the same numbers in another order learns them."""
    for file, limit in (("prompt.safetensors", 1e-4), ("regularizer.safetensors", 1e-6)):
        first, second = load_file(one / file), load_file(other / file)
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert float((value - second[key]).abs().max()) < limit, (file, key)


def kill(name):
    """SIGKILL every process of this machine's clusters that runs `name`; returns their ids."""
    found = [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if any(name in part for part in process.info["cmdline"] or ()) and _is_ours(process)
    ]
    # Not before all are found: the child of one that is dead descends from this process no more.
    for number in found:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    return found


def kill_workers():
    """SIGKILL the workers of Ray Train."""
    return kill("RayTrainWorker")


@contextmanager
def hunting(hunt):
    """Call `hunt` again and again beside the block; what it raises, the block's end raises."""
    over, failures = threading.Event(), []

    def run():
        try:
            while not over.wait(0.02):
                hunt()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        if failures:
            raise failures[0]


def _is_ours(process):
    """Whether a process descends from this one: other clusters on the machine stay alone."""
    try:
        return os.getpid() in (parent.pid for parent in process.parents())
    except psutil.NoSuchProcess:
        return False
