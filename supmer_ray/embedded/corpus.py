"""The catalog's train documents as token ids, and the examples that the embedded decoder learns from.

Documents go in, encoder inputs with one mask and the words that may stand there come out. Two kinds of example
teach words: a masked word of the sentence itself, and a short tail with a mask ("topic : ⟨mask⟩ .", "it was ⟨mask⟩ .")
whose answers are words from around the sentence. The third kind are the paper's five task types.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import nupunkt
from sklearn.cluster import MiniBatchKMeans

from supmer_ray.data.catalog import Document, unlabelled
from supmer_ray.data.embed import frame, mean_pooled
from supmer_ray.data.store import Family, item_rows
from supmer_ray.model.backbone import Backbone

SOURCES = ("bbc", "rotten-tomatoes", "product-reviews", "newsgroups", "reuters")
ORDERED = SOURCES[:3]
"""Sources with sentence ends, so that their neighbours are sentences."""
MATTER_SHARE = (0.45, 0.25, 0.08, 0.14, 0.08)
MANNER_SHARE = (0.10, 0.45, 0.20, 0.25, 0.0)
"""How often a sentence comes from each source, when what it is about is asked, and when how it is."""

WORD_SHARE = {"masked": 0.30, "matter": 0.42, "manner": 0.28}
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

SENTENCE_TOKENS = 40
CHUNK_TOKENS = 24
"""Tokens of a "sentence" of the sources that have no sentence ends."""
ANSWERS = 24
"""Words that one input may ask for at once."""
TASK_DOCUMENTS = 400
"""Documents of each ordered source that the task types are drawn from: embedding them all takes minutes."""
HELD_OUT = 0.04
DOMAINS = 60
RARE = 3e-5
"""Share of the text up to which a word counts as rare."""


@dataclass(frozen=True)
class Corpus:
    """Sentences in document order, in the shape of a store.

    Attributes:
        tokens, starts: sentence i is tokens[starts[i] : starts[i + 1]].
        document: (sentences,) number of each sentence's document.
        bounds: (documents + 1,) first sentence of each document.
        group: (documents,) documents with one number tell of one thing (the reviews of a film).
        source: (sentences,) number of the source in SOURCES.
    """

    tokens: np.ndarray
    starts: np.ndarray
    document: np.ndarray
    bounds: np.ndarray
    group: np.ndarray
    source: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row_tokens(self, row: int) -> np.ndarray:
        return self.tokens[self.starts[row] : self.starts[row + 1]]

    @cached_property
    def source_rows(self) -> list[np.ndarray]:
        return [np.flatnonzero(self.source == number) for number in range(len(SOURCES))]

    @cached_property
    def members(self) -> dict[int, np.ndarray]:
        """The sentences of each group."""
        of_row = self.group[self.document]
        order = np.argsort(of_row, kind="stable")
        groups, first = np.unique(of_row[order], return_index=True)
        return dict(zip(groups.tolist(), np.split(order, first[1:]), strict=True))

    def around(self, row: int, generator: np.random.Generator, reach: int = 3) -> np.ndarray:
        """Sentences near `row`: its neighbours in a document of some length, or others of its group."""
        first, end = self.bounds[self.document[row]], self.bounds[self.document[row] + 1]
        if end - first >= 3:
            near = np.arange(max(first, row - reach), min(end, row + reach + 1))
            near = np.append(near, first)  # a headline, where there is one
        else:
            near = self.members[int(self.group[self.document[row]])]
            near = generator.choice(near, size=min(len(near), 2 * reach), replace=False)
        return near[near != row]


def is_held_out(document: Document) -> bool:
    """Whether a document is kept for validation, by a hash of its id."""
    return hashlib.sha256(f"held out {document.id}".encode()).digest()[0] < 256 * HELD_OUT


def read(backbone: Backbone, held_out: bool, limit: int | None = None) -> Corpus:
    """The catalog's train documents, or those of them that are held out.

    Args:
        limit: of documents read from each source; None: all.
    """
    tokens: list[np.ndarray] = []
    lengths, document, source, bounds, group = [], [], [], [0], []
    groups: dict[str, int] = {}
    for number, name in enumerate(SOURCES):
        documents = [d for d in unlabelled(name) if is_held_out(d) == held_out][:limit]
        for item in documents:
            texts = _sentences(item.text) if name in ORDERED else [item.text]
            ids = [np.asarray(row, np.int32) for row in backbone.tokenize(texts)]
            if name in ORDERED:
                rows = [row[:SENTENCE_TOKENS] for row in ids if len(row) >= 4]
            else:
                rows = [row for row in np.split(ids[0], range(CHUNK_TOKENS, len(ids[0]), CHUNK_TOKENS)) if len(row) > 8]
            if not rows:
                continue
            about = item.id.rsplit("/", 1)[0] if name == "rotten-tomatoes" else item.id
            group.append(groups.setdefault(f"{name}/{about}", len(groups)))
            tokens += rows
            lengths += [len(row) for row in rows]
            document += [len(bounds) - 1] * len(rows)
            source += [number] * len(rows)
            bounds.append(bounds[-1] + len(rows))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    arrays = (np.concatenate(tokens), starts, np.array(document), np.array(bounds), np.array(group), np.array(source))
    return Corpus(*arrays)


def _sentences(text: str) -> list[str]:
    return [str(sentence) for line in text.split("\n") if line.strip() for sentence in nupunkt.sent_tokenize(line)]


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
class WordExamples:
    """Draws masked words and tails."""

    corpus: Corpus
    lexicon: Lexicon
    backbone: Backbone

    @cached_property
    def _tails(self) -> dict[str, list[tuple[list[int], list[int]]]]:
        """(before, after) ids of each tail."""
        split = {}
        for kind, tails in (("matter", MATTER_TAILS), ("manner", MANNER_TAILS)):
            pieces = [tail.split("{}") for tail in tails]
            split[kind] = [tuple(self.backbone.tokenize([p])[0] if p.strip() else [] for p in pair) for pair in pieces]
        return split  # type: ignore[return-value]

    def draw(self, kind: str, generator: np.random.Generator) -> tuple[list[int], np.ndarray, np.ndarray]:
        """An encoder input, up to `ANSWERS` word ids, and their shares that add up to 1.

        Args:
            kind: one of WORD_SHARE.
        """
        shares = MANNER_SHARE if kind == "manner" else MATTER_SHARE
        while True:
            rows = self.corpus.source_rows[generator.choice(len(SOURCES), p=shares)]
            row = int(rows[generator.integers(len(rows))])
            ids = self.corpus.row_tokens(row)
            found = self._masked(ids, generator) if kind == "masked" else self._tail(kind, row, generator)
            if found is not None:
                body, words, weights = found
                return [*self.backbone.prefix, *body, *self.backbone.suffix], words, weights / weights.sum()

    def _masked(
        self, ids: np.ndarray, generator: np.random.Generator
    ) -> tuple[list[int], np.ndarray, np.ndarray] | None:
        lexicon = self.lexicon
        weight = lexicon.wanted(ids, lexicon.matter + 0.3 * lexicon.manner + 0.02 * lexicon.whole)
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


@dataclass(frozen=True)
class TaskStore:
    """A corpus of ordered sources in the shape of a `Store`, for drawing the paper's task types.

    Attributes:
        embeddings: (sentences, d) mean-pooled encoder states.
        centroids: (DOMAINS, d) of single sentences; a pair's domain is that of its mean.
    """

    corpus: Corpus
    embeddings: np.ndarray
    centroids: np.ndarray

    def __len__(self) -> int:
        return len(self.corpus)

    def tokens(self, row: int) -> np.ndarray:
        return self.corpus.row_tokens(row)

    def document_rows(self, row: int) -> range:
        document = self.corpus.document[row]
        return range(int(self.corpus.bounds[document]), int(self.corpus.bounds[document + 1]))

    @cached_property
    def _families(self) -> dict[str, Family]:
        families = {}
        for name in ("nsp", "nss", "ss"):
            rows = item_rows(name, self.corpus.bounds, 0, len(self))
            if name == "nsp":
                rows = rows[np.diff(self.corpus.bounds)[self.corpus.document[rows]] >= 3]
            embeddings = self.embeddings[rows]
            if name != "ss":
                embeddings = (embeddings + self.embeddings[rows + 1]) / 2
            domain = nearest_centroid(embeddings, self.centroids)
            starts = np.searchsorted(np.sort(domain), np.arange(len(self.centroids) + 1))
            order = np.argsort(domain, kind="stable")
            families[name] = Family(self.centroids, rows[order], starts, starts[1:])
        return families

    def family(self, name: str) -> Family:
        return self._families[name]


def task_corpus(corpus: Corpus) -> Corpus:
    """The first `TASK_DOCUMENTS` documents of each ordered source."""
    source = corpus.source[corpus.bounds[:-1]]
    kept = np.concatenate([np.flatnonzero(source == number)[:TASK_DOCUMENTS] for number in range(len(ORDERED))])
    rows = np.flatnonzero(np.isin(corpus.document, kept))
    return Corpus(
        tokens=np.concatenate([corpus.row_tokens(int(row)) for row in rows]),
        starts=np.concatenate([[0], np.cumsum(np.diff(corpus.starts)[rows])]),
        document=np.searchsorted(kept, corpus.document[rows]),
        bounds=np.concatenate([[0], np.cumsum(np.diff(corpus.bounds)[kept])]),
        group=corpus.group[kept],
        source=corpus.source[rows],
    )


def embed(corpus: Corpus, backbone: Backbone, tokens_per_batch: int = 2048) -> np.ndarray:
    """(sentences, d) float32 mean-pooled encoder states."""
    inputs = [frame(backbone, corpus.row_tokens(row)) for row in range(len(corpus))]
    return mean_pooled(backbone, inputs, tokens_per_batch)


def cluster(embeddings: np.ndarray, seed: int) -> np.ndarray:
    """(DOMAINS, d) float32 centroids of k-means."""
    kmeans = MiniBatchKMeans(min(DOMAINS, len(embeddings) // 2), batch_size=2048, n_init=1, random_state=seed)
    return kmeans.fit(embeddings).cluster_centers_.astype(np.float32)


def nearest_centroid(embeddings: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """(n,) number of the nearest of the centroids."""
    return np.argmin((centroids**2).sum(1) - 2 * embeddings @ centroids.T, axis=1)
