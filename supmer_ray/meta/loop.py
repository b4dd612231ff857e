"""What each Ray Train worker runs: its share of every meta-step, and the common update.

A worker draws its shard of each step's tasks, computes their summed meta-gradients, adds them up with
the other workers' in one flat vector, and applies the same mean update as everyone: N workers with
T/N tasks each give the one-worker result with T tasks. There is no DDP wrapper, because the backbone
is frozen and the step calls `autograd.grad` itself.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from supmer_ray.config import RunConfig, build
from supmer_ray.data.store import Store
from supmer_ray.errors import UserError
from supmer_ray.meta.curriculum import draw_mixing, running_similarity
from supmer_ray.meta.state import MetaState
from supmer_ray.meta.step import MetaGradients, MetaStep
from supmer_ray.model.backbone import Backbone, load_backbone
from supmer_ray.tasks.batch import TaskBatch
from supmer_ray.tasks.builder import TaskBuilder
from supmer_ray.tasks.formats import Formats

METRICS_FILE = "metrics.jsonl"

REFUSAL_FILE = "refused.txt"
"""Where a worker leaves the sentence for a run that no restart could mend."""


def reduce_sums(found: MetaGradients, mixing_sum: float) -> tuple[MetaGradients, dict[str, float]]:
    """Mean gradients and mean per-task metrics over the tasks of all workers, by one all-reduce.

    Args:
        found: this worker's sums.
        mixing_sum: Σ over this worker's tasks of their λ.
    """
    names = sorted(found.tasks)
    parts = [found.prompt, *found.regularizer, found.inner_rates]
    sums = torch.stack([found.tasks[name].sum() for name in names]).to(found.prompt)
    extra = torch.tensor([mixing_sum, len(found.tasks[names[0]])]).to(found.prompt)
    flat = torch.cat([*(part.reshape(-1).to(found.prompt.dtype) for part in parts), sums, extra])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(flat)
    flat = flat[:-1] / flat[-1]
    means: list[Tensor] = []
    start = 0
    for part in parts:
        means.append(flat[start : start + part.numel()].view(part.shape))
        start += part.numel()
    values = flat[start:].tolist()
    metrics = dict(zip([*names, "mixing"], values, strict=True))
    return replace(found, prompt=means[0], regularizer=means[1:-1], inner_rates=means[-1]), metrics


@dataclass
class Learner:
    """One worker's view of a run: the model, the state that all workers share, and the step."""

    config: RunConfig
    backbone: Backbone
    state: MetaState
    rank: int = 0
    workers: int = 1

    def __post_init__(self) -> None:
        self.step = MetaStep(
            self.backbone,
            self.state.regularizer,
            second_order=self.config.meta.order == "second",
            token_budget=self.config.workers.tokens_per_micro_batch,
        )

    def train_step(self, batch: TaskBatch) -> dict[str, Any]:
        """One meta-step with this worker's share of the tasks; returns the step's metrics.

        A step with a gradient that is not finite is left out on all workers alike, and counted.

        Raises:
            FloatingPointError: too many such steps in a row.
        """
        config, progress = self.config, self.state.progress
        first = progress.step * config.tasks.tasks_per_step + self.rank * len(batch)
        similarity = progress.similarity or 0.0
        lambdas = np.array(
            [draw_mixing(config.meta.curriculum, similarity, config.seed, first + i) for i in range(len(batch))]
        )
        rates = self.state.inner_rates()
        found = self.step(self.state.prompt, rates, batch, lambdas[batch.query.task])
        mean, metrics = reduce_sums(found, float(lambdas.sum()))
        finite = bool(torch.isfinite(torch.stack([g.sum() for g in (mean.prompt, *mean.regularizer)])).all())
        if finite:
            metrics |= self.state.apply(mean)
            progress.similarity = running_similarity(
                progress.similarity, metrics["similarity"], config.meta.curriculum.ema
            )
            progress.bad_in_a_row = 0
        else:
            progress.skipped += 1
            progress.bad_in_a_row += 1
            if progress.bad_in_a_row >= config.schedule.stop_after_bad_steps:
                raise FloatingPointError(
                    f"{progress.bad_in_a_row} meta-steps in a row had a gradient that is not finite, the last at step "
                    f"{progress.step}; lower meta.prompt_rate or meta.inner_rate, or use workers.precision: float32."
                )
        progress.step += 1
        return {
            "task_type": batch.names[0],
            **metrics,
            "running_similarity": progress.similarity,
            "inner_rate": float(rates.mean()),
            "prompt_norm": float(self.state.prompt.detach().norm(dim=1).mean()),
            "skipped": progress.skipped,
        }

    def validate(self, builder: TaskBuilder) -> dict[str, dict[str, float]]:
        """Query loss and accuracy after the inner steps, by task type, on the fixed validation tasks.

        The inner rate does not decay here, so that figures of different steps can be compared.
        """
        types = self.config.tasks.types
        each = self.config.schedule.validation_tasks
        sums = torch.zeros(len(types), 3, device=self.backbone.device)
        rates = self.state.inner_rates(decayed=False)
        for number, (name, index) in enumerate((name, index) for name in types for index in range(each)):
            if number % self.workers == self.rank:
                losses, right = self.step.losses(self.state.prompt, rates, builder.validation_task(name, index))
                sums[types.index(name)] += torch.stack(
                    [losses.sum(), right.sum(), torch.ones_like(losses.sum())]
                ).float()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        means = (sums[:, :2] / sums[:, 2:]).tolist()
        return {name: {"loss": loss, "accuracy": accuracy} for name, (loss, accuracy) in zip(types, means, strict=True)}


