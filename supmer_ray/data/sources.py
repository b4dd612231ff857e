"""Where text comes from: each source becomes a few pieces that workers read on their own.

A source's spelling flows in; `Source`s flow out whose pieces yield document texts, in an order that never
changes. Files are read through pyarrow's filesystems, as Ray Data reads them, so local paths, `s3://` and
`gs://` behave alike and nothing is read whole but a JSON list and a single document.

| spelling | documents |
|---|---|
| `news.txt` | the blocks of text between blank lines |
| `news/`, `news/*.txt` | each .txt file is one document; files of the other formats give their rows |
| `news.jsonl`, `news.json`, `news.parquet`, `news.csv` | the `text` of each row |
| `folder/` made by `Dataset.save_to_disk` | the `text` of each row (of the split "train") |
| `hub:NAME` or `hub:NAME@CONFIGURATION` | the `text` of each row of the hub's data set, split "train" |
| `bbc` | the train documents of that source of the catalog (write `./bbc` for a folder of that name) |

`::COLUMN` at the end names another column than `text`. Text is UTF-8; bytes that are not are replaced in .txt and
.jsonl files, and refused elsewhere.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem

from supmer_ray.data.catalog import CATALOG_SOURCES, unlabelled
from supmer_ray.errors import UserError, first_line, nearest
from supmer_ray.files import Place, parse_json, remote_filesystem, without_keys

FORMATS = (".txt", ".jsonl", ".json", ".parquet", ".csv")
TEXT_FILES_A_PIECE = 256
CSV_BLOCK_BYTES = 64 * 2**20
"""What a CSV file is read by: much more than a long document."""

LINES_PIECE_BYTES = 64 * 2**20
"""JSON lines are cut into pieces of this size, so that one large file keeps many workers busy."""


TextName = tuple[str, ...]
"""A file by its real path and its column, a data set of the hub, or a source of the catalog."""


class Piece(Protocol):
    """A part of a source that one worker reads; it travels, so it holds names and no open files."""

    def names(self) -> Iterable[TextName]:
        """What it reads; where two sources' pieces have a name in common, they read the same texts."""
        ...

    def texts(self) -> Iterator[str]:
        """The documents, in order. Raises UserError where the data is not as described."""
        ...


@dataclass(frozen=True)
class Source:
    """A source as the user spelt it, and its pieces in reading order."""

    name: str
    pieces: tuple[Piece, ...]


def open_source(name: str) -> Source:
    """Find a source, and read its first document to see that the rest will be readable.

    Raises:
        UserError: there is no such source, it is empty or unreadable, or it lacks the column.
    """
    source = Source(name, tuple(_pieces(name)))
    if not any(text.strip() for piece in source.pieces for text in piece.texts()):
        raise UserError(f"The source '{without_keys(name)}' holds no text; name one that does.")
    return source


def require_disjoint(sources: Iterable[Source]) -> None:
    """Refuse two spellings of one text: its documents would stand among the train items and among those of validation.

    Raises:
        UserError: two of the sources read the same file, data set or source of the catalog.
    """
    first: dict[TextName, Source] = {}
    for source in sources:
        for piece in source.pieces:
            for name in piece.names():
                if (other := first.setdefault(name, source)) is not source:
                    names = " and ".join(f"'{without_keys(one.name)}'" for one in (other, source))
                    raise UserError(f"The sources {names} both hold the text of {name[0]}; name it once.")


def require_apart(out: Place, sources: Iterable[str]) -> None:
    """Refuse an output among the text that it is made from, which would be read with it the next time.

    Raises:
        UserError: `out` lies within one of the sources.
    """
    for place in filter(None, map(place_of, sources)):
        if out.lies_within(place):
            raise UserError(
                f"The output {out} lies within the source {place}, which would be read with it the next time; name "
                "another output."
            )


def place_of(source: str) -> Place | None:
    """Where a source as the user spelt it lies: a file, a folder or a glob; None for the hub's and the catalog's.

    Raises:
        UserError: it is a file:// address that names no path, or begins with a home that is not there.
    """
    name = _parts(source)[0]
    if name.startswith("hub:") or name in CATALOG_SOURCES:
        return None
    if name.startswith("file://"):
        return Place(remote_filesystem(name)[1])  # a path after all, to be compared with other paths
    try:
        return Place(name if "://" in name else str(Path(name).expanduser()))
    except RuntimeError:
        raise UserError(f"The source '{name}' begins with the home of nobody here; write the path without ~.") from None


