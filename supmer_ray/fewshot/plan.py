"""What an evaluation compares: a suite, methods and settings go in, cells come out, checked before any work.

A cell is one method on one task with all its seeds, at one value of the setting that a curve varies. What is
compared is described as JSON, which a resumed evaluation must equal, and each cell, run and store has a name that
any file system takes. `supmer_ray.evaluate` runs the cells over a cluster; nothing here needs Ray or a model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from os.path import isdir
from pathlib import Path
from typing import Any

from supmer_ray import embedded
from supmer_ray.config import AdaptConfig, EvaluateConfig, PrepareConfig
from supmer_ray.data.sources import place_of
from supmer_ray.data.store import Outline, read_manifest
from supmer_ray.errors import UserError, nearest
from supmer_ray.fewshot import builtin
from supmer_ray.fewshot.comparison import AVERAGE
from supmer_ray.fewshot.definition import TaskRows, load_definition, require_same_labels
from supmer_ray.fewshot.method import Method, changed
from supmer_ray.fewshot.sampling import draw
from supmer_ray.fewshot.suite import Curve, Suite, SuiteEntry
from supmer_ray.files import Place, Where, parse_record, sha256, without_keys
from supmer_ray.meta.run import describe_checkpoint
from supmer_ray.reading import at, completed
from supmer_ray.tasks.types import require_domains

DESCRIPTION, RESULTS = "evaluation.json", "results.parquet"
TABLE, SUMMARY, GAPS = "table.md", "table.csv", "gaps.csv"
CELLS, STORES, RUNS = "cells", "stores", "runs"
"""Files and folders of an evaluation."""

TELLING = (
    *(f"regularizer.{key}" for key in ("enabled", "gate", "two_sided")),
    *(f"meta.{key}" for key in ("order", "inner_steps", "curriculum.enabled", "curriculum.b")),
)
"""Keys of a meta-training by which methods differ, whatever tasks they are trained on."""

LONGEST_PART = 60
"""Characters of a label or name that stand in a file's name; the rest is told apart by a digest."""


@dataclass(frozen=True)
class Point:
    """One value of the setting that a curve varies; without a curve the only point, with an empty label.

    Attributes:
        run_variant: what the meta-training runs of this point are told apart by; empty where the setting does not
            reach them.
        store_variant: the same of the stores.
    """

    label: str
    config: EvaluateConfig
    run_variant: str = ""
    store_variant: str = ""


