"""Sweeps: a search space and a store go in; a table of trials, the best configuration and a picture come out.

OUT/trials.parquet      one row a trial: its settings, how far it came, its objective, its snapshot
OUT/best.yaml           the best trial's whole configuration, as `supmer train --config` reads it
OUT/sweep.png, .svg     parallel coordinates, importance of the settings, best so far
OUT/runs/TRIAL/         the metrics file of each trial
OUT/search/             Ray Tune's own state and the trials' snapshots, from which `--resume` goes on
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from ray import tune as ray_tune
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler

from supmer_ray.cluster import DRIVER_CPUS, Resources, connect, require_room, reserved_cpus, settle_data_actors
from supmer_ray.config import RunConfig, SweepConfig
from supmer_ray.data.store import Outline
from supmer_ray.errors import Stopped, UserError, first_line, require_new_folder
from supmer_ray.files import Place, Where, held, parse_record, require_outside, whole_file, write_json
from supmer_ray.monitoring.loggers import require_loggers
from supmer_ray.reading import completed
from supmer_ray.sweep.space import Within, columns_of, run_config, settings_of, space
from supmer_ray.sweep.trial import Trial, make_objective, validation_types
from supmer_ray.sweep.watch import Listener, Progress, Watch, sigterm_as_sigint, watching

if TYPE_CHECKING:
    import pandas as pd

SWEEP_FILE = "sweep.json"
SEARCH = "search"

TPE_AT_ONCE = 8
"""Trials of tpe at a time on a cluster that grows, where not more fit: what it draws before one has ended is random."""


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
    store: Where,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> SweepResult:
    """Search the settings of meta-training with Ray Tune.

    Args:
        store: what `prepare` wrote, a folder or the URI of one.
        out: the sweep's folder; on a cluster it must be a path that every node sees.
        resume: go on with the sweep in `out`: finished trials stand, unfinished ones go on from their snapshots.

    Raises:
        UserError: unusable input, a trial that does not fit the cluster, or no trial that came to its end.
        Stopped: SIGTERM or SIGINT came; `resume` goes on.
    """
    out, store = Place.of(out).resolved.local, Place.of(store).resolved
    opened = Outline.open(store)
    objective = make_objective(config, opened.manifest.backbone.name)
    types = validation_types(config, opened)
    require_new_folder(out, overwrite=overwrite, resume=resume, can_resume=True, marker=SWEEP_FILE)
    settings = {
        "store": {"place": str(store), "digest": opened.manifest.digest},
        "task": objective.task,
        "sweep": config.model_dump(mode="json", by_alias=True),
    }
    started = _require_same_sweep(out, settings) if resume else {}
    if overwrite:
        require_outside(Place(str(out)), {"store": [store], "file of the task": objective.files()})
    require_loggers(config.base.monitoring.loggers, Place(str(out)))
    with held(out, "a sweep"):
        resources = connect()
        gpu = resources.has_gpus_for(config.base.workers)
        # Ray Tune keeps to what it was started with.
        at_a_time = started.get("at_a_time", concurrency(config, resources))
        settle_data_actors(resources)
        if overwrite:
            Place(str(out)).remove()
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / SWEEP_FILE, {**settings, "at_a_time": at_a_time})
        trial = Trial(config, store, out, objective, types, at_a_time, gpu)
        with watching(Watch(config, out, progress)), sigterm_as_sigint():
            found = _tuner(config, trial, resume=resume).fit()
        if found.num_terminated + found.num_errors < config.samples:
            raise Stopped(f"the sweep in {out} was stopped; continue it with --resume.")
        return _conclude(config, found, out)


def concurrency(config: SweepConfig, resources: Resources) -> int:
    """How many trials run at a time.

    Raises:
        UserError: not even one trial fits, or fewer than the sweep asks for.
    """
    workers = config.base.workers
    require_room(resources, workers)
    fitting = resources.holding(workers) // workers.count
    if workers.count > 1:
        # On any node a driver may take what the last worker there would need.
        less = replace(resources, node_cpus=tuple(max(0.0, cpus - DRIVER_CPUS) for cpus in resources.node_cpus))
        fitting = less.holding(workers) // workers.count
        if not fitting and not resources.grows:
            raise UserError(
                f"{workers.count} workers of {reserved_cpus(workers):g} CPUs fill the cluster's nodes ({resources}), "
                f"and a trial's driver needs {DRIVER_CPUS:g} more; lower base.workers.cpus or base.workers.builders."
            )
    if resources.grows:
        # Trials that find no room yet are what tells the cluster to grow; tpe learns from those that have ended.
        most = max(fitting + 1, TPE_AT_ONCE) if config.search == "tpe" else config.samples
        return config.concurrency or min(most, config.samples)
    if config.concurrency and config.concurrency > fitting:
        raise UserError(
            f"concurrency is {config.concurrency} but {fitting} of these trials fit the cluster at a time; "
            f"write concurrency: {fitting}, or leave it out."
        )
    # More than there are samples would take threads from those that run.
    return config.concurrency or min(fitting, config.samples)


def _tuner(config: SweepConfig, trial: Trial, *, resume: bool) -> ray_tune.Tuner:
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
        # In a population, a trial that is to take over another's state: two seconds are few to close its loggers. Ray
        # Tune reads it here, and does not bring it here.
        os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "60")
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
            trial_dirname_creator=attrgetter("trial_id"),
        ),
        run_config=ray_tune.RunConfig(
            name=SEARCH,
            storage_path=str(trial.out),
            verbose=0,
            # A run of its own has its own restarts; what is left to retry is the loss of its driver.
            failure_config=ray_tune.FailureConfig(max_failures=failures if workers.count == 1 else min(1, failures)),
            checkpoint_config=ray_tune.CheckpointConfig(num_to_keep=_kept(config)),
            callbacks=[Listener()],
        ),
    )


def _kept(config: SweepConfig) -> int:
    """Snapshots that a trial keeps; in a population one that lags may ask for those of the exchange before.

    Ray Tune notes a snapshot twice where it is handed on, and removes it with the first of the two.
    """
    return 2 if config.pbt is None else 4 + 2 * -(-config.pbt.every_steps // config.base.schedule.validate_every)


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
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    if config.asha:
        return ASHAScheduler(
            time_attr="step",
            max_t=config.base.meta.steps,
            grace_period=config.asha.grace_steps,
            reduction_factor=config.asha.reduction,
        )
    if config.pbt:
        return Population(
            config.base.meta.steps,
            time_attr="step",
            perturbation_interval=config.pbt.every_steps,
            hyperparam_mutations={
                key: domain.categories if isinstance(domain, ray_tune.search.sample.Categorical) else domain
                for key, domain in space(config).items()
            },
            quantile_fraction=config.pbt.quantile,
            resample_probability=config.pbt.resample,
            custom_explore_fn=Within(config),
            log_config=False,
        )
    return FIFOScheduler()


class Population(PopulationBasedTraining):
    """Exchanges settings and snapshots among trials that have steps left to make with them.

    At its last step a trial that takes turns with others is paused and not finished, and would be given another's.
    """

    def __init__(self, steps: int, **options: Any) -> None:
        super().__init__(**options)
        self._steps = steps

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result["step"] >= self._steps:
            return TrialScheduler.CONTINUE
        return super().on_trial_result(controller, trial, result)


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
                "step": metrics.get("reached", metrics.get("step", 0)),
                "objective": metrics.get("objective"),
                **reported,
                "seconds": metrics.get("time_total_s"),
                # A trial of several workers tells where Ray Train has put its snapshot.
                "checkpoint": result.checkpoint.path if result.checkpoint else metrics.get("checkpoint_path"),
                "sentence": metrics.get("refused") or _why_failed(result.error),
                **columns_of(settings_of(config, result.config or {})),
            }
        )
    table = pd.DataFrame(rows)
    shares = [name for name in table if name.startswith("tasks.mixture.")]
    table[shares] = table[shares].fillna(0.0)  # what a trial's mixture does not name, it does not draw
    return table


def _why_failed(error: Exception | None) -> str | None:
    """What a trial ended with, in one line: Ray's errors hold the trial's own, and are its whole traceback."""
    return None if error is None else first_line(getattr(error, "cause", None) or error)


def _conclude(config: SweepConfig, found: ray_tune.ResultGrid, out: Path) -> SweepResult:
    """Write the table, the best configuration and the picture.

    Raises:
        UserError: no trial came to its end.
    """

    def ended(result: ray_tune.Result) -> float:
        return (result.metrics or {}).get("timestamp", math.inf)

    # In the order in which they ended, which a sweep that was resumed does not keep; last those that told nothing.
    results = sorted((found[place] for place in range(len(found))), key=ended)
    table = trials_table(config, results)
    with whole_file(out / "trials.parquet") as scratch:
        table.to_parquet(scratch)
    finished = table[table["state"] == "finished"]
    if finished.empty:
        why = next(iter(table["sentence"].dropna()), "none says why")
        raise UserError(f"No trial of the sweep in {out} came to its end; the first reason: {why}")
    order = finished["objective"].astype(float)
    best = order.idxmin() if config.objective.mode == "min" else order.idxmax()
    chosen = run_config(config, settings_of(config, results[int(best)].config or {}))
    objective = float(order[best])
    what = f"dev accuracy on {config.objective.task}" if config.objective.task else "mean validation loss"
    header = f"# The best of {len(table)} trials ({table['trial'][best]}): {what} {objective:.4f}.\n"
    with whole_file(out / "best.yaml") as scratch:
        scratch.write_text(header + yaml.safe_dump(chosen.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    from supmer_ray.sweep.picture import draw_sweep

    columns = sorted({name for result in results for name in columns_of(settings_of(config, result.config or {}))})
    draw_sweep(table, columns, what, config.objective.mode, out / "sweep.png", out / "sweep.svg")
    return SweepResult(table, chosen, out / "best.yaml", objective)


def _require_same_sweep(out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the sweep in `out` was started with.

    Raises:
        UserError: there is none, its description is damaged, or it is another search.
    """
    file = out / SWEEP_FILE
    try:
        started = parse_record(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{out} holds no sweep to resume ({SWEEP_FILE} is missing); start without --resume.") from None
    except (OSError, ValueError):
        raise UserError(f"{file} is damaged; start the sweep anew with --overwrite.") from None
    if isinstance(started.get("sweep"), dict):
        started["sweep"] = completed(SweepConfig, started["sweep"], str(file))
    for key, what in (("store", "store"), ("task", "few-shot task"), ("sweep", "configuration")):
        if started.get(key) != json.loads(json.dumps(settings[key])):
            raise UserError(
                f"The sweep in {out} was started with another {what}; resume with the same, or start a new sweep."
            )
    return started
