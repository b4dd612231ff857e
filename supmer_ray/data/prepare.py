"""The way from text to a store, over a Ray cluster.

A `PrepareConfig` flows in and a store flows out. Documents stream through Ray Data into the sentence
table, its rows stream through embedding actors into files of vectors, and tasks sort those into domains,
a portion each. The table is the driver's alone, which sees one batch of it at a time; the vectors lie
beside the output, a path or an object store, where on several nodes all of them have to reach it.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from os.path import isdir
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import DataContext
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from supmer_ray.cluster import Resources, connect
from supmer_ray.config import PrepareConfig
from supmer_ray.data.domains import Assigned, assigned, empty_family, fitted, sampled, sorted_under_domains
from supmer_ray.data.embed import IN_HAND, STRETCH, Embedder, Stretch, Vectors, stretch_rows
from supmer_ray.data.keywords import keywords
from supmer_ray.data.sentences import cut, tokenizer_of
from supmer_ray.data.sources import Piece, Source, open_source, place_of, require_apart, require_disjoint
from supmer_ray.data.store import (
    FAMILIES,
    MANIFEST,
    BackboneRecord,
    Family,
    Manifest,
    Sentences,
    SentenceWriter,
    count_items,
    family_record,
    file_records,
    item_rows,
    write_family,
    write_manifest,
)
from supmer_ray.errors import UserError, first_line
from supmer_ray.files import Place, Where, held, require_new_place, require_outside, without_keys

WordTokens = tuple[np.ndarray, np.ndarray]
"""Which tokens of a vocabulary begin a word, and which go on with one: what `Backbone.word_tokens` gives."""

Progress = Callable[[str, int, int | None, str], None]
"""Called as (stage, done, total or None, unit) whenever a batch has arrived."""

ITEMS_A_DOMAIN = 20
"""A family needs this many items for each domain on average: the fewer a domain holds, the more of them a set repeats.
"""

PAIR_SHARE = 0.1
"""Text with fewer pairs than this share of its sentences is taken for single sentences, without pair families."""

BLOCK_BYTES = 4 * 2**20
"""Text in one Ray Data block: small, so that one large file still feeds every worker."""

PORTION = 256
"""Stretches of vectors that one task sorts into domains: some seconds of work."""

AT_ONCE = 64
"""Portions that are asked after together: asking after each in turn would hand over all of them each time."""

LOOK_SECONDS = 5.0
"""How often a caller is told that the work still stands: a cluster that others fill may keep it waiting for hours."""

MOST_LOSSES = 3
"""How often embedding actors may be lost over the same work; over their start, so often for each of them."""

MOST_CPU_EMBEDDERS = 8
"""Actors without a GPU that start unless more are asked for: each holds the whole backbone in memory."""

NOUNS = {"nsp": "pairs of neighbouring sentences", "nss": "sentences with two before them", "ss": "sentences"}


def prepare(
    config: PrepareConfig, out: Where, *, overwrite: bool = False, progress: Progress | None = None
) -> Manifest:
    """Build a store from text, on the Ray cluster that is there, which is joined when the sources could be read.

    The result depends on the sources, the settings but `embedders`, and the kind of device, and on nothing else:
    neither the number of workers nor how the text is spread over files' blocks.

    Args:
        out: the folder, or the URI of one (`s3://…`), that every node reaches.
        overwrite: replace a store that stands at `out`.
        progress: told of every batch: stages "Cutting sentences" (in documents, total unknown), "Embedding sentences"
            (in sentences) and "Finding domains" (in items of the families).

    Returns:
        What the store holds.

    Raises:
        UserError: something to be mended in the configuration or the text. Nothing is left at `out` then.
    """
    place = Place.of(out).resolved
    require_new_place(place, overwrite=overwrite, marker=MANIFEST)
    tell = progress or (lambda stage, done, total, unit: None)
    if overwrite:
        backbone_there = [Place.of(config.backbone)] if isdir(config.backbone) else []
        require_outside(place, {"source": filter(None, map(place_of, config.sources)), "backbone": backbone_there})
    require_apart(place, config.sources)
    sources = [open_source(name) for name in config.sources]
    require_disjoint(sources)
    _embedding_workers(config.embedders, connect())
    described = _describe.remote(config.backbone)
    stage = "Reading the vocabulary, as soon as the cluster has a free CPU"
    backbone, words = _get(_first([described], partial(tell, stage, 0, None, "documents")))

    with held(place, "a preparation"), place.workshop(last=MANIFEST) as (folder, shared):
        with _quiet_data():
            writer, corpus = _write_sentences(sources, config, folder, tell)
        sentences = Sentences(folder)
        counts = _item_counts(sentences.starts, config.domains)
        _embed(config, sentences, shared, tell)
        families = _find_domains(config, sentences.starts, shared, counts, backbone.d_model, tell)
        families["ss"] = replace(families["ss"], keywords=keywords(sentences, families["ss"], *words))
        for name, family in families.items():
            write_family(folder, name, family)
        manifest = Manifest(
            corpus=corpus,
            documents=writer.documents,
            sentences=writer.sentences,
            tokens=writer.tokens,
            backbone=backbone,
            families={name: family_record(family) for name, family in families.items()},
            settings=config.model_copy(update={"sources": tuple(map(without_keys, config.sources))}),
            files=file_records(folder),
        )
        write_manifest(folder, manifest)
    return manifest


def _embedding_workers(asked: int | None, resources: Resources) -> tuple[int, dict[str, int]]:
    """How many embedding actors run, and what each reserves: a GPU where the cluster has GPUs, else one CPU.

    One CPU and one thread each is faster than few actors with many threads, and its bits do not depend on
    how many there are.
    """
    unit, most = ("GPU", int(resources.gpus)) if resources.gpus else ("CPU", int(resources.cpus))
    if asked and asked > most and not resources.grows:
        raise UserError(f"'embedders' is {asked} but the cluster has {most} {unit}s; write embedders: {most}.")
    most = max(1, most)  # where there are none yet, nodes come for the first one
    if unit == "GPU":
        return asked or most, {"num_cpus": 1, "num_gpus": 1}
    return asked or min(most, MOST_CPU_EMBEDDERS), {"num_cpus": 1}


@ray.remote(num_cpus=1)
def _describe(name: str) -> tuple[BackboneRecord, WordTokens]:
    """Load the backbone once, to know it and to fail before any work where it cannot be had."""
    import torch

    from supmer_ray.model.backbone import load_backbone

    backbone = load_backbone(name, dtype=torch.bfloat16, threads=1)
    record = BackboneRecord(
        name=name,
        fingerprint=backbone.fingerprint,
        tokenizer_fingerprint=backbone.tokenizer_fingerprint,
        d_model=backbone.d_model,
    )
    return record, backbone.word_tokens()


def _first(references: list[Any], tell: Callable[[], None]) -> Any:
    """The first of them that is done; meanwhile it is told now and then that the work still stands."""
    while not (ready := ray.wait(references, num_returns=1, timeout=LOOK_SECONDS)[0]):
        tell()
    return ready[0]


def _get(reference: Any) -> Any:
    """A remote result; a UserError comes back as itself, without Ray's traceback around it."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise


