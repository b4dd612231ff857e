"""A head and two worker nodes, each a raylet of its own with a shared path: nodes leave while work goes on."""

import json
import re
import signal
import time

import pandas as pd
import psutil
import pytest
import yaml
from cluster import PATIENCE_SECONDS, Cluster
from faults import SETTINGS, assert_nearly_same_weights, assert_same_weights, rows_of, whole_rows

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(tmp_path):
    """The head drives; two nodes of two CPUs each do the work."""
    with Cluster(tmp_path / "cluster", cpus=0) as cluster:
        cluster.join(cpus=2)
        cluster.join(cpus=2)
        yield cluster


def node_of(cluster, name):
    """The worker node on which a process called `name` runs, or None."""
    for node in cluster.nodes[1:]:
        if node.poll() is not None:
            continue
        for process in psutil.Process(node.pid).children(recursive=True):
            try:
                if any(name in part for part in process.cmdline()):
                    return node
            except psutil.NoSuchProcess:
                continue
    return None


def kill_node_of(cluster, name, ready=lambda: True):
    """Wait until it is time and `name` runs somewhere, and kill that whole node."""
    alive = cluster.alive()  # first: it takes seconds, after which what is waited for may be over
    end = time.monotonic() + PATIENCE_SECONDS
    while not (ready() and (node := node_of(cluster, name))):
        assert time.monotonic() < end, f"waited in vain for {name}"
        time.sleep(0.05)
    cluster.kill(node)
    cluster.wait_for(lambda: cluster.alive() < alive, "the head to miss the node")


def steps(file):
    return [row["step"] for row in whole_rows(file) if row["kind"] == "step"]


def assert_a_restart_is_told(file):
    told = [row["text"] for row in rows_of(file, "notice")]
    why = r"Worker \d failed \(.+ (died|unavailable)\b.+\)"
    restart = rf"{why}; the run goes on from its last snapshot, restart 1 of at most 3\."
    assert any(re.fullmatch(restart, text) for text in told), told


def test_a_cluster_grows_for_a_preparation_and_a_run(undisturbed, tiny_t5, tiny_store, tmp_path):
    """On a head without CPUs, to which Ray's autoscaler adds what is asked for."""
    out, settings = tmp_path / "run", [part for pair in SETTINGS for part in ("--set", pair)]
    with Cluster(tmp_path / "cluster", cpus=0, growth=1) as cluster:
        assert cluster.alive() == 1
        command = ["python", "jobs/train.py", "--store", tiny_store, "--out", out, *settings]
        cluster.wait_for_end(cluster.submit(*command, installed=True))
        assert cluster.alive() == 2
        # What Ray Data keeps for the whole cluster would hold the node that was added, were it there.
        found = cluster.api("/api/v0/actors?limit=1000&detail=1")["data"]["result"]["result"]
        kept = {actor["class_name"]: actor["node_id"] for actor in found if actor["state"] == "ALIVE"}
        head = cluster.environment["RAY_OVERRIDE_NODE_ID_FOR_TESTING"]
        assert {"_AutoscalingCoordinatorActor", "_StatsActor"} <= kept.keys(), kept
        assert set(kept.values()) == {head}, kept
        options = ["--source", "bbc", "--backbone", tiny_t5, "--domains", 4, "--max-documents", 20]
        command = ["python", "jobs/prepare.py", *options, "--set", "embedders=2", "--out", tmp_path / "store"]
        cluster.wait_for_end(cluster.submit(*command, installed=True))
    assert steps(out / "metrics.jsonl") == list(range(1, 13))
    assert_same_weights(out / "checkpoint", undisturbed.checkpoint)


def test_a_node_leaves_during_prepare(cluster, tiny_t5, tiny_store, tmp_path):
    options = ["--source", "bbc", "--backbone", tiny_t5, "--domains", 40, "--max-documents", 400]
    whole, disturbed = tmp_path / "whole", tmp_path / "disturbed"
    cluster.wait_for_end(cluster.submit("python", "jobs/prepare.py", *options, "--out", whole, installed=True))
    job = cluster.submit("python", "jobs/prepare.py", *options, "--out", disturbed, installed=True)
    kill_node_of(cluster, "ray::Embedder")
    log = cluster.wait_for_end(job)
    assert len(log.splitlines()) < 60, "a job's log is a few plain lines"
    assert cluster.alive() == 2
    one, other = (json.loads((store / "manifest.json").read_text()) for store in (whole, disturbed))
    assert one["files"] == other["files"] and one["families"] == other["families"]


def test_a_node_leaves_during_training_and_another_joins(cluster, undisturbed, tiny_store, tmp_path):
    out = tmp_path / "run"
    settings = [part for pair in SETTINGS for part in ("--set", pair)]
    job = cluster.submit("python", "jobs/train.py", "--store", tiny_store, "--out", out, *settings, installed=True)
    kill_node_of(cluster, "RayTrainWorker", ready=lambda: len(steps(out / "metrics.jsonl")) >= 4)
    cluster.join(cpus=2)
    cluster.wait_for_end(job)
    assert_a_restart_is_told(out / "metrics.jsonl")
    assert steps(out / "metrics.jsonl") == list(range(1, 13))
    assert_same_weights(out / "checkpoint", undisturbed.checkpoint)


