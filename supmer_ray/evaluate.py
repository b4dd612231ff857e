"""Comparing methods over tasks and data seeds, on a Ray cluster: a suite and methods go in, tables come out.

The unit of work is a cell: one method on one task with all its seeds, adapted together. Cells run as Ray
tasks; each leaves a file when it is done, so that an evaluation that was killed goes on where it was. What is
compared is a `Plan` (`fewshot/plan.py`); here it is run. Torch is imported when the plan has been checked, and Ray when
its tasks could be encoded, so that a mistake is told at once and leaves nothing behind.

    OUT/evaluation.json     what is compared, on which rows, under which settings, from which checkpoints
    OUT/stores/, OUT/runs/  stores and meta-training runs that the methods needed and nobody gave
    OUT/cells/              one Parquet file for each finished cell
    OUT/results.parquet     all rows: one for each method, task and seed
    OUT/table.{md,csv}      what they say; OUT/gaps.csv, between domains
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from supmer_ray.cluster import connect
from supmer_ray.config import Precision
from supmer_ray.errors import UserError, require_new_folder
from supmer_ray.fewshot.comparison import gaps, markdown, summarize
from supmer_ray.fewshot.definition import TaskRows
from supmer_ray.fewshot.plan import (
    CELLS,
    DESCRIPTION,
    GAPS,
    RESULTS,
    SUMMARY,
    TABLE,
    Cell,
    Plan,
    require_same,
    task_name,
)
from supmer_ray.fewshot.tables import write_table
from supmer_ray.files import Place, held, require_outside, whole_file, write_json
from supmer_ray.meta.record import read_rows
from supmer_ray.origins import Progress, find_checkpoints, require_sources

if TYPE_CHECKING:
    from supmer_ray.model.backbone import Backbone

LOOK_SECONDS = 5.0
"""How often whoever follows is told that cells are still at work: one may take minutes."""


_Rows = list[dict[str, Any]]
"""What comes of a cell."""


def evaluate(
    plan: Plan, out: Path, *, resume: bool = False, overwrite: bool = False, progress: Progress | None = None
) -> pd.DataFrame:
    """Compare the plan's methods on its tasks, on the Ray cluster that is there.

    Methods that need meta-training and have no checkpoint are trained first, into `out`, as many at a time as fit.

    Args:
        out: on a cluster a path that every node sees.
        resume: go on with the same evaluation in `out`: finished cells and runs stay as they are, and the tables
            are written anew, perhaps with another baseline.
        overwrite: replace what `out` holds.

    Returns:
        The rows of OUT/results.parquet: point, method, train, test, seed, shots, dev_accuracy, test_accuracy,
        best_step, seconds, trained_parameters.

    Raises:
        UserError: unusable input; what was finished before it stays in `out`, and where nothing was, nothing does.
        Stopped: SIGTERM or SIGINT came during meta-training; `resume` goes on.
    """
    out = Place.of(out).resolved.local
    require_new_folder(out, overwrite=overwrite, resume=resume, can_resume=True, marker=DESCRIPTION)
    rows = plan.read_tasks()
    if overwrite:
        require_outside(Place.of(out), plan.inputs(rows))
    description = plan.description(rows)
    if resume:
        # What was settled when it was started stands on: the precision.
        description = {**require_same(out, description), **description}
    plan.check(rows)
    require_sources(plan, out, anew=overwrite)
    if overwrite or not all(_cell_file(out, cell).is_file() for cell in plan.cells()):
        _require_encoders(plan, rows)
    with held(out, "an evaluation"):
        if overwrite and out.exists():
            shutil.rmtree(out)
        (out / CELLS).mkdir(parents=True, exist_ok=True)
        write_json(out / DESCRIPTION, description)
        tell = progress or (lambda title, done, total, unit, note="": None)
        try:
            checkpoints = find_checkpoints(plan, out, tell)
            _run_cells(plan, rows, checkpoints, out, tell)
        except UserError:
            # Before anything was made: the command, mended, shall not be told that the folder is taken.
            if not resume and [file for file in out.rglob("*") if file.is_file()] == [out / DESCRIPTION]:
                shutil.rmtree(out)
            raise
        return _conclude(plan, checkpoints, out)


def _require_encoders(plan: Plan, rows: Mapping[str, TaskRows]) -> None:
    """Refuse now the backbone, the words and the patterns that a cell could not use after hours of meta-training.

    Raises:
        UserError: as `TaskEncoder` and `load_backbone` have it.
    """
    from supmer_ray.fewshot.encoding import TaskEncoder, input_limit
    from supmer_ray.model.backbone import outline

    backbone, seen = outline(plan.config.backbone), set()
    for cell in plan.cells():
        if cell.method.learns == "probe":  # it reads the bare texts
            continue
        run = cell.method.run_config(cell.point.config.run)
        length = run.prompt.length if cell.method.learns == "prompt" else 0
        limit = input_limit(backbone, length, cell.adapt_config().max_length)
        for name in {cell.entry.train, *cell.entry.targets}:
            asked = name, limit, cell.point.config.pattern
            if asked not in seen:
                TaskEncoder(backbone, rows[name].definition, max_length=limit, pattern=cell.point.config.pattern)
                seen.add(asked)


def _run_cells(
    plan: Plan, rows: Mapping[str, TaskRows], checkpoints: Mapping[tuple[str, str], Place], out: Path, tell: Progress
) -> None:
    """Run the cells that have no file yet, as Ray tasks, and write a file for each.

    Raises:
        UserError: what a cell refused.
        Exception: what else the first cell that failed ended with. Those that ran beside it have their files.
    """
    import ray
    from ray.exceptions import RayTaskError

    cells = plan.cells()
    waiting = [cell for cell in cells if not _cell_file(out, cell).is_file()]
    if not waiting:
        return
    resources = connect()
    share = plan.config.gpu_share if resources.gpus >= 1 else 0.0
    precision = _settled_precision(out, "bfloat16" if share else "float32")
    # Few cells on many cores: each gets several threads, but with a GPU one, as its node may have few.
    threads = 1 if share else max(1, min(int(resources.cpus // len(waiting)), int(max(resources.node_cpus))))
    # A process keeps the GPU that it began with, whichever Ray counts for it later: where a node has several, each
    # process computes one cell.
    calls = 1 if share and max(resources.node_gpus) > 1 else 0
    remote = ray.remote(max_calls=calls)(_run_cell).options(num_cpus=threads, num_gpus=share)
    tasks = {name: ray.put(task) for name, task in rows.items()}

    def start(cell: Cell) -> Future[_Rows]:
        origin = checkpoints.get((cell.point.run_variant, cell.method.name))
        targets = [tasks[name] for name in cell.entry.targets]
        source = tasks[cell.entry.train]
        return remote.remote(cell, source, plan.seeds, origin, precision, threads, share, *targets).future()

    failed = _in_turn(
        waiting,
        start,
        keep=lambda cell, found: write_table(pd.DataFrame(found), _cell_file(out, cell)),
        # One more than fits: it begins when another ends, and tells a cluster that can grow to do so.
        most=lambda: connect().fitting(threads, gpu_share=share) + 1,
        tell=lambda left: tell("Adapting and testing", len(cells) - left, len(cells), "cells"),
    )
    if failed:
        cell, error = failed
        cause = error.cause if isinstance(error, RayTaskError) else error
        done = sum(_cell_file(out, one).is_file() for one in cells)
        so_far = f"{done} of {len(cells)} cells are done, and --resume goes on with the others."
        if isinstance(cause, UserError):
            raise UserError(f"{cause} {so_far}")
        error.add_note(f"So ended the cell {cell.name}; {so_far}")
        raise error


def _settled_precision(out: Path, first: Precision) -> Precision:
    """What all cells are computed in that have no precision of their own: `first`, or what the first ones were.

    A resumed evaluation may find other devices than it was started on, and its cells are compared with one another.
    """
    description = json.loads((out / DESCRIPTION).read_text(encoding="utf-8"))
    if "precision" not in description:
        description["precision"] = first
        write_json(out / DESCRIPTION, description)
    return description["precision"]


def _in_turn(
    cells: Sequence[Cell],
    start: Callable[[Cell], Future[_Rows]],
    keep: Callable[[Cell, _Rows], None],
    most: Callable[[], int],
    tell: Callable[[int], None],
) -> tuple[Cell, Exception] | None:
    """Start cells one after the other, and keep what comes of each.

    Once one has failed no other is started; those that were are waited for and kept, as they may be hours of work.

    Args:
        most: how many may be under way at once; of those that only wait for a CPU an error would have to wait, too.
        tell: told how many cells are left.

    Returns:
        The first cell that failed and its error, or that of keeping it.
    """
    waiting, running = deque(cells), dict[Future[_Rows], Cell]()
    left, failed = len(cells), None
    while running or (waiting and not failed):
        tell(left)
        while waiting and not failed and len(running) < most():
            cell = waiting.popleft()
            running[start(cell)] = cell
        for future in wait(running, LOOK_SECONDS, FIRST_COMPLETED).done:
            cell = running.pop(future)
            try:
                keep(cell, future.result())
            except Exception as error:
                failed = failed or (cell, error)
            else:
                left -= 1
                tell(left)
    return failed


def _run_cell(
    cell: Cell,
    source: TaskRows,
    seeds: int,
    checkpoint: Place | None,
    settled: Precision,
    threads: int,
    gpu_share: float,
    *targets: TaskRows,
) -> _Rows:
    """The rows of one cell, computed in a Ray worker with so many threads and, unless it is 0, a share of a GPU.

    Args:
        settled: the precision where the cell's configuration names none.
    """
    from supmer_ray.fewshot.evaluate import evaluate_method
    from supmer_ray.meta.state import load_checkpoint

    config = cell.point.config
    backbone = _backbone(config.backbone, config.precision or settled, threads, gpu_share)
    outcomes = evaluate_method(
        backbone,
        cell.method,
        source,
        targets,
        range(seeds),
        cell.adapt_config(),
        checkpoint=load_checkpoint(checkpoint, backbone) if checkpoint else None,
        prompt_length=config.run.prompt.length,
        vocabulary_rows=config.run.prompt.vocabulary_rows,
        pattern=config.pattern,
        token_budget=config.tokens_per_micro_batch,
    )
    return [{"point": cell.point.label, **asdict(outcome)} for outcome in outcomes]


@lru_cache(maxsize=1)
def _backbone(name: str, precision: Precision, threads: int, gpu_share: float) -> Backbone:
    """The language model, loaded once in each worker process."""
    import torch

    from supmer_ray.model.backbone import load_backbone

    device = "cuda" if gpu_share and torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, precision)
    return load_backbone(name, device=device, dtype=dtype, threads=threads, gpu_share=gpu_share or 1.0)


def _conclude(plan: Plan, checkpoints: Mapping[tuple[str, str], Place], out: Path) -> pd.DataFrame:
    """Put the cells together and write the tables."""
    rows = pd.concat([pd.read_parquet(_cell_file(out, cell)) for cell in plan.cells()], ignore_index=True)
    baseline = plan.config.baseline
    write_table(rows, out / RESULTS)
    table, drops = summarize(rows, baseline), gaps(rows, baseline)
    write_table(table, out / SUMMARY)
    if not drops.empty:
        write_table(drops, out / GAPS)
    title = f"{plan.suite.name}: {len(plan.methods)} method{'s' if len(plan.methods) > 1 else ''}"
    with whole_file(out / TABLE) as file:
        file.write_text(markdown(table, drops, baseline, title, _note(plan, checkpoints)), encoding="utf-8")
    return rows


def _note(plan: Plan, checkpoints: Mapping[tuple[str, str], Place]) -> str:
    adapt = plan.config.adapt
    tested = "all test rows" if adapt.max_test is None else f"at most {adapt.max_test} test rows"
    configs = [cell.adapt_config() for cell in plan.cells()]
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
    most = max(cell.adapt_config().shots for cell in plan.cells())
    found = [
        f"{task_name(entry.train)}: at most {entry.max_shots}"
        for entry in plan.suite.tasks
        if entry.max_shots and entry.max_shots < most
    ]
    return f" ({', '.join(found)})" if found else ""


def _training(run: Place) -> tuple[int, float] | None:
    """Meta-steps of a run and the seconds that they and the waiting for their data took, where it says so."""
    steps = read_rows(run, "step")
    try:
        seconds = sum(row["step_seconds"] + row["data_wait_seconds"] for row in steps)
    except (KeyError, TypeError):  # another version's: the checkpoint is good all the same
        return None
    return (len(steps), seconds) if steps else None


def _cell_file(out: Path, cell: Cell) -> Path:
    return out / CELLS / f"{cell.name}.parquet"
