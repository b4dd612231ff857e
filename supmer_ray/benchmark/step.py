"""The meta-step beside the sequential baseline, alternating in one run, with the device's own peak measured between."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch

from supmer_ray.benchmark.baseline import SequentialStep
from supmer_ray.benchmark.memory import peak_memory
from supmer_ray.benchmark.workload import Lengths, random_backbone, step_flops, task_batch
from supmer_ray.meta.step import MetaGradients, MetaStep
from supmer_ray.model.backbone import Backbone
from supmer_ray.model.prompted import encode_prompted
from supmer_ray.model.regularizer import Regularizer
from supmer_ray.tasks.collate import collate

MATRIX = {"cpu": 2048, "cuda": 8192}
"""Side of the square matrices whose product measures what the device can do."""


@dataclass(frozen=True)
class StepSettings:
    """One measurement.

    Attributes:
        max_length: what the baseline pads to.
        precisions: of the frozen weights in our step; the baseline is float32.
        repeats: rounds; each times the peak, the baseline and ours once.
        baseline: without it there is nothing to hold the gradients against either, and no float32 model in memory.
        compiled: on a CPU, time our step a second time with its norms compiled.
    """

    size: str
    device: str
    prompt: int = 100
    tasks: int = 4
    support: int = 16
    query: int = 16
    max_length: int = 412
    token_budget: int | None = None
    precisions: tuple[str, ...] = ("float32",)
    repeats: int = 5
    baseline: bool = True
    checkpointing: bool = False
    compiled: bool = False


@dataclass
class Series:
    """Seconds of each round, and the most memory above the start that any round took."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0


def measure_step(settings: StepSettings, lengths: Lengths, say: Callable[[str], None]) -> dict[str, Any]:
    """Medians, ratio to the baseline, rates, memory, and how far the gradients differ.

    Args:
        say: called with a line after each round.
    """
    device = torch.device(settings.device)
    batch, mixing = task_batch(settings.tasks, settings.support, settings.query, lengths, seed=0)
    flops = step_flops(settings.size, batch, settings.prompt)
    tokens = sum(int((e.lengths + settings.prompt).sum()) for e in (batch.support, batch.query, batch.partner))
    variants: dict[str, Callable[[], Any]] = {}
    dtypes = {name: getattr(torch, name) for name in settings.precisions}
    owns = {name: random_backbone(settings.size, device, dtype) for name, dtype in dtypes.items()}
    first = owns[settings.precisions[0]]
    torch.manual_seed(1)
    regularizer = Regularizer(first.d_model).to(device)
    prompt = first.random_rows(settings.prompt, 5000, torch.Generator().manual_seed(0))
    rates = torch.full((1,), 0.1, device=device)
    if settings.baseline:
        plain = random_backbone(settings.size, device, torch.float32)
        sequential = SequentialStep(plain, regularizer, settings.max_length)
        variants["baseline"] = lambda: sequential(prompt, 0.1, batch, mixing)[0]
    for precision, own in owns.items():
        forward: Any = own.forward
        forward.checkpointing = settings.checkpointing
        step = MetaStep(own, regularizer, token_budget=settings.token_budget)
        variants[precision] = _summed(step, prompt, rates, batch, mixing, compiled=False)
        if settings.compiled and device.type == "cpu":
            variants[f"{precision} compiled"] = _summed(step, prompt, rates, batch, mixing, compiled=True)

    gradients = {name: run() for name, run in variants.items()}  # and the warm-up
    # On a CPU each is held against float64 on the same weights: what they lost in rounding is the model's. On a GPU,
    # where that would take longest of all, half precision is held against float32 and float32 against the baseline.
    references: dict[str, torch.Tensor] = {}
    if settings.baseline:
        exact = torch.float64 if device.type == "cpu" else torch.float32
        wide = copy.deepcopy(regularizer).to(exact)
        for kept in (torch.float32, torch.bfloat16):
            names = [name for name in variants if name.startswith("bfloat16") == (kept == torch.bfloat16)]
            if exact == kept:
                references |= dict.fromkeys(names, gradients["baseline"])
            elif names:
                own = Backbone(random_backbone(settings.size, device, kept).model.to(exact), None, "exact")
                own.pad = plain.pad
                step = MetaStep(own, wide, token_budget=settings.token_budget)
                found = step(prompt.to(exact), rates.to(exact), batch, mixing).prompt
                references |= dict.fromkeys(names, found)
                del own, step
    series = {name: Series() for name in variants}
    peaks: list[float] = []
    for round_ in range(settings.repeats):
        peaks.append(matrix_rate(device, torch.float32 if device.type == "cpu" else torch.bfloat16))
        for name, run in variants.items():
            with peak_memory(device) as memory:
                series[name].seconds.append(timed(run, device))
            series[name].peak_bytes = max(series[name].peak_bytes, memory[0])
        times = ", ".join(f"{name} {one.seconds[-1]:.2f} s" for name, one in series.items())
        say(f"{settings.size}, length {lengths.name}, round {round_ + 1} of {settings.repeats}: {times}")
    peak = median(peaks)
    rows = {}
    for name, one in series.items():
        seconds = median(one.seconds)
        rows[name] = {
            "seconds": seconds,
            "speedup": median(series["baseline"].seconds) / seconds if settings.baseline else None,
            "tokens_per_second": tokens / seconds,
            "tasks_per_second": settings.tasks / seconds,
            "model_flops_per_second": flops / seconds,
            "peak_fraction": flops / seconds / peak,
            "peak_memory_bytes": one.peak_bytes,
            "gradient_difference": _difference(gradients[name], references[name]) if references else None,
        }
    return {
        "size": settings.size,
        "lengths": lengths.name,
        "checkpointing": settings.checkpointing,
        "mean_length": float(np.mean([e.lengths.mean() for e in (batch.support, batch.query, batch.partner)])),
        "model_flops": flops,
        "tokens": tokens,
        "matrix_flops_per_second": peak,
        "weights_bytes": {name: sum(part.nbytes for part in own.model.parameters()) for name, own in owns.items()},
        "saved_bytes_per_token": None if settings.checkpointing else _saved_bytes(settings, lengths, device),
        "variants": rows,
    }


