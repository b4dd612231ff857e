"""What a run shows: every series that the dashboard queries stands at the real metrics port while it runs."""

import importlib.util
import json
import re
import signal
import time
import urllib.request
from contextlib import suppress

import pytest
import ray

from supmer_ray.config import load_run_config
from supmer_ray.errors import Stopped, UserError
from supmer_ray.monitoring.dashboard import make_dashboard, write_dashboard
from supmer_ray.monitoring.loggers import PACKAGES
from supmer_ray.monitoring.series import PHASES, RunSeries
from supmer_ray.train import train

SETTINGS = [
    "prompt.length=5", "meta.steps=40", "tasks.tasks_per_step=2", "tasks.support=6", "tasks.query=6",
    "tasks.max_length=120", "schedule.validate_every=40", "schedule.validation_tasks=1",
]  # fmt: skip


def queried():
    """The series that the panels and variables of the dashboard ask for."""
    board = make_dashboard()
    text = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    text += [variable.get("definition", "") for variable in board["templating"]["list"]]
    return {name for part in text for name in re.findall(r"ray_supmer_\w+", part)}


def scraped(run):
    """name → its values by the label that tells them apart, of one run, from this node's metrics port."""
    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    found = {}
    for line in lines:
        match = re.match(r"(ray_supmer_\w+)\{(.*)\} (\S+)$", line)
        if match and f'run="{run}"' in match[2]:
            label = re.search(r'(?:task_type|phase)="(\w+)"', match[2])
            found.setdefault(match[1], {})[label and label[1]] = float(match[3])
    return found


def in_time(look, seconds=60):
    """What is seen, as soon as it is something; the port may not answer at once."""
    end = time.monotonic() + seconds
    while True:
        with suppress(OSError):
            if seen := look():
                return seen
        assert time.monotonic() < end
        time.sleep(0.5)


def test_the_metrics_port_has_every_series_that_the_dashboard_queries(undisturbed):
    rows = [json.loads(line) for line in undisturbed.metrics.read_text().splitlines()]
    series = RunSeries("shown", tasks_per_step=2)
    for row in rows:
        series.row(row)
    assert len(queried()) >= 20

    def shown():
        seen = scraped("shown")
        there = queried() <= seen.keys() and set(seen["ray_supmer_phase_seconds"]) == set(PHASES)
        return there and seen["ray_supmer_step"] == {None: 12} and seen

    seen = in_time(shown)
    series.close()
    assert set(seen["ray_supmer_validation_loss"]) == {"nsp", "nss", "scsp", "scss", "scc"}
    last = [row for row in rows if row["kind"] == "step"][-1]
    assert seen["ray_supmer_similarity"][None] == pytest.approx(last["similarity"], rel=1e-6)


@pytest.mark.slow
def test_a_run_shows_every_series_while_it_goes_on(tiny_store, tmp_path):
    """It goes on until all of them are seen: how many steps that takes is the machine's affair."""
    seen = {}

    def look(row):
        if row["kind"] == "step" and row["step"] % 5 == 0 and not there():
            with suppress(OSError):
                seen.update(scraped("shown"))
            if there():
                signal.raise_signal(signal.SIGTERM)

    def there():
        return queried() <= seen.keys() and set(seen["ray_supmer_phase_seconds"]) == set(PHASES)

    config = load_run_config(None, [*SETTINGS, "meta.steps=4000", "schedule.validate_every=4000"])
    with pytest.raises(Stopped):
        train(config, tiny_store, tmp_path / "shown", progress=look)
    assert set(seen["ray_supmer_validation_loss"]) == {"nsp", "nss", "scsp", "scss", "scc"}
    assert 0 <= seen["ray_supmer_data_wait_fraction"][None] <= 1
    assert seen["ray_supmer_step"][None] >= 1 and seen["ray_supmer_step_seconds"][None] > 0
    rows = [json.loads(line) for line in (tmp_path / "shown" / "metrics.jsonl").read_text().splitlines()]
    similarities = [row["similarity"] for row in rows if row["kind"] == "step"]
    assert min(similarities) <= seen["ray_supmer_similarity"][None] <= max(similarities)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_run_writes_to_the_loggers_that_it_names(tiny_store, tmp_path, name):
    if importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.skip(f"{PACKAGES[name]} is an extra")
    run = tmp_path / "run"
    settings = [*SETTINGS, "meta.steps=2", "schedule.validate_every=2", f"monitoring.loggers=[{name}]"]
    train(load_run_config(None, settings), tiny_store, run)
    if name == "mlflow":
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=f"sqlite:///{run / 'mlflow.db'}")
        (found,) = client.search_runs([client.get_experiment_by_name("supmer").experiment_id])
        assert found.info.status == "FINISHED" and len(client.get_metric_history(found.info.run_id, "train/gate")) == 2
    else:
        pattern = {"tensorboard": "tensorboard/events.*", "wandb": "wandb/offline-run-*/*.wandb"}[name]
        (file,) = run.glob(pattern)
        assert file.stat().st_size > 1000


def test_a_value_stays_at_the_metrics_port_until_the_run_is_over(ray_cluster):
    """Ray drops a gauge that nobody sets for two reporting intervals, of one second in the tests' cluster."""
    series = RunSeries("kept", tasks_per_step=1)
    series.row({"kind": "validation", "step": 0, "validation": {"nsp": {"loss": 1.5, "accuracy": 0.25}}})

    def shown():
        return scraped("kept").get("ray_supmer_validation_loss")

    in_time(shown)
    time.sleep(6)
    # What Ray has dropped does not come back, so to see it late proves as much.
    assert in_time(shown) == {"nsp": 1.5}
    series.close()
    in_time(lambda: not scraped("kept"))


def test_the_dashboard_is_written_where_grafana_looks(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(UserError, match="Grafana configuration is not at"):
        write_dashboard()
    place = tmp_path / "ray" / "session_latest" / "metrics" / "grafana" / "dashboards"
    place.mkdir(parents=True)
    assert write_dashboard().parent == place
    monkeypatch.setenv("RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR", str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match="elsewhere"):
        write_dashboard()
    assert json.loads(write_dashboard(tmp_path / "new").read_text()) == make_dashboard()