def _parts(source: str) -> tuple[str, str]:
    """What the source is, and the column that holds its text."""
    name, _, column = source.partition("::")
    return name, column or "text"


def _pieces(source: str) -> Iterator[Piece]:
    name, column = _parts(source)
    if place := place_of(source):
        yield from _file_pieces(place, column, shown=without_keys(name))
    elif name in CATALOG_SOURCES:
        yield CatalogDocuments(name)
    else:
        dataset, _, configuration = name.removeprefix("hub:").partition("@")
        if not dataset:
            raise UserError(f"The source '{name}' names no data set; write hub:NAME or hub:NAME@CONFIGURATION.")
        yield HubRows(dataset, configuration or None, column)


def _file_pieces(place: Place, column: str, shown: str) -> Iterator[Piece]:
    filesystem, path = place.filesystem()
    with _readable(shown):
        info = filesystem.get_file_info(path)
        if info.type == FileType.File:
            yield from _file_piece(filesystem, info, column)
            return
        if info.type == FileType.Directory and (folder := _dataset_folder(filesystem, path)):
            yield from _dataset_pieces(filesystem, folder, column)
            return
        files = _listed(filesystem, path, info)
    if not files:
        if info.type == FileType.Directory or "*" in path:
            raise UserError(f"The source '{shown}' holds no file in {', '.join(FORMATS)}; name a folder that does.")
        raise UserError(f"There is no file, folder or catalog source '{shown}'; {nearest(shown, CATALOG_SOURCES)}")
    texts = [file for file in files if _format(file) == ".txt"]
    for start in range(0, len(texts), TEXT_FILES_A_PIECE):
        chunk = texts[start : start + TEXT_FILES_A_PIECE]
        yield WholeFiles(filesystem, tuple(file.path for file in chunk))
    for file in files:
        if _format(file) != ".txt":
            yield from _file_piece(filesystem, file, column)


def _listed(filesystem: FileSystem, path: str, info: FileInfo) -> list[FileInfo]:
    """The files under a folder or matching a glob, by path; hidden files and folders, and other formats, left out.

    Links are followed, and a file that several lead to is listed once.
    """
    if info.type == FileType.Directory:
        root, pattern = path, None
    elif "**" in path:
        raise UserError(f"The source '{path}' holds **; name the folder instead, which is read with all below it.")
    elif "*" in path:
        root, pattern = path[: path.index("*")].rpartition("/")[0], path.replace("[", "[[]")
    else:
        return []
    found = filesystem.get_file_info(FileSelector(root, recursive=True, allow_not_found=True))
    files = [
        file
        for file in found
        if file.type == FileType.File
        and _format(file) in FORMATS
        and not any(part.startswith((".", "_")) for part in PurePosixPath(file.path[len(root) :]).parts)
        and (pattern is None or PurePosixPath(file.path).match(pattern))
    ]
    if isinstance(filesystem, LocalFileSystem):
        # Of a file's names its own is kept, where it is among them, or the shortest.
        named: dict[str, FileInfo] = {}
        for file in sorted(
            files, key=lambda file: (os.path.realpath(file.path) != file.path, len(file.path), file.path)
        ):
            named.setdefault(os.path.realpath(file.path), file)
        files = list(named.values())
    return sorted(files, key=lambda file: file.path)


def _format(file: FileInfo) -> str:
    return f".{file.extension.lower()}"


def _file_piece(filesystem: FileSystem, file: FileInfo, column: str) -> Iterator[Piece]:
    kind, path = _format(file), file.path
    if kind == ".txt":
        yield Blocks(filesystem, path)
    elif kind == ".parquet":
        with _readable(path), filesystem.open_input_file(path) as stream:
            groups = pyarrow.parquet.ParquetFile(stream).num_row_groups
        for group in range(groups):
            yield ParquetRows(filesystem, path, column, group)
    elif kind == ".csv":
        yield CsvRows(filesystem, path, column)
    elif kind == ".json" and _starts_with(filesystem, path, b"["):
        yield JsonList(filesystem, path, column)
    elif kind in (".json", ".jsonl"):
        for start in range(0, file.size, LINES_PIECE_BYTES):
            yield JsonLines(filesystem, path, column, start, min(start + LINES_PIECE_BYTES, file.size))
    else:
        raise UserError(f"The source '{path}' is no text format; name a file in {', '.join(FORMATS)} or a folder.")


