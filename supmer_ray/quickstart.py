"""The whole way on real text, on a laptop: prepare, meta-train, adapt to two tasks, compare.

It calls the same functions as the stages' own commands, with settings small enough for two cores. The comparison is
plain prompt tuning from vocabulary rows against SUPMER, meta-trained here in two minutes and as it ships, on the same
draws.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from shlex import quote
from statistics import mean, stdev

from rich.console import Console
from rich.table import Table

from supmer_ray import embedded
from supmer_ray.cluster import connect
from supmer_ray.config import AdaptConfig, PrepareConfig, RunConfig
from supmer_ray.console import duration, stage
from supmer_ray.data.prepare import prepare
from supmer_ray.errors import require_new_folder
from supmer_ray.fewshot.definition import TaskRows, load_definition
from supmer_ray.fewshot.evaluate import Outcome, evaluate_method
from supmer_ray.fewshot.method import load_method
from supmer_ray.files import whole_file
from supmer_ray.meta.state import load_checkpoint
from supmer_ray.model.backbone import load_backbone
from supmer_ray.reading import build
from supmer_ray.train import train

SOURCES = ("bbc", "rotten-tomatoes")
TASKS = ("bbc-topic", "subjectivity")
SHIPPED = "supmer, as shipped"
METHODS = {"prompt-tuning": "prompt-tuning", "supmer": "supmer", SHIPPED: "supmer"}
"""Rows of the table, and the method of each."""

SEEDS = (0, 1, 2)

PREPARE = {"sources": SOURCES, "domains": 24, "max_documents": 160, "sentence_length": 48}

RUN = {
    "prompt": {"length": 10},
    "tasks": {
        "mixture": {"nsp": 1, "scsp": 1},
        "tasks_per_step": 2,
        "support": 12,
        "query": 12,
        "max_length": 160,
        "candidate_length": 32,
    },
    "meta": {"steps": 30, "inner_rate": 0.1, "prompt_rate": 0.01, "regularizer_rate": 1e-3},
    "schedule": {"validate_every": 30, "validation_tasks": 2, "checkpoint_every": 10},
}

ADAPT = AdaptConfig(**embedded.settings_for("embedded")["adapt"], max_test=200)


def quickstart(out: Path, *, overwrite: bool = False) -> list[Outcome]:
    """Run the whole way and leave `store/`, `run/`, `results.json` in `out`.

    Raises:
        UserError: `out` holds something, the text cannot be fetched, or the machine is too small.
    """
    require_new_folder(out, overwrite=overwrite)
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    config = build(RunConfig, RUN, "the quickstart")
    with stage("Starting Ray", "cluster"):
        connect()
    with stage("Reading text", "documents") as line:
        prepare(
            build(PrepareConfig, PREPARE, "the quickstart"), out / "store", overwrite=overwrite, progress=line.named
        )
    with stage("Meta-training prompt and regularizer", "steps") as line:
        run = train(config, out / "store", out / "run", overwrite=overwrite, progress=line.train_row(config.meta.steps))
    backbone = load_backbone("embedded")
    starts = {"prompt-tuning": None, "supmer": run.checkpoint, SHIPPED: embedded.LEARNED}
    checkpoints = {name: load_checkpoint(folder, backbone) if folder else None for name, folder in starts.items()}
    outcomes: list[Outcome] = []
    with stage("Adapting", "steps") as line:
        for task in TASKS:
            rows = TaskRows.of(load_definition(task))
            for name, method in METHODS.items():
                line.update(0, ADAPT.steps, title=f"Adapting to {task}, {len(SEEDS)} seeds of {name}")
                found = evaluate_method(
                    backbone,
                    load_method(method),
                    rows,
                    [rows],
                    SEEDS,
                    ADAPT,
                    checkpoint=checkpoints[name],
                    prompt_length=config.prompt.length,
                    progress=lambda _, done, total: line.update(done, total),
                )
                outcomes += [replace(outcome, method=name) for outcome in found]
    with whole_file(out / "results.json") as file:
        file.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n", encoding="utf-8")
    _show(outcomes, time.monotonic() - started)
    checkpoint_folder = out / "run" / run.checkpoint.name
    # In a fresh clone the command stands in a virtual environment that is not on the path.
    supmer = "supmer" if shutil.which("supmer") else os.path.relpath(sys.argv[0])
    print(f"\nResults: {out / 'results.json'}    Checkpoint: {checkpoint_folder}\n\nNext:")
    adapted = quote(str(out / "adapted"))
    for command in (
        f"adapt --task bbc-topic --checkpoint {quote(str(checkpoint_folder))} --out {adapted}",
        f"predict --adapted {adapted} --input YOUR_HEADLINES.csv --output labelled.csv   # a 'headline' column",
        f"prepare --source YOUR_TEXT --domains 50 --out {quote(str(out.parent / 'my-store'))}",
    ):
        print(f"  {quote(supmer)} {command}")
    return outcomes


def _show(outcomes: list[Outcome], seconds: float) -> None:
    table = Table(title=f"K = {ADAPT.shots} a class, mean ± standard deviation over {len(SEEDS)} seeds")
    for column in ("method", "task", "dev accuracy", "test accuracy"):
        table.add_column(column, justify="right" if "accuracy" in column else "left")
    for method in METHODS:
        for task in TASKS:
            own = [outcome for outcome in outcomes if (outcome.method, outcome.test) == (method, task)]
            dev = [100 * outcome.dev_accuracy for outcome in own]
            test = [100 * outcome.test_accuracy for outcome in own]
            cells = (f"{mean(values):.1f} ± {stdev(values):.1f}" for values in (dev, test))
            table.add_row(method, task, *cells)
    print()
    Console(width=90).print(table)
    print(f"The step is chosen on the dev split; the test split is scored once. {duration(seconds)} in all.")
