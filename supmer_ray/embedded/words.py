"""Word examples: an encoder input with one mask, and the words that may stand there.

Three kinds teach words: a masked word of the sentence itself; a short tail with a mask ("topic : ⟨mask⟩ .", "it was
⟨mask⟩ .") whose answers are words from around the sentence; and the word of the sentence's class, one of some clusters
of sentences that the prompt tells of.

A prompt is random vocabulary rows, as few-shot prompts start from them. In some there are rows that help: the answer
among other words like it, or for each class its word and the mean vector of some of its sentences. So the decoder
learns that what a prompt says matters, which is what prompt tuning lives on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from supmer_ray.config import VOCABULARY_ROWS
from supmer_ray.data.keywords import class_tf_idf
from supmer_ray.embedded.corpus import SOURCES, Corpus, TaskStore
from supmer_ray.errors import UserError
from supmer_ray.model.backbone import Backbone

MATTER_SHARE = (0.45, 0.25, 0.08, 0.14, 0.08)
MANNER_SHARE = (0.10, 0.45, 0.20, 0.25, 0.0)
"""How often a sentence comes from each source, when what it is about is asked, and when how it is."""

WORD_SHARE = {"masked": 0.25, "matter": 0.30, "manner": 0.20, "class": 0.25}
"""How often a word example is of each kind."""

MATTER_TAILS = (
    "{} topic : [MASK] .",
    "{} category : [MASK] .",
    "{} subject : [MASK] .",
    "{} keyword : [MASK] .",
    "{} this is about [MASK] .",
    "{} this is [MASK] .",
    "{} it is about [MASK] .",
    "{} more on [MASK] .",
    "{} [MASK] :",
    "[MASK] : {}",
    "[MASK] news : {}",
)
MANNER_TAILS = (
    "{} it was [MASK] .",
    "{} it was [MASK] ?",
    "{} it is [MASK] .",
    "{} this is [MASK] .",
    "{} they were [MASK] .",
    "{} i find it [MASK] .",
    "{} all in all , [MASK] .",
    "{} a [MASK] one .",
    "{} just [MASK] !",
)
INTENSIFIERS = frozenset(("very", "really", "too", "quite", "extremely", "pretty", "so", "incredibly", "truly"))
NO_MANNER = ("much", "many", "far", "few", "what", "why", "very", "called", "often", "little", "sure", "please", "soon")
"""Words that stand behind intensifiers without telling how something is."""

ANSWERS = 24
"""Words that one input may ask for at once."""
KEYWORDS = 6
"""Words of a cluster, the most its own, that may name it."""
MOST_CLASSES = 6
MEMBERS = (1, 2, 4, 8, 16)
"""Sentences that the vector of a class in a prompt is the mean of."""
TRIES = 10_000
"""Sentences that are looked at for a word to ask for; of the catalog's whole text a few suffice."""

HINTS = 0.35
"""How often the prompt of a word example holds the answer among other words."""
RARE = 3e-5
"""Share of the text up to which a word counts as rare."""


@dataclass(frozen=True)
class Lexicon:
    """What the text says about words; all arrays are (vocabulary,).

    Attributes:
        whole: whether a piece begins a word of two ASCII letters or more.
        continues: whether a piece goes on with the word before it.
        matter: how much a word is wanted as an answer to what a text is about: 1 if rare, less if
            frequent, 0 for the most frequent.
        manner: whether it is a word that "very" stands before: how something is, not what.
    """

    whole: np.ndarray
    continues: np.ndarray
    matter: np.ndarray
    manner: np.ndarray

    @staticmethod
    def of(corpus: Corpus, vocabulary: dict[str, int]) -> Lexicon:
        """Count the words of a corpus; each of its sources weighs the same.

        Args:
            vocabulary: id of each piece of the tokenizer, "##" before one that goes on with a word.
        """
        size = max(vocabulary.values()) + 1
        whole, continues = np.zeros(size, bool), np.zeros(size, bool)
        for piece, number in vocabulary.items():
            whole[number] = len(piece) > 1 and piece.isalpha() and piece.isascii()
            continues[number] = piece.startswith("##")
        share = np.zeros(size)
        for rows in corpus.source_rows:
            counts = np.bincount(np.concatenate([corpus.tokens[:0], *map(corpus.row_tokens, rows)]), minlength=size)
            share += counts / max(1, counts.sum()) / len(SOURCES)
        ranked = np.argsort(-np.where(whole, share, 0), kind="stable")
        stressed = np.isin(corpus.tokens[:-1], [vocabulary[word] for word in INTENSIFIERS])
        after = np.bincount(corpus.tokens[1:][stressed], minlength=size)
        manner = whole & (after >= 4) & (after >= 0.02 * np.bincount(corpus.tokens, minlength=size))
        manner[ranked[:60]] = False
        manner[[vocabulary[word] for word in NO_MANNER]] = False
        matter = np.where(whole, np.sqrt(RARE / np.maximum(share, RARE)), 0)
        matter[ranked[:130]] = 0
        matter[share == 0] = 0
        return Lexicon(whole, continues, matter, manner)

    def wanted(self, ids: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """(n,) `weight` of each id of a sentence, 0 where a word has more pieces than this one."""
        return weight[ids] * ~np.append(self.continues[ids[1:]], False)


@dataclass(frozen=True)
class WordExample:
    """An encoder input with one mask, the words that may stand there, and what the prompt says of them.

    Attributes:
        prompt: ids of the prompt's rows; −1−k stands for row k of `vectors`.
        body: framed token ids.
        words, shares: (n,) ids of the answers, and their shares, which add up to 1.
        vectors: (K, d) float32.
    """

    prompt: list[int]
    body: list[int]
    words: np.ndarray
    shares: np.ndarray
    vectors: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt) + len(self.body)


