"""Comparing methods over tasks and data seeds, on a Ray cluster: a suite and methods go in, tables come out.

The unit of work is a cell: one method on one task with all its seeds, adapted together. Cells run as Ray
tasks; each leaves a file when it is done, so that an evaluation that was killed goes on where it was.

    OUT/evaluation.json     what is compared, on which rows, under which settings, from which checkpoints
    OUT/stores/, OUT/runs/  stores and meta-training runs that the methods needed and nobody gave
    OUT/cells/              one Parquet file for each finished cell
    OUT/results.parquet     all rows: one for each method, task and seed
    OUT/table.{md,csv}      what they say; OUT/gaps.csv, between domains
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import ray
import torch
from ray.exceptions import RayTaskError

from supmer_ray.cluster import connect
from supmer_ray.config import AdaptConfig, EvaluateConfig, Precision, PrepareConfig, RunConfig, build
from supmer_ray.data.prepare import prepare
from supmer_ray.data.store import MANIFEST, Store, read_manifest
from supmer_ray.errors import UserError, nearest, require_new_folder
from supmer_ray.fewshot import builtin
from supmer_ray.fewshot.comparison import AVERAGE, gaps, markdown, summarize
from supmer_ray.fewshot.definition import TaskRows, load_definition, require_same_labels
from supmer_ray.fewshot.evaluate import evaluate_method
from supmer_ray.fewshot.method import Method, changed
from supmer_ray.fewshot.sampling import draw
from supmer_ray.fewshot.suite import Curve, Suite, SuiteEntry
from supmer_ray.fewshot.tables import write_table
from supmer_ray.files import Place, Where, held, read_sealed, require_outside, whole_file, without_keys, write_json
from supmer_ray.meta.record import read_rows
from supmer_ray.meta.state import load_checkpoint
from supmer_ray.model.backbone import Backbone, load_backbone
from supmer_ray.tasks.types import require_domains
from supmer_ray.train import CHECKPOINT, CONFIG_FILE, train

DESCRIPTION, RESULTS = "evaluation.json", "results.parquet"
TABLE, SUMMARY, GAPS = "table.md", "table.csv", "gaps.csv"
_CELLS, _STORES, _RUNS = "cells", "stores", "runs"
LOOK_SECONDS = 5.0
"""How often whoever follows is told that cells are still at work: one may take minutes."""

LONGEST_PART = 60
"""Characters of a label or name that stand in a file's name; the rest is told apart by a digest."""

Progress = Callable[[str, int, int | None, str], None]
"""Called with what is being done, how much of it is done, of how much (if known), and in what unit."""


@dataclass(frozen=True)
class Point:
    """One value of the setting that a curve varies; without a curve the only point, with an empty label.

    Attributes:
        run: name of the meta-training runs' variant; empty where the setting does not reach them.
        store: the same of the stores.
    """

    label: str
    config: EvaluateConfig
    run: str = ""
    store: str = ""


@dataclass(frozen=True)
class Cell:
    """One method on one entry of the suite at one point, with all seeds."""

    point: Point
    entry: SuiteEntry
    method: Method

    @property
    def name(self) -> str:
        """A name for the cell's file."""
        return _file_name(self.point.label, _task_name(self.entry.train), self.method.name)

    def config(self) -> AdaptConfig:
        """How this cell adapts: the point's settings with the method's changes and the entry's limit on K."""
        config = self.method.adapt_config(self.point.config.adapt)
        shots = min(config.shots, self.entry.max_shots or config.shots)
        return config.model_copy(update={"shots": shots})