def _starts_with(filesystem: FileSystem, path: str, mark: bytes) -> bool:
    with filesystem.open_input_file(path) as stream:
        return stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(mark)


def _dataset_folder(filesystem: FileSystem, path: str) -> str | None:
    """The folder with the Arrow files of a saved data set, or of its split "train"; None: it is no data set."""
    if filesystem.get_file_info(f"{path}/state.json").type == FileType.File:
        return path
    if filesystem.get_file_info(f"{path}/dataset_dict.json").type != FileType.File:
        return None
    with _readable(path):
        splits = list(_read_json(filesystem, f"{path}/dataset_dict.json")["splits"])
    if "train" not in splits:
        raise UserError(f"The data set {path} has no split 'train'; name one of its folders: {', '.join(splits)}.")
    return f"{path}/train"


def _dataset_pieces(filesystem: FileSystem, folder: str, column: str) -> Iterator[Piece]:
    with _readable(folder):
        names = [file["filename"] for file in _read_json(filesystem, f"{folder}/state.json")["_data_files"]]
    for name in names:
        yield ArrowRows(filesystem, f"{folder}/{name}", column)


def _read_json(filesystem: FileSystem, path: str) -> Any:
    with filesystem.open_input_stream(path) as stream:
        return parse_json(stream.read())


@dataclass(frozen=True)
class WholeFiles:
    """Text files, each one document."""

    filesystem: FileSystem
    paths: tuple[str, ...]

    def names(self) -> Iterable[TextName]:
        return [_file_name(self.filesystem, path) for path in self.paths]

    def texts(self) -> Iterator[str]:
        for path in self.paths:
            with _readable(path), self.filesystem.open_input_stream(path) as stream:
                text = stream.read().decode("utf-8-sig", errors="replace")
            yield _no_binary(text, path)


@dataclass(frozen=True)
class Blocks:
    """A text file whose documents stand between blank lines."""

    filesystem: FileSystem
    path: str

    def names(self) -> Iterable[TextName]:
        return [_file_name(self.filesystem, self.path)]

    def texts(self) -> Iterator[str]:
        block: list[str] = []
        with _readable(self.path), self.filesystem.open_input_stream(self.path) as stream:
            for line in io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace"):
                if line.strip():
                    block.append(_no_binary(line, self.path))
                elif block:
                    yield "".join(block)
                    block = []
        if block:
            yield "".join(block)


