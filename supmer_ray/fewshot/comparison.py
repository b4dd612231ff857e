"""From per-seed rows to what they say: means, spreads, paired differences, gaps between domains.

A row is one method with one data seed on one task (`evaluate.Outcome`). All methods saw the same draws, so
two methods are compared seed by seed: the mean of the differences, an interval over seeds, and Student's
paired test. Accuracies and differences are in per cent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd

AVERAGE = "average"
"""The name under which a method's mean over the tasks stands; only tasks tested on themselves count."""

INTERVAL = 0.95
RESAMPLES = 9999

FEWEST_RESAMPLED = 5
"""With fewer seeds a bootstrap's interval, which reaches no further than the differences, would hold the mean in 50 to
88 % of the cases; Student's stands in for it."""

INTERVAL_IS = f"95 % bootstrap interval; Student's of fewer than {FEWEST_RESAMPLED} seeds"
"""How tables name it."""


def paired(scores: np.ndarray, baseline: np.ndarray) -> dict[str, float]:
    """How much `scores` (n,) are above `baseline` (n,), entry by entry.

    Returns:
        `difference`, the mean; `low` and `high`, its 95 % interval (`INTERVAL_IS`); `p` of the paired t-test,
        two-sided. NaN where fewer than two pairs, or differences all alike, say nothing.
    """
    import scipy.stats  # half of what the whole module takes to import, and a plan or a report may need no test

    differences = np.asarray(scores, float) - np.asarray(baseline, float)
    result = {"difference": float(differences.mean()), "low": np.nan, "high": np.nan, "p": np.nan}
    if len(differences) < 2 or np.ptp(differences) < 1e-12:
        return result
    test = scipy.stats.ttest_1samp(differences, 0)
    result["p"] = float(test.pvalue)
    if len(differences) < FEWEST_RESAMPLED:
        low, high = test.confidence_interval(INTERVAL)
        return result | {"low": float(low), "high": float(high)}
    # The 2.5 % percentiles of resampled means would hold the mean in 84 % of the cases with five seeds and in 91 % with
    # ten; taken as far out as Student's t says, in 92 and 96 % (Hesterberg 2015, doi:10.1080/00031305.2015.1089789).
    count = len(differences)
    far = np.sqrt(count / (count - 1)) * scipy.stats.t.ppf((1 + INTERVAL) / 2, count - 1)
    level = 1 - 2 * scipy.stats.norm.sf(far)
    bootstrap = scipy.stats.bootstrap(
        (differences,), np.mean, confidence_level=level, n_resamples=RESAMPLES, method="percentile", rng=0
    )
    low, high = bootstrap.confidence_interval
    return result | {"low": float(low), "high": float(high)}