@contextmanager
def _quiet_data() -> Iterator[None]:
    """Ray Data in document order and small blocks, without its own progress bars; `progress` reports instead."""
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.target_max_block_size = BLOCK_BYTES
    context.enable_operator_progress_bars = False
    # It says at WARNING that bars are off, and at INFO how each pipeline ended.
    levels = {"ray.data": logging.WARNING, "ray.data._internal.progress": logging.ERROR}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        with DataContext.current(context):
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _write_sentences(
    sources: Sequence[Source], config: PrepareConfig, folder: Path, tell: Progress
) -> tuple[SentenceWriter, str]:
    """Stream the sources into the sentence table; returns the counts and the fingerprint of the corpus."""
    corpus = hashlib.sha256()
    with SentenceWriter(folder) as writer:
        for source in sources:
            for batch in _sentence_batches(source, config):
                for problem in batch["problem"].to_pylist():
                    if problem:
                        raise UserError(problem)
                for part in batch.to_batches():
                    for digest in part["digest"].to_pylist():
                        corpus.update(digest)
                    writer.write(part["sentences"], part["tokens"])
                tell("Cutting sentences", writer.documents, None, "documents")
    return writer, corpus.hexdigest()


def _sentence_batches(source: Source, config: PrepareConfig) -> Iterator[pa.Table]:
    numbers = [{"piece": number} for number in range(len(source.pieces))]
    data = ray.data.from_items(numbers, override_num_blocks=len(numbers)).map_batches(
        _read,  # type: ignore[arg-type]
        batch_size=None,
        # Less than a whole CPU keeps reading apart from cutting: fused, one large file would use one worker.
        num_cpus=0.5,
        fn_kwargs={"pieces": source.pieces, "limit": config.max_documents},
    )
    if config.max_documents:
        data = data.limit(config.max_documents)
    data = data.map_batches(
        _cut,  # type: ignore[arg-type]
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"backbone": config.backbone, "longest": config.sentence_length},
    )
    return iter(data.iter_batches(batch_size=None, batch_format="pyarrow"))


