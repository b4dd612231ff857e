"""TensorBoard, MLflow and Weights & Biases, each read back from what it wrote."""

import importlib.util

import pytest

from supmer_ray.config import load_run_config
from supmer_ray.errors import UserError
from supmer_ray.files import Place
from supmer_ray.monitoring.loggers import PACKAGES, figures, open_loggers, require_loggers

STEP = {"kind": "step", "step": 1, "task_type": "nsp", "query_loss": 2.5, "gate": 0.25, "running_similarity": None}
VALIDATION = {"kind": "validation", "step": 1, "validation": {"scc": {"loss": 3.0, "accuracy": 0.5}}}


@pytest.fixture
def write(tmp_path):
    def write(name):
        if importlib.util.find_spec(PACKAGES[name]) is None:
            pytest.skip(f"{PACKAGES[name]} is an extra")
        config = load_run_config(None, [f"monitoring.loggers=[{name}]"])
        (logger,) = open_loggers(config, Place(str(tmp_path / "run")))
        for row in (STEP, VALIDATION, {**STEP, "step": 2, "query_loss": 2.0}):
            logger.log(row["step"], dict(figures(row)))
        logger.close()
        return tmp_path / "run"

    (tmp_path / "run").mkdir()
    return write


def test_the_figures_of_a_row():
    step = {"train/query_loss": 2.5, "train/query_loss_nsp": 2.5, "train/gate": 0.25}
    assert dict(figures(STEP)) == step
    assert dict(figures(VALIDATION)) == {"validation/loss_scc": 3.0, "validation/accuracy_scc": 0.5}
    assert dict(figures({"kind": "notice", "step": 3, "text": "…"})) == {}


def test_tensorboard(write):
    from tensorboardX.proto.event_pb2 import Event

    (file,) = (write("tensorboard") / "tensorboard").iterdir()
    data, found = file.read_bytes(), {}
    while data:  # length, its checksum, the event, its checksum
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        data = data[16 + size :]
    assert found["train/query_loss", 1] == 2.5 and found["train/query_loss", 2] == 2.0
    assert found["validation/loss_scc", 1] == 3.0


@pytest.mark.slow
def test_mlflow(write):
    from mlflow import MlflowClient

    folder = write("mlflow")
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("supmer")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run" and run.info.status == "FINISHED" and run.data.params["meta.steps"] == "2000"
    history = client.get_metric_history(run.info.run_id, "train/query_loss")
    assert sorted((entry.step, entry.value) for entry in history) == [(1, 2.5), (2, 2.0)]
    names = {name for row in (STEP, VALIDATION) for name, _ in figures(row)}
    assert run.data.metrics.keys() == names and run.data.metrics["train/query_loss"] == 2.0


@pytest.mark.slow
def test_wandb_stays_offline(write, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "")  # so that what the logger sets is taken back
    monkeypatch.delenv("WANDB_MODE")
    folder = write("wandb")
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    text = file.read_bytes()
    assert b"train/query_loss" in text and b"validation/loss_scc" in text


def test_a_logger_that_cannot_write_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(PACKAGES, "mlflow", "no_such_package")
    with pytest.raises(UserError, match=r"'mlflow', but no_such_package is not installed.*'\.\[mlflow\]'"):
        require_loggers(["mlflow"], Place(str(tmp_path)))
    with pytest.raises(UserError, match="writes to a path, not to s3://bucket/run"):
        require_loggers(["tensorboard"], Place("s3://bucket/run"))
