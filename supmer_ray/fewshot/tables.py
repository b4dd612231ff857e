"""Rows in files: CSV, JSONL and Parquet in, the same formats out, told apart by the file's ending.

Cells keep what the file says: a CSV cell stays text ("NA", "007"), a JSON integer stays an integer.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow

from supmer_ray.errors import UserError, first_line
from supmer_ray.files import parse_json, whole_file

ENDINGS = (".csv", ".jsonl", ".parquet")


def require_ending(file: Path) -> str:
    """The file's ending, lower-cased.

    Raises:
        UserError: it is none that we read and write.
    """
    ending = file.suffix.lower()
    if ending not in ENDINGS:
        raise UserError(
            f"{file} ends in '{ending}'; write a file that ends in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}."
        )
    return ending


def read_table(file: Path) -> pd.DataFrame:
    """All rows of `file`, numbered from 0.

    Raises:
        UserError: the file is missing, is of another format than its ending says, or has no rows.
    """
    ending = require_ending(file)
    try:
        if ending == ".csv":
            frame = _read_csv(file)
            if not isinstance(frame.index, pd.RangeIndex):  # pandas takes what is too much for row names
                raise UserError(f"{file} has rows with more cells than its header; put a text with commas in quotes.")
        elif ending == ".jsonl":
            frame = _read_jsonl(file)
        else:
            # Arrow types survive the round trip: integers with nulls would else come back as floats.
            frame = pd.read_parquet(file, dtype_backend="pyarrow")
            if frame.index.names != [None]:  # a column that pandas stored as row names
                frame = frame.reset_index()
    except FileNotFoundError:
        raise UserError(f"There is no file {file}; check the path.") from None
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = first_line(error)
        raise UserError(f"Cannot read {file} as {ending[1:]} ({reason}); mend the file or its ending.") from None
    if frame.empty:
        raise UserError(f"{file} holds no rows; give a file with at least one.")
    return frame.reset_index(drop=True)


def read_tsv(file: Path) -> pd.DataFrame:
    """Rows of a GLUE table: tab-separated with a header, quotes are text. Rows that break off are left out.

    Raises:
        UserError: the file is missing, is no text, or has no rows.
    """
    try:
        # Neither splitlines() nor universal newlines: a sentence may hold any other character that ends a line.
        text = file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
        header, *rows = (line.split("\t") for line in text.split("\n"))
    except FileNotFoundError:
        raise UserError(f"There is no file {file}; check the folder of the published files.") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = first_line(error)
        raise UserError(f"Cannot read {file} as a table with tabs ({reason}); use another copy of it.") from None
    whole = [row for row in rows if len(row) == len(header)]
    if not whole:
        raise UserError(f"{file} holds no rows; give a file with at least one.")
    return pd.DataFrame(whole, columns=header)


def read_headerless(file: Path, header: tuple[str, ...]) -> pd.DataFrame:
    """Rows of a comma-separated file without a header line, whose columns are named in `header`.

    Raises:
        UserError: the file is missing, has another number of columns, or has no rows.
    """
    try:
        frame = pd.read_csv(file, dtype=str, keep_default_na=False, header=None)
    except FileNotFoundError:
        raise UserError(f"There is no file {file}; check the folder of the published files.") from None
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"Cannot read {file} as a table with commas ({reason}); use another copy of it.") from None
    if frame.shape[1] != len(header):
        raise UserError(f"{file} has {frame.shape[1]} columns instead of {len(header)} ({', '.join(header)}); mend it.")
    return frame.set_axis(list(header), axis=1)


def _read_csv(file: Path) -> pd.DataFrame:
    options: dict[str, Any] = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
    [header] = pd.read_csv(file, header=None, nrows=1, **options).to_numpy().tolist()
    with file.open(encoding="utf-8-sig") as stream:
        if len(header) == 1 and not stream.readline().strip():
            raise UserError(f"The first line of {file}, which should name its column, is blank; remove it.")
    if twice := next((name for name in header if header.count(name) > 1), None):
        raise UserError(f"{file} has two columns named '{twice}'; rename one.")
    # With one column an empty line is a row, an empty text.
    frame = pd.read_csv(file, skip_blank_lines=len(header) > 1, **options)
    return frame.set_axis(header, axis=1)  # pandas gives a name to a column that has none


def _read_jsonl(file: Path) -> pd.DataFrame:
    records: list[dict[str, Any]] = []
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = parse_json(line)
            except ValueError:
                raise UserError(f"Line {number} of {file} is not JSON; write one JSON object a line.") from None
            if not isinstance(record, dict):
                raise UserError(f"Line {number} of {file} is a JSON {type(record).__name__}; write an object.")
            try:
                json.dumps(record, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise UserError(f"Line {number} of {file} holds half of a character, cut in two; mend it.") from None
            records.append(record)
    return pd.DataFrame(records, dtype=object)


def require_columns(frame: pd.DataFrame, columns: tuple[str, ...], where: str) -> None:
    """
    Raises:
        UserError: `frame`, which was read from `where`, lacks one of the columns.
    """
    for column in columns:
        if column not in frame.columns:
            has = ", ".join(map(str, frame.columns))
            raise UserError(f"{where} has no column '{column}'; its columns are: {has}.")


def write_table(frame: pd.DataFrame, file: Path, *, shown: Path | None = None) -> None:
    """Write `frame` as `file` in one piece: a reader sees the old file or the whole new one.

    Args:
        shown: the file's name in the message, where it is only tried.

    Raises:
        UserError: a column holds what the format has no place for, such as mixed kinds in Parquet.
    """
    ending = require_ending(file)
    with whole_file(file) as partial:
        try:
            if ending == ".csv":
                # Nothing but quotes keeps a carriage return within its cell, and pandas sets none for it.
                returns = any("\r" in cell for column in frame for cell in frame[column] if isinstance(cell, str))
                frame.to_csv(partial, index=False, quoting=csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL)
            elif ending == ".jsonl":
                # Fifteen digits, the most that pandas writes.
                layout = {"orient": "records", "lines": True, "date_format": "iso", "double_precision": 15}
                frame.to_json(partial, force_ascii=False, **layout)
            else:
                frame.to_parquet(partial, index=False)
        except (pyarrow.ArrowException, ValueError, OverflowError) as error:
            others = " or ".join(one for one in ENDINGS if one != ending)
            raise UserError(
                f"Cannot write {shown or file} ({first_line(error)}); write a file that ends in {others} instead."
            ) from None