def _difference(found: torch.Tensor, reference: torch.Tensor) -> float:
    return float((found.to(reference.dtype) - reference).norm() / reference.norm())


def _summed(step: MetaStep, *arguments: Any, compiled: bool) -> Callable[[], torch.Tensor]:
    forward: Any = step.backbone.forward

    def run() -> torch.Tensor:
        forward.compiled = compiled
        found: MetaGradients = step(*arguments)
        return found.prompt

    return run


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product: the best of five, after one to warm up.

    On a GPU each of the five is ten products in a row, which the host's launching them and waiting does not slow.
    """
    side, products = MATRIX[device.type], 10 if device.type == "cuda" else 1
    a = torch.randn(side, side, device=device, dtype=dtype)

    def multiply() -> None:
        for _ in range(products):
            a @ a

    timed(multiply, device)
    return max(products * 2 * side**3 / timed(multiply, device) for _ in range(5))


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds that `run` takes until the device is done with it."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - started


def _saved_bytes(settings: StepSettings, lengths: Lengths, device: torch.device) -> float:
    """Bytes a token that the encoder keeps for its backward, counted as autograd stores them, without checkpointing."""
    backbone = random_backbone(settings.size, device, getattr(torch, settings.precisions[0]))
    forward: Any = backbone.forward
    batch, _ = task_batch(1, 2, 1, lengths, seed=0)
    rows = collate(backbone, batch.support, np.arange(2))
    prompt = torch.zeros(1, settings.prompt, backbone.d_model, device=device, requires_grad=True)
    with torch.no_grad():  # the forward merges some weights and makes its bias once, at its first use
        encode_prompted(backbone, prompt, rows)
    weights = {tensor.untyped_storage().data_ptr() for tensor in forward.constants()}
    weights |= {parameter.untyped_storage().data_ptr() for parameter in backbone.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _, layout = encode_prompted(backbone, prompt, rows)
    return sum(kept.values()) / layout.positions
