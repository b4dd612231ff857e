"""Faults as they come: after each, no step is lost or counted twice, and the weights are those of a quiet run."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise

import numpy as np
import pytest
import ray
from cluster import PATIENCE_SECONDS
from faults import SETTINGS, assert_same_weights, hunting, kill, kill_workers, rows_of, whole_rows
from safetensors.numpy import load_file, save

from supmer_ray.config import load_run_config
from supmer_ray.data.store import MANIFEST, Store, file_records
from supmer_ray.errors import UserError
from supmer_ray.train import train


def assert_undisturbed(result, undisturbed, steps=12):
    assert [row["step"] for row in rows_of(result.metrics, "step")] == list(range(1, steps + 1))
    assert_same_weights(result.checkpoint, undisturbed.checkpoint)
    one, other = (rows_of(run.metrics, "step") for run in (result, undisturbed))
    assert [row["query_loss"] for row in one] == [row["query_loss"] for row in other]


@pytest.mark.slow
def test_a_killed_builder_and_a_second_run_in_the_folder_change_nothing(undisturbed, tiny_store, tmp_path):
    out, killed = tmp_path / "run", []
    config = load_run_config(None, SETTINGS)

    def kill_a_builder():
        if not killed:
            killed.extend(kill("ReadMetaTasks"))

    def disturb(row):
        if row["kind"] == "validation" and row["step"] == 0:
            with pytest.raises(UserError, match="a run is going on; wait for its end"):
                train(config, tiny_store, out, resume=True)
            with pytest.raises(UserError, match="a run is going on; wait for its end"):
                train(config, tiny_store, out, overwrite=True)
            with pytest.raises(UserError, match="already holds a run"):
                train(config, tiny_store, out)

    with hunting(kill_a_builder):
        result = train(config, tiny_store, out, progress=disturb)
    assert killed
    assert_undisturbed(result, undisturbed)


def with_bad_centroids(store, out, domains):
    """A copy of a store whose centroids of some domains are not numbers: what scc puts into its inputs."""
    shutil.copytree(store, out)
    tables = load_file(out / "ss.safetensors")
    tables["centroids"][list(domains)] = np.nan
    (out / "ss.safetensors").write_bytes(save(tables))
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["files"] = {name: record.model_dump() for name, record in file_records(out).items()}
    (out / MANIFEST).write_text(json.dumps(manifest))
    return Store.open(out).path


@pytest.mark.slow
def test_a_support_batch_that_is_not_a_number_is_skipped_counted_and_reported(undisturbed, tiny_store, tmp_path):
    settings = [*SETTINGS, "tasks.mixture={scc: 1, nsp: 2}", "tasks.tasks_per_step=1", "meta.steps=10"]
    bad = with_bad_centroids(tiny_store, tmp_path / "bad", [0, 1, 2, 3])
    said = []
    result = train(
        load_run_config(None, [*settings, "schedule.stop_after_bad_steps=10"]),
        bad, tmp_path / "run", progress=said.append,
    )  # fmt: skip
    rows = rows_of(result.metrics, "step")
    assert [row["step"] for row in rows] == list(range(1, 11))
    skipped = [row["step"] for row in rows if np.isnan(row["query_loss"])]
    assert 1 <= len(skipped) < 10 and rows[-1]["skipped"] == len(skipped)
    assert all(rows[step - 1]["task_type"] == "scc" for step in skipped)
    assert [row["skipped"] for row in rows] == [sum(s <= row["step"] for s in skipped) for row in rows]
    for tensor in load_file(result.checkpoint / "prompt.safetensors").values():
        assert np.isfinite(tensor).all()
    # A row has the norm that its step began with: a bad step leaves the prompt where it was, a good one moves it.
    for row, after in pairwise(rows):
        assert (after["prompt_norm"] == row["prompt_norm"]) == (row["step"] in skipped), row["step"]


@pytest.mark.slow
def test_too_many_such_steps_in_a_row_end_the_run_with_a_sentence(tiny_store, tmp_path):
    settings = [*SETTINGS, "tasks.mixture={scc: 1}", "schedule.stop_after_bad_steps=3"]
    bad = with_bad_centroids(tiny_store, tmp_path / "bad", range(12))
    with pytest.raises(UserError, match="3 meta-steps in a row had a gradient that is not finite"):
        train(load_run_config(None, settings), bad, tmp_path / "run")
    assert len(rows_of(tmp_path / "run" / "metrics.jsonl", "step")) == 2  # what led there can be looked at


@pytest.mark.slow
def test_ten_kills_in_one_run_change_nothing(tiny_store, tmp_path):
    """The worker is killed again and again, each time one to three steps beyond where it was killed before."""
    settings = [*SETTINGS, "meta.steps=60", "schedule.validate_every=60", "workers.max_failures=20"]
    config = load_run_config(None, settings)
    quiet, out = train(config, tiny_store, tmp_path / "quiet"), tmp_path / "run"
    chance, killed_at = random.Random(0), [0]

    def kill_now_and_then():
        reached = max((row["step"] for row in whole_rows(out / "metrics.jsonl")), default=0)
        if len(killed_at) <= 10 and reached >= killed_at[-1] + beyond[len(killed_at) - 1] and kill_workers():
            killed_at.append(reached)

    beyond = [chance.randint(1, 3) for _ in range(10)]
    with hunting(kill_now_and_then):
        result = train(config, tiny_store, out)
    assert len(killed_at) == 11
    assert_undisturbed(result, quiet, steps=60)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_a_sentence_and_nothing_is_lost(tiny_store, small_disk, tmp_path):
    out, filler = small_disk / "run", small_disk / "filler"
    config = load_run_config(None, [*SETTINGS, "meta.steps=60", "schedule.validate_every=60", "workers.max_failures=0"])

    def fill():
        """Leave room for some rows of metrics and a part of a snapshot, whatever Ray removes meanwhile."""
        free = shutil.disk_usage(small_disk).free
        if free > 40_000 and any(row["step"] >= 4 for row in whole_rows(out / "metrics.jsonl")):
            with suppress(OSError), filler.open("ab") as stream:  # the run may take the room meanwhile
                stream.write(b"\0" * (free - 40_000))

    quiet = train(config, tiny_store, tmp_path / "quiet")
    with hunting(fill), pytest.raises(UserError, match="There is no room left"):
        train(config, tiny_store, out)
    filler.unlink()
    assert_undisturbed(train(config, tiny_store, out, resume=True), quiet, steps=60)


@pytest.mark.slow
def test_a_store_that_is_gone_in_the_middle_is_one_sentence(tiny_store, tmp_path):
    """A builder refuses long after all workers have begun: Ray Train starts them again, and they leave it at that."""
    store = tmp_path / "store"
    shutil.copytree(tiny_store, store)

    killed = []

    def remove(row):
        if row["kind"] == "step" and row["step"] == 1:
            (store / MANIFEST).unlink()

    def hunt():
        """Builders that have the store open would go on; between two tasks there is none to be seen."""
        if not (store / MANIFEST).exists() and len(killed) < 3:
            killed.extend(kill("ReadMetaTasks"))

    config = load_run_config(None, [*SETTINGS, "meta.steps=4000", "schedule.validate_every=4000"])
    with hunting(hunt), pytest.raises(UserError, match=rf"^{store} has no {MANIFEST}, so it is no store"):
        train(config, store, tmp_path / "run", progress=remove)
    assert killed


@pytest.mark.slow
def test_of_two_runs_that_start_at_once_one_waits(undisturbed, tiny_store, tmp_path):
    """Two CPUs have room for either, and a worker reserves its own with its builders' or none."""
    settings = [part for value in SETTINGS for part in ("--set", value)]
    command = [sys.executable, "-c", "from supmer_ray.cli import main; main()", "train", *settings]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    runs = [
        subprocess.Popen(
            [*command, "--store", str(tiny_store), "--out", str(tmp_path / name)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for name in ("one", "other")
    ]  # fmt: skip
    try:
        said = [run.communicate(timeout=PATIENCE_SECONDS)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], said
    assert sum("The run waits until the cluster has room" in text for text in said) == 1
    for name in ("one", "other"):
        assert_same_weights(tmp_path / name / "checkpoint", undisturbed.checkpoint)


@pytest.mark.slow
def test_a_run_that_waits_for_room_ends_when_told(undisturbed, tiny_store, tmp_path):
    """No worker is there to read that it shall stop."""
    settings = [part for value in SETTINGS for part in ("--set", value)]
    command = [sys.executable, "-c", "from supmer_ray.cli import main; main()", "train", *settings]
    command += ["--store", str(tiny_store), "--out", str(tmp_path / "run")]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    taken = ray.util.placement_group([{"CPU": 1}] * int(ray.cluster_resources()["CPU"]))
    ray.get(taken.ready())
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said = ""
        while "The run waits until the cluster has room" not in said:
            line = run.stdout.readline()
            assert line, said
            said += line
        run.send_signal(signal.SIGTERM)
        said += run.communicate(timeout=PATIENCE_SECONDS)[0]
    finally:
        run.kill()
        ray.util.remove_placement_group(taken)
    assert run.returncode == 130 and "was stopped; continue it with --resume" in said, said
    subprocess.run([*command, "--resume"], env=environment, check=True, timeout=PATIENCE_SECONDS)
    assert_same_weights(tmp_path / "run" / "checkpoint", undisturbed.checkpoint)


@pytest.mark.slow
def test_a_store_whose_making_is_stopped_leaves_nothing(ray_cluster, tiny_t5, tmp_path):
    command = [sys.executable, "-c", "from supmer_ray.cli import main; main()", "prepare", "--source", "bbc"]
    command += ["--backbone", str(tiny_t5), "--domains", "12", "--out", str(tmp_path / "store")]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    making = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while making.poll() is None and not any(tmp_path.glob(".store.shared-*")):
            time.sleep(0.05)
        making.send_signal(signal.SIGTERM)
        said = making.communicate(timeout=PATIENCE_SECONDS)[0]
    finally:
        making.kill()
    assert making.returncode == 130 and "supmer: stopped." in said, said
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


@pytest.mark.slow
def test_a_run_whose_looker_on_fails_does_not_go_on_alone(tiny_store, tmp_path):
    config = load_run_config(None, [*SETTINGS, "meta.steps=4000", "schedule.validate_every=4000"])

    def fail(row):
        if row["kind"] == "step":
            raise ZeroDivisionError("a caller's mistake")

    with pytest.raises(ZeroDivisionError, match="a caller's mistake"):
        train(config, tiny_store, tmp_path / "run", progress=fail)
    rows = rows_of(tmp_path / "run" / "metrics.jsonl", "notice")
    assert "as told, with a snapshot; go on with --resume" in rows[-1]["text"]
