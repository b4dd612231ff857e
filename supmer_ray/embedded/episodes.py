"""Few-shot tasks that text itself holds, for teaching a backbone to be steered by a prompt that a few steps adapted.

The corpus goes in, episodes come out: some classes of sentences, a word that stands for each, support and query
sentences behind masks. What a class is differs: a cluster of sentences, several clusters together, a document, or a
word that is masked wherever it stands (after Bansal et al., 2020, arXiv:2009.08445). Half of the words that name
clusters say what these are about, the others are words like any, so that only the support set tells what they mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from supmer_ray.embedded.corpus import WordExamples

EPISODE_SHARE = {"cluster": 0.45, "clusters": 0.20, "word": 0.25, "document": 0.10}
"""How often an episode's classes are of each kind."""

MOST_CLASSES = 5
TOGETHER = 5
"""Clusters that a class of kind "clusters" has at most."""
UNTOLD = 0.35
"""How often clusters are named by words that say nothing of them."""
OPINIONS = 0.4
"""How often the masked words are such as "very" stands before."""
MATTER_TAIL = 0.6
"""How often the tail asks what the text is about, and not how it is."""
WORD_ROWS = 40
"""Sentences that a word must stand in to be a class."""
MEASURED_STEPS = 8
"""Steps of Adam after which the accuracy on held-out episodes is measured."""


@dataclass(frozen=True)
class Episode:
    """A few-shot task.

    Attributes:
        kind: one of EPISODE_SHARE.
        words: (n,) ids of the words that stand for the classes.
        bodies: framed token ids with one mask, support and query examples in any order.
        answers: (examples,) the class of each.
        support: (examples,) whether it is one to adapt on.
    """

    kind: str
    words: np.ndarray
    bodies: list[list[int]]
    answers: np.ndarray
    support: np.ndarray


@dataclass(frozen=True)
class EpisodeRows:
    """The support or the query examples of some episodes, padded, short ones first.

    Attributes:
        ids: (B, L) token ids.
        mask: (B, L) whether a position is no padding.
        owner: (B,) the episode of each example.
        choices: (B, n) the words it may answer, −1 where its episode has fewer.
        answers: (B,) which of them is right.
    """

    ids: Tensor
    mask: Tensor
    owner: Tensor
    choices: Tensor
    answers: Tensor

    @staticmethod
    def of(episodes: Sequence[Episode], *, support: bool, pad: int) -> EpisodeRows:
        """The examples of `episodes` that are for support, or the others."""
        chosen = [
            (owner, episode, int(number))
            for owner, episode in enumerate(episodes)
            for number in np.flatnonzero(episode.support == support)
        ]
        chosen.sort(key=lambda item: len(item[1].bodies[item[2]]))
        lengths = np.array([len(episode.bodies[number]) for _, episode, number in chosen])
        ids = np.full((len(chosen), lengths.max()), pad, np.int64)
        choices = np.full((len(chosen), MOST_CLASSES), -1, np.int64)
        for row, (_, episode, number) in enumerate(chosen):
            ids[row, : lengths[row]] = episode.bodies[number]
            choices[row, : len(episode.words)] = episode.words
        return EpisodeRows(
            torch.from_numpy(ids),
            torch.from_numpy(np.arange(ids.shape[1]) < lengths[:, None]),
            torch.tensor([owner for owner, _, _ in chosen]),
            torch.from_numpy(choices),
            torch.tensor([int(episode.answers[number]) for _, episode, number in chosen]),
        )


