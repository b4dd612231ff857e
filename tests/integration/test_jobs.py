"""`ray job submit` on a real cluster with token authentication: submit, follow the log, stop, submit again, resume."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import faults
import pytest
import yaml
from cluster import PROJECT, Cluster
from typer.main import get_command

from supmer_ray.cli import app
from supmer_ray.cluster import Resources, require_room
from supmer_ray.config import load_run_config
from supmer_ray.train import CONFIG_FILE

SETTINGS = [
    "prompt.length=5", "meta.steps=100", "tasks.tasks_per_step=2", "tasks.support=6", "tasks.query=6",
    "tasks.max_length=120", "schedule.validate_every=100", "schedule.validation_tasks=1",
    "schedule.checkpoint_every=1000",
]  # fmt: skip


@pytest.fixture
def cluster(tmp_path):
    with Cluster(tmp_path / "cluster") as cluster:
        yield cluster


def steps(out):
    return [row["step"] for row in faults.whole_rows(out / "metrics.jsonl") if row["kind"] == "step"]


@pytest.mark.slow
def test_a_job_that_was_stopped_leaves_a_checkpoint_that_resumes(cluster, tiny_store, tmp_path):
    out = tmp_path / "run"
    settings = [part for pair in SETTINGS for part in ("--set", pair)]
    command = ["python", "jobs/train.py", "--store", tiny_store, "--out", out, *settings]
    without_token = {**cluster.environment, "RAY_AUTH_MODE": "disabled"}
    with_token, cluster.environment = cluster.environment, without_token
    refused = cluster.ray("job", "list", "--address", cluster.dashboard, check=False)
    assert refused.returncode and "uthenticat" in refused.stdout + refused.stderr
    cluster.environment = with_token

    job = cluster.submit(*command)
    cluster.wait_for(lambda: len(steps(out)) >= 5, "five steps")
    (shown,) = cluster.api("/api/train/v2/runs/v1")["train_runs"]
    assert shown["name"] == "run" and shown["status"] == "RUNNING"
    (attempt,) = shown["attempts"]
    assert [worker["world_rank"] for worker in attempt["workers"]] == [0]
    cluster.stop(job)
    cluster.wait_for_end(job, "STOPPED")
    written = subprocess.check_output(
        [Path(sys.executable).with_name("supmer"), "dashboard"], env=cluster.environment, text=True
    )
    beside = Path(written.partition(":")[0]).parent
    assert "supmer_grafana_dashboard.json" in written and (beside / "default_grafana_dashboard.json").is_file()
    reached = steps(out)
    # Nothing but the signal asked for a snapshot: the next regular one would come after the end.
    snapshots = sorted(out.glob("checkpoint_*/progress.json"))
    assert [json.loads(file.read_text())["step"] for file in snapshots] == [reached[-1]]
    assert 5 <= reached[-1] < 100

    again = cluster.submit(*command, "--resume")
    followed, log = cluster.follow(again), cluster.wait_for_end(again)
    assert log.splitlines()[-1] in followed
    assert "Meta-training: 100 steps in" in log and "Traceback" not in log
    assert f"{out}/checkpoint: the meta-trained prompt" in log
    assert len(log.splitlines()) < 60, "a job's log is a few plain lines"
    assert "\x1b[" not in log.replace("\x1b[36m", "").replace("\x1b[0m", "")
    assert steps(out) == list(range(1, 101))
    assert (out / "checkpoint" / "prompt.safetensors").is_file()


@pytest.mark.slow
def test_a_job_whose_driver_was_killed_is_submitted_again(cluster, undisturbed, tiny_store, tmp_path):
    out = tmp_path / "run"
    settings = [part for pair in faults.SETTINGS for part in ("--set", pair)]
    command = ["python", "jobs/train.py", "--store", tiny_store, "--out", out, *settings]
    killed = []

    def kill_the_driver():
        if not killed and len(steps(out)) >= 4:
            killed.extend(faults.kill("jobs/train.py"))

    with faults.hunting(kill_the_driver):
        job = cluster.submit(*command)
        cluster.wait_for_end(job, "FAILED")
    assert killed and not (out / "checkpoint").exists()
    again = cluster.submit(*command, "--resume")
    log = cluster.wait_for_end(again)
    assert f"{out}/checkpoint: the meta-trained prompt" in log and "Traceback" not in log
    assert steps(out) == list(range(1, 13))
    faults.assert_same_weights(out / "checkpoint", undisturbed.checkpoint)


@pytest.mark.slow
def test_a_sweep_that_was_stopped_goes_on_and_keeps_its_finished_trial(cluster, tiny_store, tmp_path):
    out, file = tmp_path / "sweep", tmp_path / "sweep.yaml"
    base = {
        "prompt": {"length": 3},
        "tasks": {"tasks_per_step": 1, "support": 4, "query": 4, "max_length": 120},
        "meta": {"steps": 12, "inner_rate": 0.3},
        "schedule": {"validate_every": 4, "validation_tasks": 1},
    }
    space = {"meta.prompt_rate": {"loguniform": [0.001, 1.0]}}
    file.write_text(yaml.safe_dump({"base": base, "space": space, "search": "tpe", "samples": 3}))
    command = ["python", "jobs/tune.py", "--config", file, "--store", tiny_store, "--out", out]
    job = cluster.submit(*command)
    cluster.wait_for(lambda: len(list(out.glob("runs/*/metrics.jsonl"))) >= 2, "the second trial")
    (first,) = [run for run in out.glob("runs/*") if steps(run)[-1:] == [12]]
    before = (first / "metrics.jsonl").read_bytes()
    cluster.stop(job)
    log = cluster.wait_for_end(job, "STOPPED")
    assert "Traceback" not in log

    log = cluster.wait_for_end(cluster.submit(*command, "--resume"))
    assert f"{out}/best.yaml: the best of 3 trials" in log and "Traceback" not in log
    assert len(log.splitlines()) < 60, "a job's log is a few plain lines"
    assert (first / "metrics.jsonl").read_bytes() == before
    for run in out.glob("runs/*"):
        assert steps(run) == list(range(1, 13))


@pytest.mark.slow
def test_a_bare_cluster_installs_the_rest(tiny_store, tmp_path):
    """Nodes that have Python and Ray alone; a job brings this project and its packages, at their pins."""
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", bare], check=True)
    pinned = re.search(r"^ray==\S+$", (PROJECT / "constraints.txt").read_text(), re.MULTILINE).group()
    install = [bare / "bin" / "python", "-m", "pip", "install", "-q", "-c", PROJECT / "constraints.txt"]
    subprocess.run([*install, pinned.replace("ray", "ray[default]", 1)], check=True)
    assert subprocess.run([bare / "bin" / "python", "-c", "import torch"], capture_output=True).returncode
    out = tmp_path / "run"
    pairs = ["meta.steps=2", *SETTINGS[:1], *SETTINGS[2:-1], "schedule.checkpoint_every=1"]
    settings = [part for pair in pairs for part in ("--set", pair)]
    with Cluster(tmp_path / "cluster", binaries=bare / "bin") as cluster:
        job = cluster.submit(
            "python", "jobs/train.py", "--store", tiny_store, "--out", out, *settings,
            environment="jobs/runtime-env.yaml",
        )  # fmt: skip
        log = cluster.wait_for_end(job)
    assert f"{out}/checkpoint: the meta-trained prompt" in log and steps(out) == [1, 2]


@pytest.mark.slow
def test_an_evaluation_and_the_options_of_the_backbones_training_run_as_jobs(cluster, tmp_path):
    out = tmp_path / "eval"
    small = ["--set", "adapt.max_test=50", "--set", "adapt.shots=4"]
    command = ["python", "jobs/evaluate.py", "--tasks", "bbc-topic", "--methods", "zero-shot,linear-probe", *small]
    log = cluster.wait_for_end(cluster.submit(*command, "--seeds", 2, "--out", out))
    assert "linear-probe" in log and (out / "results.parquet").is_file()
    usage = cluster.wait_for_end(cluster.submit("python", "jobs/pretrain_backbone.py", "--help"))
    assert set(re.findall(r"--[a-z-]+", documented("pretrain_backbone").partition("pretrain_backbone.py ")[2])) <= set(
        re.findall(r"--[a-z-]+", usage)
    )


def options(verb):
    """The options of a verb of the command line."""
    return {option for parameter in get_command(app).commands[verb].params for option in parameter.opts}


def documented(name):
    """What the docstring of a job says, on one line as a shell would read it."""
    text = ast.get_docstring(ast.parse((PROJECT / "jobs" / f"{name}.py").read_text()))
    return " ".join(text.replace("\\\n", " ").split())


@pytest.mark.parametrize("file", ["README.md", "docs/results.md"])
def test_commands_of_the_documents_have_only_options_that_there_are(file):
    text, found = (PROJECT / file).read_text(encoding="utf-8").replace("\\\n", " "), 0
    for block in re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for verb, rest in re.findall(r"^supmer +(\w+)(.*)$", block, re.MULTILINE):
            assert set(re.findall(r"(?<!\S)--[a-z-]+", rest.partition("  #")[0])) <= options(verb), (verb, rest)
            found += 1
    assert found


@pytest.mark.parametrize("name", ["prepare", "train", "tune", "evaluate", "pretrain_backbone"])
def test_every_job_documents_its_whole_command(name):
    command = (
        "RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --working-dir . "
        f"--runtime-env jobs/runtime-env.yaml -- python jobs/{name}.py "
    )
    assert command in documented(name) and "~/.ray/auth_token" in documented(name)


@pytest.mark.parametrize("name", ["prepare", "train", "tune", "evaluate"])
def test_every_job_takes_the_options_of_its_verb(name):
    assert f'main(["{name}", *sys.argv[1:]])' in (PROJECT / "jobs" / f"{name}.py").read_text()
    command = re.search(rf"python jobs/{name}\.py (.*?)(?= Submit)", documented(name)).group(1)
    found = set(re.findall(r"--[a-z-]+", command))
    assert found and found <= options(name)


def test_the_runtime_environment_installs_this_project_with_its_pins():
    packages = yaml.safe_load((PROJECT / "jobs" / "runtime-env.yaml").read_text())["pip"]["packages"]
    assert packages[0] == "-c ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/constraints.txt"
    assert packages[1] == "${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}"
    assert (PROJECT / "constraints.txt").is_file() and (PROJECT / "pyproject.toml").is_file()


def test_the_kubernetes_manifest_runs_a_command_that_the_command_line_takes(tmp_path):
    manifest = yaml.safe_load((PROJECT / "jobs" / "rayjob.yaml").read_text())
    assert manifest["kind"] == "RayJob" and manifest["apiVersion"] == "ray.io/v1"
    spec = manifest["spec"]
    # KubeRay posts the entry point to the head, whose shell runs it: a submitter's shell would not see the volume.
    assert spec["submissionMode"] == "HTTPMode"
    entry = spec["entrypoint"].replace("/shared/", f"{tmp_path}/")
    (tmp_path / "python").write_text('#!/bin/sh\necho python "$@"\n')
    (tmp_path / "python").chmod(0o755)

    def started():
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        return subprocess.check_output(["bash", "-c", entry], env=environment, text=True).split()

    fresh = started()
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / CONFIG_FILE).touch()
    command = started()
    assert "--resume" not in fresh and sorted([*fresh, "--resume"]) == sorted(command)
    command = [word.replace(str(tmp_path), "/shared") for word in command]
    assert command[0] == "python" and (PROJECT / command[1]).is_file()
    verb = Path(command[1]).stem
    assert {word for word in command if word.startswith("--")} <= options(verb)
    config = load_run_config(None, [command[i + 1] for i, word in enumerate(command) if word == "--set"])

    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    (group,) = cluster["workerGroupSpecs"]
    pods = [cluster["headGroupSpec"]["template"], group["template"]]
    containers = [container for pod in pods for container in pod["spec"]["containers"]]
    each = float(containers[1]["resources"]["requests"]["cpu"])
    require_room(Resources((each,) * group["minReplicas"]), config.workers)
    pinned = re.search(r"^ray==(\S+)$", (PROJECT / "constraints.txt").read_text(), re.MULTILINE).group(1)
    assert cluster["rayVersion"] == pinned
    assert {container["image"] for container in containers} == {f"rayproject/ray:{pinned}-py311"}
    claimed = {volume["name"] for pod in pods for volume in pod["spec"]["volumes"]}
    mounts = [mount for container in containers for mount in container["volumeMounts"]]
    assert {mount["name"] for mount in mounts} == claimed
    for place in (command[command.index("--store") + 1], command[command.index("--out") + 1]):
        assert any(place.startswith(mount["mountPath"] + "/") for mount in mounts)
    environment = yaml.safe_load(spec["runtimeEnvYAML"])
    assert environment["pip"] == yaml.safe_load((PROJECT / "jobs" / "runtime-env.yaml").read_text())["pip"]
