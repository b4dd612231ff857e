"""The catalog's train documents as token ids, and their sentences in clusters: the text of the embedded decoder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import nupunkt
from sklearn.cluster import MiniBatchKMeans

from supmer_ray.data.catalog import Document, unlabelled
from supmer_ray.data.embed import TOKENS_PER_BATCH, framed, mean_pooled
from supmer_ray.data.store import FAMILIES, Family, item_rows
from supmer_ray.model.backbone import Backbone

SOURCES = ("bbc", "rotten-tomatoes", "product-reviews", "newsgroups", "reuters")
ORDERED = SOURCES[:3]
"""Sources with sentence ends, so that their neighbours are sentences."""
SENTENCE_TOKENS = 40
CHUNK_TOKENS = 24
"""Tokens of a "sentence" of the sources that have no sentence ends."""
TASK_DOCUMENTS = (None, None, None, 1200, 1200)
"""Documents of each source that the task types and the classes are drawn from; None: all."""
HELD_OUT = 0.04
DOMAINS = 160


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
        """Token ids (n,) of a sentence."""
        return self.tokens[self.starts[row] : self.starts[row + 1]]

    @cached_property
    def source_rows(self) -> list[np.ndarray]:
        """The sentences of each source."""
        return [np.flatnonzero(self.source == number) for number in range(len(SOURCES))]

    @cached_property
    def members(self) -> dict[int, np.ndarray]:
        """The sentences of each group."""
        of_row = self.group[self.document]
        order = np.argsort(of_row, kind="stable")
        groups, first = np.unique(of_row[order], return_index=True)
        return dict(zip(groups.tolist(), np.split(order, first[1:]), strict=True))

    def around(self, row: int, generator: np.random.Generator) -> np.ndarray:
        """Sentences near `row`: its neighbours in a document of some length, or others of its group."""
        reach = 3
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
        for name in FAMILIES:
            rows = item_rows(name, self.corpus.bounds, 0, len(self))
            embeddings = self.embeddings[rows]
            if name != "ss":
                embeddings = (embeddings + self.embeddings[rows + 1]) / 2
            domain = nearest_centroid(embeddings, self.centroids)
            starts = np.searchsorted(np.sort(domain), np.arange(len(self.centroids) + 1))
            order = np.argsort(domain, kind="stable")
            none = np.zeros((len(self.centroids), 0), np.int32)
            families[name] = Family(self.centroids, starts, starts[1:], none, rows[order])
        return families

    def family(self, name: str) -> Family:
        return self._families[name]

    @cached_property
    def clusters(self) -> list[np.ndarray]:
        """The sentences of each domain."""
        family = self.family("ss")
        return [family.rows(number, "train") for number in range(len(self.centroids))]

    @cached_property
    def usable_clusters(self) -> np.ndarray:
        """Domains with enough sentences to be a class."""
        return np.flatnonzero([len(rows) >= 4 for rows in self.clusters])


def task_corpus(corpus: Corpus) -> Corpus:
    """The first `TASK_DOCUMENTS` documents of each source."""
    source = corpus.source[corpus.bounds[:-1]]
    kept = np.concatenate([np.flatnonzero(source == number)[:most] for number, most in enumerate(TASK_DOCUMENTS)])
    rows = np.flatnonzero(np.isin(corpus.document, kept))
    return Corpus(
        tokens=np.concatenate([corpus.row_tokens(int(row)) for row in rows]),
        starts=np.concatenate([[0], np.cumsum(np.diff(corpus.starts)[rows])]),
        document=np.searchsorted(kept, corpus.document[rows]),
        bounds=np.concatenate([[0], np.cumsum(np.diff(corpus.bounds)[kept])]),
        group=corpus.group[kept],
        source=corpus.source[rows],
    )


def embed(corpus: Corpus, backbone: Backbone) -> np.ndarray:
    """(sentences, d) float32 mean-pooled encoder states."""
    texts = framed(backbone, corpus.tokens, corpus.starts[:-1], corpus.starts[1:])
    return mean_pooled(backbone, texts, TOKENS_PER_BATCH["cpu"]).numpy()


def cluster(embeddings: np.ndarray, seed: int) -> np.ndarray:
    """(DOMAINS, d) float32 centroids of k-means."""
    kmeans = MiniBatchKMeans(min(DOMAINS, len(embeddings) // 2), batch_size=2048, n_init=1, random_state=seed)
    return kmeans.fit(embeddings).cluster_centers_.astype(np.float32)


def nearest_centroid(embeddings: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """(n,) number of the nearest of the centroids."""
    return np.argmin((centroids**2).sum(1) - 2 * embeddings @ centroids.T, axis=1)
