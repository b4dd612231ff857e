"""A labelled task as data: one YAML names its rows, text fields, pattern and verbalizers.

In comes a YAML file or the name of a built-in task, out come a checked `TaskDefinition` and, from its
`read`, the train and test rows (`TaskRows` holds both). A pattern puts the fields around one {mask}; a
verbalizer is the word that stands for a label there (Schick and Schütze, 2021). A new task is a new YAML,
never new code.

A multiple choice may be asked at once, with letters as words, or candidate by candidate as a sentence
pair ("does this one follow?"), which a small language model can answer where it cannot point with a letter.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os.path import isdir
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import pandas as pd
from pydantic import BeforeValidator, Field, field_validator, model_serializer, model_validator

from supmer_ray.errors import UserError, first_line, nearest
from supmer_ray.fewshot import builtin
from supmer_ray.fewshot.tables import read_headerless, read_table, read_tsv, require_columns
from supmer_ray.files import Place
from supmer_ray.reading import Section

MASK = "mask"
"""The name that stands for the answer's place in a pattern."""

CANDIDATE = "candidate"
"""The name that stands for one candidate after the other in a pattern."""

WRONG, RIGHT = "wrong", "right"
"""What a multiple choice that is asked candidate by candidate has verbalizers for."""


def _as_text(words: Any) -> Any:
    """A mapping as YAML has it, from labels to words or columns, with both sides as text; all else as it is.

    Raises:
        ValueError: something is empty, or no longer what was written.
    """
    if not isinstance(words, dict):
        return words
    for label, word in words.items():
        if isinstance(word, list | dict):
            raise ValueError(f"'{label}' has several words; give it one")
        for value in (label, word):
            # YAML turns a bare yes, no, true, false or null into something whose spelling is lost.
            if value is None or isinstance(value, bool):
                raise ValueError(f"'{label}: {word}' holds a word that YAML reads as {value}; put it in quotes")
        if not str(word).strip():
            raise ValueError(f"label '{label}' has an empty word; write one")
    result = {str(label): str(word).strip() for label, word in words.items()}
    if len(result) < len(words):
        raise ValueError("a label is written twice, as a number and as a text; keep one of the two")
    return result


Words = Annotated[dict[str, str], BeforeValidator(_as_text)]


class FileSplits(Section):
    """Train and test rows in CSV, JSONL or Parquet files; relative paths start at the YAML's folder."""

    train: Path
    test: Path

    def below(self, folder: Path) -> Self:
        """The same splits with whole paths, relative ones from `folder`.

        Raises:
            UserError: both are one file, or one is no name that a file may have.
        """
        train, test = (Place(str(folder / file)).resolved.local for file in (self.train, self.test))
        if train == test:
            raise UserError(f"Train and test rows are both {train}, so test rows would be trained on; name two files.")
        return self.model_copy(update={"train": train, "test": test})

    def read(self, file: Path, label: str) -> pd.DataFrame:
        """The rows of one of the files."""
        return read_table(file)


class SplitNames(Section):
    """What a data set calls its train and test rows."""

    train: str = "train"
    test: str = "test"

    @model_validator(mode="after")
    def _two(self) -> SplitNames:
        if self.train == self.test:
            raise ValueError(f"both are '{self.train}', so test rows would be trained on; name two")
        return self


class DatasetSplits(Section):
    """A data set of the hub, or a folder that the `datasets` library reads; a relative one starts at the YAML's."""

    name: str
    config: str | None = None
    splits: SplitNames = SplitNames()


class PublishedSplits(FileSplits):
    """Train and test rows in files as a benchmark publishes them.

    Attributes:
        format: tsv has a header and no quoting (GLUE), jsonl one object a line (SuperGLUE), csv no header
            (the single-sentence sets as LM-BFF packed them).
        header: names of a csv's columns.
        columns: the file's name of a column → the definition's, where they differ.
        labels: the file's spelling of a label → the definition's, where they differ.
    """

    format: Literal["tsv", "jsonl", "csv"]
    header: tuple[str, ...] = ()
    columns: dict[str, str] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)

    def read(self, file: Path, label: str) -> pd.DataFrame:
        """The rows of one of the files, in the definition's names and labels."""
        if self.format == "tsv":
            frame = read_tsv(file)
        elif self.format == "csv":
            frame = read_headerless(file, self.header)
        else:
            frame = read_table(file)
        frame = frame.rename(columns=self.columns)
        require_columns(frame, (label,), str(file))
        return frame.assign(**{label: frame[label].map(lambda value: self.labels.get(str(value), value))})


