"""The Prometheus series of a run, through `ray.util.metrics`: rows of the metrics file go in.

Ray exports them from the metrics port of the worker's node, with `ray_` before each name. Only rank 0 writes
rows, so every series has one value a run; the task types share a series and differ by a label.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from ray.util.metrics import Gauge

from supmer_ray.meta.step import PHASES as STEP_PHASES

PHASES = ("data", *STEP_PHASES)
"""What the seconds of a meta-step are split into: waiting for tasks, inner steps, query loss, all-reduce."""

BY_TYPE = {
    "supmer_meta_loss": ("query_loss", "Query loss of the latest meta-step of each task type, in nats."),
    "supmer_support_loss": ("support_loss", "Support loss of the latest meta-step of each task type, in nats."),
}
"""Series with a label for the task type: name → key of a step's row, description."""

OVERALL = {
    "supmer_step": ("step", "Meta-steps done."),
    "supmer_similarity": ("similarity", "Agreement s of query and support gradients, in [0, 1]."),
    "supmer_running_similarity": ("running_similarity", "The running s that drives the curriculum."),
    "supmer_mixing": ("mixing", "Mean lambda: the share of a query that is its own."),
    "supmer_gate": ("gate", "Gate z of the regularizer, mean over the tasks."),
    "supmer_gradient_norm": ("gradient_norm", "Norm of the raw support gradient g."),
    "supmer_update_norm": ("update_norm", "Norm of the regularized gradient psi(g)."),
    "supmer_update_cosine": ("update_cosine", "Cosine of g and psi(g)."),
    "supmer_inner_rate": ("inner_rate", "Mean inner rate alpha."),
    "supmer_prompt_norm": ("prompt_norm", "Mean norm of the prompt's rows."),
    "supmer_skipped_steps": ("skipped", "Meta-steps left out because a gradient was not finite."),
    "supmer_step_seconds": ("step_seconds", "Seconds of the latest meta-step, without waiting for its tasks."),
}
"""Series of the whole run: name → key of a step's row, description (Ray takes ASCII only)."""

COMPUTED = {
    "supmer_tasks_per_second": "Meta-tasks a second, over all workers, waiting included.",
    "supmer_tokens_per_second": "Encoder tokens a second, over all workers, waiting included; no padding, no prompt.",
    "supmer_data_wait_fraction": "Share of a step's time that the worker waited for its tasks.",
    "supmer_gpu_memory_bytes": "GPU memory that PyTorch holds on rank 0's device.",
}
PHASE_SECONDS = ("supmer_phase_seconds", "Seconds of the latest meta-step by phase.")
KEPT_SECONDS = 1.0
"""How often the latest values are set again. Ray drops a gauge that was not set for two of its reporting intervals, 20
seconds where nothing else is configured; validation comes once in many steps, and a step of a large model may take
longer than that."""

VALIDATION = {
    "supmer_validation_loss": ("loss", "Validation loss of each task type, in nats."),
    "supmer_validation_accuracy": ("accuracy", "Validation accuracy of each task type."),
}


class RunSeries:
    """The series of one run, kept at their latest values until `close`.

    Args:
        run: the run's name, a label of all of them.
        tasks_per_step: T, over all workers.
    """

    def __init__(self, run: str, tasks_per_step: int) -> None:
        self._run, self._tasks = run, tasks_per_step
        by_type = {name: text for name, (_, text) in {**BY_TYPE, **VALIDATION}.items()}
        overall = {**{name: text for name, (_, text) in OVERALL.items()}, **COMPUTED}
        self._gauges = {name: Gauge(name, text, ("run", "task_type")) for name, text in by_type.items()}
        self._gauges |= {name: Gauge(name, text, ("run",)) for name, text in overall.items()}
        self._gauges[PHASE_SECONDS[0]] = Gauge(*PHASE_SECONDS, ("run", "phase"))
        self._latest: dict[tuple[str, ...], tuple[float, dict[str, str]]] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()

    def close(self) -> None:
        """The run is over: let its series age out."""
        self._closed.set()
        self._keeper.join()

    def _keep(self) -> None:
        while not self._closed.wait(KEPT_SECONDS):
            with self._lock:
                for (name, *_), (value, labels) in self._latest.items():
                    self._gauges[name].set(value, labels)

    def row(self, row: dict[str, Any]) -> None:
        """Set what a row of the metrics file says."""
        if row["kind"] == "step":
            self._step(row)
        elif row["kind"] == "validation":
            for task_type, figures in row["validation"].items():
                for name, (key, _) in VALIDATION.items():
                    self._set(name, figures[key], task_type=task_type)

    def _step(self, row: dict[str, Any]) -> None:
        for name, (key, _) in BY_TYPE.items():
            self._set(name, row[key], task_type=row["task_type"])
        for name, (key, _) in OVERALL.items():
            if row[key] is not None:
                self._set(name, row[key])
        waited = row["data_wait_seconds"]
        total = waited + row["step_seconds"]
        self._set("supmer_data_wait_fraction", waited / total)
        self._set("supmer_tasks_per_second", self._tasks / total)
        self._set("supmer_tokens_per_second", row["tokens"] / total)
        self._set("supmer_gpu_memory_bytes", torch.cuda.memory_allocated() if torch.cuda.is_available() else 0)
        for phase in PHASES:
            self._set(PHASE_SECONDS[0], row[f"{phase}_seconds"] if phase != "data" else waited, phase=phase)

    def _set(self, name: str, value: float, **labels: str) -> None:
        labels = {"run": self._run, **labels}
        with self._lock:
            self._latest[name, *labels.values()] = float(value), labels
            self._gauges[name].set(float(value), labels)
