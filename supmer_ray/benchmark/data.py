"""What feeding the step costs: building meta-tasks, embedding sentences, and how long training waits."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch

from supmer_ray.benchmark.memory import peak_memory_of_all
from supmer_ray.benchmark.step import timed
from supmer_ray.config import PrepareConfig, RunConfig, TasksConfig
from supmer_ray.data.embed import IN_HAND, STRETCH, Embedder, Stretch
from supmer_ray.data.store import Outline, Store
from supmer_ray.files import Place
from supmer_ray.model.backbone import Backbone, load_backbone
from supmer_ray.model.packed import Layout
from supmer_ray.model.prompted import micro_batches
from supmer_ray.reading import build
from supmer_ray.tasks.batch import Examples
from supmer_ray.tasks.builder import TaskBuilder
from supmer_ray.tasks.collate import collate
from supmer_ray.tasks.formats import Formats
from supmer_ray.tasks.types import require_domains

STEPS = 100

STRETCHES = {"cpu": 1, "cuda": 40}
"""Stretches that are embedded in a round, or as many as the store has."""

RUN: dict[str, Any] = {
    "prompt": {"length": 10},
    "tasks": {"tasks_per_step": 2, "support": 8, "query": 8, "max_length": 160, "candidate_length": 32},
    "meta": {"steps": 20, "inner_rate": 0.1},
    "schedule": {"validate_every": 20, "validation_tasks": 1, "checkpoint_every": 20},
}
"""A small run, for the share of it that waits for data."""


def measure_data(path: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Meta-tasks a second that one core builds and packs into Arrow, and the share of a real run that waits."""
    from supmer_ray.cluster import connect
    from supmer_ray.meta.record import read_rows
    from supmer_ray.train import train

    torch.set_num_threads(1)
    require_domains(Outline.open(path), TasksConfig().types)
    store = Store.open(path)
    backbone = load_backbone(store.manifest.backbone.name)
    config = TasksConfig(max_length=400 if backbone.max_positions else 412)
    formats = Formats.of(backbone, config)
    builder = TaskBuilder(store, formats, config, seed=0)
    for step in range(5):
        builder.shard(step, 0, 1).to_arrow()
    rates = []
    for round_ in range(5):
        started = time.process_time()
        for step in range(round_ * STEPS, (round_ + 1) * STEPS):
            builder.shard(step, 0, 1).to_arrow()
        rates.append(STEPS * config.tasks_per_step / (time.process_time() - started))
    say(f"builder: {median(rates):,.0f} meta-tasks a second for each core ({min(rates):,.0f} to {max(rates):,.0f})")
    packing = 1e3 * median(_packing_seconds(builder, backbone, step) for step in range(50)) / config.tasks_per_step
    say(f"worker: {packing:.2f} ms a meta-task to cut its examples into micro-batches and lay them out")
    with tempfile.TemporaryDirectory() as folder:
        connecting = time.perf_counter()
        connect()
        connected = time.perf_counter() - connecting
        began = time.time()
        result = train(build(RunConfig, RUN, "the benchmark"), path, Path(folder) / "run")
        steps, starts = (read_rows(result.out.local, kind) for kind in ("step", "start"))
    waited, worked = (sum(row[name] for row in steps) for name in ("data_wait_seconds", "step_seconds"))
    later = steps[1:]  # the first step waits for the builders to start
    waited_later = sum(row["data_wait_seconds"] for row in later)
    fraction = waited_later / (waited_later + sum(row["step_seconds"] for row in later))
    say(f"training: {fraction:.2%} of the time after the first step waits for data ({waited:.2f} s in all)")
    (reached,) = [row["reached"] for row in starts]
    times = [began, *reached.values()]
    names = ("Ray Train's worker", "backbone", "first validation", "first step")
    start = {"cluster": connected}
    start |= {name: later - sooner for name, sooner, later in zip(names, times, times[1:], strict=False)}
    start["of which waiting for its data"] = steps[0]["data_wait_seconds"]
    say("from the command to the first step: " + ", ".join(f"{name} {value:.1f} s" for name, value in start.items()))
    return {
        "store": path.name,
        "start_seconds": start,
        "tasks_per_second_per_core": median(rates),
        "packing_ms_per_task": packing,
        "data_wait_fraction": fraction,
        "data_wait_fraction_with_start": waited / (waited + worked),
    }