class DataSource(Section):
    """Where the rows come from: exactly one of the four."""

    catalog: str | None = None
    files: FileSplits | None = None
    dataset: DatasetSplits | None = None
    published: PublishedSplits | None = None

    @model_validator(mode="after")
    def _one_source(self) -> DataSource:
        if sum(source is not None for source in (self.catalog, self.files, self.dataset, self.published)) != 1:
            raise ValueError("name exactly one of catalog, files, dataset and published")
        return self

    def places(self) -> list[Path]:
        """The files and folders of the user's that the rows come from."""
        if own := self.files or self.published:
            return [own.train, own.test]
        return [Path(self.dataset.name)] if self.dataset and isdir(self.dataset.name) else []


class Pattern(Section):
    """One way to ask; in YAML its text alone, where it has no words of its own.

    Attributes:
        text: the fields and one mask in braces, "{text} It was {mask} ."; with candidates also {candidate}.
        verbalizers: the words for this pattern, where those of the task do not fit it; otherwise empty.
    """

    text: str
    verbalizers: Words = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"text": value} if isinstance(value, str) else value

    @model_serializer
    def _as_written(self) -> str | dict[str, Any]:
        return {"text": self.text, "verbalizers": self.verbalizers} if self.verbalizers else self.text


class TaskDefinition(Section):
    """A labelled task: what to read and how to ask the language model about it.

    Attributes:
        published: where `data` is a hub's, the same rows in files, below a folder that the user names.
        where: column → values; rows with another value there are left out.
        fields: the text columns that the patterns use.
        candidates: of a multiple choice that is asked candidate by candidate, label → the text column of the
            candidate that it stands for, in the order in which labels are numbered. Otherwise empty.
        label: the column that holds the label; labels are read as text.
        patterns: ways to ask, of which one is used at a time, the first unless a number is given.
        verbalizers: label → word, in the order in which labels are numbered; with candidates the words for
            `wrong` and `right`.
    """

    name: str = Field(min_length=1)
    description: str = ""
    data: DataSource
    published: PublishedSplits | None = None
    where: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    fields: tuple[str, ...] = Field(min_length=1)
    candidates: Words = Field(default_factory=dict)
    label: str = "label"
    patterns: tuple[Pattern, ...] = Field(min_length=1)
    verbalizers: Words = Field(min_length=2)

    @field_validator("fields")
    @classmethod
    def _fields_are_columns(cls, fields: tuple[str, ...]) -> tuple[str, ...]:
        if MASK in fields:
            raise ValueError(f"'{MASK}' stands for the answer's place in a pattern; rename that column")
        if len(set(fields)) < len(fields):
            raise ValueError("a field is listed twice")
        return fields

    @field_validator("candidates")
    @classmethod
    def _candidates_are_columns(cls, candidates: dict[str, str], info: Any) -> dict[str, str]:
        if not candidates:
            return candidates
        if len(candidates) < 2:
            raise ValueError("one candidate leaves no choice; name at least two")
        if CANDIDATE in info.data.get("fields", ()):
            raise ValueError(f"'{CANDIDATE}' stands for one candidate after the other in a pattern; rename that column")
        columns = [*info.data.get("fields", ()), *candidates.values()]
        if len(set(columns)) < len(columns):
            raise ValueError("a column is named twice among fields and candidates")
        return candidates

    @field_validator("patterns")
    @classmethod
    def _patterns_are_usable(cls, patterns: tuple[Pattern, ...], info: Any) -> tuple[Pattern, ...]:
        for pattern in (own.text for own in patterns):
            names = [name for _, name in pattern_parts(pattern) if name is not None]
            once = [MASK, CANDIDATE] if info.data.get("candidates") else [MASK]
            for name in names:
                if name not in once and name not in info.data.get("fields", names):
                    known = [*info.data["fields"], *once]
                    raise ValueError(f"pattern '{pattern}' names {{{name}}}, which is no field; {nearest(name, known)}")
            for name in once:
                if names.count(name) != 1:
                    raise ValueError(
                        f"pattern '{pattern}' has {names.count(name)} times {{{name}}}; write it exactly once"
                    )
            if len(names) == 1:
                raise ValueError(f"pattern '{pattern}' uses no field; write at least one in braces")
        return patterns

    @model_validator(mode="after")
    def _columns_and_words_fit(self) -> TaskDefinition:
        if self.label in self.texts:
            raise ValueError(f"the label's column '{self.label}' is one of the texts as well; the answer would be read")
        if self.candidates and set(self.verbalizers) != {WRONG, RIGHT}:
            raise ValueError(
                f"with candidates, verbalizers are the words for '{WRONG}' and '{RIGHT}', not for "
                f"{', '.join(self.verbalizers)}"
            )
        for pattern in self.patterns:
            if pattern.verbalizers and set(pattern.verbalizers) != set(self.verbalizers):
                raise ValueError(
                    f"pattern '{pattern.text}' has words for {', '.join(pattern.verbalizers)}, but the task's labels "
                    f"are {', '.join(self.verbalizers)}; give each a word, or leave the pattern's own words out"
                )
        return self

    def from_folder(self, folder: Path) -> TaskDefinition:
        """The definition with the rows of its published files below `folder`, or itself if it has none."""
        if self.published is None:
            return self
        return self.model_copy(update={"data": DataSource(published=self.published.below(folder))})

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels in the order of their numbers."""
        return tuple(self.candidates or self.verbalizers)

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns that hold text: the fields, then the candidates."""
        return (*self.fields, *self.candidates.values())

    def read(self) -> dict[str, pd.DataFrame]:
        """The rows: {"train": …, "test": …} with the text columns and the label column, all text.

        Train rows whose texts stand in the test split too, or a second time, are left out.

        Raises:
            UserError: a file, column or split is missing, a label has no verbalizer (with its row), or
                the hub cannot be reached.
        """
        splits = self._read_splits()
        frames = {split: self._checked(frame, where) for split, (frame, where) in splits.items()}
        own, tested = (pd.MultiIndex.from_frame(frames[split][list(self.texts)]) for split in ("train", "test"))
        # Neither what is tested nor what stands there already is drawn from: test rows would be trained on, and rows
        # that were trained on would choose the step.
        drawn = frames["train"][~(own.duplicated() | own.isin(tested))].reset_index(drop=True)
        return frames | {"train": drawn}

    def _read_splits(self) -> dict[str, tuple[pd.DataFrame, str]]:
        if own := self.data.files or self.data.published:
            files = {"train": own.train, "test": own.test}
            return {split: (own.read(file, self.label), str(file)) for split, file in files.items()}
        if self.data.dataset is not None:
            return _read_dataset(self.data.dataset, self.label)
        from supmer_ray.data.catalog import labelled

        frame = labelled(str(self.data.catalog))
        where = f"catalog task '{self.data.catalog}'"
        return {
            split: (frame[frame["split"] == split].reset_index(drop=True), f"{where}, split {split}")
            for split in ("train", "test")
        }

    def _checked(self, frame: pd.DataFrame, where: str) -> pd.DataFrame:
        require_columns(frame, (*self.texts, self.label, *self.where), where)
        for column, values in self.where.items():
            frame = frame[frame[column].map(str).isin(values)]
        if frame.empty and not self.where:
            raise UserError(f"There are no rows in {where}; give at least one.")
        if frame.empty:
            raise UserError(f"No row of {where} passes the 'where' of task '{self.name}'; mend its values.")
        numbers = frame.index + 1  # as the file counts its rows
        frame = frame.reset_index(drop=True)[[*self.texts, self.label]]
        missing = frame[self.label].isna() | (frame[self.label].map(str) == "")
        if missing.any():
            row = numbers[missing.to_numpy().argmax()]
            raise UserError(f"Row {row} of {where} has no '{self.label}'; give it a label or leave the row out.")
        texts = field_texts(frame, self.texts, where, numbers)
        texts[self.label] = frame[self.label].map(str)
        unknown = ~texts[self.label].isin(self.labels)
        if unknown.any():
            row = int(unknown.to_numpy().argmax())
            label = texts[self.label].iloc[row]
            what, line = (
                ("candidate", 'COLUMN" under candidates')
                if self.candidates
                else ("verbalizer", 'WORD" under verbalizers')
            )
            raise UserError(
                f"Row {numbers[row]} of {where} has the label '{label}', which has no {what} in task '{self.name}'; "
                f"add a line \"'{label}': {line} (it has: {', '.join(self.labels)})."
            )
        for label, column in self.candidates.items():
            empty = (texts[self.label] == label) & ~texts[column].str.strip().astype(bool)
            if empty.any():
                row = numbers[empty.to_numpy().argmax()]
                raise UserError(
                    f"Row {row} of {where} has the label '{label}', but its candidate '{column}' is empty; mend it."
                )
        return texts


