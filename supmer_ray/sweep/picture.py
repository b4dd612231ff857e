"""The picture of a sweep: its table of trials goes in, one figure of three panels comes out.

Parallel coordinates (a line a trial, coloured by its objective), the importance of each setting (fANOVA:
Hutter, Hoos and Leyton-Brown, 2014), and the best objective so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEWEST_FOR_IMPORTANCE = 4
"""With fewer trials than this, no importance is drawn."""


def draw_sweep(trials: pd.DataFrame, settings: Sequence[str], objective: str, mode: str, *files: Path) -> None:
    """Draw the trials that have an objective into every one of `files` (the suffix names the format).

    Args:
        settings: the columns of `trials` that were searched.
        objective: what its axis says.
        mode: "min" or "max".
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    told = trials[trials["state"].isin(["finished", "stopped"]) & trials["objective"].notna()]
    figure = Figure(figsize=(max(10.0, 1.6 * len(settings) + 3), 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(1.2, 1))
    _parallel_coordinates(figure.add_subplot(grid[0, :]), told, settings, objective, mode)
    _importance(figure.add_subplot(grid[1, 0]), told, settings)
    _best_so_far(figure.add_subplot(grid[1, 1]), told, objective, mode)
    for file in files:
        figure.savefig(file, dpi=150)


def places(values: pd.Series) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """Where each value lies on an axis from 0 to 1, and labels for its ends (or for every word).

    Positive numbers that span more than a decade lie on a logarithmic axis.
    """
    if not pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
        words = sorted({str(value) for value in values})
        step = 1 / max(1, len(words) - 1)
        return values.map(lambda value: words.index(str(value)) * step).to_numpy(float), [
            (number * step, word) for number, word in enumerate(words)
        ]
    numbers = values.to_numpy(float)
    low, high = np.nanmin(numbers), np.nanmax(numbers)
    labels = [(0.0, f"{low:.3g}"), (1.0, f"{high:.3g}")]
    if low > 0 and high > 10 * low:
        numbers, low, high = np.log(numbers), np.log(low), np.log(high)
    return (numbers - low) / ((high - low) or 1.0), labels


def _parallel_coordinates(axes: Axes, trials: pd.DataFrame, settings: Sequence[str], objective: str, mode: str) -> None:
    from matplotlib import colormaps

    columns = [*settings, "objective"]
    heights = np.stack([places(trials[name])[0] for name in columns])  # (columns, trials)
    good = 1 - heights[-1] if mode == "min" else heights[-1]
    for number in np.argsort(good):
        finished = trials["state"].iloc[number] == "finished"
        axes.plot(
            heights[:, number], color=colormaps["viridis"](good[number]), alpha=0.9, linestyle="-" if finished else ":"
        )
    axes.set_xticks(range(len(columns)), [*(name.removeprefix("meta.") for name in settings), objective], fontsize=8)
    axes.tick_params(axis="x", rotation=20)
    axes.set_yticks([])
    for place, name in enumerate(columns):
        axes.axvline(place, color="0.8", linewidth=0.8, zorder=0)
        for height, label in places(trials[name])[1]:
            axes.annotate(label, (place, height), fontsize=7, ha="left", xytext=(3, 0), textcoords="offset points")
    axes.set_title(f"{len(trials)} trials; dotted: stopped early; bright: good", fontsize=10)


def importance(trials: pd.DataFrame, settings: Sequence[str]) -> dict[str, float]:
    """The share of the objective's variance that each setting explains; empty for too few trials."""
    import optuna
    from optuna.distributions import FloatDistribution
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    varied = [name for name in settings if trials[name].notna().all() and trials[name].nunique() > 1]
    if len(trials) < FEWEST_FOR_IMPORTANCE or not varied or trials["objective"].nunique() < 2:
        return {}
    heights = {name: places(trials[name])[0] for name in varied}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    for number, value in enumerate(trials["objective"]):
        study.add_trial(
            optuna.trial.create_trial(
                params={name: float(heights[name][number]) for name in varied},
                distributions={name: FloatDistribution(0, 1) for name in varied},
                value=float(value),
            )
        )
    return get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))


def _importance(axes: Axes, trials: pd.DataFrame, settings: Sequence[str]) -> None:
    found = importance(trials, settings)
    axes.set_title("importance (fANOVA)" if found else "too few trials for importance", fontsize=10)
    names = list(found)[::-1]
    axes.barh([name.removeprefix("meta.") for name in names], [found[name] for name in names])
    axes.tick_params(labelsize=8)


def _best_so_far(axes: Axes, trials: pd.DataFrame, objective: str, mode: str) -> None:
    from matplotlib.ticker import MaxNLocator

    finished = trials["state"] == "finished"
    numbers = np.arange(1, len(trials) + 1)
    values = trials["objective"].to_numpy(float)
    # A trial that was stopped early, or refused, cannot be the best.
    best = (np.fmin if mode == "min" else np.fmax).accumulate(np.where(finished, values, np.nan))
    axes.plot(numbers[finished], values[finished], "o", markersize=4, label="finished")
    axes.plot(numbers[~finished], values[~finished], "x", markersize=4, label="stopped early")
    axes.step(numbers, best, where="post", label="best so far")
    axes.set_xlabel("trial", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(objective, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8)