@dataclass(frozen=True)
class Episodes:
    """Draws episodes from the sentences of `words`.

    Args:
        shots: support examples of a class, and as many query examples.
    """

    words: WordExamples
    shots: int

    def draw(self, generator: np.random.Generator, kind: str | None = None) -> Episode:
        """An episode of `kind`, or of a kind drawn by EPISODE_SHARE."""
        kind = kind or str(generator.choice(list(EPISODE_SHARE), p=list(EPISODE_SHARE.values())))
        classes = int(generator.integers(2, MOST_CLASSES + 1))
        while True:
            named = self._masked(classes, generator) if kind == "word" else self._grouped(kind, classes, generator)
            if len(np.unique(named[0])) == classes:
                break
        words, texts = named
        backbone = self.words.backbone
        bodies = [[*backbone.prefix, *text, *backbone.suffix] for group in texts for text in group]
        support = np.tile(np.arange(2 * self.shots) < self.shots, classes)
        return Episode(kind, words, bodies, np.repeat(np.arange(classes), 2 * self.shots), support)

    def _masked(self, classes: int, generator: np.random.Generator) -> tuple[np.ndarray, list[list[list[int]]]]:
        """Words, and for each of them sentences in which it is masked; where it stands again it is left out."""
        ids, opinions = np.array(list(self._rows_of)), self.words.lexicon.manner
        pool = ids[opinions[ids]] if generator.random() < OPINIONS and opinions[ids].sum() >= MOST_CLASSES else ids
        words = generator.choice(pool, classes, replace=False)
        texts = []
        for word in words:
            rows = generator.choice(self._rows_of[int(word)], 2 * self.shots, replace=False)
            texts.append([self._hide(self.words.corpus.row_tokens(int(row)), int(word)) for row in rows])
        return words, texts

    def _hide(self, ids: np.ndarray, word: int) -> list[int]:
        first = int(np.flatnonzero(ids == word)[0])
        rest = ids[first + 1 :]
        return [*ids[:first].tolist(), self.words.backbone.sentinel, *rest[rest != word].tolist()]

    def _grouped(
        self, kind: str, classes: int, generator: np.random.Generator
    ) -> tuple[np.ndarray, list[list[list[int]]]]:
        """A word for each of some groups of sentences, and sentences of each behind one tail."""
        store, need = self.words.store, 2 * self.shots
        if kind == "document":
            bounds = store.corpus.bounds
            chosen = generator.choice(self._documents, classes, replace=False)
            groups = [np.arange(bounds[document], bounds[document + 1]) for document in chosen]
            clusters = None
        else:
            several = int(generator.integers(2, TOGETHER + 1)) if kind == "clusters" else 1
            most = len(self._clusters) // classes
            clusters = generator.permutation(self._clusters)[: classes * min(several, most)].reshape(classes, -1)
            groups = [np.concatenate([store.clusters[cluster] for cluster in part]) for part in clusters]
        if clusters is None or generator.random() < UNTOLD:
            words = generator.choice(np.array(list(self._rows_of)), classes, replace=False)
        else:
            words = np.array([generator.choice(self.words.keywords[part[0]]) for part in clusters])
        tails = self.words.tails["matter" if generator.random() < MATTER_TAIL else "manner"]
        before, after = tails[generator.integers(len(tails))]
        drawn = [generator.choice(group, need, replace=False) for group in groups]
        texts = [[[*before, *store.corpus.row_tokens(int(row)).tolist(), *after] for row in rows] for rows in drawn]
        return words, texts

    @cached_property
    def _clusters(self) -> np.ndarray:
        """Clusters with enough sentences for a class."""
        return np.flatnonzero([len(rows) >= 2 * self.shots for rows in self.words.store.clusters])

    @cached_property
    def _documents(self) -> np.ndarray:
        """Documents with enough sentences for a class."""
        return np.flatnonzero(np.diff(self.words.store.corpus.bounds) >= 2 * self.shots)

    @cached_property
    def _rows_of(self) -> dict[int, np.ndarray]:
        """The sentences that hold a word, for each word that can be a class."""
        corpus, lexicon = self.words.corpus, self.words.lexicon
        tokens = corpus.tokens
        owner = np.repeat(np.arange(len(corpus)), np.diff(corpus.starts))
        wanted = lexicon.wanted(tokens, lexicon.matter + lexicon.manner) > 0
        pairs = np.unique(np.stack([tokens[wanted], owner[wanted]]), axis=1)
        ids, first = np.unique(pairs[0], return_index=True)
        least = max(WORD_ROWS, 2 * self.shots)
        rows = np.split(pairs[1], first[1:])
        return {int(id): own for id, own in zip(ids, rows, strict=True) if len(own) >= least}