@dataclass(frozen=True)
class Cell:
    """One method on one entry of the suite at one point, with all seeds."""

    point: Point
    entry: SuiteEntry
    method: Method

    @property
    def name(self) -> str:
        """A name for the cell's file."""
        return file_name(self.point.label, task_name(self.entry.train), self.method.name)

    def adapt_config(self) -> AdaptConfig:
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
                raise UserError(
                    f"The checkpoint for '{name}' is for no method that is compared and meta-trained; leave it out."
                )

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
                    f"The {where} makes a store for each value; write --set 'prepare.sources=[…]' and leave --store "
                    "out."
                )
            config = changed(self.config, {key: value}, where)
            run = "" if key.startswith("adapt.") else label
            points.append(Point(label, config, run, label if key.startswith("prepare.") else ""))
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
        prepared = [point.config.prepare.sources for point in self.points() if point.config.prepare]
        inputs["source"] = [place for name in chain(*prepared) if (place := place_of(name))]
        inputs["backbone"] = [Place.of(self.config.backbone)] if isdir(self.config.backbone) else []
        return inputs

    def description(self, rows: Mapping[str, TaskRows]) -> dict[str, Any]:
        """All of it as JSON, with the tasks that `rows` holds; a resumed evaluation must have the same."""
        given = {
            name: {"folder": str(place), "prompt": describe_checkpoint(place).prompt_digest}
            for name, place in self.given.items()
        }
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
            "backbone": _file_digests(self.config.backbone),
            "data": str(self.data.resolve()) if self.data else None,
        }
        if self.config.prepare:
            values["config"]["prepare"]["sources"] = [without_keys(name) for name in self.config.prepare.sources]
        return json.loads(json.dumps(values))

    def read_tasks(self) -> dict[str, TaskRows]:
        """The rows of every task of the suite, read once.

        Raises:
            UserError: a task or its rows cannot be read, or there is no such data folder.
        """
        if self.data and not isdir(self.data):
            raise UserError(
                f"There is no folder {self.data} that may be read; name the one with the benchmarks' published files."
            )
        names = {name for entry in self.suite.tasks for name in (entry.train, *entry.targets)}
        definitions = {name: load_definition(name) for name in sorted(names)}
        if self.data:
            definitions = {name: one.from_folder(self.data) for name, one in definitions.items()}
        return {name: TaskRows.of(definition) for name, definition in definitions.items()}

    def check(self, rows: Mapping[str, TaskRows]) -> None:
        """Refuse now what a cell would refuse later: labels, too few rows, settings, missing checkpoints.

        Raises:
            UserError: the first such thing.
        """
        _once([task.definition.name for task in rows.values()], "tasks of the comparison")
        if AVERAGE in [task.definition.name for task in rows.values()]:
            raise UserError(f"A task is named '{AVERAGE}', as the tables name the mean of all; give it another name.")
        names = [method.name for method in self.methods]
        baseline = self.config.baseline
        if baseline not in (*names, EvaluateConfig().baseline):
            raise UserError(f"The baseline '{baseline}' is none of the methods; {nearest(baseline, names)}")
        prepare, backbone = self.config.prepare, self.config.backbone
        if prepare and prepare.backbone not in (backbone, PrepareConfig.model_fields["backbone"].default):
            raise UserError(
                f"prepare.backbone is '{prepare.backbone}', but the comparison is on '{backbone}'; write "
                "--set backbone= alone."
            )
        if self.data and not any(task.definition.published for task in rows.values()):
            raise UserError("None of the tasks has files in a published layout; leave --data out.")
        if self.store and prepare:
            raise UserError("A store and sources for one were given; leave --store or prepare.sources out.")
        _once([task_name(entry.train) for entry in self.suite.tasks], "entries of the comparison")
        for cell in self.cells():
            _check_cell(cell, rows[cell.entry.train], [rows[name] for name in cell.entry.targets])
        for point in self.points():
            for method in self.methods:
                if method.meta is not None:
                    self._check_origin(point, method)
        if self.store:
            name = read_manifest(self.store).backbone.name
            if name != backbone:
                raise UserError(
                    f"The store {self.store} was prepared with the backbone '{name}', but the comparison is on "
                    f"'{backbone}'; write --set backbone={name}."
                )

    def _check_origin(self, point: Point, method: Method) -> None:
        """Refuse a method that is meta-trained if it has no checkpoint and nothing to make one of, or a wrong one."""
        config = method.run_config(point.config.run)
        given = self.given.get(method.name)
        if given is None:
            if self.store is None and point.config.prepare is None:
                raise UserError(
                    f"Method '{method.name}' needs meta-training; give a store (--store), its checkpoint "
                    f"(--checkpoint {method.name}=RUN/checkpoint), or sources (--set 'prepare.sources=[…]')."
                )
            if self.store:
                require_domains(Outline.open(self.store), config.tasks.types)
            return
        if point.run_variant:
            raise UserError(
                f"The curve varies '{point.label}', which belongs to meta-training, so method '{method.name}' cannot "
                "take one checkpoint for all; leave --checkpoint out."
            )
        made = describe_checkpoint(given).config
        has_of, asked_of = made.model_dump(mode="json"), config.model_dump(mode="json")
        wanted = {key: at(asked_of, key) for key in (*TELLING, *(method.meta or ()))}
        other = {key: found for key, value in wanted.items() if (found := at(has_of, key)) != value}
        if other:
            has, asked = (", ".join(f"{key}: {values[key]}" for key in other) for values in (other, wanted))
            raise UserError(
                f"The checkpoint {given} was meta-trained with {has}, and method '{method.name}' stands for {asked}; "
                "name the one of such a run, or leave it out."
            )
        length = made.prompt.length
        if length != config.prompt.length:
            raise UserError(
                f"The checkpoint {given} holds a prompt of {length} rows, but the prompts that are compared with it "
                f"have {config.prompt.length}; write --set run.prompt.length={length}."
            )


