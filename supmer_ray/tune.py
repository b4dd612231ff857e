"""Sweeps: a search space and a store go in; a table of trials, the best configuration and a picture come out.

    OUT/trials.parquet      one row a trial: its settings, how far it came, its objective, its snapshot
    OUT/best.yaml           the best trial's whole configuration, as `supmer train --config` reads it
    OUT/sweep.png, .svg     parallel coordinates, importance of the settings, best so far
    OUT/runs/TRIAL/         the metrics file of each trial
    OUT/search/             Ray Tune's own state and the trials' snapshots, from which `--resume` goes on

A trial is a meta-training run of the ordinary loop (`meta.loop`). One that needs a single worker is that
worker itself; only a trial of several workers starts a Ray Train run of its own, which costs it more to
start (`docs/design.md` has the measurement).
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from ray import tune as ray_tune

from supmer_ray.cluster import BUILDER_CPUS, Resources, connect, require_room
from supmer_ray.config import (
    PAPER_TASK_TYPES,
    TASK_TYPES,
    AdaptConfig,
    ObjectiveConfig,
    RunConfig,
    SweepConfig,
    assign,
    build,
)
from supmer_ray.data.store import Store
from supmer_ray.errors import Stopped, UserError, require_new_folder
from supmer_ray.files import Place, held, whole_file, write_json
from supmer_ray.meta.loop import GROUP_FILE, REFUSAL_FILE, Learner, RunPlan, meta_train, snapshots_in
from supmer_ray.tasks.types import FAMILY, require_domains

if TYPE_CHECKING:
    import pandas as pd

    from supmer_ray.fewshot.definition import TaskDefinition

SWEEP_FILE = "sweep.json"
SEARCH = "search"
RUNS = "runs"

DIVERGED_LOSS = 1000.0
"""The objective of a trial whose loss is not finite: far above any real one, in nats, but a number to compare."""

Progress = Callable[[int, int, float | None, int], None]
"""Called with the trials that are done, their number, the best objective so far, and the steps of those at work."""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found.

    Attributes:
        trials: one row a trial.
        best: the best configuration.
        file: where it stands, for `supmer train --config`.
        objective: of the best trial.
    """

    trials: pd.DataFrame
    best: RunConfig
    file: Path
    objective: float


def tune(
    config: SweepConfig,
    store: Path,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> SweepResult:
    """Search the settings of meta-training with Ray Tune.

    Args:
        store: what `prepare` wrote.
        out: the sweep's folder; on a cluster it must be a path that every node sees.
        resume: go on with the sweep in `out`: finished trials stand, unfinished ones go on from their snapshots.

    Raises:
        UserError: unusable input, a trial that does not fit the cluster, or no trial that came to its end.
        Stopped: SIGTERM or SIGINT came; `resume` goes on.
    """
    out, store = out.resolve(), store.resolve()
    objective = _objective(config.objective)
    types = _validation_types(config, Store.open(store))
    require_new_folder(out, overwrite=overwrite, resume=resume, can_resume=True, marker=SWEEP_FILE)
    settings = {"store": str(store), "sweep": config.model_dump(mode="json", by_alias=True)}
    if resume:
        _require_same_sweep(out, settings)
    with held(out, "a sweep"):
        resources = connect()
        gpu = resources.has_gpus_for(config.base.workers)
        at_a_time = concurrency(config, resources, gpu=gpu)
        if overwrite:
            Place(str(out.parent)).delete(out.name)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / SWEEP_FILE, settings)
        trial = _Trial(config, store, out, objective, types, at_a_time, gpu)
        with _watching(_Watch(config, out, progress)), _sigterm_as_sigint():
            found = _tuner(config, trial, resume=resume).fit()
        if found.num_terminated + found.num_errors < config.samples:
            raise Stopped(f"the sweep in {out} was stopped; go on with it by --resume.")
        return _conclude(config, found, out)


def space(config: SweepConfig) -> dict[str, Any]:
    """What Ray Tune samples: one entry for each number that has to be chosen.

    A choice is sampled by its place in the list. A mixture is sampled by one uniform number u for each task
    type: −log u is exponential, and exponentials divided by their sum are uniform on the simplex.
    """
    found: dict[str, Any] = {}
    for key, dimension in config.space.items():
        if dimension.choice:
            found[key] = ray_tune.choice(list(range(len(dimension.choice))))
        elif dimension.simplex:
            found |= {f"{key}.{name}": ray_tune.uniform(1e-6, 1.0) for name in dimension.simplex}
        elif dimension.int_:
            found[key] = ray_tune.randint(dimension.int_[0], dimension.int_[1] + 1)
        else:
            sample = ray_tune.uniform if dimension.uniform else ray_tune.loguniform
            names = [f"{key}.{i}" for i in range(_most_inner_steps(config))] if dimension.each_inner_step else [key]
            found |= {name: sample(*dimension.ends) for name in names}
    return found


