"""The self-supervised task types, five of the paper's (section 3.1) and one more: which sentences, which answer.

A type draws a meta-task's domains from its family of the store and makes labelled examples of them.
Everything random comes from the generator that is passed in.

| type | question | answers |
|---|---|---|
| nsp | are these two sentences neighbours? | yes, maybe (same document), no |
| nss | which candidate follows these two sentences? | A B C D |
| scsp | do these two sentences share a domain? | yes, no |
| scss | which candidate shares the anchor's domain? | A B C D |
| scc | which of four centroids is this sentence's domain? | A B C D |
| sck | which word fits this sentence, one of four domains'? | a keyword of each |

sck is not the paper's. A small language model has never learned to answer "A" or "yes" about a text, and a few-shot
task asks it for words of its own ("great", "sport"); so does sck, with a few-shot pattern and the domain's keywords.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from supmer_ray.errors import UserError
from supmer_ray.tasks.batch import Examples
from supmer_ray.tasks.formats import LETTERS, Formats

if TYPE_CHECKING:
    from supmer_ray.data.store import Family, FamilyOutline, Outline, Store

FAMILY = {"nsp": "nsp", "nss": "nss", "scsp": "ss", "scss": "ss", "scc": "ss", "sck": "ss"}
"""The data family whose clustering gives each task type its domains."""

ANSWERS: dict[str, tuple[str, ...]] = {
    "nsp": ("yes", "maybe", "no"),
    "nss": LETTERS,
    "scsp": ("yes", "no"),
    "scss": LETTERS,
    "scc": LETTERS,
}
"""The answers of each type whose answers are always the same."""

KEYWORD_CLASSES = 4
"""Domains, and so answers, of an sck task."""

DOMAINS_PER_TASK = {"nsp": 1, "nss": 1, "scsp": 1, "scss": 1, "scc": len(LETTERS), "sck": KEYWORD_CLASSES}

MINIMUM_ITEMS = 2
"""Items that a domain needs in a split to be drawn: an anchor and another of its kind."""

TRIES = 8
"""How often a distractor is drawn anew that stands there already; a small store may have no other."""


def domain_similarity(own: np.ndarray, partner: np.ndarray) -> float:
    """δ = ½(1 + cos(c̄, c̄')), c̄ the mean of the (domains, d) centroids of each side."""
    a, b = own.mean(axis=0, dtype=np.float64), partner.mean(axis=0, dtype=np.float64)
    return float((1 + a @ b / (np.linalg.norm(a) * np.linalg.norm(b) + 1e-12)) / 2)


def balanced(generator: np.random.Generator, classes: int, count: int) -> np.ndarray:
    """`count` class numbers in random order, each class as often as any other, give or take one."""
    order = generator.permutation(classes)
    return generator.permutation(np.resize(order, count))


def require_domains(store: Outline, names: Iterable[str]) -> None:
    """Refuse task types for which `store` has too few domains, before a run begins.

    Raises:
        UserError: a type lacks domains for a task and its partner, in training or in validation, or documents.
    """
    for name in names:
        if name in ("nsp", "nss") and store.manifest.documents == 1:
            raise UserError(
                f"Task type '{name}' takes sentences of other documents, and the store {store.place} has one document; "
                f"prepare it from more, or take '{name}' out of tasks.mixture."
            )
        need = 2 * DOMAINS_PER_TASK[name]
        for split in ("train", "validation"):
            usable = len(_usable(store.family(FAMILY[name]), name, split))
            if usable < need:
                words = f" and {KEYWORD_CLASSES} or more keywords" if name == "sck" else ""
                raise UserError(
                    f"Task type '{name}' needs {need} domains with {MINIMUM_ITEMS} or more {split} items{words}, and "
                    f"the store {store.place} has {usable}; prepare it from more text or with fewer domains, or take "
                    f"'{name}' out of tasks.mixture."
                )


def _usable(family: FamilyOutline, name: str, split: str) -> np.ndarray:
    """The domains that a task of a type can be drawn from."""
    usable = family.usable(split, MINIMUM_ITEMS)
    if name == "sck":
        # With as many words each as a task has classes, every class finds one that no other has taken.
        named = (family.keywords >= 0).sum(axis=1) >= KEYWORD_CLASSES
        usable = usable[named[usable]]
    return usable


@dataclass(frozen=True)
class TaskDraw:
    """Draws the examples of one meta-task.

    Args:
        store: where sentences and domains come from.
        formats: how they are written.
        name: the task type.
        split: "train" or "validation": the items that anchors and same-domain partners come from.
        generator: the source of everything random.
    """

    store: Store
    formats: Formats
    name: str
    split: str
    generator: np.random.Generator

    @property
    def family(self) -> Family:
        return self.store.family(FAMILY[self.name])

    def domains(self) -> tuple[np.ndarray, np.ndarray]:
        """The task's domains and its partner's, all different, uniformly from the usable ones."""
        need = DOMAINS_PER_TASK[self.name]
        usable = _usable(self.family, self.name, self.split)
        drawn = self.generator.choice(usable, size=2 * need, replace=False)
        return drawn[:need], drawn[need:]

    def examples(self, domains: np.ndarray, sizes: Sequence[int]) -> list[Examples]:
        """Sets of the given sizes over the same domains, each balanced over the answers.

        Items are not repeated within a set while the domains hold enough of them, nor between sets at all, else the
        query would ask what the support has answered; of scsp and scss, which take two items a question, a domain of
        fewer than four gives all of them to each set.
        """
        shares = [self._shares(int(domain), sizes, len(domains)) for domain in domains]
        vectors = self.family.centroids[domains] if self.name == "scc" else None
        make = getattr(self, f"_{self.name}")
        if self.name == "sck":
            words, tail = self._keywords(domains), int(self.generator.integers(len(self.formats.tails)))
            make = partial(make, tail=tail)
        else:
            words = [self.formats.words[answer] for answer in ANSWERS[self.name]]
        if self.name in ("scsp", "scss"):
            make = partial(make, others=self._others(domains))
        sets = []
        for size, items in zip(sizes, zip(*shares, strict=True), strict=True):
            answers = balanced(self.generator, len(words), size)
            inputs = [make(items, int(answer)) for answer in answers]
            targets = [self.formats.target(words[answer]) for answer in answers]
            sets.append(Examples.of(inputs, targets, vectors, words))
        return sets

    def _keywords(self, domains: np.ndarray) -> list[int]:
        """A keyword of each domain, all different."""
        words: list[int] = []
        for domain in domains:
            own = self.family.keywords[domain]
            words.append(int(self.generator.choice(own[(own >= 0) & ~np.isin(own, words)])))
        return words

    def _shares(self, domain: int, sizes: Sequence[int], domains: int) -> list[Iterator[int]]:
        """For each set where its items of a domain come from: the same row of items while it suffices for all."""
        rows = self.family.rows(domain, self.split)
        # A set that is no multiple of its domains asks some of them once more than others.
        each = 2 if self.name in ("scsp", "scss") else 1  # an anchor, and another of its domain
        wanted = sum(-(-size // domains) for size in sizes) * each
        if len(rows) >= wanted or len(rows) < each * len(sizes):
            return [self._items(rows)] * len(sizes)
        parts = np.array_split(self.generator.permutation(rows), len(sizes))
        return [self._items(part) for part in parts]

    def _items(self, rows: np.ndarray) -> Iterator[int]:
        """Items in random order, again and again; of two or more never one twice in a row."""
        last = None
        while True:
            order = self.generator.permutation(rows)
            if order[0] == last:
                # An anchor must not be its own partner.
                order[[0, -1]] = order[[-1, 0]]
            yield from map(int, order)
            last = order[-1]

    def _others(self, domains: np.ndarray) -> np.ndarray:
        """The usable domains of the family that are not the task's."""
        usable = self.family.usable(self.split, MINIMUM_ITEMS)
        return usable[~np.isin(usable, domains)]

    def _one_of(self, values: np.ndarray) -> int:
        """One of `values`, uniformly: what `Generator.choice` draws, without the checks that cost it more than that."""
        return int(values[self.generator.integers(len(values))])

    def _other(self, others: np.ndarray) -> int:
        """An item of one of the other domains, each as likely as any."""
        return self._one_of(self.family.rows(self._one_of(others), self.split))

    def _foreign(self, row: int) -> int:
        """A sentence of another document than `row`'s."""
        own = self.store.document_rows(row)
        drawn = int(self.generator.integers(len(self.store) - len(own)))
        return drawn if drawn < own.start else drawn + len(own)

    @staticmethod
    def _different(count: int, draw: Callable[[], int]) -> list[int]:
        """`count` drawn rows, none twice where there are enough of them."""
        found: list[int] = []
        for _ in range(count):
            drawn = draw()
            for _ in range(TRIES):
                if drawn not in found:
                    break
                drawn = draw()
            found.append(drawn)
        return found

    def _same_document(self, row: int, first: int, last: int) -> int | None:
        """A sentence of `row`'s document outside `first` … `last`, which hold `row`, if there is one."""
        own = self.store.document_rows(row)
        before, after = max(0, first - own.start), max(0, own.stop - 1 - last)
        if not before + after:
            return None
        drawn = int(self.generator.integers(before + after))
        return own.start + drawn if drawn < before else last + 1 + drawn - before

    def _nsp(self, items: Sequence[Iterator[int]], answer: int) -> list[int]:
        first = next(items[0])
        second: int | None = first + 1
        if ANSWERS["nsp"][answer] == "maybe":
            second = self._same_document(first, first - 1, first + 1)
            if second is None:
                # The middle of three sentences neighbours both others; its follower does not.
                first += 1
                second = self._same_document(first, first - 1, first + 1)
        elif ANSWERS["nsp"][answer] == "no":
            second = self._foreign(first)
        assert second is not None, "the store keeps pairs of documents with three or more sentences only"
        return self.formats.sentence_pair(self.store.tokens(first), self.store.tokens(second))

    def _nss(self, items: Sequence[Iterator[int]], answer: int) -> list[int]:
        row = next(items[0])
        near = self._same_document(row, row, row + 2)
        assert near is not None, "the store keeps contexts of documents with four or more sentences only"
        distractors = [
            int(d) for d in self.generator.permutation([near, *self._different(2, partial(self._foreign, row))])
        ]
        candidates = [*distractors[:answer], row + 2, *distractors[answer:]]
        anchor = np.concatenate([self.store.tokens(row), self.store.tokens(row + 1)])
        return self.formats.multiple_choice(anchor, [self.store.tokens(c) for c in candidates])

    def _scsp(self, items: Sequence[Iterator[int]], answer: int, others: np.ndarray) -> list[int]:
        first = next(items[0])
        second = next(items[0]) if ANSWERS["scsp"][answer] == "yes" else self._other(others)
        return self.formats.sentence_pair(self.store.tokens(first), self.store.tokens(second))

    def _scss(self, items: Sequence[Iterator[int]], answer: int, others: np.ndarray) -> list[int]:
        anchor, right = next(items[0]), next(items[0])
        distractors = self._different(len(LETTERS) - 1, partial(self._other, others))
        candidates = [*distractors[:answer], right, *distractors[answer:]]
        return self.formats.multiple_choice(self.store.tokens(anchor), [self.store.tokens(c) for c in candidates])

    def _scc(self, items: Sequence[Iterator[int]], answer: int) -> list[int]:
        return self.formats.single_sentence(self.store.tokens(next(items[answer])))

    def _sck(self, items: Sequence[Iterator[int]], answer: int, tail: int) -> list[int]:
        return self.formats.sentence_tail(self.store.tokens(next(items[answer])), tail)
