"""A linear probe: what a straight line through the frozen encoder's states knows of a task.

Rows of text go in as mean encoder states (no prompt, no pattern), logistic regression of several strengths
is fitted on the K examples a class, and the dev split chooses among them. It is the reference point that
says what the encoder knows already.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from supmer_ray.data.embed import framed, mean_pooled
from supmer_ray.fewshot.adapt import Evaluation, accuracy_and_loss
from supmer_ray.fewshot.definition import TaskDefinition
from supmer_ray.model.backbone import Backbone

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
"""Inverse penalties C that the dev split chooses from."""


def features(
    backbone: Backbone,
    definition: TaskDefinition,
    frame: pd.DataFrame,
    *,
    max_length: int,
    token_budget: int | None = None,
) -> np.ndarray:
    """(n, features) float64 of the rows' text fields.

    One field is its mean encoder state; of several, each one's, and how the first differs from and agrees
    with every other (|u − v| and u · v), which a line could not see.
    """
    states = [_mean_states(backbone, frame[field].tolist(), max_length, token_budget) for field in definition.texts]
    first, others = states[0], states[1:]
    return np.concatenate([*states, *(np.abs(first - other) for other in others), *(first * v for v in others)], axis=1)


def probe(
    train: np.ndarray, answers: np.ndarray, dev: np.ndarray, dev_answers: np.ndarray
) -> tuple[Pipeline, Evaluation]:
    """Fit the probe and choose its strength on the dev split.

    Args:
        train, dev: (n, features); answers, dev_answers: (n,) numbers of labels, each label among `answers`.

    Returns:
        The fitted classifier, and the dev evaluation that chose it.
    """
    best: tuple[Pipeline, Evaluation] | None = None
    for strength in STRENGTHS:
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
        classifier.fit(train, answers)
        found = Evaluation(0, *accuracy_and_loss(classifier.predict_proba(dev), dev_answers))
        if best is None or found.beats(best[1]):
            best = classifier, found
    assert best is not None
    return best


def parameters(classifier: Pipeline) -> int:
    """Trained numbers of the logistic regression."""
    line = classifier.steps[-1][1]
    return int(line.coef_.size + line.intercept_.size)


def _mean_states(backbone: Backbone, texts: Sequence[str], max_length: int, token_budget: int | None) -> np.ndarray:
    """(n, d): the mean of the encoder's states over a text's positions, frame included."""
    ids = backbone.tokenize(texts)
    ends = np.cumsum([0, *map(len, ids)])
    examples = framed(backbone, np.fromiter(chain(*ids), np.int32), ends[:-1], ends[1:], max_length)
    return mean_pooled(backbone, examples, token_budget or backbone.token_budget).cpu().numpy()
