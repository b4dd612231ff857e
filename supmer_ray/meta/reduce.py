"""What the workers of a run tell each other in a step: one flat vector, reduced once.

A worker's sums over its own tasks go in, the means over all tasks come out, alike on every worker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from supmer_ray.meta.step import MetaGradients
from supmer_ray.tasks.collate import to_device


def reduce_sums(
    found: MetaGradients, own: Mapping[str, float], flags: Sequence[bool] = ()
) -> tuple[MetaGradients, dict[str, Tensor], Tensor]:
    """Mean gradients and mean per-task metrics over the tasks of all workers, by one all-reduce.

    Everything stays on the device, and the host does not wait for it.

    Args:
        found: this worker's sums.
        own: what else is to be averaged over tasks: its name → the sum over this worker's.
        flags: what this worker has to say to all; each of the third result is above 0 if any worker's is set.
    """
    names = sorted(found.tasks)
    parts = [found.prompt, *found.regularizer, found.inner_rates]
    sums = torch.stack([found.tasks[name].sum() for name in names]).to(found.prompt)
    counts = np.array([*own.values(), *flags, len(found.tasks[names[0]])], np.float32)
    extra = to_device(counts, found.prompt.device).to(found.prompt.dtype)
    flat = torch.cat([*(part.reshape(-1).to(found.prompt.dtype) for part in parts), sums, extra])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(flat)
    flat = flat[:-1] / flat[-1]
    means: list[Tensor] = []
    start = 0
    for part in parts:
        means.append(flat[start : start + part.numel()].view(part.shape))
        start += part.numel()
    values, raised = flat[start:].split([len(names) + len(own), len(flags)])
    metrics = dict(zip([*names, *own], values.unbind(), strict=True))
    return replace(found, prompt=means[0], regularizer=means[1:-1], inner_rates=means[-1]), metrics, raised
