"""One worker's view of a run: its share of a meta-step, the common update, and validation.

A worker computes its tasks' summed meta-gradients, adds them up with the other workers' in one flat
vector, and applies the same mean update as everyone: N workers with T/N tasks each give the one-worker
result with T tasks. There is no DDP wrapper, because the backbone is frozen and the step calls
`autograd.grad` itself. Torch alone is needed here; what starts the workers is another's subject (`loop`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed

from supmer_ray.config import RunConfig
from supmer_ray.meta.curriculum import draw_mixing, running_similarity
from supmer_ray.meta.reduce import reduce_sums
from supmer_ray.meta.state import MetaState
from supmer_ray.meta.step import MetaStep
from supmer_ray.model.backbone import Backbone
from supmer_ray.tasks.batch import TaskBatch
from supmer_ray.tasks.builder import TaskBuilder


@dataclass
class Learner:
    """One worker's view of a run: the model, the state that all workers share, and the step."""

    config: RunConfig
    backbone: Backbone
    state: MetaState
    rank: int = 0
    workers: int = 1
    stopping: bool = field(default=False, init=False)
    looking: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.step = MetaStep(
            self.backbone,
            self.state.regularizer,
            second_order=self.config.meta.order == "second",
            answers_only=self.config.meta.loss == "answers",
            token_budget=self.config.workers.tokens_per_micro_batch,
        )

    def train_step(self, batch: TaskBatch, *, stop: bool = False, look: bool = False) -> dict[str, Any]:
        """One meta-step with this worker's share of the tasks; returns the step's metrics.

        Norms and rates among them are those that the step began with.

        A step with a gradient that is not finite is left out on all workers alike, and counted. `stop`
        says that this worker was asked to end the run, `look` that it is time to look for nodes that leave; afterwards
        all workers have `stopping` and `looking` set alike.

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
        mixing = lambdas[batch.query.task]
        found = self.step(self.state.prompt, rates, batch, mixing)
        encoded = len(rates) * batch.support.lengths.sum() + batch.query.lengths.sum()
        encoded += batch.partner.lengths[mixing < 1].sum()  # at λ = 1 a query's partner is never read
        mean, figures, flags = reduce_sums(found, {"mixing": lambdas.sum(), "tokens": encoded}, (stop, look))
        found.marks.append(self.step.mark())
        norms = self.state.gradient_norms(mean)
        figures |= {f"{name}_gradient_norm": norm for name, norm in norms.items()}
        figures["prompt_norm"] = self.state.prompt.detach().norm(dim=1).mean()
        figures["inner_rate"] = rates.sum() / max(1, len(rates))
        # The only place where the host waits for the device.
        values = torch.stack([*flags, *(figure.to(flags) for figure in figures.values())]).tolist()
        self.stopping, self.looking = (value > 0 for value in values[: len(flags)])
        metrics = dict(zip(figures, values[len(flags) :], strict=True))
        if all(math.isfinite(metrics[f"{name}_gradient_norm"]) for name in norms):
            self.state.apply(mean, norms)
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
                    f"{progress.step}; go on by --resume with workers.precision: float32, or start a new run "
                    "(--overwrite) with a lower meta.prompt_rate or meta.inner_rate."
                )
        progress.step += 1
        return {
            "task_type": batch.names[0],
            **metrics,
            "running_similarity": progress.similarity,
            "skipped": progress.skipped,
            "tokens": round(metrics["tokens"] * config.tasks.tasks_per_step),
            **{f"{phase}_seconds": value for phase, value in found.seconds().items()},
        }

    def validate(self, builder: TaskBuilder, types: Sequence[str]) -> dict[str, dict[str, float]]:
        """Query loss and accuracy after the inner steps, by task type, on the fixed validation tasks.

        The inner rate does not decay here, so that figures of different steps can be compared.
        """
        each = self.config.schedule.validation_tasks
        sums = torch.zeros(len(types), 3, device=self.backbone.device)
        rates = self.state.inner_rates(decayed=False)
        for number, (name, index) in enumerate((name, index) for name in types for index in range(each)):
            if number % self.workers == self.rank:
                losses, right = self.step.query_metrics(self.state.prompt, rates, builder.validation_task(name, index))
                sums[types.index(name)] += torch.stack(
                    [losses.sum(), right.sum(), torch.ones_like(losses.sum())]
                ).float()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        means = (sums[:, :2] / sums[:, 2:]).tolist()
        return {name: {"loss": loss, "accuracy": accuracy} for name, (loss, accuracy) in zip(types, means, strict=True)}
