"""The mix-up curriculum: how much of a query set's own domain is kept (paper, section 3.4).

The running agreement s of query and support gradients goes in, mixing weights λ come out. While s is
small, λ is 1 and a task stays itself; as the prompt learns, tasks are mixed with their partner domain.
"""

from __future__ import annotations

import numpy as np

from supmer_ray.config import CurriculumConfig

_MIXING_STREAM = 0xBE7A
"""Keeps these draws apart from those of the tasks themselves, which have the same seed and index."""


def beta_scale(similarity: float, m: float) -> float:
    """b = (m^s − 1) / (m − 1) + 1e-7, from about 0 at s = 0 to about 1 at s = 1."""
    return (m**similarity - 1) / (m - 1) + 1e-7


def draw_mixing(config: CurriculumConfig, similarity: float, seed: int, task_index: int) -> float:
    """λ ~ Beta(a, a·b) for one meta-task, a pure function of its arguments; 1 without a curriculum."""
    if not config.enabled:
        return 1.0
    draw = np.random.default_rng([seed, task_index, _MIXING_STREAM])
    b = beta_scale(similarity, config.m) if config.b is None else config.b
    return float(draw.beta(config.a, config.a * b))


def running_similarity(before: float | None, mean: float, ema: float) -> float:
    """s ← (1 − ema)·s + ema·mean_τ s_τ; the first value sets it."""
    return mean if before is None else (1 - ema) * before + ema * mean
