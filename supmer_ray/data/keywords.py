"""Domains get words of their own: class TF-IDF over the sentences that train, for the task type sck.

A store's sentences and its clustering flow in, a few token ids for each domain flow out. Only words that are one
token can be an answer, so only those are counted; memory holds one number for each domain and token.
"""

from __future__ import annotations

import numpy as np

from supmer_ray.data.store import Family, Sentences

KEYWORDS = 8
"""Words kept of a domain."""

RARE = 2
"""Sentences of a domain that a word must stand in to be one of its own."""


def class_tf_idf(counts: np.ndarray) -> np.ndarray:
    """How much each word is a class's own, from how many sentences of the class it stands in: (classes, words) both.

    A word w scores n(w, class) · log(1 + A / n(w)), n those counts and A how many words a class has on average.
    (Grootendorst, 2022, arXiv:2203.05794, equation 2.)
    """
    return counts * np.log1p(counts.sum() / max(1, len(counts)) / np.maximum(counts.sum(axis=0), 1))


def keywords(sentences: Sentences, family: Family, words: np.ndarray, continuations: np.ndarray) -> np.ndarray:
    """The words that are most each domain's own, most telling first.

    Args:
        words: (vocabulary,) whether a token begins a word that may be an answer.
        continuations: (vocabulary,) whether a token goes on with the word before it.

    Returns:
        (domains, KEYWORDS) int32 token ids; −1 where a domain has fewer.
    """
    domain = np.full(len(sentences), -1, np.int32)
    sizes = np.diff(family.starts)
    number = np.repeat(np.arange(family.domains, dtype=np.int32), sizes)
    trains = np.arange(len(family.items)) < np.repeat(family.train_ends, sizes)
    domain[family.items[trains]] = number[trains]
    vocabulary = len(words)
    totals = np.zeros(family.domains * vocabulary, np.float32)
    for first, offsets, tokens in sentences.batches():
        row = np.repeat(np.arange(first, first + len(offsets) - 1), np.diff(offsets))
        # A word ends where its sentence does, or where the next token begins another word.
        goes_on = np.append(continuations[tokens[1:]] & (row[1:] == row[:-1]), False)
        counted = words[tokens] & ~goes_on & (domain[row] >= 0)
        pairs = np.unique(row[counted] * vocabulary + tokens[counted])
        places = domain[pairs // vocabulary] * np.int64(vocabulary) + pairs % vocabulary
        found, times = np.unique(places, return_counts=True)
        totals[found] += times
    counts = totals.reshape(family.domains, vocabulary)
    score = class_tf_idf(counts)
    score[counts < RARE] = 0
    best = np.argsort(-score, axis=1, kind="stable")[:, :KEYWORDS]
    return np.where(np.take_along_axis(score, best, axis=1) > 0, best, -1).astype(np.int32)
