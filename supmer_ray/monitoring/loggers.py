"""TensorBoard, MLflow and Weights & Biases as settings (`monitoring.loggers`): rows of the metrics file go in.

Each is imported only where it is asked for. All of them write below the run's folder unless the environment
says otherwise (`MLFLOW_TRACKING_URI`, `WANDB_MODE=online`), so nothing leaves the machine unasked.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from supmer_ray.config import RunConfig
from supmer_ray.errors import UserError
from supmer_ray.files import Place

PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}
"""The module that each logger needs; `pip install -c constraints.txt -e ".[NAME]"` in our folder brings it."""


class Logger(Protocol):
    """Takes the figures of a run, step by step."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Record named numbers at a step."""

    def close(self) -> None:
        """Write what is still held back."""


def require_loggers(names: Sequence[str], out: Place) -> None:
    """Refuse loggers that could not write.

    Raises:
        UserError: one is not installed, or the run lies in an object store.
    """
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(
                f"monitoring.loggers names '{name}', but {PACKAGES[name]} is not installed; "
                f"write pip install -c constraints.txt -e '.[{name}]' in the project's folder, or leave it out."
            )
        if out.remote:
            raise UserError(f"'{name}' of monitoring.loggers writes to a path, not to {out}; leave it out.")


def open_loggers(config: RunConfig, out: Place, step: int = 0) -> list[Logger]:
    """The loggers that a run's configuration names; the run goes on from `step`."""
    kinds: dict[str, Callable[[RunConfig, Path, int], Logger]] = {
        "tensorboard": TensorBoardLogger,
        "mlflow": MlflowLogger,
        "wandb": WandbLogger,
    }
    return [kinds[name](config, out.local, step) for name in config.monitoring.loggers]


def figures(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a row of the metrics file, by a name for each."""
    if row["kind"] == "step":
        numbers = {key: value for key, value in row.items() if key != "step" and isinstance(value, int | float)}
        yield from ((f"train/{key}", float(value)) for key, value in numbers.items())
        yield f"train/query_loss_{row['task_type']}", float(row["query_loss"])
    elif row["kind"] == "validation":
        for task_type, found in row["validation"].items():
            yield from ((f"validation/{key}_{task_type}", float(value)) for key, value in found.items())


class TensorBoardLogger:
    """Event files in RUN/tensorboard; what the lost steps of a killed worker had written no longer counts."""

    def __init__(self, config: RunConfig, run: Path, step: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else 0)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class MlflowLogger:
    """One MLflow run for each time the training was started, in RUN/mlflow.db.

    The figures of a step are one batch, which threads of MLflow's write: one by one they took longer than many a step.
    """

    def __init__(self, config: RunConfig, run: Path, step: int) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=uri)
        experiment = self._client.get_experiment_by_name("supmer")
        number = experiment.experiment_id if experiment else self._client.create_experiment("supmer")
        self._run = self._client.create_run(number, run_name=run.name).info.run_id
        settings = [
            Param(f"{section}.{key}".rstrip("."), value)
            for section, values in config.model_dump(mode="json").items()
            for key, value in (values.items() if isinstance(values, dict) else (("", values),))
        ]
        self._client.log_batch(self._run, params=settings)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        batch = [Metric(name, value, now, step) for name, value in figures.items()]
        self._client.log_batch(self._run, metrics=batch, synchronous=False)

    def close(self) -> None:
        self._client.set_terminated(self._run)  # which waits for what is not yet written


class WandbLogger:
    """An offline run below RUN/wandb, for `wandb sync`; `WANDB_MODE=online` sends it at once."""

    def __init__(self, config: RunConfig, run: Path, step: int) -> None:
        import wandb

        os.environ.setdefault("WANDB_MODE", "offline")
        settings = wandb.Settings(silent=True, console="off")
        self._run = wandb.init(
            project="supmer", name=run.name, dir=str(run), config=config.model_dump(mode="json"),
            settings=settings,
        )  # fmt: skip

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()
