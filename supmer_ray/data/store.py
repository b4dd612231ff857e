"""A prepared corpus on disk: sentences, and for each data family its items sorted by domain.

Record batches of sentences flow in through `SentenceWriter`, clustered items through `write_family`;
meta-task builders read single rows back through `Store`. Everything large is memory-mapped, so that
random access costs no memory and the processes of a node share one copy in the page cache.

    sentences.arrow         document int64, text string, tokens list<int32> (no special tokens)
    documents.npy           (documents + 1,) int64, the first row of each document
    FAMILY.rows.npy         (items,) int64 sentence rows, domain by domain, train before validation
    FAMILY.safetensors      centroids (domains, d) float32, starts (domains + 1,), train_ends (domains,) int64,
                            keywords (domains, words) int32
    manifest.json           written last; its digests tell a whole store from a damaged one

A store that lies in an object store is read from a copy on the node's disk, made once by whoever opens it first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow.fs import copy_files
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.numpy import load, load_file, save

from supmer_ray.config import PrepareConfig
from supmer_ray.errors import UserError, first_line
from supmer_ray.files import Place, Where, held, parse_record, sha256, whole_folder
from supmer_ray.registry import writable_home

SCHEMA_VERSION = 2
ITEM = {"nsp": (1, 3), "nss": (2, 4), "ss": (0, 1)}
"""Pairs of neighbours, selection contexts, single sentences (paper, section 3.1): how many sentences of its document
stand behind the first one of an item, and how many the document has at least."""
FAMILIES = tuple(ITEM)

SENTENCES = "sentences.arrow"
DOCUMENTS = "documents.npy"
FILES = (SENTENCES, DOCUMENTS, *(f"{family}.{kind}" for family in FAMILIES for kind in ("rows.npy", "safetensors")))
"""What a store consists of, beside its manifest."""

MANIFEST = "manifest.json"

SCHEMA = pa.schema([("document", pa.int64()), ("text", pa.string()), ("tokens", pa.list_(pa.int32()))])
BATCH_ROWS = 8192
"""Rows of every record batch but the last: fixed, so that the file does not depend on how the data arrived."""

VERIFIED_BYTES = 16 * 2**20
"""Files up to this size are hashed when a store is opened; larger ones are checked by their size."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Record):
    """What a whole file looks like."""

    bytes: int
    sha256: str


class FamilyRecord(_Record):
    """Counts of one family; all are 0 where the text has too few neighbouring sentences for it."""

    domains: int
    items: int
    train: int


class BackboneRecord(_Record):
    """The frozen model whose tokenizer cut the text and whose encoder embedded it."""

    name: str
    fingerprint: str
    tokenizer_fingerprint: str
    d_model: int


