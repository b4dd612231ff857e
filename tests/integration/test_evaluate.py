"""Comparing methods on a real cluster: every way to learn, a killed evaluation that goes on, and refusals."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch
from comparing import ADAPT, META, METHODS
from faults import kill_workers, rows_of

from supmer_ray.data.store import Store
from supmer_ray.errors import Stopped, UserError
from supmer_ray.evaluate import _backbone, _run_cell, evaluate
from supmer_ray.fewshot.definition import TaskRows, load_definition
from supmer_ray.fewshot.suite import Curve, Suite
from supmer_ray.model.backbone import load_backbone


def test_every_way_to_learn_and_a_resumed_evaluation_agree(compared, plan, tmp_path):
    """One row a method, task and seed; resuming computes what is missing and touches nothing else."""
    methods, (out, rows, _) = METHODS, compared
    assert list(rows["method"].unique()) == methods
    assert len(rows) == len(methods) * 2 * 3
    assert rows.groupby(["method", "train", "test"])["seed"].apply(list).map(lambda seeds: seeds == [0, 1]).all()
    assert set(rows["test"][rows["train"] == "games"]) == {"games", "state"}
    pd.testing.assert_frame_equal(pd.read_parquet(out / "results.parquet"), rows)
    assert "| supmer |" in (out / "table.md").read_text() and "2 steps" in (out / "table.md").read_text()
    assert set(pd.read_csv(out / "gaps.csv")["method"]) == set(methods)
    assert len(pd.read_csv(out / "table.csv")) == len(methods) * 4

    kept = {file: file.read_bytes() for file in (out / "cells").iterdir()}
    lost = [out / "cells" / f"games--{method}.parquet" for method in ("supmer", "zero-shot")]
    for file in lost:
        file.unlink()
    again = evaluate(plan(methods), out, resume=True)
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), rows.drop(columns="seconds"))
    assert [file for file, content in kept.items() if file.read_bytes() != content and file not in lost] == []

    with pytest.raises(UserError, match=r"already holds a run; .*--resume"):
        evaluate(plan(methods), out)
    evaluate(plan(methods, baseline="zero-shot"), out, resume=True)
    assert "Difference to zero-shot" in (out / "table.md").read_text()
    evaluate(plan(methods), out, resume=True)
    assert "Difference to prompt-tuning" in (out / "table.md").read_text()
    with pytest.raises(UserError, match=r"was started with another 'config'"):
        evaluate(plan(methods, pattern=1), out, resume=True)
    with pytest.raises(UserError, match=r"was started with another 'methods'"):
        evaluate(plan(methods[:2]), out, resume=True)

    # The trained checkpoint, given to a new evaluation, gives the same rows.
    given = {"supmer": out / "runs" / "supmer" / "checkpoint"}
    alone = evaluate(plan(["supmer"], store=False, checkpoints=given), tmp_path / "given")
    first = rows[rows["method"] == "supmer"].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone.drop(columns="seconds"), first.drop(columns="seconds"))


KILLED = """
import os, pickle, signal, sys
from supmer_ray.evaluate import evaluate

def die(title, done, total, unit, note=""):
    if unit == "cells" and 0 < done < total:
        os.killpg(os.getpgid(0), signal.SIGKILL)