def _read(batch: Any, pieces: Sequence[Piece], limit: int | None) -> Iterator[Any]:
    """The documents of some pieces (numbers in `piece`) as a table of (text, problem).

    What the user has to mend travels as a row: an exception would reach the screen with Ray's log around it.
    """
    schema = pa.schema([("text", pa.string()), ("problem", pa.string())])
    for number in batch["piece"]:
        try:
            texts = islice((text for text in pieces[number].texts() if text.strip()), limit)
            while chunk := list(islice(texts, 64)):
                yield pa.table({"text": chunk, "problem": [None] * len(chunk)}, schema)
        except UserError as error:
            yield pa.table({"text": [""], "problem": [str(error)]}, schema)


def _cut(documents: Any, backbone: str, longest: int) -> Any:
    try:
        tokenize = tokenizer_of(backbone)
    except (OSError, ValueError, UserError) as error:
        problem = (
            f"A node of the cluster cannot load the tokenizer of '{backbone}' ({first_line(error)}); put it where "
            "every node sees it."
        )
        return cut([""], lambda texts: [[] for _ in texts], longest).append_column("problem", pa.array([problem]))
    return cut(documents["text"].to_pylist(), tokenize, longest).append_column("problem", documents["problem"])


def _item_counts(starts: np.ndarray, domains: int) -> dict[str, int]:
    """Items of each family, 0 for one that is left empty.

    Args:
        starts: (documents + 1,) first row of each document.

    Raises:
        UserError: the text is too small for the domains asked for.
    """
    counts = {name: count_items(name, starts) for name in FAMILIES}
    if not counts["ss"]:
        raise UserError(
            "The sources hold no sentence of three words or more; words are told apart by spaces, so text in a script "
            "without them cannot be used."
        )
    for name in ("nsp", "nss"):
        if counts[name] < PAIR_SHARE * counts["ss"]:
            counts[name] = 0
    scarcest = min((name for name in FAMILIES if counts[name] or name == "ss"), key=lambda name: counts[name])
    fitting = counts[scarcest] // ITEMS_A_DOMAIN
    if fitting < domains:
        advice = f"write domains: {fitting} or add text" if fitting >= 2 else "add text"
        raise UserError(
            f"The sources hold {len(starts) - 1} documents with {counts[scarcest]} {NOUNS[scarcest]}, too few for "
            f"{domains} domains of {ITEMS_A_DOMAIN} on average; {advice}."
        )
    return counts