class Manifest(_Record):
    """What a store holds and what it was made from.

    Attributes:
        corpus: SHA-256 over the digests of the documents' texts, in order.
        settings: the configuration that `prepare` ran with.
    """

    schema_version: int = SCHEMA_VERSION
    corpus: str
    documents: int
    sentences: int
    tokens: int
    backbone: BackboneRecord
    families: dict[str, FamilyRecord]
    settings: PrepareConfig
    files: dict[str, FileRecord]

    @property
    def digest(self) -> str:
        """SHA-256 of what is in the store, however it was made: the same text in other domains is another store."""
        files = {name: record.sha256 for name, record in self.files.items()}
        parts = [self.schema_version, self.backbone.fingerprint, self.backbone.tokenizer_fingerprint, files]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class FamilyOutline:
    """The domains of one data family and how many items each has, without the items.

    Attributes:
        centroids: (domains, d) float32, mean embedding of each domain's items.
        starts: (domains + 1,) where each domain's items start among the family's.
        train_ends: (domains,) where its train items end and its validation items start.
        keywords: (domains, words) int32 token ids of the words that are most a domain's own, −1 where it has fewer;
            no words in the families of pairs.
    """

    centroids: np.ndarray
    starts: np.ndarray
    train_ends: np.ndarray
    keywords: np.ndarray

    @property
    def domains(self) -> int:
        return len(self.centroids)

    def usable(self, split: str, minimum: int) -> np.ndarray:
        """The numbers of the domains that have at least `minimum` items in `split`, "train" or "validation"."""
        starts, ends = self._bounds(split)
        return np.flatnonzero(ends - starts >= minimum)

    def _bounds(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        if split == "train":
            return self.starts[:-1], self.train_ends
        if split == "validation":
            return self.train_ends, self.starts[1:]
        raise ValueError(f"split '{split}' is neither 'train' nor 'validation'")


@dataclass(frozen=True)
class Family(FamilyOutline):
    """The items of one data family, by domain.

    An item is the row of its first sentence: a sentence (ss), a pair of neighbours i, i + 1 of a document
    of at least three sentences (nsp: two would leave none that is not a neighbour), or a context i, i + 1
    whose follower i + 2 belongs to the same document of at least four sentences (nss).

    Attributes:
        items: (items,) int64 sentence rows, domain by domain.
    """

    items: np.ndarray

    def rows(self, domain: int, split: str) -> np.ndarray:
        """Sentence rows (n,) int64 of a domain's items in `split`."""
        starts, ends = self._bounds(split)
        return self.items[starts[domain] : ends[domain]]


class Sentences:
    """The sentence table of a store, also while the store is still being built."""

    def __init__(self, folder: Path) -> None:
        from datasets import Dataset  # here, so that the step and its benchmark need neither it nor a store

        table = Dataset.from_file(str(folder / SENTENCES)).data
        self._length = table.num_rows
        self._documents = table.column("document").chunks
        self._texts = table.column("text").chunks
        chunks = table.column("tokens").chunks
        self._tokens = [(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in chunks]
        self.starts = _map(folder / DOCUMENTS)

    def __len__(self) -> int:
        return self._length

    def tokens(self, row: int) -> np.ndarray:
        """Token ids (n,) int32 of a sentence, without special tokens: a read-only view of the file."""
        batch, place = self._locate(row)
        offsets, values = self._tokens[batch]
        return values[offsets[place] : offsets[place + 1]]

    def span(self, rows: range) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (n,) int32 of consecutive sentences, end to end, and where each starts in them (sentences + 1,)."""
        tokens, lengths = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
        row = rows.start
        while row < rows.stop:
            batch, place = self._locate(row)
            offsets, values = self._tokens[batch]
            own = offsets[place : place + rows.stop - row + 1]
            tokens.append(values[own[0] : own[-1]])
            lengths.append(np.diff(own))
            row += len(own) - 1
        return np.concatenate(tokens), np.concatenate([[0], *lengths]).cumsum()

    def batches(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """All sentences, batch by batch: the first row, where each sentence starts (n + 1,), and the tokens."""
        for number, (offsets, values) in enumerate(self._tokens):
            yield number * BATCH_ROWS, offsets - offsets[0], values[offsets[0] : offsets[-1]]

    def text(self, row: int) -> str:
        """The sentence in `row`."""
        batch, place = self._locate(row)
        return self._texts[batch][place].as_py()

    def document(self, row: int) -> int:
        """Number of the document that holds `row`."""
        batch, place = self._locate(row)
        return self._documents[batch][place].as_py()

    def document_rows(self, row: int) -> range:
        """The rows of the document that holds `row`, in reading order."""
        document = self.document(row)
        return range(int(self.starts[document]), int(self.starts[document + 1]))

    def _locate(self, row: int) -> tuple[int, int]:
        if not 0 <= row < self._length:
            raise IndexError(f"sentence row {row} of {self._length}")
        batch, place = divmod(int(row), BATCH_ROWS)
        return batch, place


class Store(Sentences):
    """Read access to a prepared corpus; get one with `Store.open`.

    Example:
        >>> store = Store.open("runs/store")
        >>> family = store.family("nsp")
        >>> row = family.rows(family.usable("train", 32)[0], "train")[0]
        >>> store.text(row), store.text(row + 1)
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        super().__init__(path)
        self.path = path
        self.manifest = manifest
        self._families: dict[str, Family] = {}

    @staticmethod
    def open(where: Where) -> Store:
        """Open the store in a folder, or that of a URI (`s3://…`) by a copy in the cache folder.

        Raises:
            UserError: there is no store, another version wrote it, or a file of it is missing or damaged.
        """
        place = Place.of(where)
        manifest = read_manifest(place)
        if place.remote:
            return Store(_copied(place, manifest), manifest)
        _verify(place.local, manifest)
        return Store(place.local, manifest)

    def family(self, name: str) -> Family:
        """One of `FAMILIES`."""
        if name not in self._families:
            tables = load_file(self.path / f"{name}.safetensors")
            self._families[name] = Family(items=_map(self.path / f"{name}.rows.npy"), **tables)
        return self._families[name]


class Outline:
    """A prepared corpus without its sentences, as a driver looks at it before a run; get one with `Outline.open`.

    Of a store in an object store it reads a few small files, where `Store.open` copies all to this machine.
    """

    def __init__(self, place: Place, manifest: Manifest) -> None:
        self.place = place
        self.manifest = manifest
        self._families: dict[str, FamilyOutline] = {}

    @staticmethod
    def open(where: Where) -> Outline:
        """Look at the store in a folder or in that of a URI (`s3://…`).

        Raises:
            UserError: there is no store, another version wrote it, or a file of one in a folder is missing or damaged.
        """
        place = Place.of(where)
        manifest = read_manifest(place)
        if not place.remote:
            _verify(place.local, manifest)
        return Outline(place, manifest)

    def family(self, name: str) -> FamilyOutline:
        """The domains of one of `FAMILIES`.

        Raises:
            UserError: their file is missing or damaged.
        """
        if name not in self._families:
            file = f"{name}.safetensors"
            with self.place.answering():
                content = self.place.content(file)
            if content is None or hashlib.sha256(content).hexdigest() != self.manifest.files[file].sha256:
                raise UserError(
                    f"The store's file {self.place / file} is missing or has changed since it was written; prepare the "
                    "store again."
                )
            self._families[name] = FamilyOutline(**load(content))
        return self._families[name]


class SentenceWriter:
    """Streams documents into `sentences.arrow` and `documents.npy` of a folder; memory stays at one batch."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stream = pa.ipc.new_stream(str(folder / SENTENCES), SCHEMA)
        self._waiting = SCHEMA.empty_table()
        self._counts: list[np.ndarray] = []
        self.documents = 0
        self.sentences = 0
        self.tokens = 0

    def write(self, texts: pa.ListArray, tokens: pa.ListArray) -> None:
        """Append documents: list<string> sentences and list<list<int32>> token ids, one entry a document.

        One without a sentence is none: there would be nothing to draw from it.
        """
        filled = pc.greater(texts.value_lengths(), 0)
        texts, tokens = texts.filter(filled), tokens.filter(filled)
        counts = texts.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        total = int(counts.sum())
        ids = tokens.flatten()
        table = pa.table(
            {
                "document": np.repeat(np.arange(len(counts)) + self.documents, counts),
                "text": texts.flatten(),
                "tokens": ids,
            }
        ).cast(SCHEMA)
        self._waiting = pa.concat_tables([self._waiting, table])
        while self._waiting.num_rows >= BATCH_ROWS:
            self._emit(self._waiting.slice(0, BATCH_ROWS))
            self._waiting = self._waiting.slice(BATCH_ROWS)
        self._counts.append(counts)
        self.documents += len(counts)
        self.sentences += total
        self.tokens += len(ids.flatten())

    def _emit(self, rows: pa.Table) -> None:
        # Through IPC once more: a slice carries its neighbours' buffers along, a fresh batch does not.
        for batch in rows.combine_chunks().to_batches():
            self._stream.write_batch(batch.take(pa.array(np.arange(batch.num_rows))))

    def close(self) -> None:
        if self._waiting.num_rows:
            self._emit(self._waiting)
        self._stream.close()
        counts = np.concatenate([np.zeros(1, np.int64), *self._counts])
        np.save(self._folder / DOCUMENTS, np.cumsum(counts), allow_pickle=False)

    def __enter__(self) -> SentenceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._stream.close()


def write_family(folder: Path, name: str, family: Family) -> None:
    """Write the two files of a family."""
    np.save(folder / f"{name}.rows.npy", family.items, allow_pickle=False)
    tables = {
        "centroids": family.centroids,
        "starts": family.starts,
        "train_ends": family.train_ends,
        "keywords": family.keywords,
    }
    # Not save_file: it makes files that only their owner can read.
    (folder / f"{name}.safetensors").write_bytes(save(tables))


def family_record(family: Family) -> FamilyRecord:
    """The counts that the manifest keeps of a family."""
    train = int((family.train_ends - family.starts[:-1]).sum())
    return FamilyRecord(domains=family.domains, items=len(family.items), train=train)


def file_records(folder: Path) -> dict[str, FileRecord]:
    """Size and digest of every file that a store consists of, for its manifest."""
    return {name: FileRecord(bytes=(folder / name).stat().st_size, sha256=sha256(folder / name)) for name in FILES}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Declare the store in `folder` whole."""
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_manifest(where: Where) -> Manifest:
    """The manifest of the store in a folder, or in that of a URI; its files are not looked at.

    Raises:
        UserError: there is no store, another version wrote it, or its manifest is damaged.
    """
    place = Place.of(where)
    file = place / MANIFEST
    with place.answering():
        if not place.remote and not place.local.is_dir():
            raise UserError(f"There is no store at {place}; make one with 'supmer prepare --out {place}'.")
        text = place.read(MANIFEST)
    if text is None:
        raise UserError(f"{place} has no {MANIFEST}, so it is no store; name the folder that 'supmer prepare' made.")
    damaged = UserError(f"{file} is damaged; prepare the store again.")
    try:
        values = parse_record(text)
    except ValueError:
        raise damaged from None
    if (version := values.get("schema_version")) != SCHEMA_VERSION:
        raise UserError(
            f"The store {place} was written by another version (its schema is {version}, this one reads "
            f"{SCHEMA_VERSION}); prepare it again."
        )
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        key = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise UserError(f"{file} is damaged at '{key}'; prepare the store again.") from None
    if manifest.files.keys() != set(FILES) or manifest.families.keys() != set(FAMILIES):
        raise damaged
    return manifest


def _verify(folder: Path, manifest: Manifest, *, whole: bool = False, shown: Place | None = None) -> None:
    """Check the files in `folder` against the manifest.

    Args:
        whole: hash large files too.
        shown: the place that messages name; unset: the folder.
    """
    for name, record in manifest.files.items():
        file = folder / name
        named = (shown or Place.of(folder)) / name
        if not file.is_file():
            raise UserError(f"The store's file {named} is missing; prepare the store again.")
        size = file.stat().st_size
        if size != record.bytes:
            raise UserError(
                f"The store's file {named} has {size} bytes instead of {record.bytes}; prepare the store again."
            )
        if (whole or size <= VERIFIED_BYTES) and sha256(file) != record.sha256:
            raise UserError(f"The store's file {named} has changed since it was written; prepare the store again.")


def _copied(place: Place, manifest: Manifest) -> Path:
    """A copy of a store in an object store, on this node's disk; it is fetched where there is none that is whole.

    Copies are told apart by their manifests, digests and all, so a store that was replaced is another one.
    """
    folder = writable_home() / "stores" / manifest.digest[:16]
    with held(folder, "a copy", wait=True):
        try:
            _verify(folder, manifest)
        except UserError:
            _fetch(place, manifest, folder)
    return folder


def _fetch(place: Place, manifest: Manifest, folder: Path) -> None:
    filesystem, path = place.filesystem()
    with whole_folder(folder) as partial:
        for name in manifest.files:
            try:
                copy_files(f"{path}/{name}", str(partial / name), source_filesystem=filesystem)
            except FileNotFoundError:
                continue  # as in a folder: it is missed below
            except OSError as error:
                raise UserError(f"Cannot read {place / name} ({first_line(error)}); try again.") from None
        _verify(partial, manifest, whole=True, shown=place)


def _map(file: Path) -> np.ndarray:
    return np.load(file, mmap_mode="r", allow_pickle=False)


def item_rows(name: str, starts: np.ndarray, first: int, last: int) -> np.ndarray:
    """The rows in [first, last) that begin an item of a family.

    Args:
        starts: (documents + 1,) first row of each document, as in `documents.npy`.
    """
    following, smallest = ITEM[name]
    rows = np.arange(first, last)
    document = np.searchsorted(starts, rows, side="right") - 1
    end = starts[document + 1]
    return rows[(rows + following < end) & (end - starts[document] >= smallest)]


def count_items(name: str, starts: Iterable[int]) -> int:
    """How many items of a family the documents hold."""
    following, smallest = ITEM[name]
    sizes = np.diff(np.asarray(starts))
    return int((sizes[sizes >= smallest] - following).sum())
