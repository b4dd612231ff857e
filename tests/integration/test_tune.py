"""Sweeps on a real cluster: early-stopped trials leave nothing taken, and an interrupted sweep goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import ray
import torch
import yaml
from cluster import PATIENCE_SECONDS, Cluster, assert_all_is_free
from ray.util import placement_group, placement_group_table, remove_placement_group

from supmer_ray.config import AdaptConfig, ObjectiveConfig, SweepConfig, load_run_config, load_sweep_config
from supmer_ray.data.store import Store, read_manifest
from supmer_ray.errors import UserError
from supmer_ray.fewshot.definition import load_definition
from supmer_ray.files import Place
from supmer_ray.meta.learner import Learner
from supmer_ray.meta.loop import meta_train
from supmer_ray.meta.run import GROUP_FILE, RunPlan, snapshots_in
from supmer_ray.meta.state import MetaState
from supmer_ray.model.backbone import load_backbone
from supmer_ray.reading import build
from supmer_ray.sweep.trial import RUNS, Objective
from supmer_ray.sweep.watch import Watch
from supmer_ray.tune import SWEEP_FILE, tune

SMOKE = Path(__file__).parents[2] / "tune_configs" / "smoke.yaml"
BASE = {
    "prompt": {"length": 3},
    "tasks": {"tasks_per_step": 1, "support": 4, "query": 4, "max_length": 120},
    "meta": {"steps": 4, "prompt_rate": 0.3, "inner_rate": 0.3},
    "schedule": {"validate_every": 2, "validation_tasks": 1},
}
RATE = {"meta.prompt_rate": {"loguniform": [0.001, 1.0]}}


def sweep(**values):
    return build(SweepConfig, {"base": BASE, "space": RATE, "search": "random", **values}, "the test")


def test_a_trial_that_is_tried_again_loses_its_dead_runs_group_and_keeps_its_own(ray_cluster, tmp_path):
    place = Place(str(tmp_path / RUNS / "trial"))
    place.local.mkdir(parents=True)
    watch = Watch(sweep(samples=1), tmp_path, None)
    dead, own = (placement_group([{"CPU": 1}]) for _ in range(2))
    try:
        ray.get([dead.ready(), own.ready()], timeout=PATIENCE_SECONDS)
        place.write(GROUP_FILE, dead.id.hex())
        watch.recovers(SimpleNamespace(trial_id="trial"))
        place.write(GROUP_FILE, own.id.hex())
        watch.release()
        assert placement_group_table(dead)["state"] == "CREATED", "a run is given time to die"
        watch.release(at_once=True)
        Cluster.wait_for(lambda: placement_group_table(dead)["state"] == "REMOVED", "the end of the dead run's group")
        assert placement_group_table(own)["state"] == "CREATED"
    finally:
        remove_placement_group(dead)
        remove_placement_group(own)


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_early_stopped_trials_leave_nothing_taken_and_the_best_can_be_trained(tiny_store, tmp_path, monkeypatch):
    """Before the first begins, the sweep waits for room, and says so."""
    monkeypatch.setattr("supmer_ray.cluster.SETTLE_SECONDS", 0.5)
    assert_all_is_free()
    holder = ray.remote(lambda: time.sleep(600)).options(num_cpus=1.5).remote()
    space = {**RATE, "tasks.mixture": {"simplex": ["nsp", "nss", "scsp", "scss", "scc"]}}
    config = sweep(space=space, samples=4, search="tpe", asha={"grace_steps": 2, "reduction": 2})
    said, waited = [], []

    def progress(*message):
        *told, note = message
        (waited if note else said).append(message)
        if note:
            assert not said and not told[0]
            ray.cancel(holder, force=True)

    try:
        result = tune(config, tiny_store, tmp_path / "sweep", progress=progress)
    finally:
        ray.cancel(holder, force=True)
    assert_all_is_free()
    assert [note for *_, note in waited] == [
        "The sweep waits until the cluster has room for 1 worker of 1.5 CPUs; 0.5 CPUs and 0 GPUs of it are free."
    ]

    table = pd.read_parquet(tmp_path / "sweep" / "trials.parquet")
    pd.testing.assert_frame_equal(table, result.trials)
    assert set(table["state"]) == {"finished", "stopped"} and len(table) == 4
    assert table["tasks.mixture.scc"].between(0, 1).all()
    weights = table[[name for name in table if name.startswith("tasks.mixture.")]]
    assert weights.sum(axis=1).to_numpy() == pytest.approx(1)
    losses = table[[name for name in table if name.startswith("validation_loss_")]]
    assert losses.shape[1] == 5
    assert losses.mean(axis=1).to_numpy() == pytest.approx(table["objective"].to_numpy())
    finished = table[table["state"] == "finished"]
    assert result.objective == finished["objective"].min()
    assert sorted({done for done, *_ in said}) == [0, 1, 2, 3, 4] and said[-1][1] == 4
    assert said[0][3] == 2, "the first validation of the first trial shows"
    assert said[-1][2] == result.objective, "what was stopped early is not the best"
    # On two CPUs one trial runs at a time: none begins before the one before it has written its last row.
    spans = []
    for run in (tmp_path / "sweep" / "runs").iterdir():
        (start,) = [row for row in rows_of(run / "metrics.jsonl") if row["kind"] == "start"]
        spans.append((start["reached"]["worker"], (run / "metrics.jsonl").stat().st_mtime))
    assert all(end <= begin for (_, end), (begin, _) in pairwise(sorted(spans)))
    for trial, step in zip(table["trial"], table["step"], strict=True):
        rows = rows_of(tmp_path / "sweep" / "runs" / trial / "metrics.jsonl")
        assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(1, step + 1))
    assert (tmp_path / "sweep" / "sweep.png").stat().st_size > 10_000

    # The same settings in a run of its own give the same figures.
    best = load_run_config(result.file)
    assert best == result.best
    (tmp_path / "run").mkdir()
    meta_train(RunPlan(best, Place.of(tiny_store), Place.of(tmp_path / "run")), Shelf(tmp_path / "snapshots"))
    metrics = rows_of(tmp_path / "run" / "metrics.jsonl")
    last = [row for row in metrics if row["kind"] == "validation"][-1]["validation"]
    assert sum(row["loss"] for row in last.values()) / 5 == pytest.approx(result.objective, rel=1e-5)


def test_what_cannot_run_is_refused_before_anything_is_written(tiny_store, tmp_path):
    out = tmp_path / "sweep"
    with pytest.raises(UserError, match=r"^A worker of 64\.5 CPUs .* does not fit .*\(1 of 2 CPUs\)"):
        tune(sweep(samples=1, base={**BASE, "workers": {"cpus": 64}}), tiny_store, out)
    with pytest.raises(UserError, match="no task"):
        tune(sweep(samples=1, objective={"task": "bbc-topics"}), tiny_store, out)
    with pytest.raises(UserError, match="holds no sweep to resume"):
        tune(sweep(samples=1), tiny_store, out, resume=True)
    assert not out.exists()
    config, digest = sweep(samples=1), read_manifest(tiny_store).digest
    started = {
        "store": {"place": str(tiny_store), "digest": digest},
        "task": None,
        "sweep": config.model_dump(mode="json", by_alias=True),
    }
    for key, other, what in (("store", digest, "store"), ("task", {"labels": ["a", "b"]}, "few-shot task")):
        out.mkdir(exist_ok=True)
        (out / SWEEP_FILE).write_text(json.dumps(started | {key: other}))
        with pytest.raises(UserError, match=f"was started with another {what}; resume with the same"):
            tune(config, tiny_store, out, resume=True)


@pytest.mark.slow
def test_dev_accuracy_of_a_few_shot_task(tiny_store, tmp_path):
    """The objective is the mean dev accuracy of the seeds' runs; whatever the test split holds, nothing changes."""
    for split, numbers in (("train", range(40)), ("test", range(40, 44))):
        rows = [f"{'a fine film' if i % 2 else 'a bad film'} {i},{('bad', 'good')[i % 2]}" for i in numbers]
        (tmp_path / f"{split}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    task = {
        "name": "films",
        "description": "is a film good or bad?",
        "data": {"files": {"train": "train.csv", "test": "test.csv"}},
        "fields": ["text"],
        "label": "label",
        "patterns": ["{text} It was {mask} ."],
        "verbalizers": {"bad": "bad", "good": "good"},
    }
    (tmp_path / "films.yaml").write_text(yaml.safe_dump(task))
    asked = {"task": str(tmp_path / "films.yaml"), "adapt": {"shots": 4, "steps": 20}}
    config = sweep(samples=1, objective=asked).objective
    assert config.mode == "max"
    backbone = load_backbone(Store.open(tiny_store).manifest.backbone.name)
    run = load_run_config(None, ["prompt.length=3"])
    learner = Learner(run, backbone, MetaState.fresh(run, backbone))
    objective = Objective(config, load_definition(config.task))
    reported = objective(learner, {"nsp": {"loss": 2.0}})
    assert reported["validation_loss"] == 2.0
    accuracies = []
    for seed in range(2):
        from supmer_ray.fewshot.adapt import AdaptRun, adapt
        from supmer_ray.fewshot.encoding import TaskEncoder
        from supmer_ray.fewshot.sampling import draw

        drawn = draw(objective.definition, objective.definition.read(), 4, seed)
        encoder = TaskEncoder(backbone, objective.definition, max_length=412)
        train_split, dev = encoder.split(drawn.train), encoder.split(drawn.dev)
        state = learner.state
        alone = AdaptRun(train_split, dev, encoder.verbalizer_ids, seed, state.prompt.detach(), state.regularizer)
        (result,) = adapt(backbone, [alone], AdaptConfig(shots=4, steps=20))
        accuracies.append(result.best.accuracy)
    assert reported["objective"] == pytest.approx(sum(accuracies) / 2)

    found = tune(sweep(samples=1, objective=asked), tiny_store, tmp_path / "one")
    assert 0 < found.objective <= 1
    (tmp_path / "test.csv").write_text("text,label\nsomething else,good\n")
    assert Objective(config, load_definition(config.task))(learner, {"nsp": {"loss": 2.0}}) == reported


