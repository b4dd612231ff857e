"""A trial: a meta-training run of the ordinary loop (`meta.loop`), and what it reports.

One that needs a single worker is that worker itself; only a trial of several workers starts a Ray Train run of its own,
which costs it more to start (`docs/design.md` has the measurement).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ray import tune as ray_tune

from supmer_ray.cluster import DRIVER_CPUS, reserved_cpus, workers_a_node
from supmer_ray.config import PAPER_TASK_TYPES, TASK_TYPES, AdaptConfig, ObjectiveConfig, SweepConfig
from supmer_ray.data.store import Outline
from supmer_ray.errors import UserError
from supmer_ray.fewshot import builtin
from supmer_ray.files import Place
from supmer_ray.meta.learner import Learner
from supmer_ray.meta.loop import meta_train
from supmer_ray.meta.record import read_rows
from supmer_ray.meta.run import REFUSAL_FILE, RunPlan, snapshots_in
from supmer_ray.sweep.space import run_config, settings_of
from supmer_ray.tasks.types import FAMILY, require_domains

if TYPE_CHECKING:
    from supmer_ray.fewshot.definition import TaskDefinition

RUNS = "runs"
"""Within a sweep's folder: the trials' metrics files."""

DIVERGED_LOSS = 1000.0
"""The objective of a trial whose loss is not finite: far above any real one, in nats, but a number to compare."""


@dataclass(frozen=True)
class Objective:
    """What a trial reports after each validation.

    Attributes:
        config: what to make best.
        definition: the few-shot task, where the objective is its dev accuracy.
        task: all that makes the task another one, as JSON.
    """

    config: ObjectiveConfig
    definition: TaskDefinition | None = None
    task: dict[str, Any] | None = None
    _splits: list[Any] = field(default_factory=list, repr=False, compare=False)

    def files(self) -> list[Place]:
        """The user's own files of the few-shot task."""
        if self.definition is None:
            return []
        own = builtin.own_file(str(self.config.task))
        return [*([Place.of(own)] if own else []), *map(Place.of, self.definition.data.places())]

    @property
    def worst(self) -> float:
        return 0.0 if self.definition else DIVERGED_LOSS

    def __call__(self, learner: Learner, found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """`objective`, and the validation loss of each task type and on average over them."""
        losses = {f"validation_loss_{name}": figures["loss"] for name, figures in found.items()}
        mean = sum(losses.values()) / len(losses)
        reported = {"validation_loss": mean, **losses}
        value = self._dev_accuracy(learner) if self.definition else mean
        return {"objective": value if math.isfinite(value) else self.worst, **reported}

    def _dev_accuracy(self, learner: Learner) -> float:
        """Mean over the data seeds; the test split is not looked at."""
        from supmer_ray.fewshot.adapt import AdaptRun, adapt

        assert self.definition
        config, prompt = self.config, learner.state.prompt.detach().float().cpu()
        if not self._splits:
            self._splits.extend(_dev_splits(learner.backbone, self.definition, config.adapt, config.seeds, len(prompt)))
        runs = [
            AdaptRun(train, dev, ids, seed, prompt, learner.state.regularizer)
            for seed, (train, dev, ids) in enumerate(self._splits)
        ]
        budget = learner.config.workers.tokens_per_micro_batch
        results = adapt(learner.backbone, runs, config.adapt, token_budget=budget)
        return float(np.mean([result.best.accuracy for result in results]))


def _dev_splits(
    backbone: Any, definition: TaskDefinition, settings: AdaptConfig, seeds: int, prompt_length: int
) -> list[tuple[Any, Any, np.ndarray]]:
    """The encoded train and dev split of each data seed, and the ids of the answers."""
    from supmer_ray.fewshot.encoding import TaskEncoder, input_limit
    from supmer_ray.fewshot.sampling import draw

    frames = definition.read()
    limit = input_limit(backbone, prompt_length, settings.max_length)
    encoder = TaskEncoder(backbone, definition, max_length=limit)
    drawn = [draw(definition, frames, settings.shots, seed) for seed in range(seeds)]
    return [(encoder.split(d.train), encoder.split(d.dev), encoder.verbalizer_ids) for d in drawn]


def make_objective(config: SweepConfig, backbone: str) -> Objective:
    """The objective of a sweep on `backbone`, after its few-shot task was found usable.

    Raises:
        UserError: the task cannot be read, has too few rows, or has words or a pattern that the backbone cannot use.
    """
    objective = config.objective
    if objective.task is None:
        return Objective(objective)
    from supmer_ray.fewshot.definition import TaskRows, load_definition
    from supmer_ray.fewshot.encoding import TaskEncoder, input_limit
    from supmer_ray.fewshot.sampling import draw
    from supmer_ray.model.backbone import outline

    rows = TaskRows.of(load_definition(objective.task))
    draw(rows.definition, rows.frames, objective.adapt.shots, 0)
    searched, language_model = config.space.get("prompt.length"), outline(backbone)
    longest = max(searched.ends) if searched else config.base.prompt.length
    limit = input_limit(language_model, longest, objective.adapt.max_length)
    TaskEncoder(language_model, rows.definition, max_length=limit)
    return Objective(objective, rows.definition, rows.description())


def validation_types(config: SweepConfig, store: Outline) -> tuple[str, ...]:
    """What every trial is judged on, whatever its mixture: the paper's types that the store can make, and those drawn.

    Raises:
        UserError: the space draws a task type that the store has too few domains for.
    """
    drawn = set(config.base.tasks.types)
    if mixture := config.space.get("tasks.mixture"):
        drawn = {name for value in mixture.ends for name, weight in value.items() if weight}
    require_domains(store, [name for name in TASK_TYPES if name in drawn])
    makeable = []
    for name in (*PAPER_TASK_TYPES, *sorted(drawn - set(PAPER_TASK_TYPES))):
        try:
            if store.family(FAMILY[name]).domains:
                require_domains(store, [name])
                makeable.append(name)
        except UserError:
            continue
    return tuple(makeable)


class TrialHost:
    """A trial that is itself the one worker of its run."""

    rank, workers, local_workers = 0, 1, 1

    def __init__(self, *, gpu: bool) -> None:
        self.device = torch.device("cuda" if gpu else "cpu")

    def snapshots(self) -> Sequence[Any]:
        """The one that Ray Tune hands over (with pbt, another trial's), then those that are older than it.

        By name, a count of the trial's own: with pbt an older one may be of a later step, which was given up.
        """
        latest = ray_tune.get_checkpoint()
        if latest is None:
            return []
        folder, _, name = latest.path.rpartition("/")
        named = {snapshot.path.rpartition("/")[2]: snapshot for snapshot in snapshots_in(Place(folder))}
        return [named[own] for own in sorted(named, reverse=True) if own <= name]

    def report(self, metrics: dict[str, Any], write: Callable[[Path], None]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            ray_tune.report(metrics, checkpoint=ray_tune.Checkpoint.from_directory(folder))

    def leaving(self) -> bool:
        """Ray Tune does not say."""
        return False


@dataclass(frozen=True)
class Trial:
    """What every trial is told; called with a sample of the space, it is the trial."""

    config: SweepConfig
    store: Place
    out: Path
    objective: Objective
    types: tuple[str, ...]
    at_a_time: int
    gpu: bool

    def __call__(self, sample: dict[str, Any]) -> None:
        place = Place(str(self.out / RUNS / ray_tune.get_context().get_trial_id()))
        place.local.mkdir(parents=True, exist_ok=True)
        try:
            config = run_config(self.config, settings_of(self.config, sample))
            beside = workers_a_node(self.at_a_time * config.workers.count)
            plan = RunPlan(config, self.store, place, self.types, self.objective, beside)
            if config.workers.count == 1:
                meta_train(plan, TrialHost(gpu=self.gpu))
            else:
                _train_nested(plan, gpu=self.gpu)
        except (UserError, FloatingPointError) as error:
            # A retry would find the same: the trial ends, as the worst of all.
            made = read_rows(place, "step")
            reached = made[-1]["step"] if made else 0
            # Step 0, at which no scheduler does anything with it.
            worst = {"step": 0, "objective": self.objective.worst}
            ray_tune.report({**worst, "reached": reached, "refused": str(error)})

    @property
    def resources(self) -> ray_tune.PlacementGroupFactory:
        """Of a trial of one worker: its own, its builders' among them. Of a larger one: its driver's."""
        workers = self.config.base.workers
        if workers.count > 1:
            return ray_tune.PlacementGroupFactory([{"CPU": DRIVER_CPUS}])
        own = {"CPU": reserved_cpus(workers), **({"GPU": workers.gpu_share} if self.gpu else {})}
        return ray_tune.PlacementGroupFactory([own])


def _train_nested(plan: RunPlan, *, gpu: bool) -> None:
    """A trial of several workers: a Ray Train run of its own, whose reports are the trial's."""
    from ray.tune.integration.ray_train import TuneReportCallback

    from supmer_ray.train import make_trainer

    try:
        make_trainer(plan, gpu=gpu, callbacks=[TuneReportCallback()]).fit()
    finally:
        if (sentence := plan.out.read(REFUSAL_FILE)) is not None:
            raise UserError(sentence)
