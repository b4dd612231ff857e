"""One worker against two at the same global batch: real processes, real all-reduce, no Ray."""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing

from supmer_ray.benchmark.workload import Lengths, random_backbone, task_batch
from supmer_ray.errors import UserError
from supmer_ray.meta.reduce import reduce_sums
from supmer_ray.meta.step import MetaStep
from supmer_ray.model.regularizer import Regularizer
from supmer_ray.tasks.batch import TaskBatch


def measure_scaling(size: str, length: int, options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Seconds of a step with one and with two workers that share the machine, and bytes all-reduced."""
    if options.tasks % 2:
        raise UserError(
            f"--scaling shares {options.tasks} tasks between two workers; write --tasks {options.tasks + 1}."
        )
    cores = torch.get_num_threads() // 2 * 2  # each of two workers has half of them
    gpus = options.device.startswith("cuda") and torch.cuda.device_count() >= 2
    if options.device.startswith("cuda") and not gpus:
        say(f"{size}: one GPU here, so one and two workers are measured on its CPU")
    if not (gpus or cores):
        raise UserError("--scaling shares the CPU's threads between two workers and has one; give it --threads 2.")
    found = {}
    for workers in (1, 2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
        arguments = (workers, port, size, length, options, max(1, cores // workers), gpus, queue)
        torch.multiprocessing.spawn(_worker, arguments, nprocs=workers)
        found[workers] = queue.get()
    ratio = found[1]["seconds"] / found[2]["seconds"]
    say(
        f"{size}, length {length}, {options.tasks} tasks: one worker {found[1]['seconds']:.2f} s a step, two workers "
        f"{found[2]['seconds']:.2f} s ({ratio:.2f} times as fast on the same {cores} threads); "
        f"{found[2]['bytes']:,} bytes all-reduced a step, {found[2]['reduce_seconds'] * 1e3:.1f} ms"
    )
    return {"size": size, "length": length, "one": found[1], "two": found[2]}


def _worker(
    rank: int,
    workers: int,
    port: int,
    size: str,
    length: int,
    options: argparse.Namespace,
    threads: int,
    gpus: bool,
    queue: Any,
) -> None:
    torch.set_num_threads(threads)
    backend, device = ("nccl", torch.device("cuda", rank)) if gpus else ("gloo", torch.device("cpu"))
    if gpus:
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(backend, f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    backbone = random_backbone(size, device, torch.bfloat16 if gpus else torch.float32)
    torch.manual_seed(1)
    regularizer = Regularizer(backbone.d_model).to(device)
    step = MetaStep(backbone, regularizer, token_budget=options.tokens)
    prompt = backbone.random_rows(options.prompt, 5000, torch.Generator().manual_seed(0))
    share = options.tasks // workers
    fixed = Lengths.fixed(length)
    parts = [task_batch(1, options.support, options.query, fixed, seed=task) for task in range(options.tasks)]
    own = parts[rank * share : (rank + 1) * share]
    batch = TaskBatch.concat([part for part, _ in own])
    mixing = [value for _, part in own for value in part]
    seconds, reduces = [], []
    for round_ in range(4):
        torch.distributed.barrier()
        started = time.perf_counter()
        found = step(prompt, torch.full((1,), 0.1, device=device), batch, torch.tensor(mixing).numpy())
        if gpus:
            torch.cuda.synchronize()
        computed = time.perf_counter()
        reduce_sums(found, {"mixing": 0.0, "tokens": 0.0}, (False, False))
        if gpus:
            torch.cuda.synchronize()
        if round_:
            seconds.append(time.perf_counter() - started)
            reduces.append(time.perf_counter() - computed)
    if rank == 0:
        # The inner rate, the figures of the tasks, and the five numbers that `reduce_sums` puts behind them.
        floats = prompt.numel() + sum(p.numel() for p in regularizer.parameters()) + 1 + len(found.tasks) + 5
        queue.put({"seconds": median(seconds), "reduce_seconds": median(reduces), "bytes": 4 * floats})
    torch.distributed.destroy_process_group()
    # A thread of gloo may still be dropping a tensor, for which it wants the GIL; if Python is being taken down
    # meanwhile, the process aborts (pytorch/pytorch#190489). The queue has written through: leave at once.
    os._exit(0)