def settings_of(config: SweepConfig, sample: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, by dotted key, that a sample of `space` stands for."""
    found: dict[str, Any] = {}
    for key, dimension in config.space.items():
        if dimension.choice:
            found[key] = dimension.choice[sample[key]]
        elif dimension.simplex:
            sizes = {name: -math.log(sample[f"{key}.{name}"]) for name in dimension.simplex}
            found[key] = {name: size / sum(sizes.values()) for name, size in sizes.items()}
        elif not dimension.each_inner_step:
            found[key] = sample[key]
    for key, dimension in config.space.items():
        if dimension.each_inner_step:
            steps = found.get("meta.inner_steps", config.base.meta.inner_steps)
            found[key] = [sample[f"{key}.{i}"] for i in range(steps)]
    return found


def run_config(config: SweepConfig, settings: Mapping[str, Any]) -> RunConfig:
    """The configuration of the trial with these settings."""
    values = config.base.model_dump(mode="json")
    for key, value in settings.items():
        values = assign(values, key, value)
    return build(RunConfig, values, "the search space")


def _most_inner_steps(config: SweepConfig) -> int:
    dimension = config.space.get("meta.inner_steps")
    return max(dimension.ends) if dimension else config.base.meta.inner_steps


def concurrency(config: SweepConfig, resources: Resources, *, gpu: bool = False) -> int:
    """How many trials run at a time; a trial of one worker lies on one node.

    Args:
        gpu: each worker takes a GPU.

    Raises:
        UserError: not even one trial fits, fewer than the sweep asks for, or a population not as a whole.
    """
    workers = config.base.workers
    require_room(resources, workers)
    each = workers.cpus + workers.builders * BUILDER_CPUS
    if workers.count == 1:
        fitting = sum(int(cpus / each + 1e-9) for cpus in resources.node_cpus)
    else:
        fitting = int(resources.cpus / (workers.count * each + DRIVER_CPUS) + 1e-9)
    if gpu:
        fitting = min(fitting, int(resources.gpus // workers.count))
    if not fitting:
        nodes = ", ".join(f"{cpus:g}" for cpus in resources.node_cpus)
        raise UserError(
            f"A trial needs {workers.count * each:g} CPUs for its workers and builders, but the cluster's nodes have "
            f"{nodes}; lower base.workers.cpus or base.workers.builders."
        )
    if config.concurrency and config.concurrency > fitting:
        raise UserError(
            f"concurrency is {config.concurrency} but {fitting} of these trials fit the cluster at a time; "
            f"write concurrency: {fitting}, or leave it out."
        )
    # A population has to be there as a whole, or there is nobody to exchange with. Trials of one worker that do not fit
    # take turns; those of several hold what they have until they end.
    if config.search == "pbt" and workers.count > 1 and fitting < config.samples:
        raise UserError(
            f"Population-based training needs its {config.samples} trials at a time, but {fitting} of "
            f"{workers.count} workers fit the cluster; write samples: {fitting}, or base.workers.count: 1."
        )
    return config.concurrency or fitting


DRIVER_CPUS = 0.01
"""What the driver of a trial of several workers reserves: Ray Tune refuses a trial without resources."""


@dataclass(frozen=True)
class Objective:
    """What a trial reports after each validation.

    Attributes:
        config: what to make best.
        definition: the few-shot task, where the objective is its dev accuracy.
    """

    config: ObjectiveConfig
    definition: TaskDefinition | None = None
    _splits: list[Any] = field(default_factory=list, repr=False, compare=False)

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
            AdaptRun(self.definition.name, train, dev, ids, seed, prompt, learner.state.regularizer)
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


def _objective(config: ObjectiveConfig) -> Objective:
    """The objective, after its few-shot task was found usable."""
    if config.task is None:
        return Objective(config)
    from supmer_ray.fewshot.definition import load_definition
    from supmer_ray.fewshot.sampling import draw

    definition = load_definition(config.task)
    draw(definition, definition.read(), config.adapt.shots, 0)
    return Objective(config, definition)


def _validation_types(config: SweepConfig, store: Store) -> tuple[str, ...]:
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

    rank, workers = 0, 1

    def __init__(self, local_workers: int, *, gpu: bool) -> None:
        self.local_workers = local_workers
        self.device = torch.device("cuda" if gpu else "cpu")

    def snapshots(self) -> Sequence[Any]:
        """The one that Ray Tune hands over (with pbt, another trial's), then those that are older than it."""
        latest = ray_tune.get_checkpoint()
        if latest is None:
            return []
        folder, _, name = latest.path.rpartition("/")
        return [snapshot for snapshot in snapshots_in(Place(folder)) if snapshot.path.rpartition("/")[2] <= name]

    def report(self, metrics: dict[str, Any], write: Callable[[Path], None]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            ray_tune.report(metrics, checkpoint=ray_tune.Checkpoint.from_directory(folder))


@dataclass(frozen=True)
class _Trial:
    """What every trial is told; called with a sample of the space, it is the trial."""

    config: SweepConfig
    store: Path
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
            plan = RunPlan(config, self.store, place, self.types, self.objective)
            if config.workers.count == 1:
                _build_in_own_group()
                import ray

                nodes = sum(node["Alive"] for node in ray.nodes())
                meta_train(plan, TrialHost(-(-self.at_a_time // nodes), gpu=self.gpu))
            else:
                _train_nested(plan, gpu=self.gpu)
        except (UserError, FloatingPointError) as error:
            # A retry would find the same: the trial ends, as the worst of all.
            ray_tune.report({"step": 0, "objective": self.objective.worst, "refused": str(error)})

    @property
    def resources(self) -> ray_tune.PlacementGroupFactory:
        """Of a trial of one worker: its own, and those of its builders. Of a larger one: its driver's."""
        workers = self.config.base.workers
        if workers.count > 1:
            return ray_tune.PlacementGroupFactory([{"CPU": DRIVER_CPUS}])
        own = {"CPU": workers.cpus, **({"GPU": 1.0} if self.gpu else {})}
        builders = [{"CPU": BUILDER_CPUS} for _ in range(workers.builders)]
        return ray_tune.PlacementGroupFactory([own, *builders], strategy="STRICT_PACK")


def _build_in_own_group() -> None:
    """Have this process's meta-tasks built on what its trial has reserved for that."""
    import ray.data
    from ray.util.placement_group import get_current_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    context = ray.data.DataContext.get_current()
    group = get_current_placement_group()
    assert group is not None  # a function trainable always runs in its trial's
    context.scheduling_strategy = PlacementGroupSchedulingStrategy(group)
    context.scheduling_strategy_large_args = context.scheduling_strategy
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def _train_nested(plan: RunPlan, *, gpu: bool) -> None:
    """A trial of several workers: a Ray Train run of its own, whose reports are the trial's."""
    from ray.tune.integration.ray_train import TuneReportCallback

    from supmer_ray.train import make_trainer

    make_trainer(plan, gpu=gpu, callbacks=[TuneReportCallback()]).fit()
    sentence = plan.out.read(REFUSAL_FILE)
    if sentence is not None:
        raise UserError(sentence)


def _tuner(config: SweepConfig, trial: _Trial, *, resume: bool) -> ray_tune.Tuner:
    """Ray Tune's side of the sweep, new or as its state in OUT/search says.

    That state holds pickles, as Ray Tune's does: a sweep is resumed where it was started, and nothing else
    of this project reads them.
    """
    # Ray Tune notes which trials ended every ten seconds or more; what a kill may lose is a second.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    # Its log files for TensorBoard, CSV and JSON would repeat what stands in the trials' metrics files.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # Its newer output says what it does even when it is told to say nothing.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # It warns of slow steps, and that the log files above are missing.
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    workers = config.base.workers
    failures = workers.max_failures

    def supmer(sample: dict[str, Any]) -> None:
        trial(sample)

    trainable = ray_tune.with_resources(supmer, trial.resources)
    search = str(trial.out / SEARCH)
    if resume and ray_tune.Tuner.can_restore(search):
        return ray_tune.Tuner.restore(search, trainable, resume_unfinished=True, resume_errored=True)
    return ray_tune.Tuner(
        trainable,
        param_space=space(config),
        tune_config=ray_tune.TuneConfig(
            metric="objective",
            mode=config.objective.mode,
            num_samples=config.samples,
            max_concurrent_trials=trial.at_a_time if config.search == "tpe" else None,
            search_alg=_searcher(config, trial.at_a_time),
            scheduler=_scheduler(config),
            reuse_actors=config.search == "pbt",
            trial_dirname_creator=_trial_folder,
        ),
        run_config=ray_tune.RunConfig(
            name=SEARCH,
            storage_path=str(trial.out),
            verbose=0,
            # A run of its own has its own restarts; what is left to retry is the loss of its driver.
            failure_config=ray_tune.FailureConfig(max_failures=failures if workers.count == 1 else min(1, failures)),
            checkpoint_config=ray_tune.CheckpointConfig(num_to_keep=4 if config.pbt else 2),
            callbacks=[_Listener()],
        ),
    )


def _trial_folder(trial: Any) -> str:
    return trial.trial_id


def _searcher(config: SweepConfig, at_a_time: int) -> Any:
    """How trials are chosen. Random search does not heed the bound of the tuner, only one of its own."""
    if config.search == "tpe":
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        return OptunaSearch(seed=config.seed)
    from ray.tune.search import BasicVariantGenerator

    # Of a population, what a trial reserves bounds how many run at a time; it has to be there as a whole.
    return BasicVariantGenerator(random_state=config.seed, max_concurrent=0 if config.search == "pbt" else at_a_time)


def _scheduler(config: SweepConfig) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining

    if config.asha:
        return ASHAScheduler(
            time_attr="step",
            max_t=config.base.meta.steps,
            grace_period=config.asha.grace_steps,
            reduction_factor=config.asha.reduction,
        )
    if config.pbt:
        return PopulationBasedTraining(
            time_attr="step",
            perturbation_interval=config.pbt.every_steps,
            hyperparam_mutations={
                key: domain.categories if isinstance(domain, ray_tune.search.sample.Categorical) else domain
                for key, domain in space(config).items()
            },
            quantile_fraction=config.pbt.quantile,
            resample_probability=config.pbt.resample,
            custom_explore_fn=_Within(config),
            log_config=False,
        )
    return FIFOScheduler()


@dataclass(frozen=True)
class _Within:
    """Keeps the rates that population-based training changed within the space."""

    config: SweepConfig

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        kept = dict(sample)
        for name in sample:
            dimension = self.config.space.get(name) or self.config.space[name.rpartition(".")[0]]
            if not dimension.choice:
                low, high = dimension.ends
                kept[name] = min(max(sample[name], low), high)
        return kept


class _Watch:
    """Follows the trials of a sweep: tells the progress, and frees what a stopped trial has left behind.

    A trial of several workers that is stopped early dies before its Ray Train run, which leaves that run's
    placement group to a cleaner of Ray Train's. The cleaner gives up where the machine has no dashboard
    process or several clusters, and the sweep would wait for the resources for ever.
    """

    def __init__(self, config: SweepConfig, out: Path, progress: Progress | None) -> None:
        self._config, self._out, self._progress = config, out, progress
        self._ended: dict[str, float] = {}
        self._reached: dict[str, int] = {}

    def ended(self, trials: Sequence[Any], last: Any) -> None:
        self._ended[last.trial_id] = time.monotonic()
        self.tell(trials, last)

    def reported(self, trials: Sequence[Any], trial: Any, result: Mapping[str, Any]) -> None:
        self._reached[trial.trial_id] = result.get("step", 0)
        self.tell(trials)

    def tell(self, trials: Sequence[Any], last: Any = None) -> None:
        """Tell how far the sweep is; `last` has just ended, whatever its status still says."""
        if self._progress:
            ended = [trial for trial in trials if trial is last or trial.is_finished()]
            steps = sum(self._reached.get(trial.trial_id, 0) for trial in trials if trial not in ended)
            # One that was stopped early cannot be the best: best.yaml is of those that came to their end.
            results = [trial.last_result or {} for trial in ended]
            whole = [found for found in results if found.get("step", 0) >= self._config.base.meta.steps]
            values = [found["objective"] for found in whole]
            best = min if self._config.objective.mode == "min" else max
            self._progress(len(ended), self._config.samples, best(values, default=None), steps)

    def release(self, *, at_once: bool = False) -> None:
        """Remove the groups of trials that ended a while ago: their runs are dead and cannot make new ones."""
        from ray._raylet import PlacementGroupID
        from ray.util.placement_group import PlacementGroup, remove_placement_group

        for trial, since in list(self._ended.items()):
            if at_once or time.monotonic() - since > RELEASE_SECONDS:
                del self._ended[trial]
                if group := Place(str(self._out / RUNS / trial)).read(GROUP_FILE):
                    remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group)))


RELEASE_SECONDS = 5.0
"""How long a stopped trial's run is given to die."""

_watch: _Watch | None = None
"""Of the sweep that this process runs."""


class _Listener(ray_tune.Callback):
    """Hands events to the watch. It has no state of its own, because Ray Tune saves it with the search."""

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        if _watch:
            _watch.reported(trials, trial, result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if _watch:
            _watch.ended(trials, trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if _watch:
            _watch.ended(trials, trial)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if _watch:
            _watch.release()


@contextmanager
def _watching(watch: _Watch) -> Iterator[None]:
    global _watch
    _watch = watch
    try:
        yield
    finally:
        _watch = None
        watch.release(at_once=True)


@contextmanager
def _sigterm_as_sigint() -> Iterator[None]:
    """While the block runs, SIGTERM is what SIGINT is: Ray Tune saves its state and ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: os.kill(os.getpid(), signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def trials_table(config: SweepConfig, results: Sequence[ray_tune.Result]) -> pd.DataFrame:
    """One row a trial: `trial`, `state`, `step`, `objective`, the losses, `seconds`, `checkpoint`, the settings.

    The state is "finished", "stopped" (early, as a poor one), "refused" (settings that cannot run, or a loss
    that was not finite; `sentence` says why) or "failed".
    """
    import pandas as pd

    rows = []
    for result in results:
        metrics = result.metrics or {}
        finished = metrics.get("step", 0) >= config.base.meta.steps
        state = "failed" if result.error else "finished" if finished else "stopped"
        reported = {name: metrics[name] for name in sorted(metrics) if name.startswith("validation_loss")}
        rows.append(
            {
                "trial": metrics.get("trial_id"),
                "state": "refused" if "refused" in metrics else state,
                "step": metrics.get("step", 0),
                "objective": metrics.get("objective"),
                **reported,
                "seconds": metrics.get("time_total_s"),
                "checkpoint": result.checkpoint.path if result.checkpoint else None,
                "sentence": metrics.get("refused") or (str(result.error) if result.error else None),
                **_columns(settings_of(config, result.config or {})),
            }
        )
    return pd.DataFrame(rows)


def _columns(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as columns of numbers and words: a mixture or a list of rates takes one column an entry."""
    columns: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            columns |= {f"{key}.{name}": entry for name, entry in value.items()}
        elif isinstance(value, list | tuple):
            columns |= {f"{key}.{number}": entry for number, entry in enumerate(value)}
        else:
            columns[key] = value
    return columns


def _conclude(config: SweepConfig, found: ray_tune.ResultGrid, out: Path) -> SweepResult:
    """Write the table, the best configuration and the picture.

    Raises:
        UserError: no trial came to its end.
    """
    results = [found[number] for number in range(len(found))]
    table = trials_table(config, results)
    with whole_file(out / "trials.parquet") as scratch:
        table.to_parquet(scratch)
    finished = table[table["state"] == "finished"]
    if finished.empty:
        why = next((sentence for sentence in table["sentence"] if sentence), "none says why")
        raise UserError(f"No trial of the sweep in {out} came to its end; the first reason: {why}")
    order = finished["objective"].astype(float)
    best = order.idxmin() if config.objective.mode == "min" else order.idxmax()
    chosen = run_config(config, settings_of(config, results[int(best)].config or {}))
    objective = float(order[best])
    what = f"dev accuracy on {config.objective.task}" if config.objective.task else "mean validation loss"
    header = f"# The best of {len(table)} trials ({table['trial'][best]}): {what} {objective:.4f}.\n"
    with whole_file(out / "best.yaml") as scratch:
        scratch.write_text(header + yaml.safe_dump(chosen.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    from supmer_ray.sweep_picture import draw_sweep

    columns = sorted({name for result in results for name in _columns(settings_of(config, result.config or {}))})
    draw_sweep(table, columns, what, config.objective.mode, out / "sweep.png", out / "sweep.svg")
    return SweepResult(table, chosen, out / "best.yaml", objective)


def _require_same_sweep(out: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to resume another search than the one that stands in `out`."""
    try:
        started = json.loads((out / SWEEP_FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        raise UserError(f"{out} holds no sweep to resume ({SWEEP_FILE} is missing or damaged).") from None
    for key in ("store", "sweep"):
        if started.get(key) != json.loads(json.dumps(settings[key])):
            raise UserError(
                f"The sweep in {out} was started with another {'store' if key == 'store' else 'configuration'}; "
                "resume with the same, or start a new sweep."
            )