def test_a_node_that_says_that_it_leaves_takes_few_steps_with_it(cluster, tiny_store, tmp_path):
    """SIGTERM, as when Kubernetes deletes a pod: half a minute later the node is gone. No regular snapshot is made."""
    out, count = tmp_path / "run", 600
    pairs = [*SETTINGS, f"meta.steps={count}", "schedule.checkpoint_every=1000", "schedule.validate_every=1000"]
    settings = [part for pair in pairs for part in ("--set", pair)]
    job = cluster.submit("python", "jobs/train.py", "--store", tiny_store, "--out", out, *settings, installed=True)
    cluster.wait_for(lambda: len(steps(out / "metrics.jsonl")) >= 4, "the fourth step")
    node_of(cluster, "RayTrainWorker").send_signal(signal.SIGTERM)
    told = steps(out / "metrics.jsonl")[-1]
    cluster.wait_for_end(job)
    file = out / "metrics.jsonl"
    first, second = rows_of(file, "start")
    assert first["step"] == 1 and second["step"] > told, "it went on from a snapshot that was made for it"
    # Ray may take the node's end for a failure, where it sees it before it has missed the node.
    notice, *_ = [row["text"] for row in rows_of(file, "notice")]
    assert re.fullmatch(r"A node of the run will leave soon; from step \d+ on it has a snapshot .*", notice)
    assert steps(file) == list(range(1, count + 1))


def test_two_workers_on_two_nodes_learn_what_one_learns_and_outlive_a_node(
    cluster, undisturbed, tiny_store, bucket, tmp_path
):
    """Undisturbed, with all that nodes share in an object store; and on a path, where one worker's node leaves."""
    pairs = [*SETTINGS, "workers.count=2", "workers.cpus=1.5"]
    settings = [part for pair in pairs for part in ("--set", pair)]
    wanted = json.loads((tiny_store / "manifest.json").read_text())["settings"]
    options = ["--source", "bbc", "--backbone", wanted["backbone"], "--domains", 12, "--max-documents", 60]
    cluster.wait_for_end(cluster.submit("python", "jobs/prepare.py", *options, "--out", bucket.store, installed=True))
    command = ["python", "jobs/train.py", *settings, "--store", bucket.store, "--out", bucket.uri]
    log = cluster.wait_for_end(cluster.submit(*command, installed=True))
    ours = "\n".join(line for line in log.splitlines() if "Running entrypoint" not in line)  # Ray shows the command
    assert "secret" not in ours and "s3://runs/team/first/checkpoint: the meta-trained prompt" in ours
    quiet = bucket.fetch(tmp_path / "fetched") / "checkpoint"
    assert_nearly_same_weights(quiet, undisturbed.checkpoint)

    out = tmp_path / "run"
    command = ["python", "jobs/train.py", *settings, "--store", tiny_store, "--out", out]
    job = cluster.submit(*command, installed=True)
    kill_node_of(cluster, "RayTrainWorker", ready=lambda: len(steps(out / "metrics.jsonl")) >= 4)
    cluster.join(cpus=2)
    cluster.wait_for_end(job)
    assert_a_restart_is_told(out / "metrics.jsonl")
    assert steps(out / "metrics.jsonl") == list(range(1, 13))
    assert_same_weights(out / "checkpoint", quiet)


def test_a_node_leaves_during_a_sweep(cluster, tiny_store, tmp_path):
    base = {
        "prompt": {"length": 3},
        "tasks": {"tasks_per_step": 1, "support": 4, "query": 4, "max_length": 120},
        "meta": {"steps": 6, "prompt_rate": 0.3, "inner_rate": 0.3},
        "schedule": {"validate_every": 2, "validation_tasks": 1},
    }
    space = {"meta.prompt_rate": {"loguniform": [0.001, 1.0]}}
    file, out = tmp_path / "sweep.yaml", tmp_path / "sweep"
    file.write_text(yaml.safe_dump({"base": base, "space": space, "search": "random", "samples": 4}))
    command = ["python", "jobs/tune.py", "--config", file, "--store", tiny_store, "--out"]
    quiet = tmp_path / "quiet"
    cluster.wait_for_end(cluster.submit(*command, quiet, installed=True))
    job = cluster.submit(*command, out, installed=True)
    kill_node_of(
        cluster,
        "ray::ImplicitFunc",
        ready=lambda: any(steps(metrics)[-1:] >= [2] for metrics in out.glob("runs/*/metrics.jsonl")),
    )
    cluster.wait_for_end(job)
    table, undisturbed = (
        pd.read_parquet(folder / "trials.parquet").sort_values("meta.prompt_rate") for folder in (out, quiet)
    )
    assert len(table) == 4 and set(table["state"]) == {"finished"}
    assert table["meta.prompt_rate"].tolist() == undisturbed["meta.prompt_rate"].tolist()
    # A trial that goes on where fewer nodes are left has fewer threads, whose sums differ in the last digit.
    assert table["objective"].tolist() == pytest.approx(undisturbed["objective"].tolist(), rel=1e-5)
    for trial in table["trial"]:
        assert steps(out / "runs" / trial / "metrics.jsonl") == list(range(1, 7))
