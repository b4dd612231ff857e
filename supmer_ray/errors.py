"""The one error a user can cause, and the small checks that every stage shares.

Whatever is wrong with the user's input is raised as `UserError`: one sentence that says what was
wrong, where, and what to write instead. The command line prints it and exits with status 2; library
callers may catch it. Everything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from textwrap import shorten

LONGEST_NAME = 220
"""Bytes in the name of an output: file systems take 255, and what is written beside it until it is whole needs more."""


class UserError(Exception):
    """Input that cannot be used. The message is one sentence for the person who wrote the input."""


class Stopped(Exception):
    """Work that ended early because it was told to (SIGTERM, `ray job stop`, Ctrl-C), and can be gone on with."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A "did you mean …?" for `word`, or the list of what is known when nothing is near."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known are: {', '.join(names)}."


def first_line(error: BaseException) -> str:
    """What an error of a library says, in a line that fits into a sentence."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return shorten(text, 200, placeholder=" …").rstrip(".")


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one of those behind it, is that of a full disk (or quota, or file size limit)."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        # Ray Train's errors hold what failed beside themselves, in the workers or in its controller's own notes.
        behind = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None)]
        if any(is_disk_full(failure) for failure in behind):
            return True
        error = getattr(error, "cause", None) or error.__cause__
    return False


def require_name(path: str) -> None:
    """Refuse a path that no file has, or that no record could repeat.

    Raises:
        UserError: it holds a NUL, or bytes that are not UTF-8.
    """
    if "\0" in path:
        raise UserError(f"The path {path!r} holds a NUL, which no file's name may; write it without.")
    # What is not UTF-8 comes from the system as halves of surrogate pairs.
    if (shown := path.encode("utf-8", "backslashreplace").decode()) != path:
        raise UserError(f"The path {shown} is not UTF-8; give it another name.")


def require_path(folder: Path) -> None:
    """Refuse what would be a folder named "s3:" or "~": the URI of an object store where only a path will do, and a
    home that the shell has left as it was written.

    Raises:
        UserError: a part of the path is a URI's scheme, or "~", or it begins so; or it is no name (`require_name`).
    """
    require_name(str(folder))
    if "~" in folder.parts or str(folder).startswith("~"):
        raise UserError(
            f"{folder} holds a ~, which a shell reads at the start of a word only; write the path without it."
        )
    if scheme := next((part for part in folder.parts if re.fullmatch(r"[a-z][a-z0-9+.-]+:", part)), None):
        raise UserError(
            f"A {scheme}//… address was given where a path is needed: only text, stores and runs of 'supmer train' may "
            "lie in an object store; name a folder that every node sees."
        )


def require_writable(output: Path) -> None:
    """
    Raises:
        UserError: a file or a folder of this name cannot be made.
    """
    whole = Path(os.path.realpath(output))
    if len(os.fsencode(whole.name)) > LONGEST_NAME:
        raise UserError(f"Cannot write into {output}: its name is longer than {LONGEST_NAME} bytes; name another.")
    try:
        output.stat()
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            raise UserError(f"Cannot write into {output} ({error.strerror}); name another.") from None
    where = next(place for place in (whole, *whole.parents) if os.path.exists(place))
    enough = os.W_OK
    if where.is_dir():
        enough |= os.X_OK
    elif whole != where:
        raise UserError(f"Cannot write into {output}: {where} is a file; name another.")
    if not os.access(where, enough):
        raise UserError(f"Cannot write into {output}: {where} may not be written to; name another.")


def require_one_way(*, overwrite: bool, resume: bool) -> None:
    """
    Raises:
        UserError: what is to be resumed would be deleted first.
    """
    if overwrite and resume:
        raise UserError("--resume goes on with what the output holds and --overwrite deletes it; give one of the two.")


def require_free(
    output: str, held: Collection[str], *, overwrite: bool, resume: bool, can_resume: bool, marker: str | None
) -> None:
    """
    Args:
        held: the names of what the output holds.
        marker: see `require_new_folder`.

    Raises:
        UserError: it is not to be replaced or gone on with, or is none to replace.
    """
    foreign = bool(held) and marker is not None and marker not in held
    if foreign and not resume:
        end = ", so it is not overwritten" if overwrite else ""
        raise UserError(
            f"The output {output} holds something else than this command writes ({marker} is missing){end}; name "
            "another."
        )
    if held and not (overwrite or resume):
        what = "already holds a run" if marker else "is not empty"
        ways = "--overwrite to replace it or --resume to go on" if can_resume else "--overwrite to replace it"
        raise UserError(f"The output {output} {what}; choose another, or add {ways}.")


def require_new_folder(
    folder: Path, *, overwrite: bool, resume: bool = False, can_resume: bool = False, marker: str | None = None
) -> None:
    """Refuse an output folder that already holds something, before any work is done.

    Args:
        can_resume: whether the calling command has a `--resume` to suggest.
        marker: a file by which the command knows its own output; what lacks it is neither overwritten nor called a
            run. None: the command has none.

    Raises:
        UserError: both flags were given, the folder is a URI or a file, is not empty and neither flag was given, or is
            none to overwrite.
    """
    require_path(folder)
    require_one_way(overwrite=overwrite, resume=resume)
    if os.path.exists(folder) and not folder.is_dir():
        raise UserError(f"The output {folder} is a file; name a folder instead.")
    require_writable(folder)
    if os.path.ismount(folder):
        raise UserError(f"The output {folder} is a volume, which cannot be replaced as a whole; name a folder in it.")
    try:
        held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    except PermissionError:
        raise UserError(f"Cannot look into the output {folder}; check its permissions, or name another.") from None
    require_free(str(folder), held, overwrite=overwrite, resume=resume, can_resume=can_resume, marker=marker)