def _embed(config: PrepareConfig, sentences: Sentences, shared: Place, tell: Progress) -> None:
    """Write the vectors of all sentences and pairs into `shared`."""
    count, reserved = _embedding_workers(config.embedders, connect())
    gpu = "num_gpus" in reserved
    in_hand = IN_HAND["cuda" if gpu else "cpu"]
    waiting = deque(range(-(-len(sentences) // STRETCH)))
    embedder: Any = ray.remote(Embedder).options(**reserved, max_concurrency=in_hand)
    # Stretches are given to actors that stand, and Ray restarts none: where a node leaves, an actor may have no place
    # to start again for as long as the others work, and what was given to it would wait as long.
    actors = list[Any]()
    busy = dict[Any, tuple[Any, int | None]]()  # a call → its actor, and the stretch; None: it is starting
    losses = Counter[int | None]()
    done = 0

    def start() -> None:
        actors.append(embedder.remote(shared, config.backbone, gpu))
        busy[actors[-1].load.remote()] = actors[-1], None

    def give(actor: Any, most: int) -> None:
        for _ in range(min(most, len(waiting))):
            number = waiting.popleft()
            busy[actor.embed.remote(Stretch.of(sentences, number))] = actor, number

    tell("Embedding sentences", done, len(sentences), "sentences")
    try:
        for _ in range(min(count, len(waiting))):
            start()
        while done < len(sentences):
            call = _first(list(busy), partial(tell, "Embedding sentences", done, len(sentences), "sentences"))
            actor, stretch = busy.pop(call)
            try:
                rows = _get(call)
            except (RayActorError, OutOfMemoryError):  # what Ray's memory monitor kills is no RayActorError
                losses[stretch] += 1
                if losses[stretch] > (MOST_LOSSES if stretch is not None else MOST_LOSSES * count):
                    raise
                if stretch is not None:
                    waiting.append(stretch)
                if actor in actors:  # the first of its calls that tells
                    actors.remove(actor)
                    start()
                # A new actor may find no place while one stands that has nothing in hand any more.
                at_work = [one for one, _ in busy.values()]
                for idle in [one for one in actors if one not in at_work]:
                    give(idle, in_hand)
                continue
            if stretch is not None:
                done += rows
                tell("Embedding sentences", done, len(sentences), "sentences")
            if actor in actors:
                give(actor, 1 if stretch is not None else in_hand)
    finally:
        # Not left to the garbage collector: whoever keeps the traceback of a failure would keep their CPUs with it.
        for actor in actors:
            ray.kill(actor)


@dataclass(frozen=True)
class Portion:
    """A part of a family that one task passes.

    Attributes:
        family: its name.
        stretches: whose items it holds.
        first: number of its first item among the family's.
        items: how many it has.
    """

    family: str
    stretches: range
    first: int
    items: int

    def chosen(self, items: np.ndarray) -> np.ndarray:
        """Those of the family's items (sorted numbers) that lie in it, counted from its first."""
        start, stop = np.searchsorted(items, (self.first, self.first + self.items))
        return items[start:stop] - self.first

    def read(self, starts: np.ndarray, shared: Place) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(rows, vectors) of its items, stretch by stretch."""
        vectors = Vectors(shared)
        for stretch in self.stretches:
            span = stretch_rows(stretch, int(starts[-1]))
            rows = item_rows(self.family, starts, span.start, span.stop)
            if self.family == "ss":
                yield rows, vectors.sentences(stretch)
            else:
                pairs = item_rows("nsp", starts, span.start, span.stop)
                yield rows, vectors.pairs(stretch)[np.isin(pairs, rows)]


def _portions(family: str, starts: np.ndarray) -> list[Portion]:
    sentences = int(starts[-1])
    count = -(-sentences // STRETCH)
    portions = list[Portion]()
    passed = 0
    for first in range(0, count, PORTION):
        stretches = range(first, min(first + PORTION, count))
        last = stretch_rows(stretches[-1], sentences).stop
        items = len(item_rows(family, starts, first * STRETCH, last))
        portions.append(Portion(family, stretches, passed, items))
        passed += items
    return portions


def _find_domains(
    config: PrepareConfig,
    starts: np.ndarray,
    shared: Place,
    counts: dict[str, int],
    d_model: int,
    tell: Progress,
) -> dict[str, Family]:
    """Cluster each family, portion by portion wherever the cluster has room; the domains have no words yet."""
    documents = ray.put(np.array(starts))
    counting, sorting = list[Any](), dict[str, Any]()
    for number, name in enumerate(FAMILIES):
        if not counts[name]:
            continue
        generator = np.random.default_rng(config.seed * len(FAMILIES) + number)
        chosen = np.sort(generator.choice(counts[name], min(config.kmeans_sample, counts[name]), replace=False))
        seed = int(generator.integers(2**31))
        portions = _portions(name, starts)
        points = [_sample.remote(one, documents, shared, own) for one in portions if len(own := one.chosen(chosen))]
        kmeans = _fit.remote(config.domains, seed, *points)
        found: list[Any] = [_assign.remote(one, documents, shared, kmeans) for one in portions]
        counting += [count for count, _ in found]
        sorting[name] = _sort.remote(generator, *(part for _, part in found))
    done, total = 0, sum(counts.values())
    tell("Finding domains", done, total, "items")
    try:
        while counting:
            ready, counting = ray.wait(counting, num_returns=min(AT_ONCE, len(counting)), timeout=1)
            for count in ready:
                done += _get(count)
            tell("Finding domains", done, total, "items")
        families = {name: empty_family(d_model) for name in FAMILIES}
        return families | {name: _get(family) for name, family in sorting.items()}
    except BaseException:
        # What one portion refuses ends all: nothing waits for the others, and they would hold CPUs.
        for reference in (*counting, *sorting.values()):
            ray.cancel(reference)
        raise


@ray.remote(num_cpus=1)
def _sample(portion: Portion, starts: np.ndarray, shared: Place, chosen: np.ndarray) -> np.ndarray:
    return sampled(portion.read(starts, shared), chosen)


@ray.remote(num_cpus=1)
def _fit(domains: int, seed: int, *points: np.ndarray) -> Any:
    return fitted(points, domains, seed)


@ray.remote(num_cpus=1, num_returns=2)
def _assign(portion: Portion, starts: np.ndarray, shared: Place, kmeans: Any) -> tuple[int, Assigned]:
    """How many items it has, for who follows the work, and their domains, for who sorts them."""
    return portion.items, assigned(portion.read(starts, shared), kmeans)


@ray.remote(num_cpus=1)
def _sort(generator: np.random.Generator, *portions: Assigned) -> Family:
    return sorted_under_domains(portions, generator)
