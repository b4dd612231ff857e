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


def measure_gpu(
    options: argparse.Namespace, say: Callable[[str], None], keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """t5-base beside the baseline, t5-large at length 390, t5-xl at 412 with and without checkpointing, and scaling.

    What fails or does not fit the memory is said and left out; the rest is measured all the same.

    Args:
        keep: called with all that there is after each measurement: a run that is cut short keeps them.

    Raises:
        UserError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise UserError("--gpu needs a CUDA device, and torch finds none here; leave it out to measure the CPU.")
    base = StepSettings(size="t5-base", device="cuda", precisions=("bfloat16",), repeats=options.repeats)
    alone = replace(base, baseline=False)
    large, xl = replace(alone, size="t5-large"), replace(alone, size="t5-xl")
    planned = [(large, Lengths.fixed(390))]
    planned += [(base, Lengths.fixed(length)) for length in (60, 150, 390)]
    # Texts of different lengths, as every real run has them.
    planned += [(base, Lengths.spread(150, base.max_length))]
    planned += [(replace(xl, checkpointing=checkpointing), Lengths.fixed(412)) for checkpointing in (False, True)]
    steps: list[dict[str, Any]] = []
    failed: list[str] = []
    found: dict[str, Any] = {"steps": steps, "failed": failed}
    for settings, lengths in planned:
        name = f"{settings.size}, length {lengths.name}" + (", checkpointing" if settings.checkpointing else "")
        try:
            row = measure_step(settings, lengths, say)
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
            say(failed[-1])
        else:
            steps.append(row)
        keep(found)
        gc.collect()
        torch.cuda.empty_cache()
    if torch.cuda.device_count() > 1:
        two = argparse.Namespace(**{**vars(options), "tasks": options.tasks + options.tasks % 2})
        found["scaling"] = measure_scaling("t5-base", options.lengths[0], two, say)
    else:
        say("One GPU here: scaling over NCCL needs two.")
    return found