@dataclass(frozen=True)
class Plan:
    """What is compared with what.

    Attributes:
        seeds: the data seeds 0 … seeds − 1.
        store: for the meta-training of methods that have no checkpoint.
        checkpoints: method → RUN/checkpoint, a folder or the URI of one.
        data: folder with the benchmarks' published files, for tasks that have such a layout.

    Raises:
        UserError: there is no method, two have one name, or a checkpoint is for none of them.
    """

    suite: Suite
    methods: Sequence[Method]
    config: EvaluateConfig
    seeds: int = 5
    curve: Curve | None = None
    store: Place | None = None
    checkpoints: Mapping[str, Where] | None = None
    data: Path | None = None

    def __post_init__(self) -> None:
        if not self.methods:
            raise UserError("The comparison has no method; name at least one, for example --methods supmer.")
        _once([method.name for method in self.methods], "methods of the comparison")
        for name in self.checkpoints or {}:
            if name not in [method.name for method in self.methods if method.meta is not None]:
                raise UserError(f"The checkpoint for '{name}' is for no method that is compared and meta-trained.")

    @property
    def given(self) -> dict[str, Place]:
        """The checkpoints as places, links followed."""
        return {name: Place.of(where).resolved for name, where in (self.checkpoints or {}).items()}

    def points(self) -> list[Point]:
        """The curve's values as configurations.

        Raises:
            UserError: the curve's setting or a value of it is none that the schema has, or two values are the same.
        """
        if self.curve is None:
            return [Point("", self.config)]
        key, where = self.curve.key, f"curve '{self.curve.name}'"
        points = []
        for value in self.curve.values:
            label = f"{key.split('.', 1)[1]} = {_shown(value)}"
            if key.startswith("prepare.") and (self.config.prepare is None or self.store):
                raise UserError(
                    f"The {where} makes a store for each value; write --set prepare.sources=[…] and leave --store out."
                )
            config = changed(self.config, {key: value}, where)
            store = label if key.startswith("prepare.") else ""
            points.append(Point(label, config, label if not key.startswith("adapt.") else "", store))
        _once([point.label for point in points], f"values of the {where}", "write values with other letters or digits")
        return points

    def cells(self) -> list[Cell]:
        """All cells, in the order in which the tables show them."""
        return [
            Cell(point, entry, method)
            for point in self.points()
            for entry in self.suite.tasks
            for method in self.methods
        ]

    def inputs(self, rows: Mapping[str, TaskRows]) -> dict[str, list[Place]]:
        """The files and folders that were given, by what they are."""
        inputs = {f"checkpoint for '{name}'": [place] for name, place in self.given.items()}
        inputs["store"] = [self.store] if self.store else []
        inputs["data folder"] = [Place.of(self.data)] if self.data else []
        for name, task in rows.items():
            own = builtin.own_file(name)
            files = [*([own] if own else []), *task.definition.data.places()]
            inputs[f"file for task '{task.definition.name}'"] = [Place.of(file) for file in files]
        sources = self.config.prepare.sources if self.config.prepare else ()
        inputs["source"] = [Place.of(name) for name in sources if Path(name).exists()]
        return inputs

    def description(self, rows: Mapping[str, TaskRows]) -> dict[str, Any]:
        """All of it as JSON, with the tasks that `rows` holds; a resumed evaluation must have the same."""
        given = {}
        for name, place in self.given.items():
            sealed = read_sealed(place, "a checkpoint")
            given[name] = {"folder": str(place), "prompt": sealed["checksums"]["prompt.safetensors"]}
        values: dict[str, Any] = {
            "suite": self.suite.model_dump(mode="json"),
            "tasks": {name: task.description() for name, task in rows.items()},
            "methods": [method.model_dump(mode="json") for method in self.methods],
            "config": self.config.model_dump(mode="json"),
            "seeds": self.seeds,
            "curve": {**self.curve.model_dump(mode="json"), "values": _shown(self.curve.values)}
            if self.curve
            else None,
            "store": {"place": str(self.store.resolved), "digest": read_manifest(self.store).digest}
            if self.store
            else None,
            "checkpoints": given,
            "backbone": _weights(self.config.backbone),
            "data": str(self.data.resolve()) if self.data else None,
        }
        if self.config.prepare:
            values["config"]["prepare"]["sources"] = [without_keys(name) for name in self.config.prepare.sources]
        return json.loads(json.dumps(values))


def _shown(value: Any) -> Any:
    """A curve's value as names and files may have it: without the keys of a source."""
    if isinstance(value, str):
        return without_keys(value)
    return [_shown(one) for one in value] if isinstance(value, list | tuple) else value


def _weights(backbone: str) -> dict[str, str]:
    """Digests of the files of a backbone in a folder of the user's, which may change; of others nothing."""
    folder = Path(backbone)
    files = sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]) if folder.is_dir() else []
    return {file.name: str(Place.of(folder).digest(file.name)) for file in files}


