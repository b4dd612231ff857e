"""What every stage does with files: places, locks, digests, and outputs that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from supmer_ray.errors import (
    UserError,
    first_line,
    require_free,
    require_name,
    require_new_folder,
    require_one_way,
    require_path,
)

if TYPE_CHECKING:
    from pyarrow import NativeFile
    from pyarrow.fs import FileSystem


DEEPEST = 50
"""Levels of lists and sections within each other: no schema has nearly as many."""


def sha256(file: Path) -> str:
    """Hex digest of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _led_to(path: Path) -> Path:
    """What a link leads to: that is replaced, on its own disk."""
    return Path(os.path.realpath(path))


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A scratch sibling of `folder` to write into; it replaces `folder` when the block ends well.

    After an exception nothing of it is left and `folder` is as it was.
    """
    folder = _led_to(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.with_name(f".{folder.name}.partial-{uuid.uuid4().hex[:8]}")
    scratch.mkdir()
    try:
        yield scratch
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old-{uuid.uuid4().hex[:8]}")
            folder.rename(old)
            try:
                scratch.rename(folder)
            except OSError:
                old.rename(folder)
                raise
            shutil.rmtree(old, ignore_errors=True)  # on NFS what another process still reads stays
        else:
            scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A scratch sibling of `file` to write; it replaces `file` when the block ends well."""
    file = _led_to(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f".{file.name}.partial-{uuid.uuid4().hex[:8]}{file.suffix}")
    try:
        yield scratch
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)


def within(value: object, levels: int) -> bool:
    """Whether lists and mappings are nested no deeper than so; one that holds itself has no end."""
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return levels > 0 and all(within(part, levels - 1) for part in parts)


def parse_json(text: str | bytes) -> Any:
    """What JSON says.

    Raises:
        ValueError: it is none, or is nested deeper than Python reads.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_record(text: str | bytes) -> dict[str, Any]:
    """What the JSON object says that one of our files is.

    Raises:
        ValueError: it is none, or is nested deeper than any that we write.
    """
    values = parse_json(text)
    if not isinstance(values, dict) or not within(values, DEEPEST):
        raise ValueError("it is no object of ours")
    return values


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write `values` as indented JSON, whole or not at all."""
    with whole_file(file) as scratch:
        scratch.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)
"""What a file system without locks answers."""


@contextmanager
def held(where: Where, who: str, *, wait: bool = False) -> Iterator[None]:
    """Keep a folder to this process while the block runs, by a lock that ends with the process.

    The lock lies beside the folder, so that the folder may be replaced meanwhile. Object stores have no locks, nor have
    some network file systems: there it is nobody's.

    Args:
        who: what works there, for the message ("a run").
        wait: until whoever holds it has ended.

    Raises:
        UserError: another process holds it.
    """
    place = Place.of(where)
    if place.remote:
        yield
        return
    folder = place.local
    lock = folder.with_name(f".{folder.name}.lock")
    while True:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            stream = lock.open("a")
        except OSError as error:
            raise UserError(f"Cannot write into {folder.parent} ({error.strerror}); name another folder.") from None
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not lock.exists() or not os.path.samestat(lock.stat(), os.fstat(stream.fileno())):
                    raise BlockingIOError  # its holder has just ended and removed it
            except (BlockingIOError, FileNotFoundError):
                if wait:
                    continue
                raise UserError(f"In {folder} {who} is going on; wait for its end, or name another folder.") from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)  # without locks, another may have removed it
            return


CLOUD_PATIENCE_SECONDS = 30
"""Google's client would go on for 15 minutes where its storage cannot be reached."""


def without_keys(uri: str) -> str:
    """A path or URI as people may read it: without the keys and the options that a URI may hold."""
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return uri
    address = rest.partition("?")[0]
    bucket, slash, path = address.partition("/")
    if ":" in bucket and "@" not in bucket:
        # The "/" may be a secret's, which should have been written %2F; it is no more to be read for that.
        return scheme + mark + address.rpartition("@")[2]
    return scheme + mark + bucket.rpartition("@")[2] + slash + path


