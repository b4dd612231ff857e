"""From a sweep's configuration to what Ray Tune samples, and from a sample back to a run's configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import tune as ray_tune

from supmer_ray.config import RunConfig, SweepConfig
from supmer_ray.reading import assign, build


def space(config: SweepConfig) -> dict[str, Any]:
    """What Ray Tune samples: one entry for each number that has to be chosen.

    A choice is sampled by its place in the list. A mixture is sampled by one uniform number u for each task
    type: −log u is exponential, and exponentials divided by their sum are uniform on the simplex.
    """
    found: dict[str, Any] = {}
    for key, dimension in config.space.items():
        if dimension.choice:
            found[key] = ray_tune.choice(list(range(len(dimension.choice))))
        elif dimension.simplex:
            found |= {f"{key}.{name}": ray_tune.uniform(1e-6, 1.0) for name in dimension.simplex}
        elif dimension.int_:
            found[key] = ray_tune.randint(dimension.int_[0], dimension.int_[1] + 1)
        else:
            sample = ray_tune.uniform if dimension.uniform else ray_tune.loguniform
            names = [f"{key}.{i}" for i in range(most_inner_steps(config))] if dimension.each_inner_step else [key]
            found |= {name: sample(*dimension.ends) for name in names}
    return found


def settings_of(config: SweepConfig, sample: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, by dotted key, that a sample of `space` stands for."""
    found: dict[str, Any] = {}
    for key, dimension in config.space.items():
        if dimension.choice:
            found[key] = dimension.choice[sample[key]]
        elif dimension.simplex:
            sizes = {name: -math.log(sample[f"{key}.{name}"]) for name in dimension.simplex}
            found[key] = {name: size / sum(sizes.values()) for name, size in sizes.items()}
        elif not dimension.each_inner_step:
            found[key] = sample[key]
    for key, dimension in config.space.items():
        if dimension.each_inner_step:
            steps = found.get("meta.inner_steps", config.base.meta.inner_steps)
            found[key] = [sample[f"{key}.{i}"] for i in range(steps)]
    return found


def run_config(config: SweepConfig, settings: Mapping[str, Any]) -> RunConfig:
    """The configuration of the trial with these settings."""
    values = config.base.model_dump(mode="json")
    for key, value in settings.items():
        values = assign(values, key, value)
    return build(RunConfig, values, "the search space")


def most_inner_steps(config: SweepConfig) -> int:
    dimension = config.space.get("meta.inner_steps")
    return max(dimension.ends) if dimension else config.base.meta.inner_steps


def columns_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as columns of numbers and words: a list of rates takes one column an entry, a mixture one a share."""
    columns: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            columns |= {f"{key}.{name}": weight / sum(value.values()) for name, weight in value.items()}
        elif isinstance(value, list | tuple):
            columns |= {f"{key}.{number}": entry for number, entry in enumerate(value)}
        else:
            columns[key] = value
    return columns


@dataclass(frozen=True)
class Within:
    """Keeps the rates that population-based training changed within the space."""

    config: SweepConfig

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        kept = dict(sample)
        for name in sample:
            dimension = self.config.space.get(name) or self.config.space[name.rpartition(".")[0]]
            if not dimension.choice:
                low, high = dimension.ends
                kept[name] = min(max(sample[name], low), high)
        return kept
