"""The K-shot draw: from a task's rows to K training and K dev rows a class, and the test rows.

Every method is compared on the same draw: it depends on the train split's row order, K and the seed
only. The dev split chooses the best step; the test split is never drawn from and never chosen on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from supmer_ray.errors import UserError
from supmer_ray.fewshot.definition import TaskDefinition


@dataclass(frozen=True)
class FewShotDraw:
    """K rows a class to train on, and K other rows a class to choose the best step."""

    train: pd.DataFrame
    dev: pd.DataFrame


def draw(definition: TaskDefinition, frames: Mapping[str, pd.DataFrame], shots: int, seed: int) -> FewShotDraw:
    """Draw a few-shot task.

    The rows of each class are shuffled by (seed, class number); training takes from the front and
    dev from the back, so that the draw for a smaller K lies within that for a larger one.

    Args:
        frames: what `definition.read()` gave.
        shots: K.

    Raises:
        UserError: a class has fewer than 2K rows in the train split.
    """
    rows = frames["train"]
    train: list[np.ndarray] = []
    dev: list[np.ndarray] = []
    for number, label in enumerate(definition.labels):
        own = np.flatnonzero((rows[definition.label] == label).to_numpy())
        if len(own) < 2 * shots:
            raise UserError(
                f"Class '{label}' of task '{definition.name}' has {len(own)} rows in its train split, repeated and "
                f"tested ones not counted, but needs {2 * shots}: {shots} to train and {shots} for the dev split; "
                "lower the shots or add rows."
            )
        shuffled = np.random.default_rng((seed, number)).permutation(own)
        train.append(shuffled[:shots])
        dev.append(shuffled[-shots:])
    return FewShotDraw(
        train=rows.iloc[np.concatenate(train)].reset_index(drop=True),
        dev=rows.iloc[np.concatenate(dev)].reset_index(drop=True),
    )


def test_rows(frames: Mapping[str, pd.DataFrame], max_test: int | None) -> pd.DataFrame:
    """The test rows that every data seed and every method is judged on: all, or the same `max_test` of them."""
    test = frames["test"]
    if max_test is not None and max_test < len(test):
        test = test.iloc[np.sort(np.random.default_rng(0).permutation(len(test))[:max_test])]
    return test.reset_index(drop=True)