def evaluate(
    plan: Plan, out: Path, *, resume: bool = False, overwrite: bool = False, progress: Progress | None = None
) -> pd.DataFrame:
    """Compare the plan's methods on its tasks, on the Ray cluster that is there.

    Methods that need meta-training and have no checkpoint are trained first, into `out`.

    Args:
        out: on a cluster a path that every node sees.
        resume: go on with the same evaluation in `out`: finished cells and runs stay as they are, and the tables
            are written anew, perhaps with another baseline.
        overwrite: replace what `out` holds.

    Returns:
        The rows of OUT/results.parquet: point, method, train, test, seed, shots, dev_accuracy, test_accuracy,
        best_step, seconds, trained_parameters.

    Raises:
        UserError: unusable input; what was finished before it stays in `out`.
    """
    out = Path(out).absolute()
    require_new_folder(out, overwrite=overwrite, resume=resume, can_resume=True, marker=DESCRIPTION)
    rows = _read_tasks(plan)
    if overwrite:
        require_outside(Place.of(out), plan.inputs(rows))
    description = plan.description(rows)
    if resume:
        _require_same(out, description)
    _check(plan, rows)
    with held(out, "an evaluation"):
        if overwrite and out.exists():
            shutil.rmtree(out)
        (out / _CELLS).mkdir(parents=True, exist_ok=True)
        write_json(out / DESCRIPTION, description)
        tell = progress or (lambda title, done, total, unit: None)
        checkpoints = {
            (point.run, method.name): _checkpoint(plan, point, method, out, tell)
            for point in plan.points()
            for method in plan.methods
            if method.meta is not None
        }
        _run_cells(plan, rows, checkpoints, out, tell)
        return _conclude(plan, checkpoints, out)


def _require_same(out: Path, description: Mapping[str, Any]) -> None:
    file = out / DESCRIPTION
    if not file.is_file():
        raise UserError(f"{out} holds no evaluation to resume ({DESCRIPTION} is missing); start without --resume.")
    try:
        started = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        raise UserError(f"{file} is damaged; start the evaluation anew with --overwrite.") from None
    for name, value in description.items():
        before = started.get(name)
        if name == "config" and isinstance(before, dict):
            before = before | {"baseline": value["baseline"]}  # it shapes the tables only, so it may change
        if before != value:
            raise UserError(
                f"The evaluation in {out} was started with another '{name}'; resume with the same, or start a new one."
            )


def _read_tasks(plan: Plan) -> dict[str, TaskRows]:
    """The rows of every task of the suite, read once."""
    names = {name for entry in plan.suite.tasks for name in (entry.train, *entry.targets)}
    definitions = {name: load_definition(name) for name in sorted(names)}
    if plan.data:
        definitions = {name: one.from_folder(plan.data) for name, one in definitions.items()}
    return {name: TaskRows.of(definition) for name, definition in definitions.items()}


def _check(plan: Plan, rows: Mapping[str, TaskRows]) -> None:
    """Refuse now what a cell would refuse later: labels, too few rows, settings, missing checkpoints."""
    _once([rows[name].definition.name for name in rows], "tasks of the comparison")
    if AVERAGE in [one.definition.name for one in rows.values()]:
        raise UserError(f"A task is named '{AVERAGE}', as the tables name the mean of all; give it another name.")
    names = [method.name for method in plan.methods]
    if plan.config.baseline not in (*names, EvaluateConfig().baseline):
        raise UserError(
            f"The baseline '{plan.config.baseline}' is none of the methods; {nearest(plan.config.baseline, names)}"
        )
    usual = PrepareConfig.model_fields["backbone"].default
    if plan.config.prepare and plan.config.prepare.backbone not in (plan.config.backbone, usual):
        raise UserError(
            f"prepare.backbone is '{plan.config.prepare.backbone}', but the comparison is on '{plan.config.backbone}'; "
            "write --set backbone= alone."
        )
    _once([_task_name(entry.train) for entry in plan.suite.tasks], "entries of the comparison")
    for cell in plan.cells():
        source = rows[cell.entry.train]
        for target in cell.entry.targets:
            require_same_labels(source.definition, rows[target].definition)
            texts = [len(one.definition.texts) for one in (source, rows[target])]
            if cell.method.learns == "probe" and texts[0] != texts[1]:
                raise UserError(
                    f"Task '{source.definition.name}' has {texts[0]} texts a row and '{rows[target].definition.name}' "
                    f"has {texts[1]}, so a probe of the one says nothing of the other; leave '{cell.method.name}' out."
                )
        draw(source.definition, source.frames, cell.config().shots, 0)
    for point in plan.points():
        for method in plan.methods:
            if method.meta is not None:
                _check_origin(plan, point, method)
    if plan.store:
        name = read_manifest(plan.store).backbone.name
        if name != plan.config.backbone:
            raise UserError(
                f"The store {plan.store} was prepared with the backbone '{name}', but the comparison is on "
                f"'{plan.config.backbone}'; write --set backbone={name}."
            )


def _once(names: Sequence[str], what: str, advice: str = "give each a name of its own") -> None:
    # Files and tables tell tasks, methods and points apart by these names alone.
    names = [_file_name(name) for name in names]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"Two {what} have the name '{name}'; {advice}.")