def _check_cell(cell: Cell, source: TaskRows, targets: Sequence[TaskRows]) -> None:
    """Refuse tasks that do not go together, and too few rows."""
    name, count = source.definition.name, len(source.definition.texts)
    for target in targets:
        require_same_labels(source.definition, target.definition)
        own = len(target.definition.texts)
        if cell.method.learns == "probe" and own != count:
            raise UserError(
                f"Task '{name}' has {count} texts a row and '{target.definition.name}' has {own}, so a probe of the "
                f"one says nothing of the other; leave '{cell.method.name}' out."
            )
    draw(source.definition, source.frames, cell.adapt_config().shots, 0)


def _shown(value: Any) -> Any:
    """A curve's value as names and files may have it: without the keys of a source."""
    if isinstance(value, str):
        return without_keys(value)
    return [_shown(one) for one in value] if isinstance(value, list | tuple) else value


def _file_digests(backbone: str) -> dict[str, str]:
    """Digests of what may change under a backbone's name: our weights, or files in a folder; of a hub's nothing."""
    if backbone == "embedded":
        return {embedded.WEIGHTS.name: sha256(embedded.WEIGHTS)}
    folder = Path(backbone)
    files = sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]) if isdir(folder) else []
    return {file.name: sha256(file) for file in files}


def _once(names: Sequence[str], what: str, advice: str = "give each a name of its own") -> None:
    """Refuse names that would be one file's: files and tables tell tasks, methods and points apart by them alone."""
    names = [file_name(name) for name in names]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"Two {what} have the name '{name}'; {advice}.")


def require_same(out: Path, description: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse to resume another evaluation than the one that is described.

    Returns:
        The description that `out` holds.

    Raises:
        UserError: `out` holds none, a damaged one, or one that differs in more than the baseline and how it is laid
            out.
    """
    file = out / DESCRIPTION
    if not file.is_file():
        raise UserError(f"{out} holds no evaluation to resume ({DESCRIPTION} is missing); start without --resume.")
    damaged = UserError(f"{file} is damaged; start the evaluation anew with --overwrite.")
    try:
        started = parse_record(file.read_text(encoding="utf-8"))
    except ValueError:
        raise damaged from None
    for name, value in description.items():
        before = started.get(name)
        if name == "tasks" and isinstance(before, dict):
            pattern = description["config"]["pattern"]
            value = _asked(value, pattern)
            try:
                before = _asked(before, pattern)
            except (LookupError, TypeError):
                raise damaged from None
        if name == "config" and isinstance(before, dict):
            before, value = _computed(completed(EvaluateConfig, before, str(file))), _computed(value)
        if before != value:
            raise UserError(
                f"The evaluation in {out} was started with another '{name}'; resume with the same, or start a new one."
            )
    return started


def _computed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what shapes the tables only, and what may be otherwise on another cluster."""
    kept = {
        key: value for key, value in config.items() if key not in ("baseline", "gpu_share", "tokens_per_micro_batch")
    }
    run = {key: value for key, value in config["run"].items() if key != "monitoring"}
    kept["run"] = run | {"workers": {"precision": run["workers"]["precision"]}}
    if config["prepare"]:
        kept["prepare"] = {key: value for key, value in config["prepare"].items() if key != "embedders"}
    return kept


def _asked(tasks: Mapping[str, Any], pattern: int) -> dict[str, Any]:
    """Descriptions of tasks with the one pattern that is used: a task may be given further ones."""
    used = {}
    for name, task in tasks.items():
        patterns = task["definition"]["patterns"]
        own = {"patterns": patterns[min(pattern, len(patterns) - 1)]}
        used[name] = {**task, "definition": {**task["definition"], **own}}
    return used


def task_name(task: str) -> str:
    """The name of a task's YAML without its folder and ending, or of a built-in task."""
    return Path(task).stem if builtin.own_file(task) else task


def file_name(*parts: str) -> str:
    """The parts as one name that any file system takes: other characters than letters and digits become '-'."""
    return "--".join(_safe(part) for part in parts if part)


def _safe(part: str) -> str:
    name = re.sub(r"[^\w.]+", "-", part)
    if len(name) <= LONGEST_PART:
        return name
    # A list of paths, say: file systems take 255 bytes.
    return f"{name[:LONGEST_PART]}-{hashlib.sha256(part.encode()).hexdigest()[:8]}"