evaluate(pickle.loads(open(sys.argv[1], "rb").read()), sys.argv[2], progress=die)
"""


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(ray_cluster, plan, tmp_path):
    """SIGKILL to the driver and its Ray after the first cell; the rest is computed, the rows are as undisturbed."""
    whole = plan(["prompt-tuning", "zero-shot"], store=False)
    undisturbed = evaluate(whole, tmp_path / "undisturbed")
    (tmp_path / "plan.pkl").write_bytes(pickle.dumps(whole))
    out = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(tmp_path / "plan.pkl"), str(out)]
    killed = subprocess.run(command, start_new_session=True, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    [finished] = (out / "cells").glob("*.parquet")
    before = finished.read_bytes()
    assert not (out / "results.parquet").exists()
    again = evaluate(whole, out, resume=True)
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), undisturbed.drop(columns="seconds"))
    assert finished.read_bytes() == before


@pytest.mark.slow
def test_an_evaluation_says_that_its_meta_training_lost_a_worker(plan, tmp_path):
    killed, said = [], []

    def follow(title, done, total, unit, note=""):
        if unit == "steps" and done and not killed:
            killed.extend(kill_workers())
        if note:
            said.append((title, note))

    run = META | {"meta": {"steps": 30, "prompt_rate": 0.3}}
    evaluate(plan(["supmer"], run=run), tmp_path / "out", progress=follow)
    [(title, note)] = said
    assert title == "Meta-training supmer"
    assert note.startswith("supmer: Worker 0 failed (") and "restart 1 of at most" in note


def test_methods_are_meta_trained_at_once_where_they_fit(compared):
    out, _, said = compared
    runs = [out / "runs" / name for name in ("supmer", "ppt")]
    begun = [rows_of(run / "metrics.jsonl", "start")[0]["reached"]["worker"] for run in runs]
    ended = [(run / "checkpoint" / "config.json").stat().st_mtime for run in runs]
    assert max(begun) < min(ended)
    assert ("Meta-training 2 runs", 4, 4, "steps") in said


@pytest.mark.slow
def test_an_evaluation_that_is_told_to_stop_in_a_meta_training_goes_on(plan, tmp_path):
    whole, out, told = plan(["supmer"], run=META | {"meta": {"steps": 30, "prompt_rate": 0.3}}), tmp_path / "out", []

    def stop(title, done, total, unit, note=""):
        if unit == "steps" and done and not told:
            told.append(done)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match=r"the evaluation in .*out was stopped; continue it with --resume"):
        evaluate(whole, out, progress=stop)
    run = out / "runs" / "supmer"
    assert len(rows_of(run / "metrics.jsonl", "step")) < 30 and not (run / "checkpoint").exists()
    assert len(evaluate(whole, out, resume=True)) == 2 * 3
    assert [row["step"] for row in rows_of(run / "metrics.jsonl", "step")] == list(range(1, 31))


def test_a_curve_gives_each_value_its_rows(along_shots):
    out, rows = along_shots
    assert rows.groupby("point", sort=False)["shots"].first().to_dict() == {"shots = 2": 2, "shots = 8": 8}
    assert "## shots = 8" in (out / "table.md").read_text()


@pytest.mark.slow
def test_a_curve_over_domains_makes_a_store_and_a_run_for_each_value(ray_cluster, plan, tmp_path):
    """From sources to tables, and once more from what a part of it left."""
    curve, out = (
        Curve(name="domains", description="By domains.", key="prepare.domains", values=(4, 12)),
        tmp_path / "out",
    )
    sources = {"sources": ["bbc"], "max_documents": 30}
    whole = plan(["prompt-tuning", "supmer"], store=False, curve=curve, prepare=sources)
    rows = evaluate(whole, out)
    stores = {value: Store.open(out / "stores" / f"store--domains-{value}") for value in curve.values}
    assert {value: store.manifest.settings.domains for value, store in stores.items()} == {4: 4, 12: 12}
    runs = {value: out / "runs" / f"supmer--domains-{value}" for value in curve.values}
    trained_on = {value: json.loads((run / "run.json").read_text())["store_digest"] for value, run in runs.items()}
    assert trained_on == {value: store.manifest.digest for value, store in stores.items()}
    assert rows.groupby(["point", "method"], sort=False).size().tolist() == [6, 6, 6, 6]
    tested = rows.pivot(index=["method", "train", "test", "seed"], columns="point", values="test_accuracy")
    assert (tested.loc["prompt-tuning", "domains = 4"] == tested.loc["prompt-tuning", "domains = 12"]).all()
    table = (out / "table.md").read_text()
    assert "## domains = 4" in table and "supmer (domains = 12) 2 steps" in table

    shutil.rmtree(runs[12])
    shutil.rmtree(out / "stores" / "store--domains-12")
    (out / "cells" / "domains-12--games--supmer.parquet").unlink()
    again = evaluate(whole, out, resume=True)
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), rows.drop(columns="seconds"))


def test_a_curve_asks_for_the_runs_and_stores_that_differ(plan):
    def variants(key, values, **changes):
        curve = Curve(name="c", key=key, values=values)
        return [(point.run_variant, point.store_variant) for point in plan(["supmer"], curve=curve, **changes).points()]

    assert variants("adapt.shots", (2, 4)) == [("", ""), ("", "")]
    assert variants("run.meta.steps", (1, 2)) == [("meta.steps = 1", ""), ("meta.steps = 2", "")]
    found = variants("prepare.domains", (3, 4), store=False, prepare={"sources": ["bbc"]})
    assert found == [("domains = 3", "domains = 3"), ("domains = 4", "domains = 4")]


@pytest.mark.parametrize("precision", ["bfloat16", "float64"])
def test_a_cell_computes_in_the_precision_that_was_asked_for(plan, monkeypatch, precision):
    loaded = []

    def watched(*arguments, **options):
        loaded.append(load_backbone(*arguments, **options))
        return loaded[-1]

    monkeypatch.setattr("supmer_ray.model.backbone.load_backbone", watched)
    _backbone.cache_clear()
    cell = plan(["zero-shot"], store=False, precision=precision).cells()[1]
    task = TaskRows.of(load_definition(cell.entry.train))
    rows = _run_cell(cell, task, 1, None, "float32", 1, 0.0, task)
    assert [backbone.dtype for backbone in loaded] == [getattr(torch, precision)]
    assert 0 <= rows[0]["test_accuracy"] <= 1


def test_refusals_come_before_any_work(plan, tmp_path):
    def refused(message, given, **options):
        with pytest.raises(UserError, match=message):
            evaluate(given, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    refused(r"'supmer' needs meta-training; give a store", plan(["supmer"], store=False))
    refused(r"has 30 rows in its train split, .* but needs 80", plan(["zero-shot"], adapt=ADAPT | {"shots": 40}))
    refused(r"was prepared with the backbone .* write --set backbone=", plan(["supmer"], backbone="embedded"))
    twice = replace(plan(["zero-shot"]), suite=Suite.model_validate({"name": "s", "tasks": ["bbc-topic", "bbc-topic"]}))
    refused(r"Two entries of the comparison have the name 'bbc-topic'", twice)
    curve = Curve(name="c", key="prepare.domains", values=(3, 4))
    refused(r"makes a store for each value; write --set 'prepare.sources=", plan(["supmer"], curve=curve))
    curve = Curve(name="c", key="adapt.shotz", values=(3, 4))
    refused(r"Unknown key 'adapt.shotz' in curve 'c'; did you mean 'shots'", plan(["zero-shot"], curve=curve))
    refused(r"holds no evaluation to resume", plan(["zero-shot"]), resume=True)
    with pytest.raises(UserError, match="Two methods of the comparison have the name"):
        plan(["zero-shot", "zero-shot"])
    with pytest.raises(UserError, match="The checkpoint for 'supmer' is for no method that is compared"):
        plan(["zero-shot"], checkpoints={"supmer": tmp_path})