def remote_filesystem(uri: str) -> tuple[FileSystem, str]:
    """The pyarrow file system of a URI, and the path within it.

    Raises:
        UserError: pyarrow has no such file system, or it cannot be reached.
    """
    from pyarrow import ArrowException

    if "#" in uri:
        raise UserError(f"The address {without_keys(uri)} holds a '#', which would end it; write %23 for it.")
    address, mark, options = uri.partition("?")
    scheme, _, rest = address.partition("://")
    if scheme in ("gs", "gcs") and not mark:
        mark, options = "?", f"retry_limit_seconds={CLOUD_PATIENCE_SECONDS}"
    bucket, slash, path = rest.partition("/")
    # All that lies in a bucket shares one client, with its connections and what it was told of keys and region.
    shared = scheme in ("s3", "gs", "gcs") and bucket != ""
    root, below = (f"{scheme}://{bucket}", slash + path) if shared else (address, "")
    opened = root + mark + options
    try:
        # The environment may name the endpoint and the keys; a client does not outlive a fork.
        filesystem, start = _client(opened, os.getpid(), frozenset(os.environ.items()))
    except (ValueError, OSError, NotImplementedError, ArrowException) as error:
        why = first_line(error).replace(opened, without_keys(uri))
        raise UserError(f"Cannot reach {without_keys(uri)} ({why}); write a path, s3://… or gs://….") from None
    return filesystem, start + unquote(below).rstrip("/")


@lru_cache(maxsize=32)
def _client(uri: str, process: int, environment: frozenset[tuple[str, str]]) -> tuple[FileSystem, str]:
    from pyarrow.fs import FileSystem

    return FileSystem.from_uri(uri)