def _check_origin(plan: Plan, point: Point, method: Method) -> None:
    config = method.run_config(point.config.run)
    given = plan.given.get(method.name)
    if given is None:
        if plan.store is None and point.config.prepare is None:
            raise UserError(
                f"Method '{method.name}' needs meta-training; give a store (--store), its checkpoint "
                f"(--checkpoint {method.name}=RUN/checkpoint), or sources (--set prepare.sources=[…])."
            )
        if plan.store:
            require_domains(Store.open(plan.store), config.tasks.types)
        return
    if point.run:
        raise UserError(
            f"The curve varies '{point.label}', which belongs to meta-training, so method '{method.name}' cannot take "
            "one checkpoint for all; leave --checkpoint out."
        )
    made = build(RunConfig, read_sealed(given, "a checkpoint")["run"], str(given))
    if method.run_config(made) != made:
        raise UserError(
            f"The checkpoint {given} was not meta-trained as method '{method.name}' says "
            f"({', '.join(method.meta or ())}); name the one of such a run, or leave it out."
        )
    length = made.prompt.length
    if length != config.prompt.length:
        raise UserError(
            f"The checkpoint {given} holds a prompt of {length} rows, but the prompts that are compared with it have "
            f"{config.prompt.length}; write --set run.prompt.length={length}."
        )


def _checkpoint(plan: Plan, point: Point, method: Method, out: Path, tell: Progress) -> Place:
    """Where the method's checkpoint at this point lies; meta-trained now if it is not there yet."""
    if given := plan.given.get(method.name):
        return given
    folder = out / _RUNS / _file_name(method.name, point.run)
    if not (folder / CHECKPOINT / "config.json").is_file():
        store = plan.store or _store(point, out, tell)
        config = method.run_config(point.config.run)
        title = f"Meta-training {method.name}{f', {point.run}' if point.run else ''}"

        def show(row: dict[str, Any]) -> None:
            if row["kind"] == "step":
                tell(title, row["step"], config.meta.steps, "steps")

        started = (folder / CONFIG_FILE).is_file()
        train(config, store, folder, resume=started, overwrite=not started, progress=show)
    return Place.of(folder / CHECKPOINT)


def _store(point: Point, out: Path, tell: Progress) -> Path:
    assert point.config.prepare
    folder = out / _STORES / _file_name("store", point.store)
    if not (folder / MANIFEST).is_file():
        connect()
        config: PrepareConfig = point.config.prepare.model_copy(update={"backbone": point.config.backbone})
        prepare(config, folder, progress=tell)
    return folder


