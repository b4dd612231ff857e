"""What a report draws: metrics of a run and rows of an evaluation go in, matplotlib figures come out.

Each figure is as wide as a phone's screen is in inches of text, so that it can be read there; the colours
are few and fixed, so that a page can exchange them for those of a dark one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from supmer_ray.fewshot.comparison import AVERAGE, pair_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from supmer_ray.data.store import Store

INK, GRID, PAPER = "#1d1e24", "#d6d7de", "#fefefe"
SERIES = ("#2f6fde", "#d9581f", "#1f9a6d", "#a34bc4", "#b8860b", "#d1366f", "#4f8a10", "#6b7280")
"""Colours of text, grid and background, and of the series."""

WIDTH = 5.0
"""Inches: at a phone's width the text of a figure this wide is as large as a page's small print."""

DOTS = 400
"""Single steps that a figure shows as dots: thousands would make a page of megabytes."""

TWO_LINES = "\n→ "
"""How a pair of tasks is written beside an axis, which has little room."""

STYLE: dict[str, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "legend.facecolor": PAPER,
    "legend.edgecolor": GRID,
    "legend.framealpha": 0.8,
    "grid.color": GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar in a name is a dollar
}


@contextmanager
def style(salt: str) -> Iterator[None]:
    """Draw and save figures in the report's style while the block runs.

    Args:
        salt: makes the identifiers within an SVG the figure's own, and the same at every drawing.
    """
    from matplotlib import rc_context

    values: Any = {**STYLE, "svg.hashsalt": salt}
    with rc_context(values):
        yield


def losses(steps: pd.DataFrame, validations: pd.DataFrame) -> Figure:
    """Query loss of each task type while training (smoothed), and on the fixed validation tasks (dots).

    Args:
        steps: rows of a run's metrics: step, task_type, query_loss.
        validations: step, task_type, loss.
    """
    names = sorted({*steps["task_type"], *validations["task_type"]})
    figure, axes = _figure(3.1 + 0.17 * _rows(names))
    for number, name in enumerate(names):
        own, told = steps[steps["task_type"] == name], validations[validations["task_type"] == name]
        colour = SERIES[number % len(SERIES)]
        axes.plot(own["step"], smoothed(own["query_loss"]), color=colour, linewidth=1.4)
        axes.plot(told["step"], told["loss"], _marker(number), color=colour, markersize=4)
        axes.plot([], [], marker=_marker(number), color=colour, markersize=4, linewidth=1.4, label=name)
    _labels(axes, "meta-step", "query loss")
    _legend(figure, axes)
    return figure


def signals(steps: pd.DataFrame) -> Figure:
    """s, the mean λ and the mean gate z of each step."""
    figure, axes = _figure(3.2)
    dots = steps.iloc[:: -(-len(steps) // DOTS)]
    for number, (column, label) in enumerate(
        [("running_similarity", "s, running similarity"), ("mixing", "λ, own share"), ("gate", "z, gate")]
    ):
        values = steps[column] if column == "running_similarity" else smoothed(steps[column])
        axes.plot(steps["step"], values, color=SERIES[number], linewidth=1.4, label=label)
        if column != "running_similarity":
            axes.plot(dots["step"], dots[column], ".", color=SERIES[number], markersize=2, alpha=0.35)
    axes.set_ylim(-0.03, 1.03)
    _labels(axes, "meta-step", "s, λ and z, from 0 to 1")
    _legend(figure, axes)
    return figure


def alignment(steps: pd.DataFrame) -> Figure:
    """How ψ's update agrees with the query gradient (s_τ) and with the raw support gradient."""
    figure, axes = _figure(3.2)
    every = -(-len(steps) // DOTS)
    # s_τ = ½(1 + cos), from 0 to 1; a cosine is what both lines should be read as.
    for number, (values, label) in enumerate(
        [
            (2 * steps["similarity"] - 1, "cos(query gradient, ψ)"),
            (steps["update_cosine"], "cos(support gradient, ψ)"),
        ]
    ):
        axes.plot(steps["step"][::every], values[::every], ".", color=SERIES[number], markersize=2, alpha=0.35)
        axes.plot(steps["step"], smoothed(values), color=SERIES[number], linewidth=1.4, label=label)
    axes.axhline(0, color=INK, linewidth=0.8)
    _labels(axes, "meta-step", "cosine")
    _legend(figure, axes)
    return figure


def domain_plane(store: Store, marked: Sequence[int]) -> Figure:
    """The single-sentence domains' centroids on their first two principal axes, as large as their domains.

    Args:
        marked: numbers of the domains that get a label.
    """
    family = store.family("ss")
    centred = family.centroids - family.centroids.mean(axis=0)
    _, spread, axes_of = np.linalg.svd(centred, full_matrices=False)
    plane = centred @ axes_of[:2].T
    share = (spread[:2] ** 2).sum() / (spread**2).sum()
    sizes = np.diff(family.starts)
    figure, axes = _figure(3.8)
    axes.scatter(plane[:, 0], plane[:, 1], s=12 + 240 * sizes / sizes.max(), color=SERIES[0], alpha=0.35, linewidth=0)
    for number in marked:
        axes.annotate(str(number), plane[number], ha="center", va="center", fontsize=8.5, fontweight="bold")
    _labels(axes, f"first two principal axes of the centroids ({100 * share:.0f} % of their variance)", "")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return figure


def spread_domains(store: Store, count: int) -> list[int]:
    """Numbers of at most `count` domains that lie far from each other: the largest, then always the farthest."""
    family = store.family("ss")
    chosen = [int(np.diff(family.starts).argmax())]
    while len(chosen) < min(count, family.domains):
        gaps_to = np.linalg.norm(family.centroids[:, None] - family.centroids[chosen], axis=-1).min(axis=1)
        chosen.append(int(gaps_to.argmax()))
    return chosen


def differences(table: pd.DataFrame, baseline: str) -> Figure:
    """Each method's mean difference to the baseline with its interval, on the average or the only task."""
    last = table[table["point"] == table["point"].iloc[-1]]
    averaged = (last["train"] == AVERAGE).any()
    inside = last[last["train"] == last["test"]]
    table = last[last["train"] == AVERAGE] if averaged else last if inside.empty else inside
    table = table[(table["method"] != baseline) & table["difference"].notna()]
    lines = [
        one["method"] if averaged else f"{one['method']}, {pair_name(one['train'], one['test'], TWO_LINES)}"
        for _, one in table.iterrows()
    ]
    figure, axes = _figure(1.25 + 0.3 * len(lines))
    middle = table["difference"].to_numpy()
    low = np.where(table["low"].isna(), middle, table["low"])
    high = np.where(table["high"].isna(), middle, table["high"])
    places = np.arange(len(lines))[::-1]
    axes.hlines(places, low, high, color=SERIES[0], linewidth=2)
    axes.plot(middle, places, "o", color=SERIES[0])
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(places, lines)
    axes.set_ylim(-0.6, len(lines) - 0.4)
    _labels(axes, f"points above {baseline}" + ("\naverage of the tasks" if averaged else ""), "")
    return figure


def accuracies(rows: pd.DataFrame) -> Figure:
    """Mean and spread over seeds of each method on each task."""
    last = rows[rows["point"] == rows["point"].iloc[-1]]
    methods = list(dict.fromkeys(last["method"]))
    pairs = list(last[["train", "test"]].drop_duplicates().itertuples(index=False, name=None))
    pitch, block = 0.11, 0.11 * len(methods) + 0.14  # inches of a method's line and of a task's lines
    figure, axes = _figure(0.9 + 0.17 * _rows(methods) + block * len(pairs))
    starts = -np.arange(len(pairs)) * block
    for number, method in enumerate(methods):
        own = last[last["method"] == method].groupby(["train", "test"])["test_accuracy"]
        mean, spread = 100 * own.mean().reindex(pairs), 100 * own.std().reindex(pairs).fillna(0)
        axes.errorbar(
            mean, starts - pitch * number, xerr=spread, fmt=_marker(number),
            color=SERIES[number % len(SERIES)], markersize=4, elinewidth=1, label=method,
        )  # fmt: skip
    names = [pair_name(train, test, TWO_LINES) for train, test in pairs]
    axes.set_yticks(starts - pitch * (len(methods) - 1) / 2, names)
    axes.set_ylim(starts[-1] - block + pitch, pitch)
    axes.grid(axis="y", visible=False)
    for start in starts[1:]:
        axes.axhline(start + (pitch + block - pitch * len(methods)) / 2, color=GRID, linewidth=0.8)
    _labels(axes, "test accuracy, per cent", "")
    _legend(figure, axes)
    return figure


def curves(rows: pd.DataFrame, key: str, values: Sequence[Any]) -> Figure:
    """Accuracy of each method along the varied setting: the mean over tasks, and its spread over seeds."""
    methods = list(dict.fromkeys(rows["method"]))
    figure, axes = _figure(3.1 + 0.17 * _rows(methods))
    points = list(dict.fromkeys(rows["point"]))
    inside = rows[rows["train"] == rows["test"]]
    inside = rows if inside.empty else inside
    for number, method in enumerate(methods):
        own = inside[inside["method"] == method].groupby(["point", "seed"])["test_accuracy"].mean().groupby("point")
        mean, spread = 100 * own.mean().reindex(points), 100 * own.std().reindex(points).fillna(0)
        places = np.arange(len(points)) + 0.03 * (number - (len(methods) - 1) / 2)
        colour = SERIES[number % len(SERIES)]
        axes.errorbar(
            places, mean, yerr=spread, color=colour, marker=_marker(number), markersize=4, linewidth=1.4, elinewidth=1,
            label=method,
        )  # fmt: skip
    axes.set_xticks(np.arange(len(points)), [str(value) for value in values])
    _labels(axes, key.partition(".")[2], "test accuracy, per cent")
    _legend(figure, axes)
    return figure


def domain_gaps(table: pd.DataFrame) -> Figure:
    """Accuracy inside (filled) and outside (hollow) the domain that each method was adapted on."""
    table = table[table["point"] == table["point"].iloc[-1]]
    if (table["train"] == AVERAGE).any():
        table = table[table["train"] == AVERAGE]
        lines = list(table["method"])
    else:
        lines = [f"{one['method']}, {one['train']}" for _, one in table.iterrows()]
    figure, axes = _figure(1.1 + 0.3 * len(lines))
    places = np.arange(len(lines))[::-1]
    axes.hlines(places, table["out_of_domain"], table["in_domain"], color=SERIES[1], linewidth=2)
    axes.plot(table["in_domain"], places, "o", color=SERIES[1], label="in domain")
    axes.plot(table["out_of_domain"], places, "o", color=SERIES[1], markerfacecolor=PAPER, label="out of domain")
    axes.set_yticks(places, lines)
    axes.set_ylim(-0.6, len(lines) - 0.4)
    _labels(axes, "test accuracy, per cent", "")
    _legend(figure, axes)
    return figure


def smoothed(values: pd.Series) -> pd.Series:
    """The running mean of about a twentieth of the values, at least 3."""
    return values.rolling(max(3, len(values) // 20), min_periods=1, center=True).mean()


def _figure(height: float) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _marker(number: int) -> str:
    """Of the line with this number: of 8 neighbours no two alike, and with its colour no other's, up to 64 lines."""
    return "os^Dv<>P"[(number + number // len(SERIES)) % 8]


def _legend(figure: Figure, axes: Axes) -> None:
    """A legend above the axes, where it hides nothing."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=_columns(names), fontsize=8.5)


def _columns(names: Sequence[str]) -> int:
    """Of a legend: as many as have room beside each other, 3 at most."""
    return max(1, min(3, int(WIDTH / (0.5 + 0.07 * max(map(len, names))))))  # inches of a handle and of a character


def _rows(names: Sequence[str]) -> int:
    """Of a legend."""
    return -(-len(names) // _columns(names))


def _labels(axes: Axes, across: str, up: str) -> None:
    axes.set_xlabel(across)
    axes.set_ylabel(up)
