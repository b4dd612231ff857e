"""Everything that is asked of a GPU, one measurement after the other, without Ray."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from supmer_ray.benchmark.scaling import measure_scaling
from supmer_ray.benchmark.step import StepSettings, measure_step
from supmer_ray.benchmark.workload import Lengths
from supmer_ray.errors import UserError

BUDGET = 16384
"""Tokens of a micro-batch: many, because a GPU is idle between small kernels, yet t5-xl's activations fit 80 GB."""


def measure_gpu(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """t5-base beside the baseline, t5-large at length 390, t5-xl at 412 with and without checkpointing, and scaling.

    What does not fit the memory is said and left out; the rest is measured all the same.

    Raises:
        UserError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise UserError("--gpu needs a CUDA device, and torch finds none here; leave it out to measure the CPU.")
    base = StepSettings(
        size="t5-base", device="cuda", token_budget=BUDGET, precisions=("bfloat16",), repeats=options.repeats
    )
    alone = replace(base, baseline=False)
    planned = [(replace(base, compiled=True), length) for length in (60, 150, 390)]
    planned += [(replace(alone, size="t5-large", compiled=True), 390)]
    planned += [(replace(alone, size="t5-xl", checkpointing=checkpointing), 412) for checkpointing in (False, True)]
    steps, failed = [], []
    for settings, length in planned:
        name = f"{settings.size}, length {length}" + (", checkpointing" if settings.checkpointing else "")
        try:
            row = measure_step(settings, Lengths.fixed(length), say)
        except torch.OutOfMemoryError:
            failed.append(name)
            say(f"{name}: does not fit {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB")
        else:
            steps.append({**row, "checkpointing": settings.checkpointing})
        gc.collect()
        torch.cuda.empty_cache()
    found: dict[str, Any] = {"steps": steps, "out_of_memory": failed}
    if torch.cuda.device_count() > 1:
        two = argparse.Namespace(**{**vars(options), "tokens": BUDGET, "tasks": options.tasks + options.tasks % 2})
        found["scaling"] = measure_scaling("t5-base", options.lengths[0], two, say)
    else:
        say("One GPU here: scaling over NCCL needs two.")
    return found