@dataclass(frozen=True)
class WordExamples:
    """Draws masked words, tails and classes.

    Args:
        longest: rows of a prompt at most.
    """

    corpus: Corpus
    lexicon: Lexicon
    backbone: Backbone
    store: TaskStore
    longest: int

    @cached_property
    def _tails(self) -> dict[str, list[tuple[list[int], list[int]]]]:
        """(before, after) ids of each tail."""

        def ids(piece: str) -> list[int]:
            return self.backbone.tokenize([piece])[0] if piece.strip() else []

        split = {}
        for kind, tails in (("matter", MATTER_TAILS), ("manner", MANNER_TAILS)):
            pieces = [tail.split("{}") for tail in tails]
            split[kind] = [(ids(before), ids(after)) for before, after in pieces]
        return split

    def draw(self, kind: str, generator: np.random.Generator, *, plain: bool = False) -> WordExample:
        """An example whose answers are up to `ANSWERS` words.

        Args:
            kind: one of WORD_SHARE.
            plain: for measuring: no prompt (but for classes, which it must tell of), and any whole word masked alike.

        Raises:
            UserError: the text is so little that it has no such words.
        """
        shares = MANNER_SHARE if kind == "manner" else MATTER_SHARE
        for _ in range(TRIES):
            if kind == "class":
                return self._class(generator)
            rows = self.corpus.source_rows[generator.choice(len(SOURCES), p=shares)]
            row = int(rows[generator.integers(len(rows))])
            if kind == "masked":
                found = self._masked(self.corpus.row_tokens(row), generator, evenly=plain)
            else:
                found = self._tail(kind, row, generator)
            if found is not None:
                body, words, weights = found
                prompt: list[int] = []
                if not plain:
                    prompt = random_rows(self.longest, generator)
                    if prompt and generator.random() < HINTS:
                        words, weights = self._hint(kind, prompt, words, weights, generator)
                framed = [*self.backbone.prefix, *body, *self.backbone.suffix]
                return WordExample(prompt, framed, words, weights / weights.sum(), self._no_vectors)
        raise UserError(f"The text has no words of the kind '{kind}' to ask for; read more documents of each source.")

    @cached_property
    def _no_vectors(self) -> np.ndarray:
        return np.zeros((0, self.backbone.d_model), np.float32)

    @cached_property
    def _common(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Words that a hint may name beside the answer, and how often each is drawn."""
        lexicon = self.lexicon
        counts = np.bincount(self.corpus.tokens, minlength=len(lexicon.whole))
        weights = {"manner": counts * lexicon.manner, "matter": counts * lexicon.matter}
        weights["masked"] = weights["matter"] + 0.3 * weights["manner"]
        found = {kind: np.flatnonzero(weight) for kind, weight in weights.items()}
        return {kind: (ids, weights[kind][ids] / weights[kind][ids].sum()) for kind, ids in found.items()}

    def _hint(
        self, kind: str, prompt: list[int], words: np.ndarray, weights: np.ndarray, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Put one of the answers and other words into the rows of `prompt`; that answer is asked for then.

        Where the rows are fewer than the words, the answer may be among those that are left out.
        """
        at = int(generator.choice(len(words), p=weights / weights.sum()))
        ids, share = self._common[kind]
        others = generator.choice(ids, int(generator.integers(1, MOST_CLASSES)), p=share)
        named = generator.permutation([words[at], *others[others != words[at]]][: len(prompt)])
        for place, word in zip(generator.choice(len(prompt), len(named), replace=False), named, strict=True):
            prompt[place] = int(word)
        return words[at : at + 1], np.ones(1)

    @cached_property
    def _keywords(self) -> list[np.ndarray]:
        """For each cluster of sentences the words that are most its own, by class TF-IDF."""
        corpus, lexicon = self.store.corpus, self.lexicon
        wanted = lexicon.matter + 0.5 * lexicon.manner
        counts = np.zeros((len(self.store.centroids), len(wanted)), np.float32)
        for cluster, rows in enumerate(self.store.clusters):
            for row in rows:
                ids = corpus.row_tokens(int(row))
                counts[cluster, np.unique(ids)] += 1
        counts *= wanted > 0
        return list(np.argsort(-class_tf_idf(counts), axis=1)[:, :KEYWORDS])

    def _class(self, generator: np.random.Generator) -> WordExample:
        """A sentence of one of some clusters, each told in the prompt by its word, its vector or both."""
        usable = self.store.usable_clusters
        chosen = generator.choice(usable, int(generator.integers(2, MOST_CLASSES + 1)), replace=False)
        named = generator.random() < 0.6
        shown = not named or generator.random() < 0.6
        if named:
            words = np.array([generator.choice(self._keywords[cluster]) for cluster in chosen])
        else:
            ids, share = self._common["masked"]
            words = generator.choice(ids, len(chosen), p=share)
        if len(np.unique(words)) < len(words):
            return self._class(generator)
        answer = int(generator.integers(len(chosen)))
        row = int(generator.choice(self.store.clusters[chosen[answer]]))
        vectors = []
        for cluster in chosen if shown else ():
            rows = generator.choice(self.store.clusters[cluster], int(generator.choice(MEMBERS)))
            rows = rows[rows != row]
            vectors.append((self.store.embeddings[rows] if len(rows) else self.store.centroids[[cluster]]).mean(0))
        groups = [[int(word), *([-1 - number] if shown else [])] for number, word in enumerate(words)]
        filler = random_rows(self.longest, generator)[: max(0, self.longest - sum(map(len, groups)))]
        groups += [[word] for word in filler]
        prompt = [id for group in generator.permutation(len(groups)) for id in groups[group]]
        before, after = self._tails["matter"][generator.integers(len(self._tails["matter"]))]
        body = [*before, *self.store.corpus.row_tokens(row).tolist(), *after]
        return WordExample(
            prompt,
            [*self.backbone.prefix, *body, *self.backbone.suffix],
            words[answer : answer + 1].astype(np.int64),
            np.ones(1),
            np.stack(vectors).astype(np.float32) if shown else self._no_vectors,
        )

    def _masked(
        self, ids: np.ndarray, generator: np.random.Generator, *, evenly: bool
    ) -> tuple[list[int], np.ndarray, np.ndarray] | None:
        lexicon = self.lexicon
        preferred = lexicon.matter + 0.3 * lexicon.manner + 0.1 * lexicon.whole
        weight = lexicon.wanted(ids, lexicon.whole.astype(float) if evenly else preferred)
        if weight.sum() <= 0:
            return None
        at = int(generator.choice(len(ids), p=weight / weight.sum()))
        body = [*ids[:at].tolist(), self.backbone.sentinel, *ids[at + 1 :].tolist()]
        return body, ids[at : at + 1].astype(np.int64), np.ones(1)

    def _tail(
        self, kind: str, row: int, generator: np.random.Generator
    ) -> tuple[list[int], np.ndarray, np.ndarray] | None:
        own = self.corpus.row_tokens(row)
        near = [self.corpus.row_tokens(int(r)) for r in self.corpus.around(row, generator)]
        share = self.lexicon.manner.astype(float) if kind == "manner" else self.lexicon.matter
        found = [(ids, self.lexicon.wanted(ids, share) * (0.3 if kind == "manner" else 1.0)) for ids in near]
        if kind == "manner":
            found.append((own, self.lexicon.wanted(own, share)))
        if not found:
            return None
        words = np.concatenate([ids for ids, _ in found])
        weights = np.concatenate([weight for _, weight in found])
        if kind == "matter":
            weights[np.isin(words, own)] = 0
        useful = np.flatnonzero(weights > 0)
        if not len(useful):
            return None
        if len(useful) > ANSWERS:
            useful = generator.choice(useful, ANSWERS, replace=False, p=weights[useful] / weights.sum())
            weights = np.ones_like(weights)
        before, after = self._tails[kind][generator.integers(len(self._tails[kind]))]
        return [*before, *own.tolist(), *after], words[useful].astype(np.int64), weights[useful]


def random_rows(longest: int, generator: np.random.Generator) -> list[int]:
    """Up to `longest` random ids under `VOCABULARY_ROWS`, often none: what a few-shot prompt starts from."""
    length = int(generator.integers(0, longest + 1)) if generator.random() < 0.85 else 0
    return generator.integers(0, VOCABULARY_ROWS, length).tolist()