def _packing_seconds(builder: TaskBuilder, backbone: Backbone, step: int) -> float:
    """What the worker does on the host with a step's examples before they are computed with."""
    batch = builder.shard(step, 0, 1)
    started = time.process_time()
    for examples in (batch.support, batch.query, batch.partner):
        for index in micro_batches(examples.lengths, RUN["prompt"]["length"], backbone.token_budget):
            collate(backbone, examples, index)
    return time.process_time() - started


def measure_prepare(sizes: Sequence[int], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Seconds and peak memory of preparing so many BBC articles, one after the other on one cluster.

    Memory is what this process and its cluster hold, shared pages counted once.
    """
    from supmer_ray.cluster import connect
    from supmer_ray.data.prepare import prepare

    connect()
    rows = []
    for documents in sizes:
        # One actor whatever the size: of several, a small text would start fewer than a large one.
        config = PrepareConfig(sources=("bbc",), domains=8, max_documents=documents, embedders=1)
        with tempfile.TemporaryDirectory() as folder, peak_memory_of_all() as peak:
            started = time.perf_counter()
            manifest = prepare(config, Path(folder) / "store")
            seconds = time.perf_counter() - started
        tokens = manifest.tokens
        rows.append({"documents": documents, "tokens": tokens, "seconds": seconds, "peak_bytes": peak[0]})
        say(
            f"prepare: {documents:,} documents, {tokens:,} tokens in {seconds:.1f} s, "
            f"{peak[0] / 2**20:,.0f} MiB in all processes"
        )
    return rows


def measure_embedding(path: Path, device: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Tokens embedded a second as an actor of `prepare` does it, beside a bare forward of equal tokens, alternating.

    The bare forward has texts of one length, as many as fill a batch, and does as many batches as make those tokens.
    """
    store = Store.open(path)
    kind = torch.device(device).type
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(IN_HAND[kind]) as threads:
        embedder = Embedder(Place.of(folder), store.manifest.backbone.name, kind == "cuda")
        embedder.load()
        backbone, budget = embedder.backbone, embedder.budget
        stretches = [Stretch.of(store, number) for number in range(min(STRETCHES[kind], -(-len(store) // STRETCH)))]
        tokens, items = (sum(map(what, (one.framed(backbone) for one in stretches))) for what in (_tokens, len))
        mean = tokens // items
        bare_layout = Layout((mean,) * (budget // mean), (mean,) * (budget // mean))
        bare_input = backbone.embed(torch.full((bare_layout.positions,), backbone.pad, device=backbone.device))
        passes = max(1, round(tokens / bare_layout.positions))

        @torch.no_grad()
        def bare() -> None:
            for _ in range(passes):
                backbone.encode(bare_input, bare_layout)

        times: dict[str, list[float]] = {"embedding": [], "bare": []}
        for _ in range(3):
            seconds = timed(lambda: list(threads.map(embedder.embed, stretches)), backbone.device)
            times["embedding"].append(seconds / tokens)
            times["bare"].append(timed(bare, backbone.device) / (passes * bare_layout.positions))
    ratio = median(bare / own for bare, own in zip(times["bare"], times["embedding"], strict=True))
    rate = 1 / median(times["embedding"])
    each = "" if kind == "cuda" else " for each core"
    say(f"embedding: {rate:,.0f} tokens a second{each}, {ratio:.0%} of the bare forward pass")
    return {"tokens_per_second": rate, "share_of_bare_forward": ratio, "tokens": tokens, "items": items}


def _tokens(examples: Examples) -> int:
    return int(examples.offsets[-1])