Frames = Mapping[str, pd.DataFrame]
"""What `TaskDefinition.read` gives: the rows of "train" and "test"."""


@dataclass(frozen=True)
class TaskRows:
    """A task with its rows already read."""

    definition: TaskDefinition
    frames: Frames

    @staticmethod
    def of(definition: TaskDefinition) -> TaskRows:
        return TaskRows(definition, definition.read())

    def description(self) -> dict[str, Any]:
        """All that makes the task another one, as JSON: its definition, and a digest of each split's rows."""
        return {
            "definition": self.definition.model_dump(mode="json"),
            "labels": list(self.definition.labels),  # in their order, which objects of JSON are equal without
            "rows": {split: _digest(frame) for split, frame in self.frames.items()},
        }


def _digest(frame: pd.DataFrame) -> str:
    """SHA-256 of the values, row by row."""
    return hashlib.sha256(pd.util.hash_pandas_object(frame, index=False).to_numpy().tobytes()).hexdigest()


def require_same_labels(source: TaskDefinition, target: TaskDefinition) -> None:
    """
    Raises:
        UserError: what is learned on `source` cannot be tested on `target`.
    """
    if source.labels != target.labels:
        raise UserError(
            f"Task '{target.name}' has the labels {', '.join(target.labels)}, but '{source.name}', which is adapted "
            f"on, has {', '.join(source.labels)}; test on a task with the same labels in the same order."
        )
    if bool(source.candidates) != bool(target.candidates):
        ways = {True: "candidate by candidate", False: "at once"}
        raise UserError(
            f"Task '{target.name}' is asked {ways[bool(target.candidates)]}, but '{source.name}', which is adapted on, "
            f"{ways[bool(source.candidates)]}; test on a task that is asked in the same way."
        )