@pytest.mark.slow
def test_the_smoke_sweep_runs(tiny_store, tmp_path):
    result = tune(load_sweep_config(SMOKE), tiny_store, tmp_path / "sweep")
    assert list(result.trials["state"]) == ["finished"] * 2 and set(result.trials["step"]) == {8}
    assert load_run_config(result.file) == result.best


@pytest.mark.slow
def test_population_based_training_hands_snapshots_on(tiny_store, tmp_path):
    base = {**BASE, "meta": {**BASE["meta"], "steps": 8}}
    # Among rates of so many sizes there is one that learns nothing: its trial is the poorest whenever it reports.
    config = sweep(
        base=base,
        space={"meta.prompt_rate": {"loguniform": [1e-7, 1.0]}},
        samples=3,
        search="pbt",
        pbt={"every_steps": 2, "quantile": 0.4, "resample": 0.5},
        seed=1,
    )
    result = tune(config, tiny_store, tmp_path / "sweep")
    assert_all_is_free()
    assert set(result.trials["state"]) == {"finished"} and set(result.trials["step"]) == {8}
    assert result.trials["meta.prompt_rate"].between(1e-7, 1.0).all()
    # A poor trial goes on from a good one's snapshot: its rows after that have another rate than before.
    exchanged = 0
    for trial in result.trials["trial"]:
        snapshots = sorted((tmp_path / "sweep" / "search" / trial).glob("checkpoint_*/config.json"))
        rates = [json.loads(file.read_text())["run"]["meta"]["prompt_rate"] for file in snapshots]
        exchanged += len(set(rates)) > 1
    assert exchanged