@dataclass(frozen=True, repr=False)
class Place:
    """A folder that every node sees: a path, or a URI of an object store (`s3://…`, `gs://…`).

    Object stores know neither folders nor appending; what is here works on both.

    Attributes:
        where: the absolute path, or the URI with its keys and options.

    Raises:
        UserError: the URI is a scheme alone, or it is no name that a file may have.
    """

    where: str

    def __post_init__(self) -> None:
        address, mark, query = self.where.partition("?")
        if self.remote and not address.partition("://")[2].strip("/"):
            raise UserError(f"The address {address} names no folder; write one behind it, as in s3://bucket/folder.")
        where = address.rstrip("/") + mark + query if self.remote else str(Path(self.where).absolute())
        require_name(where)
        object.__setattr__(self, "where", where)

    @staticmethod
    def of(where: Where) -> Place:
        """What a caller names as a path, a URI or a place.

        Raises:
            UserError: a `Path` was made of a URI.
        """
        if isinstance(where, Place):
            return where
        require_path(Path("" if "://" in str(where) else where))
        return Place(str(where))

    @property
    def remote(self) -> bool:
        """Whether it lies in an object store."""
        return "://" in self.where

    def __str__(self) -> str:
        return without_keys(self.where) if self.remote else self.where

    def __repr__(self) -> str:
        return f"Place({str(self)!r})"

    def __truediv__(self, name: str) -> Place:
        address, mark, query = self._parts()
        return Place(f"{address}/{name}{mark}{query}")

    def _parts(self) -> tuple[str, str, str]:
        """The address, and the "?" and the options behind it; a path has neither."""
        return self.where.partition("?") if self.remote else (self.where, "", "")

    @property
    def local(self) -> Path:
        """The folder as a path of this machine."""
        assert not self.remote, str(self)
        return Path(self.where)

    @property
    def parent(self) -> Place:
        """The folder that holds this one."""
        if not self.remote:
            return Place(str(self.local.parent))
        address, mark, query = self._parts()
        return Place(address.rpartition("/")[0] + mark + query)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self._parts()[0].rpartition("/")[2]

    @property
    def resolved(self) -> Place:
        """The same place, links followed where it is a path."""
        return self if self.remote else Place(os.path.realpath(self.where))

    def lies_within(self, other: Place) -> bool:
        """Whether this is the other place or lies in it, links followed."""
        return self.remote == other.remote and f"{self.resolved}/".startswith(f"{other.resolved}/")

    def filesystem(self) -> tuple[FileSystem, str]:
        """The pyarrow file system and the path within it.

        Raises:
            UserError: pyarrow has no such file system, or it cannot be reached.
        """
        from pyarrow.fs import LocalFileSystem

        return remote_filesystem(self.where) if self.remote else (LocalFileSystem(), self.where)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """While the block runs, a file or an object store that cannot be read ends it with one sentence.

        Raises:
            UserError: so it was.
        """
        try:
            yield
        except OSError as error:
            check = "check the address and the keys" if self.remote else "check its permissions"
            raise UserError(f"Cannot reach {self} ({first_line(error)}); {check}.") from None

    @contextmanager
    def _stream(self, name: str) -> Iterator[NativeFile | None]:
        """A file, to read, or None where there is no such file."""
        filesystem, path = self.filesystem()
        try:
            stream = filesystem.open_input_stream(f"{path}/{name}")
        except (FileNotFoundError, NotADirectoryError):
            yield None
            return
        with stream:
            yield stream

    def content(self, name: str) -> bytes | None:
        """What a file holds, or None where there is no such file."""
        with self._stream(name) as stream:
            return stream.read() if stream else None

    def read(self, name: str) -> str | None:
        """The text of a file, or None where there is no such file."""
        content = self.content(name)
        return None if content is None else content.decode("utf-8", errors="replace")

    def digest(self, name: str) -> str | None:
        """Hex SHA-256 of a file's bytes, or None where there is no such file."""
        with self._stream(name) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() if stream else None

    def holds(self, name: str) -> bool:
        """Whether there is such a file."""
        from pyarrow.fs import FileType

        filesystem, path = self.filesystem()
        return filesystem.get_file_info(f"{path}/{name}").type == FileType.File

    def glance(self, name: str) -> str | None:
        """`read` for those who look again soon: None also where an object store does not answer this time."""
        try:
            return self.read(name)
        except OSError:
            if not self.remote:
                raise
            return None

    def write(self, name: str, text: str) -> None:
        """Write a small file, whole or not at all."""
        if self.remote:
            filesystem, path = self.filesystem()
            with filesystem.open_output_stream(f"{path}/{name}") as stream:
                stream.write(text.encode("utf-8"))
            return
        with whole_file(self.local / name) as scratch:
            scratch.write_text(text, encoding="utf-8")

    @contextmanager
    def workshop(self, last: str) -> Iterator[tuple[Path, Place]]:
        """A folder of this machine to build this one in, which appears here when the block ends well.

        On a path it replaces what stands here in one step. In an object store what stands here is deleted and the
        files are written one by one.

        Args:
            last: the file that tells a whole folder, which is written last.

        Yields:
            The folder, and a place beside this one for what several nodes share until then; of it nothing is left.

        Raises:
            UserError: the object store does not take the files.
        """
        shared = self.parent / f".{self.name}.shared-{uuid.uuid4().hex[:8]}"
        try:
            if self.remote:
                with TemporaryDirectory(prefix="supmer-") as folder:
                    yield Path(folder), shared
                    self._upload(Path(folder), last)
            else:
                shared.local.mkdir(parents=True)
                with whole_folder(self.local) as folder:
                    yield folder, shared
        finally:
            with suppress(OSError):  # what made the block end is to be heard of, not this
                shared.remove()

    def _upload(self, folder: Path, last: str) -> None:
        from pyarrow.fs import copy_files

        filesystem, path = self.filesystem()
        try:
            self.remove()
            for file in sorted(folder.iterdir(), key=lambda file: (file.name == last, file.name)):
                copy_files(str(file), f"{path}/{file.name}", destination_filesystem=filesystem)
        except OSError as error:
            raise UserError(f"Cannot write to {self} ({first_line(error)}); check the address and the keys.") from None

    def remove(self) -> None:
        """Remove what lies here, a folder with all that it holds or a file, if it is there."""
        from pyarrow.fs import FileType

        # Asked of the place itself: in a URI its name may be written otherwise than the folder's (%20).
        filesystem, path = self.filesystem()
        kind = filesystem.get_file_info(path).type
        if kind == FileType.Directory:
            filesystem.delete_dir(path)
        elif kind == FileType.File:
            filesystem.delete_file(path)

    def listed(self) -> list[str]:
        """The names of what lies here, sorted; nothing where there is no such folder."""
        from pyarrow.fs import FileSelector

        filesystem, path = self.filesystem()
        return sorted(info.base_name for info in filesystem.get_file_info(FileSelector(path, allow_not_found=True)))