class MetricsLog:
    """Appends rows to `metrics.jsonl`; a resumed run first drops what its lost steps had written."""

    def __init__(self, file: Path, step: int) -> None:
        self.file = file
        kept = []
        if file.exists():
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= step and step > 0:
                        kept.append(line + "\n")
                except (json.JSONDecodeError, KeyError):
                    break  # the line that a killed worker did not finish
        file.write_text("".join(kept), encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


def worker_loop(settings: dict[str, Any]) -> None:
    """The function that Ray Train runs on every worker.

    What every worker finds wrong alike (settings that do not fit the backbone, gradients that are not
    finite) ends the run with a sentence for the driver, instead of restarts that would find it again.

    Args:
        settings: `config` (the run's configuration), `store` and `out`.
    """
    try:
        _work(settings)
    except (UserError, FloatingPointError) as error:
        (Path(settings["out"]) / REFUSAL_FILE).write_text(str(error), encoding="utf-8")


def _work(settings: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch

    from supmer_ray.tasks.stream import ShardSource, stream_shards

    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    config = build(RunConfig, settings["config"], "the run's configuration")
    store = Store.open(settings["store"])
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        # Builders are idle most of the time, so a CPU worker may use its whole share of the node.
        share = (os.cpu_count() or 1) // context.get_local_world_size()
        torch.set_num_threads(max(1, int(config.workers.cpus), share))
    dtype = getattr(torch, config.workers.precision) if config.workers.precision else None
    backbone = load_backbone(store.manifest.backbone.name, device=device, dtype=dtype)
    require_same_backbone(store, backbone)

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state = MetaState.resume(Path(folder), config, backbone)
    else:
        state = MetaState.fresh(config, backbone)
    learner = Learner(config, backbone, state, rank, workers)
    formats = make_formats(config, backbone)
    builder = TaskBuilder(store, formats, config.tasks, config.seed)
    log = MetricsLog(Path(settings["out"]) / METRICS_FILE, state.progress.step) if rank == 0 else None
    identity = checkpoint_identity(store)

    def report(metrics: dict[str, Any]) -> None:
        if rank:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            state.save(Path(folder), identity)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def validate() -> None:
        found = learner.validate(builder)
        if log:
            log.write({"kind": "validation", "step": state.progress.step, "validation": found})

    if state.progress.step == 0:
        validate()
    schedule, last = config.schedule, config.meta.steps
    steps = range(state.progress.step, last)
    source = ShardSource(Path(settings["store"]), formats, config.tasks, config.seed, rank, workers)
    shards = stream_shards(source, steps, builders=config.workers.builders)
    for batch, waited in _timed(shards):
        started = time.perf_counter()
        metrics = learner.train_step(batch)
        seconds = time.perf_counter() - started
        done = state.progress.step
        row = {
            "kind": "step",
            "step": done,
            **metrics,
            "step_seconds": seconds,
            "data_wait_seconds": waited,
            "tokens": int(batch.support.offsets[-1] + batch.query.offsets[-1] + batch.partner.offsets[-1]),
        }
        if log:
            log.write(row)
        if done % schedule.validate_every == 0 or done == last:
            validate()
        if done % schedule.checkpoint_every == 0 or done == last:
            report({name: value for name, value in row.items() if name != "kind"})


def require_same_backbone(store: Store, backbone: Backbone) -> None:
    """Refuse a backbone whose weights are not those that the store was prepared with.

    Raises:
        UserError: the fingerprints differ.
    """
    if backbone.fingerprint != store.manifest.backbone.fingerprint:
        raise UserError(
            f"The store {store.path} was prepared with other weights of '{backbone.name}' than are found here; "
            "prepare it again."
        )


def checkpoint_identity(store: Store) -> dict[str, Any]:
    """What a checkpoint made from `store` says of where it belongs."""
    manifest = store.manifest
    return {"backbone": manifest.backbone.model_dump(), "corpus": manifest.corpus}


def make_formats(config: RunConfig, backbone: Backbone) -> Formats:
    """The formats of a run's tasks.

    Raises:
        UserError: the prompt and the longest input do not fit the backbone's positions.
    """
    longest = config.prompt.length + config.tasks.max_length
    if backbone.max_positions is not None and longest > backbone.max_positions:
        raise UserError(
            f"prompt.length {config.prompt.length} and tasks.max_length {config.tasks.max_length} need {longest} "
            f"positions, but '{backbone.name}' has {backbone.max_positions}; lower one of them."
        )
    tasks = config.tasks
    return Formats.of(backbone, tasks.max_length, tasks.anchor_length, tasks.candidate_length)


def _timed(shards: Iterator[TaskBatch]) -> Iterator[tuple[TaskBatch, float]]:
    """Each shard with the seconds that the worker waited for it."""
    while True:
        started = time.perf_counter()
        batch = next(shards, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - started