@pytest.mark.slow
def test_a_sweep_whose_driver_was_killed_goes_on_and_loses_no_finished_trial(tiny_store, tmp_path):
    out, file = tmp_path / "sweep", tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({"base": BASE, "space": RATE, "search": "tpe", "samples": 4}))
    code = "from supmer_ray.cli import main; main()"
    command = [sys.executable, "-c", code, "tune", "--config", file, "--store", tiny_store, "--out", out]
    driver = subprocess.Popen([str(part) for part in command], start_new_session=True)
    end = time.monotonic() + PATIENCE_SECONDS
    try:
        while len(list(out.glob("runs/*"))) < 3:  # the third trial has begun, so two are finished
            assert driver.poll() is None and time.monotonic() < end
            time.sleep(0.2)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    begun = [run for run in out.glob("runs/*") if (run / "metrics.jsonl").is_file()]
    finished = [run for run in begun if any(row["step"] == 4 for row in rows_of(run / "metrics.jsonl"))]
    assert len(finished) >= 2
    before = {run: (run / "metrics.jsonl").stat().st_mtime_ns for run in finished}

    done = subprocess.run([*map(str, command), "--resume"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = pd.read_parquet(out / "trials.parquet")
    assert set(table["state"]) == {"finished"} and len(table) == 4
    assert {run.name for run in finished} == set(table["trial"][: len(finished)])
    assert before == {run: (run / "metrics.jsonl").stat().st_mtime_ns for run in finished}
    for trial in table["trial"]:
        steps = [row["step"] for row in rows_of(out / "runs" / trial / "metrics.jsonl") if row["kind"] == "step"]
        assert steps == [1, 2, 3, 4]


class Shelf:
    """A host of one worker that keeps the snapshots in a folder."""

    rank, workers, local_workers, device = 0, 1, 1, torch.device("cpu")

    def __init__(self, folder):
        self.folder, self.told = folder, []
        folder.mkdir(exist_ok=True)

    def snapshots(self):
        return snapshots_in(Place(str(self.folder)))

    def report(self, metrics, write):
        self.told.append(metrics)
        snapshot = self.folder / f"checkpoint_{len(list(self.folder.iterdir())):06}"
        snapshot.mkdir()
        write(snapshot)

    def leaving(self):
        return False


def test_a_trial_whose_last_report_was_lost_tells_it_again(tiny_store, tmp_path):
    """The sweep was killed between the trial's last snapshot and its own note of the result."""
    (tmp_path / "run").mkdir()
    plan = RunPlan(
        sweep(samples=1).base, tiny_store, Place(str(tmp_path / "run")), ("nsp",), Objective(ObjectiveConfig())
    )
    before, again = Shelf(tmp_path / "snapshots"), Shelf(tmp_path / "snapshots")
    meta_train(plan, before)
    assert [report["step"] for report in before.told] == [2, 4]
    rows = rows_of(tmp_path / "run" / "metrics.jsonl")
    meta_train(plan, again)
    assert again.told == before.told[-1:]
    assert rows_of(tmp_path / "run" / "metrics.jsonl") == rows


@pytest.mark.slow
def test_trials_of_two_workers_stopped_early_leave_nothing_taken(tiny_store, tmp_path):
    """Each such trial starts a Ray Train run of its own; this cluster has no dashboard process to clean up."""
    base = {**BASE, "tasks": {**BASE["tasks"], "tasks_per_step": 2}, "workers": {"count": 2, "cpus": 0.4}}
    config = sweep(base=base, samples=3, asha={"grace_steps": 2, "reduction": 2})
    result = tune(config, tiny_store, tmp_path / "sweep")
    assert set(result.trials["state"]) == {"finished", "stopped"}
    assert_all_is_free()