@dataclass(frozen=True)
class _Rows:
    """A file of rows, one column of which holds the texts."""

    filesystem: FileSystem
    path: str
    column: str

    def names(self) -> Iterable[TextName]:
        return [_file_name(self.filesystem, self.path, self.column)]

    def _texts_in(self, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Iterator[str]:
        """The column's texts, nulls left out.

        Raises:
            UserError: there is no such column, or it holds no text.
        """
        if self.column not in schema.names:
            raise UserError(_no_column(self.column, self.path, schema.names))
        kind = schema.field(self.column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise UserError(
                f"The column '{self.column}' of {self.path} holds {kind}, not text; name another as SOURCE::COLUMN."
            )
        for batch in batches:
            yield from (text for text in batch.column(self.column).to_pylist() if text is not None)


@dataclass(frozen=True)
class JsonLines(_Rows):
    """The lines that start within [start, stop) bytes of a file with one JSON object a line."""

    start: int
    stop: int

    def texts(self) -> Iterator[str]:
        with _readable(self.path), self.filesystem.open_input_file(self.path) as raw:
            raw.seek(max(self.start - 1, 0))
            stream = io.BufferedReader(raw)
            # One byte early: a line that starts exactly at `start` is then not taken for the rest of another.
            place = self.start - 1 + len(stream.readline()) if self.start else 0
            while place < self.stop and (line := stream.readline()):
                if line.strip():
                    yield from self._text(line, place)
                place += len(line)

    def _text(self, line: bytes, place: int) -> Iterator[str]:
        try:
            row = parse_json(line.decode("utf-8-sig", errors="replace"))
        except ValueError:
            raise UserError(f"{self._where(place)} is not JSON; write one object a line.") from None
        yield from _json_text(row, self.column, lambda: self._where(place))

    def _where(self, place: int) -> str:
        with self.filesystem.open_input_stream(self.path) as stream:
            lines_before = stream.read(place).count(b"\n")
        return f"Line {lines_before + 1} of {self.path}"


@dataclass(frozen=True)
class JsonList(_Rows):
    """A file that holds one JSON list of objects; it is read whole."""

    def texts(self) -> Iterator[str]:
        with _readable(self.path):
            rows = _read_json(self.filesystem, self.path)
        for number, row in enumerate(rows, start=1):
            yield from _json_text(row, self.column, partial(self._where, number))

    def _where(self, number: int) -> str:
        return f"Row {number} of {self.path}"


@dataclass(frozen=True)
class ParquetRows(_Rows):
    """One row group of a Parquet file."""

    group: int

    def texts(self) -> Iterator[str]:
        with _readable(self.path), self.filesystem.open_input_file(self.path) as stream:
            file = pyarrow.parquet.ParquetFile(stream)
            batches = file.iter_batches(1024, row_groups=[self.group], columns=[self.column])
            yield from self._texts_in(file.schema_arrow, batches)


@dataclass(frozen=True)
class CsvRows(_Rows):
    """A CSV file whose first line names the columns."""

    def texts(self) -> Iterator[str]:
        as_strings = pa.csv.ConvertOptions(default_column_type=pa.string(), strings_can_be_null=False)
        multi_line = pa.csv.ParseOptions(newlines_in_values=True)
        with _readable(self.path), self.filesystem.open_input_stream(self.path) as stream:
            # A text must lie within two blocks.
            blocks = pa.csv.ReadOptions(block_size=CSV_BLOCK_BYTES)
            reader = pa.csv.open_csv(stream, blocks, convert_options=as_strings, parse_options=multi_line)
            yield from self._texts_in(reader.schema, reader)


@dataclass(frozen=True)
class ArrowRows(_Rows):
    """One Arrow file of a data set saved with the `datasets` library."""

    def texts(self) -> Iterator[str]:
        with _readable(self.path), self.filesystem.open_input_stream(self.path) as stream:
            reader = pa.ipc.open_stream(stream)
            yield from self._texts_in(reader.schema, reader)


@dataclass(frozen=True)
class HubRows:
    """The split "train" of a data set on the hub, read as it is downloaded."""

    dataset: str
    configuration: str | None
    column: str

    def names(self) -> Iterable[TextName]:
        return [(f"hub:{self.dataset}", self.configuration or "", self.column)]

    def texts(self) -> Iterator[str]:
        from datasets import load_dataset
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()  # it tells of every retry before the one sentence that counts
        try:
            rows = load_dataset(self.dataset, self.configuration, split="train", streaming=True)
            for row in rows:
                if self.column not in row:
                    raise UserError(_no_column(self.column, f"hub:{self.dataset}", row))
                if isinstance(row[self.column], str):
                    yield row[self.column]
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"Cannot read 'hub:{self.dataset}' ({first_line(error)}); check the name, and whether the hub is "
                "reachable from here."
            ) from None


@dataclass(frozen=True)
class CatalogDocuments:
    """The documents of a catalog source that no test split holds."""

    name: str

    def names(self) -> Iterable[TextName]:
        return [(self.name,)]

    def texts(self) -> Iterator[str]:
        return (document.text for document in unlabelled(self.name))


def _file_name(filesystem: FileSystem, path: str, column: str = "") -> TextName:
    if isinstance(filesystem, LocalFileSystem):
        return os.path.realpath(path), column
    return path, column, str(id(filesystem))  # a bucket's name is another store's as well, behind another client


def _json_text(row: Any, column: str, where: Callable[[], str]) -> Iterator[str]:
    """The row's text, or nothing where it is null."""
    if not isinstance(row, dict):
        raise UserError(f'{where()} is no JSON object; write {{"{column}": "…"}}.')
    if column not in row:
        raise UserError(_no_column(column, where(), row))
    if isinstance(row[column], str):
        # JSON may hold half of a surrogate pair, which no text does.
        yield row[column].encode("utf-8", "replace").decode()
    elif row[column] is not None:
        raise UserError(f"{where()} has a {type(row[column]).__name__} as '{column}'; write a text.")


def _no_column(column: str, where: str, known: Iterable[str]) -> str:
    return f"{where} has no column '{column}' (it has {', '.join(known)}); name the text column as SOURCE::COLUMN."


def _no_binary(text: str, path: str) -> str:
    if "\0" in text:
        raise UserError(f"{path} is not UTF-8 text; convert it, or leave it out.")
    return text


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """Turns what pyarrow, json and the filesystems raise for unreadable data into a sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(
            f"Cannot read {path} ({first_line(error)}); check that it can be reached, is whole and is UTF-8."
        ) from None
