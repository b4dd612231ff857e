"""Meta-training: a store and a configuration go in, a run folder with a checkpoint comes out.

`RUN/checkpoint/` is the result, `RUN/metrics.jsonl` what happened, one JSON object a line. Ray Train
keeps its own snapshots beside them, from which `--resume` and a restarted worker go on.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supmer_ray.cluster import connect, require_room
from supmer_ray.config import RunConfig
from supmer_ray.data.store import Store
from supmer_ray.errors import UserError, require_new_folder
from supmer_ray.files import whole_folder, write_json
from supmer_ray.meta.loop import METRICS_FILE, REFUSAL_FILE, worker_loop
from supmer_ray.tasks.types import require_domains

CHECKPOINT = "checkpoint"
CONFIG_FILE = "run.json"

Progress = Callable[[dict[str, Any]], None]
"""Called with every row of `metrics.jsonl` as it appears."""


@dataclass(frozen=True)
class TrainResult:
    """Where a run's outcome lies.

    Attributes:
        checkpoint: folder with θ and ψ_φ.
        metrics: the file with one row a step.
    """

    checkpoint: Path
    metrics: Path


def train(
    config: RunConfig,
    store: Path,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Meta-train a soft prompt and a gradient regularizer with Ray Train.

    Args:
        store: what `prepare` wrote.
        out: the run's folder; on a cluster it must be a path that every node sees.
        resume: go on from the last snapshot in `out`, under the configuration that stands there.
        overwrite: replace what `out` holds.

    Raises:
        UserError: unusable input, or too few free CPUs; nothing was written.
    """
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    require_domains(Store.open(store), config.tasks.types)
    out, store = out.resolve(), store.resolve()
    require_new_folder(out, overwrite=overwrite, resume=resume, can_resume=True)
    if resume:
        _require_same_run(out, config, store)
    resources = connect()
    require_room(resources, config.workers)
    gpu = resources.gpus >= config.workers.count if config.workers.gpu is None else config.workers.gpu
    if overwrite and out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / CONFIG_FILE, {"store": str(store), "config": config.model_dump(mode="json")})

    trainer = TorchTrainer(
        worker_loop,
        train_loop_config={"config": config.model_dump(mode="json"), "store": str(store), "out": str(out)},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers.count,
            use_gpu=gpu,
            resources_per_worker={"CPU": config.workers.cpus, **({"GPU": 1} if gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=out.name,
            storage_path=str(out.parent),
            failure_config=ray.train.FailureConfig(max_failures=config.workers.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    refusal = out / REFUSAL_FILE
    refusal.unlink(missing_ok=True)
    with _Follow(out / METRICS_FILE, progress):
        result = trainer.fit()
    if refusal.exists():
        sentence = refusal.read_text(encoding="utf-8")
        if result.checkpoint is None:
            shutil.rmtree(out)
        raise UserError(sentence)
    if result.checkpoint is None:
        raise RuntimeError(f"The run in {out} ended without a checkpoint.")
    with result.checkpoint.as_directory() as snapshot, whole_folder(out / CHECKPOINT) as folder:
        shutil.copytree(snapshot, folder, dirs_exist_ok=True)
    return TrainResult(out / CHECKPOINT, out / METRICS_FILE)


def _require_same_run(out: Path, config: RunConfig, store: Path) -> None:
    """Refuse to resume under another configuration than the run was started with."""
    file = out / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"{out} holds no run to resume ({CONFIG_FILE} is missing); start without --resume.")
    started = json.loads(file.read_text(encoding="utf-8"))
    now = config.model_dump(mode="json")
    for section, values in started["config"].items():
        if section not in ("workers", "schedule") and now[section] != values:
            raise UserError(
                f"The run in {out} was started with other values under '{section}'; resume with the same "
                "configuration, or start a new run."
            )
    if started["store"] != str(store):
        raise UserError(f"The run in {out} was started on the store {started['store']}; resume with that one.")


class _Follow:
    """Passes the rows of a growing metrics file on, while the `with` block runs."""

    def __init__(self, file: Path, progress: Progress | None) -> None:
        self._file, self._progress = file, progress
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        if self._progress:
            self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._progress:
            self._thread.join()

    def _run(self) -> None:
        assert self._progress
        read = 0
        while True:
            last_look = self._stop.is_set()
            if self._file.exists():
                if self._file.stat().st_size < read:
                    read = 0  # a restarted worker dropped the rows of its lost steps
                with self._file.open("rb") as stream:
                    stream.seek(read)
                    for line in stream:
                        if not line.endswith(b"\n"):
                            break
                        read += len(line)
                        self._progress(json.loads(line))
            if last_look:
                return
            self._stop.wait(0.5)