def summarize(rows: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """One row for each point, task to adapt on, task to test on, and method.

    Where a point has several tasks that are tested on themselves, their average is added, with the name
    `AVERAGE`: its `mean` and paired difference are of each seed's average over the tasks, its `sd` is the
    mean of the tasks' spreads.

    Args:
        rows: `Outcome`s, with a column `point`.
        baseline: the method that differences are taken to; where it has no rows they are NaN.

    Returns:
        point, train, test, method, seeds, shots, mean, sd, difference, low, high, p (all in per cent but p),
        seconds (mean wall time of a seed) and trained_parameters.
    """
    records = []
    for point, own in _groups(rows, "point"):
        spreads: dict[str, list[float]] = {}
        for train, learned in _groups(own, "train"):
            for test, tested in _groups(learned, "test"):
                found = _methods(tested, baseline)
                records += [{"point": point, "train": train, "test": test, **one} for one in found]
                if train == test:
                    for one in found:
                        spreads.setdefault(one["method"], []).append(one["sd"])
        inside = own[own["train"] == own["test"]]
        if inside["test"].nunique() > 1:
            numbers = ["test_accuracy", "seconds", "trained_parameters", "shots"]
            average = inside.groupby(["method", "seed"], sort=False)[numbers].mean().reset_index()
            for one in _methods(average, baseline):
                one["sd"] = float(np.mean(spreads[one["method"]]))
                records.append({"point": point, "train": AVERAGE, "test": AVERAGE, **one})
    return pd.DataFrame(records)


def gaps(rows: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """What each method loses from the domain it was adapted on to the others; empty without other domains.

    Returns:
        point, train, method, in_domain, out_of_domain, gap (their means over seeds, in per cent), relative_gap
        (the share of the baseline's gap), and how much smaller the gap is than the baseline's, seed by seed:
        difference, low, high, p. Of several train tasks the mean is added, with the name `AVERAGE`.
    """
    table = rows.assign(inside=rows["train"] == rows["test"])
    sides = table.pivot_table(
        index=["point", "train", "method", "seed"], columns="inside", values="test_accuracy", sort=False
    )
    if not {True, False} <= set(sides.columns):
        return pd.DataFrame()
    sides = (100 * sides.dropna()).reset_index().rename(columns={True: "in_domain", False: "out_of_domain"})
    sides["gap"] = sides["in_domain"] - sides["out_of_domain"]
    numbers = ["in_domain", "out_of_domain", "gap"]
    if sides["train"].nunique() > 1:
        average = sides.groupby(["point", "method", "seed"], sort=False)[numbers].mean().reset_index()
        sides = pd.concat([sides, average.assign(train=AVERAGE)])
    records = []
    for (point, train), own in sides.groupby(["point", "train"], sort=False):
        seeds = own.pivot(index="seed", columns="method", values="gap")
        for method, mine in _groups(own, "method"):
            record = {"point": point, "train": train, "method": method, **mine[numbers].mean().to_dict()}
            if baseline in seeds and method != baseline:
                both = seeds[[method, baseline]].dropna()
                own_gap, other_gap = both[method].mean(), both[baseline].mean()
                record["relative_gap"] = float(own_gap / other_gap) if other_gap > 0 else np.nan
                record |= paired(both[baseline].to_numpy(), both[method].to_numpy())
            records.append(record)
    return pd.DataFrame(records)


def markdown(table: pd.DataFrame, drops: pd.DataFrame, baseline: str, title: str, note: str) -> str:
    """The comparison as Markdown tables: accuracies, paired differences, gaps between domains, cost.

    Args:
        table, drops: what `summarize` and `gaps` found with the same baseline.
    """
    seeds = int(table["seeds"].max())
    parts = [f"# {title}", note]
    for point, own in _groups(table, "point"):
        if point:
            parts.append(f"## {point}")
        columns = [pair_name(train, test) for train, test in own[["train", "test"]].drop_duplicates().to_numpy()]
        own = own.assign(column=[pair_name(train, test) for train, test in own[["train", "test"]].to_numpy()])
        cells = own.set_index(["method", "column"])
        methods = list(dict.fromkeys(own["method"]))
        inside = ", of the tasks tested on themselves" if any(" → " in one for one in columns) else ""
        of_all = f" ({AVERAGE}{inside}: the mean of the tasks' standard deviations)" if AVERAGE in columns else ""
        parts.append(f"Test accuracy in per cent, mean ± standard deviation over {seeds} data seeds{of_all}:")
        parts.append(
            _table(
                ["method", *columns],
                [[method, *(_cell(cells, method, column, _accuracy) for column in columns)] for method in methods],
            )
        )
        if baseline in methods and len(methods) > 1:
            parts.append(f"Difference to {baseline} in points, paired by seed [{INTERVAL_IS}], p of the paired t-test:")
            others = [method for method in methods if method != baseline]
            parts.append(
                _table(
                    ["method", *columns],
                    [[method, *(_cell(cells, method, column, _difference) for column in columns)] for method in others],
                )
            )
        if not drops.empty:
            parts.append(
                "Adapted on one domain and tested on others: accuracy inside and outside, the gap, and how much "
                f"smaller it is than that of {baseline}:"
            )
            parts.append(_gap_table(drops[drops["point"] == point]))
        parts.append("Cost of one seed of one task:")
        # What a method cost on one task stands on the line of each of its targets.
        each = own[own["train"] != AVERAGE].drop_duplicates(["train", "method"])
        cost = each.groupby("method", sort=False)[["seconds", "trained_parameters"]].mean()
        parts.append(
            _table(
                ["method", "wall seconds", "trained parameters"],
                [[method, f"{one.seconds:.1f}", f"{one.trained_parameters:,.0f}"] for method, one in cost.iterrows()],
            )
        )
    return "\n\n".join(parts) + "\n"


def _groups(rows: pd.DataFrame, column: str) -> Iterator[tuple[str, pd.DataFrame]]:
    for name in dict.fromkeys(rows[column]):
        yield name, rows[rows[column] == name]


def _methods(rows: pd.DataFrame, baseline: str) -> list[dict[str, Any]]:
    """What each method reached on one task, or on the average of several."""
    scores = 100 * rows.pivot(index="seed", columns="method", values="test_accuracy")
    records = []
    for method, own in _groups(rows, "method"):
        values = scores[method].dropna()
        record = {
            "method": method,
            "seeds": len(values),
            "shots": float(own["shots"].mean()),
            "mean": float(values.mean()),
            "sd": float(values.std(ddof=1)) if len(values) > 1 else np.nan,
            "difference": np.nan,
            "low": np.nan,
            "high": np.nan,
            "p": np.nan,
        }
        if baseline in scores and method != baseline:
            both = scores[[method, baseline]].dropna()
            record |= paired(both[method].to_numpy(), both[baseline].to_numpy())
        record["seconds"] = float(own["seconds"].mean())
        record["trained_parameters"] = float(own["trained_parameters"].mean())
        records.append(record)
    return records


def pair_name(train: str, test: str, arrow: str = " → ") -> str:
    """What a task to adapt on and one to test on are called: "news → films", or the task where both are the same."""
    return test if train == test else f"{train}{arrow}{test}"


def _cell(cells: pd.DataFrame, method: str, column: str, write: Callable[[pd.Series], str]) -> str:
    return write(cells.loc[(method, column)]) if (method, column) in cells.index else "–"


def _accuracy(one: pd.Series) -> str:
    return f"{one['mean']:.1f}" + ("" if np.isnan(one["sd"]) else f" ± {one['sd']:.1f}")


def _difference(one: pd.Series) -> str:
    if np.isnan(one["difference"]):
        return "–"
    text = f"{one['difference']:+.1f}"
    return text if np.isnan(one["p"]) else f"{text} [{one['low']:+.1f}, {one['high']:+.1f}], p {probability(one['p'])}"


def probability(p: float) -> str:
    """A p-value as "= 0.03" or "< 0.001"."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}" if p < 0.1 else f"= {p:.2f}"


def _gap_table(drops: pd.DataFrame) -> str:
    lines = []
    for _, one in drops.iterrows():
        smaller, share = "–", "–"
        if "difference" in one and not np.isnan(one["difference"]):
            smaller = _difference(one)
            share = "–" if np.isnan(one["relative_gap"]) else f"{100 * one['relative_gap']:.0f} %"
        numbers = [f"{one[name]:.1f}" for name in ("in_domain", "out_of_domain", "gap")]
        lines.append([one["train"], one["method"], *numbers, smaller, share])
    head = ["adapted on", "method", "in domain", "out of domain", "gap", "smaller by", "share of the baseline's gap"]
    return _table(head, lines)


def _table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])