def _run_cells(
    plan: Plan, rows: Mapping[str, TaskRows], checkpoints: Mapping[tuple[str, str], Place], out: Path, tell: Progress
) -> None:
    cells = plan.cells()
    waiting = [cell for cell in cells if not _cell_file(out, cell).is_file()]
    if not waiting:
        return
    resources = connect()
    gpus = 1 if resources.gpus >= 1 else 0
    # Few cells on many cores: each gets several threads, but with a GPU one, as its node may have few.
    threads = 1 if gpus else max(1, min(int(resources.cpus // len(waiting)), int(max(resources.node_cpus))))
    remote = ray.remote(_run_cell).options(num_cpus=threads, num_gpus=gpus)
    tasks = {name: ray.put(task) for name, task in rows.items()}
    title, running = "Adapting and testing", {}
    for cell in waiting:
        origin = checkpoints.get((cell.point.run, cell.method.name))
        targets = [tasks[name] for name in cell.entry.targets]
        running[remote.remote(cell, tasks[cell.entry.train], plan.seeds, origin, threads, bool(gpus), *targets)] = cell
    while running:
        tell(title, len(cells) - len(running), len(cells), "cells")
        done, _ = ray.wait(list(running), timeout=LOOK_SECONDS)
        if not done:
            continue
        [ready] = done
        cell = running.pop(ready)
        try:
            found = ray.get(ready)
        except RayTaskError as error:
            for reference in running:
                ray.cancel(reference, force=True)
            raise (error.cause if isinstance(error.cause, UserError) else error) from None
        write_table(pd.DataFrame(found), _cell_file(out, cell))
    tell(title, len(cells), len(cells), "cells")


def _run_cell(
    cell: Cell, source: TaskRows, seeds: int, checkpoint: Place | None, threads: int, gpu: bool, *targets: TaskRows
) -> list[dict[str, Any]]:
    """The rows of one cell, computed in a Ray worker."""
    config = cell.point.config
    backbone = _backbone(config.backbone, config.precision, threads, gpu)
    outcomes = evaluate_method(
        backbone,
        cell.method,
        source,
        targets,
        range(seeds),
        cell.config(),
        checkpoint=load_checkpoint(checkpoint, backbone) if checkpoint else None,
        prompt_length=config.run.prompt.length,
        vocabulary_rows=config.run.prompt.vocabulary_rows,
        pattern=config.pattern,
        token_budget=config.tokens_per_micro_batch,
    )
    return [{"point": cell.point.label, **asdict(outcome)} for outcome in outcomes]


@lru_cache(maxsize=1)
def _backbone(name: str, precision: Precision | None, threads: int, gpu: bool) -> Backbone:
    """The language model, loaded once in each worker process."""
    device = "cuda" if gpu and torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, precision) if precision else None
    return load_backbone(name, device=device, dtype=dtype, threads=threads)


def _conclude(plan: Plan, checkpoints: Mapping[tuple[str, str], Place], out: Path) -> pd.DataFrame:
    """Put the cells together and write the tables."""
    rows = pd.concat([pd.read_parquet(_cell_file(out, cell)) for cell in plan.cells()], ignore_index=True)
    baseline = plan.config.baseline
    write_table(rows, out / RESULTS)
    write_table(summarize(rows, baseline), out / SUMMARY)
    drops = gaps(rows, baseline)
    if not drops.empty:
        write_table(drops, out / GAPS)
    with whole_file(out / TABLE) as file:
        text = markdown(rows, baseline, f"{plan.suite.name}: {len(plan.methods)} methods", _note(plan, checkpoints))
        file.write_text(text, encoding="utf-8")
    return rows


def _note(plan: Plan, checkpoints: Mapping[tuple[str, str], Place]) -> str:
    adapt = plan.config.adapt
    tested = "all test rows" if adapt.max_test is None else f"at most {adapt.max_test} test rows"
    configs = [cell.config() for cell in plan.cells()]
    shots, steps = (_used(getattr(one, name) for one in configs) for name in ("shots", "steps"))
    lines = [
        f"{plan.suite.description} K = {shots} examples a class to train on and as many for the dev split"
        f"{_lowered(plan)}, {steps} steps; backbone {plan.config.backbone}. Every method saw the same draws; the step "
        f"was chosen on the dev split, and the test split ({tested}) was scored once.".strip()
    ]
    spent = []
    for (run, method), place in checkpoints.items():
        if (found := _training(place.parent)) is not None:
            meta_steps, seconds = found
            spent.append(f"{method}{f' ({run})' if run else ''} {meta_steps:,} steps in {seconds:,.0f} s")
    if spent:
        lines.append(f"Meta-training, once for all tasks: {'; '.join(spent)}.")
    return "\n\n".join(lines)


def _used(values: Iterable[int]) -> str:
    """A setting's values in the cells, in words: "8 or 16"."""
    return " or ".join(map(str, sorted(set(values))))


def _lowered(plan: Plan) -> str:
    """Which entries of the suite have rows for a smaller K than another one's, in brackets."""
    most = max(cell.config().shots for cell in plan.cells())
    found = [
        f"{_task_name(entry.train)}: at most {entry.max_shots}"
        for entry in plan.suite.tasks
        if entry.max_shots and entry.max_shots < most
    ]
    return f" ({', '.join(found)})" if found else ""


def _training(run: Place) -> tuple[int, float] | None:
    """Meta-steps of a run and the seconds that they and the waiting for their data took, where it says so."""
    steps = read_rows(run, "step")
    return (len(steps), sum(row["step_seconds"] + row["data_wait_seconds"] for row in steps)) if steps else None


def _cell_file(out: Path, cell: Cell) -> Path:
    return out / _CELLS / f"{cell.name}.parquet"


def _task_name(task: str) -> str:
    """The name of a task's YAML without its folder and ending, or of a built-in task."""
    return Path(task).stem if "/" in task else task


def _file_name(*parts: str) -> str:
    """The parts as one name that any file system takes: other characters than letters and digits become '-'."""
    return "--".join(_safe(part) for part in parts if part)


def _safe(part: str) -> str:
    name = re.sub(r"[^\w.]+", "-", part)
    if len(name) <= LONGEST_PART:
        return name
    # A list of paths, say: file systems take 255 bytes.
    return f"{name[:LONGEST_PART]}-{hashlib.sha256(part.encode()).hexdigest()[:8]}"
