"""Real Ray Train runs on real text: a run, a killed worker, a resumed job, and what is refused."""

import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from cluster import assert_all_is_free
from faults import SETTINGS, assert_nearly_same_weights, assert_same_weights, kill_workers, rows_of
from safetensors.numpy import load_file, save_file

from supmer_ray.cli import main
from supmer_ray.config import PAPER_TASK_TYPES, load_run_config
from supmer_ray.data.store import MANIFEST, file_records
from supmer_ray.errors import UserError
from supmer_ray.files import read_sealed
from supmer_ray.meta.loop import make_formats
from supmer_ray.model.backbone import load_backbone
from supmer_ray.tasks.stream import ShardSource, stream_shards
from supmer_ray.train import train


@pytest.fixture(scope="module")
def close_by():
    """The driver looks at the rows so often that it sees a step before the next ones are over, of which snapshots wait
    for Ray Train's controller.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("supmer_ray.train.FOLLOW_SECONDS", 0.02)
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "2")
        yield


@dataclass(frozen=True)
class Killed:
    """A run that waited for room, and whose worker was killed at its seventh step.

    Attributes:
        said: its notices before the first step.
        free: CPUs that nobody had reserved, at each step.
    """

    out: Path
    said: list[str]
    free: list[float]


@pytest.fixture(scope="module")
def killed(close_by, tiny_store, tmp_path_factory):
    """Of the cluster's two CPUs another has one and a half at first; the run's worker and its builder want as many."""
    out, said, free = tmp_path_factory.mktemp("killed") / "run", [], []
    assert_all_is_free()
    holder = ray.remote(lambda: time.sleep(600)).options(num_cpus=1.5).remote()

    def progress(row):
        if row["kind"] == "notice" and not free:
            said.append(row["text"])
            ray.cancel(holder, force=True)
        elif row["kind"] == "step":
            free.append(ray.available_resources().get("CPU", 0.0))
            if row["step"] == 7:
                kill_workers()

    try:
        with pytest.raises(Exception, match="Training failed"):
            train(load_run_config(None, [*SETTINGS, "workers.max_failures=0"]), tiny_store, out, progress=progress)
    finally:
        ray.cancel(holder, force=True)  # or all later tests have half a CPU, for ten minutes
    return Killed(out, said, free)


def test_the_meta_loss_falls_on_validation_tasks_of_every_type(undisturbed):
    before, after = (row["validation"] for row in rows_of(undisturbed.metrics, "validation"))
    assert before.keys() == set(PAPER_TASK_TYPES)
    for name in PAPER_TASK_TYPES:
        assert after[name]["loss"] < before[name]["loss"], name


def test_every_step_is_recorded_once_with_its_metrics(undisturbed):
    rows = rows_of(undisturbed.metrics, "step")
    assert [row["step"] for row in rows] == list(range(1, 13))
    for row in rows:
        assert 0 <= row["similarity"] <= 1 and 0 <= row["gate"] <= 1 and 0 <= row["mixing"] <= 1
        assert row["step_seconds"] > 0 and row["tokens"] > 0
    assert sorted(path.suffix for path in undisturbed.checkpoint.iterdir()) == [".json"] * 2 + [".safetensors"] * 3


def test_a_run_that_waits_for_room_says_so_and_then_takes_what_it_has_reserved(killed):
    """While it goes on, what it has reserved is all that it takes: half a CPU is left for others."""
    assert killed.said == [
        "The run waits until the cluster has room for 1 worker of 1.5 CPUs; 0.5 CPUs and 0 GPUs of it are free."
    ]
    assert len(killed.free) >= 7
    assert killed.free[0] == 0.5 and min(killed.free) >= 0.5


def test_a_dead_run_resumes_bit_for_bit_from_an_older_snapshot_and_outlives_a_kill(
    close_by, killed, undisturbed, tiny_store
):
    """The newest snapshot and Ray Train's note of it are cut short: the one before is used, and the log says so. On the
    way from there a worker is killed again, and Ray Train restarts it. Two builders feed it as one did.
    """
    out = killed.out
    assert not (out / "checkpoint").exists()
    for folder in out.glob("checkpoint_2*"):  # the kill may have come while one was written
        try:
            read_sealed(folder, "a snapshot")
        except UserError:
            shutil.rmtree(folder)
    *_, before, newest = sorted(out.glob("checkpoint_2*"))
    for file in (newest / "optimizer.safetensors", out / "checkpoint_manager_snapshot.json"):
        file.write_bytes(file.read_bytes()[:-100])
    reached = json.loads((before / "progress.json").read_text())["step"]

    said, again_killed = [], []

    def kill(row):
        said.append(row)
        if row["kind"] == "step" and row["step"] == reached + 1 and not again_killed:
            again_killed.extend(kill_workers())

    again = load_run_config(None, [*SETTINGS, "workers.builders=2"])
    result = train(again, tiny_store, out, resume=True, progress=kill)
    assert again_killed
    told = [row["text"] for row in said if row["kind"] == "notice"]
    assert any(
        f"{newest.name}/optimizer.safetensors is damaged" in text and f"goes on from step {reached} instead" in text
        for text in told
    )
    (restart,) = (text for text in told if "failed" in text)
    assert re.fullmatch(
        r"Worker 0 failed \(.+ died .+\); the run goes on from its last snapshot, restart 1 of at most 3\.", restart
    )
    assert restart in [row["text"] for row in rows_of(result.metrics, "notice")]
    assert [row["step"] for row in rows_of(result.metrics, "step")] == list(range(1, 13))
    assert_same_weights(result.checkpoint, undisturbed.checkpoint)


def test_a_run_is_not_resumed_on_a_store_that_was_made_anew(undisturbed, tiny_store, tmp_path):
    started = json.loads((undisturbed.out.local / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(started | {"store_digest": "0" * 64}))
    with pytest.raises(UserError, match=r"was made anew since the run in .* was started; start a new run"):
        train(load_run_config(None, SETTINGS), tiny_store, tmp_path, resume=True)


def test_two_workers_learn_what_one_learns(undisturbed, tiny_store, tmp_path):
    """In the place of a run that is over: of that, nothing is left."""
    out = tmp_path / "two"
    shutil.copytree(undisturbed.out.local, out)
    config = load_run_config(None, [*SETTINGS, "workers.count=2", "workers.cpus=0.5"])
    result = train(config, tiny_store, out, overwrite=True)
    assert [row["step"] for row in rows_of(result.metrics, "step")] == list(range(1, 13))
    assert json.loads((out / "run.json").read_text())["config"]["workers"]["count"] == 2
    assert not {path.name for path in out.glob("checkpoint_2*")} & {
        path.name for path in undisturbed.out.local.glob("checkpoint_2*")
    }
    assert_nearly_same_weights(result.checkpoint, undisturbed.checkpoint)


@pytest.fixture
def poor_store(tiny_store, tmp_path):
    """A store whose sentences are in three domains."""
    out = shutil.copytree(tiny_store, tmp_path / "poor")
    tables, kept = load_file(out / "ss.safetensors"), {"centroids": 3, "starts": 4, "train_ends": 3, "keywords": 3}
    save_file({name: table[: kept[name]] for name, table in tables.items()}, out / "ss.safetensors")
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["files"] = {name: record.model_dump() for name, record in file_records(out).items()}
    (out / MANIFEST).write_text(json.dumps(manifest))
    return out


def test_what_cannot_run_is_refused_before_anything_is_written(undisturbed, tiny_store, poor_store, tmp_path):
    out = tmp_path / "refused"
    with pytest.raises(
        UserError, match=r"of 64\.5 CPUs .* does not fit the cluster, whose nodes \(1 of 2 CPUs.*\) hold 0"
    ):
        train(load_run_config(None, ["workers.cpus=64"]), tiny_store, out)
    with pytest.raises(UserError, match="holds no run to resume"):
        train(load_run_config(None, SETTINGS), tiny_store, tmp_path, resume=True)
    with pytest.raises(UserError, match="There is no store"):
        train(load_run_config(None, SETTINGS), tmp_path / "nowhere", out)
    with pytest.raises(UserError, match="already holds a run"):
        train(load_run_config(None, SETTINGS), tiny_store, undisturbed.checkpoint.parent)
    with pytest.raises(UserError, match="was started with other values under 'prompt'"):
        train(
            load_run_config(None, [*SETTINGS, "prompt.length=7"]),
            tiny_store,
            undisturbed.checkpoint.parent,
            resume=True,
        )
    with pytest.raises(UserError, match="'scc' needs 8 domains"):
        train(load_run_config(None, [*SETTINGS, "tasks.mixture={scc: 1}"]), poor_store, out)
    assert not out.exists()


def with_backbone(store, out, **values):
    """A copy of a store whose manifest says other things of the backbone."""
    shutil.copytree(store, out)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["backbone"] |= values
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def test_a_store_of_the_embedded_backbone_brings_the_settings_that_suit_it(tiny_store, tmp_path, monkeypatch):
    store = with_backbone(tiny_store, tmp_path / "store", name="embedded")
    seen = []

    def note(config, *rest, **options):
        seen.append(config)
        raise UserError("seen")

    monkeypatch.setattr("supmer_ray.train.train", note)
    for where in (store, tiny_store):
        with pytest.raises(SystemExit):
            main(["train", "--store", str(where), "--out", str(tmp_path / "run"), "--set", "meta.steps=7"])
    # A file stands in their place, for all that it does not say as well.
    (tmp_path / "own.yaml").write_text("meta: {steps: 5}")
    with pytest.raises(SystemExit):
        main(["train", "--store", str(store), "--out", str(tmp_path / "run"), "--config", str(tmp_path / "own.yaml")])
    small, paper, own = seen
    assert set(small.tasks.types) == {"nsp", "scsp"} and small.meta.prompt_rate == 0.01 and small.meta.steps == 7
    assert set(paper.tasks.types) == set(PAPER_TASK_TYPES) and paper.meta.prompt_rate == 0.1 and paper.meta.steps == 7
    assert own == load_run_config(None, ["meta.steps=5"])


def test_what_a_builder_refuses_is_its_sentence(ray_cluster, tiny_t5, tmp_path):
    config = load_run_config(None, SETTINGS)
    source = ShardSource(
        tmp_path / "nowhere", make_formats(config, load_backbone(str(tiny_t5))), config.tasks, 0, 0, 1, ""
    )
    with pytest.raises(UserError, match=r"^There is no store at .*nowhere; make one with .*$"):
        next(stream_shards(source, range(2)))


def test_what_only_a_worker_can_see_is_refused_once_and_leaves_nothing(tiny_store, tmp_path):
    """A worker finds that the weights at the backbone's place are others than the store was prepared with."""
    store = with_backbone(tiny_store, tmp_path / "store", fingerprint="0" * 64)
    with pytest.raises(UserError, match="was prepared with other weights"):
        train(load_run_config(None, SETTINGS), store, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