def field_texts(
    frame: pd.DataFrame, fields: tuple[str, ...], where: str = "the input", numbers: Iterable[int] | None = None
) -> pd.DataFrame:
    """The text columns as text; a missing cell is an empty text.

    Args:
        numbers: of the rows, for the message; unset: from 1.

    Raises:
        UserError: a cell of `frame`, which was read from `where`, holds a list, an object or bytes.
    """
    for field in fields:
        for row, cell in zip(range(1, len(frame) + 1) if numbers is None else numbers, frame[field], strict=True):
            if isinstance(cell, list | tuple | dict | np.ndarray):
                raise UserError(
                    f"Row {row} of {where} holds more than one text as '{field}'; give each its own column."
                )
            if isinstance(cell, bytes | bytearray | memoryview):
                raise UserError(f"Row {row} of {where} holds bytes as '{field}'; store that column as text.")
    return pd.DataFrame({field: ["" if pd.isna(cell) else str(cell) for cell in frame[field]] for field in fields})


def pattern_parts(pattern: str) -> list[tuple[str, str | None]]:
    """The pattern cut at its braces: (text, name of the field or mask behind it, None at the end).

    Raises:
        ValueError: its braces do not pair up, or hold more than a name.
    """
    try:
        parts = list(string.Formatter().parse(pattern))
    except ValueError:
        raise ValueError(
            f"the braces of pattern '{pattern}' do not pair up; write {{{{ for a brace in the text"
        ) from None
    for _, name, form, conversion in parts:
        if name is not None and (not name or form or conversion):
            raise ValueError(
                f"pattern '{pattern}' has more or less than a name in braces; write {{field}} or {{{MASK}}}"
            )
    return [(text, name) for text, name, _, _ in parts]


def load_definition(task: str | Path) -> TaskDefinition:
    """A task from its YAML file, or a built-in one by name.

    Raises:
        UserError: there is no such file or task, or a key or value of the YAML is wrong.
    """
    definition = builtin.load(TaskDefinition, "definitions", task, "task")
    file = builtin.own_file(task)
    return _anchored(definition, file.parent) if file else definition


def _anchored(definition: TaskDefinition, folder: Path) -> TaskDefinition:
    """The definition with its paths made absolute, so that it means the same everywhere."""
    data = definition.data
    if data.published is not None:
        data = DataSource(published=data.published.below(folder))
    elif data.files is not None:
        data = DataSource(files=data.files.below(folder))
    elif data.dataset is not None and isdir(folder / data.dataset.name):
        place = str((folder / data.dataset.name).resolve())
        data = DataSource(dataset=data.dataset.model_copy(update={"name": place}))
    return definition.model_copy(update={"data": data})


def _read_dataset(source: DatasetSplits, label: str) -> dict[str, tuple[pd.DataFrame, str]]:
    import datasets
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it tells of every retry before the one sentence that counts
    folder = Path(source.name)
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(str(folder))
        else:
            splits = datasets.load_dataset(source.name, source.config)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"Cannot read the data set '{source.name}' ({first_line(error)}); check its name and config and that the "
            "hub can be reached, or give the rows as files."
        ) from None
    frames = {}
    for split, name in (("train", source.splits.train), ("test", source.splits.test)):
        if name not in splits:
            raise UserError(f"The data set '{source.name}' has no split '{name}'; {nearest(name, map(str, splits))}")
        rows = splits[name]
        frame = rows.to_pandas()
        names = getattr(rows.features.get(label), "names", None)
        if names:
            # A class label is stored as its number; −1 stands for a label that is kept secret.
            frame[label] = [
                None if pd.isna(number) else names[int(number)] if number >= 0 else str(int(number))
                for number in frame[label]
            ]
        frames[split] = (frame, f"data set '{source.name}', split {name}")
    return frames