Where = str | Path | Place
"""How callers may name a place."""


SEAL = "config.json"
"""What describes a sealed folder."""


def seal(folder: Path, description: Mapping[str, Any]) -> None:
    """Write `description` into `folder`, with the digest of every other file that lies there."""
    checksums = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
    write_json(folder / SEAL, {**description, "checksums": checksums})


def read_sealed(where: Where, what: str) -> dict[str, Any]:
    """The description of a sealed folder, after every file's digest was found right.

    Args:
        what: what the folder should be, for the message ("a checkpoint").

    Raises:
        UserError: the folder or its description is missing or unreadable, or a file is missing or changed.
    """
    place = Place.of(where)
    with place.answering():
        content = place.content(SEAL)
        if content is None:
            raise UserError(f"{place} is not {what}: it holds no {SEAL}.")
        try:
            description = parse_record(content)
        except ValueError:
            raise UserError(f"{place / SEAL} is damaged; use another copy of it.") from None
        checksums = description.get("checksums")
        if not isinstance(checksums, dict):
            raise UserError(f"{place} is not {what}: its {SEAL} has no checksums.")
        for member, digest in checksums.items():
            found = place.digest(member)
            if found is None:
                raise UserError(f"{place} is not whole: {member} is missing; use another copy of it.")
            if found != digest:
                raise UserError(
                    f"{place / member} is damaged (its digest is not the recorded one); use another copy of it."
                )
    return description


def require_outside(out: Place, inputs: Mapping[str, Iterable[Place]]) -> None:
    """Refuse to replace an output that holds what the command is to read.

    Args:
        inputs: what they are ("store") → where they lie.

    Raises:
        UserError: one of them lies within `out`, links followed.
    """
    for what, places in inputs.items():
        for place in places:
            if place.lies_within(out):
                raise UserError(
                    f"The {what} {place} lies within the output {out}, which --overwrite would delete; name another "
                    "output."
                )


def require_new_place(
    place: Place, *, overwrite: bool, resume: bool = False, can_resume: bool = False, marker: str | None = None
) -> None:
    """`require_new_folder`, wherever the output lies.

    Raises:
        UserError: as `require_new_folder` has it; in an object store also for a whole bucket, and where the store does
            not answer.
    """
    if not place.remote:
        require_new_folder(place.local, overwrite=overwrite, resume=resume, can_resume=can_resume, marker=marker)
        return
    require_one_way(overwrite=overwrite, resume=resume)
    if "/" not in place.filesystem()[1].strip("/"):
        raise UserError(f"{place} is a whole bucket; name a folder in it.")
    with place.answering():
        found = place.listed()
    require_free(str(place), found, overwrite=overwrite, resume=resume, can_resume=can_resume, marker=marker)
