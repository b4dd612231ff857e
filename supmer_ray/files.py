"""Small file habits that every stage shares: digests, and outputs that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from supmer_ray.errors import UserError


def sha256(file: Path) -> str:
    """Hex digest of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A scratch sibling of `folder` to write into; it replaces `folder` when the block ends well.

    After an exception nothing of it is left and `folder` is as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.with_name(f".{folder.name}.partial-{uuid.uuid4().hex[:8]}")
    scratch.mkdir()
    try:
        yield scratch
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old-{uuid.uuid4().hex[:8]}")
            folder.rename(old)
            scratch.rename(folder)
            shutil.rmtree(old)
        else:
            scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A scratch sibling of `file` to write; it replaces `file` when the block ends well."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f".{file.name}.partial-{uuid.uuid4().hex[:8]}{file.suffix}")
    try:
        yield scratch
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write `values` as indented JSON."""
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def seal(folder: Path, description: Mapping[str, Any], name: str = "config.json") -> None:
    """Write `description` into `folder`, with the digest of every other file that lies there."""
    checksums = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
    write_json(folder / name, {**description, "checksums": checksums})


def read_sealed(folder: Path, what: str, name: str = "config.json") -> dict[str, Any]:
    """The description of a sealed folder, after every file's digest was found right.

    Args:
        what: what the folder should be, for the message ("a checkpoint").

    Raises:
        UserError: the folder or its description is missing or unreadable, or a file is missing or changed.
    """
    file = folder / name
    if not file.is_file():
        raise UserError(f"{folder} is not {what}: it holds no {name}.")
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        checksums = description["checksums"].items()
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError):
        raise UserError(f"{file} is damaged; use another copy of {what}.") from None
    for member, digest in checksums:
        path = folder / member
        if not path.is_file():
            raise UserError(f"{folder} is not whole: {member} is missing; use another copy of {what}.")
        if sha256(path) != digest:
            raise UserError(f"{path} is damaged (its digest is not the recorded one); use another copy of {what}.")
    return description
