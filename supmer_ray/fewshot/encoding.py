"""Rows of a task to token ids: pattern around the fields, the sentinel at the mask, words as targets.

In come rows of text, out come flat `Examples` (framed as the backbone's tokenizer frames a text) and
the numbers of their labels. A text that is too long loses the ends of its longest fields, so that a question
beside a passage stays whole; the pattern and the mask always do. A multiple choice that is asked
candidate by candidate becomes one example for each candidate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
import scipy.special

from supmer_ray.errors import UserError
from supmer_ray.fewshot.definition import (
    CANDIDATE,
    MASK,
    RIGHT,
    WRONG,
    TaskDefinition,
    field_texts,
    pattern_parts,
)
from supmer_ray.model.backbone import Backbone
from supmer_ray.model.prompted import ANSWER, IGNORED
from supmer_ray.tasks.batch import Examples


@dataclass(frozen=True, eq=False)
class Split:
    """Encoded rows and their right answers.

    Attributes:
        examples: encoder inputs with the decoder's targets (sentinel, word, closing): one a row, or with candidates
            one for each label, those of a row together.
        answers: (n,) number of each row's label, in the definition's order.
        offered: with candidates (n, labels), whether a row has the one that stands for the label; otherwise None.
    """

    examples: Examples
    answers: np.ndarray
    offered: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.answers)

    def examples_of(self, rows: np.ndarray) -> np.ndarray:
        """Numbers of the examples that ask about these rows, candidates that a row has not left out."""
        if self.offered is None:
            return rows
        labels = self.offered.shape[1]
        return (rows[:, None] * labels + np.arange(labels))[self.offered[rows]]


def label_probabilities(scores: np.ndarray, offered: np.ndarray | None) -> np.ndarray:
    """What the words of each example say about the labels of each row.

    Asked at once, a word's probability is its label's. Asked candidate by candidate, each has odds of being right,
    and exactly one is: p(label) ∝ p(right | its candidate) / p(wrong | its candidate).

    Args:
        scores: (examples, words) probabilities; with candidates the words are (wrong, right).
        offered: as in `Split`.

    Returns:
        (n, labels) probabilities, 0 where a row has no such candidate.
    """
    if offered is None:
        return scores
    logs = np.log(np.maximum(scores, np.finfo(scores.dtype).tiny))
    odds = (logs[:, 1] - logs[:, 0]).reshape(offered.shape)
    return scipy.special.softmax(np.where(offered, odds, -np.inf), axis=1)


def levelled(lengths: Sequence[int], room: int) -> list[int]:
    """How many tokens each field keeps so that all together have at most `room`: the longest give way first.

    Example:
        >>> levelled([500, 12, 300], 400)
        [194, 12, 194]
    """
    kept, left = [0] * len(lengths), room
    for number, place in enumerate(sorted(range(len(lengths)), key=lengths.__getitem__)):
        kept[place] = min(lengths[place], left // (len(lengths) - number))
        left -= kept[place]
    return kept


def input_limit(backbone: Backbone, prompt_length: int, max_length: int) -> int:
    """Tokens that an encoder input may have beside the prompt: `max_length`, or what the positions leave.

    Raises:
        UserError: the prompt leaves none.
    """
    if backbone.max_positions is None:
        return max_length
    left = backbone.max_positions - prompt_length
    if left < 1:
        raise UserError(
            f"A prompt of {prompt_length} rows leaves no room in the {backbone.max_positions} positions of "
            f"'{backbone.name}'; use a shorter prompt or another backbone."
        )
    return min(max_length, left)


class TaskEncoder:
    """Encodes the rows of one task with one of its patterns.

    Args:
        max_length: of an encoder input with its frame, prompt not counted.
        pattern: number of the definition's pattern; one that has fewer uses its last.

    Attributes:
        verbalizer_ids: (words,) first token of each label's word, or of (wrong, right), what scoring looks at.

    Raises:
        UserError: two words begin with the same token, a word is unknown to the tokenizer, or the
            pattern alone is longer than `max_length`.
    """

    def __init__(self, backbone: Backbone, definition: TaskDefinition, *, max_length: int, pattern: int = 0) -> None:
        self.backbone = backbone
        self.definition = definition
        special = {*backbone.tokenizer.all_special_ids, backbone.sentinel, backbone.closing}
        self._special = special - {backbone.tokenizer.unk_token_id}
        own = definition.patterns[min(pattern, len(definition.patterns) - 1)]
        self._parts = self._pattern_tokens(own.text)
        fixed = sum(len(tokens) for _, tokens, _ in self._parts)
        self._room = max_length - fixed - 1 - len(backbone.prefix) - len(backbone.suffix)
        if self._room < 1:
            raise UserError(
                f"Pattern '{own.text}' of task '{definition.name}' leaves no room for the text in "
                f"{max_length} tokens; shorten the pattern or raise max_length."
            )
        self._targets = self._target_tokens(own.verbalizers or definition.verbalizers)
        self.verbalizer_ids = self._targets[:, ANSWER].astype(np.int64)

    def inputs(self, frame: pd.DataFrame) -> Examples:
        """The rows' encoder inputs, without targets."""
        ids = self._input_ids(frame)
        return Examples.of(ids, [[IGNORED]] * len(ids), choices=self.verbalizer_ids)

    def split(self, frame: pd.DataFrame) -> Split:
        """The rows' encoder inputs with the targets of their labels."""
        numbers = {label: number for number, label in enumerate(self.definition.labels)}
        answers = frame[self.definition.label].map(numbers).to_numpy(np.int64)
        offered, words = self.offered(frame), answers
        if offered is not None:
            words = (np.arange(len(numbers)) == answers[:, None]).astype(np.int64).ravel()
        targets = self._targets[words].tolist()
        examples = Examples.of(self._input_ids(frame), targets, choices=self.verbalizer_ids)
        return Split(examples, answers, offered)

    def offered(self, frame: pd.DataFrame) -> np.ndarray | None:
        """With candidates (n, labels), whether each row has the one that stands for the label; otherwise None.

        Raises:
            UserError: a row has none at all.
        """
        if not self.definition.candidates:
            return None
        texts = field_texts(frame, tuple(self.definition.candidates.values()))
        offered = np.stack([texts[column].str.strip().astype(bool) for column in texts], axis=1)
        none = ~offered.any(axis=1)
        if none.any():
            raise UserError(
                f"Row {int(none.argmax()) + 1} has no candidate ({', '.join(texts)} are empty); mend or leave it out."
            )
        return offered

    def _pattern_tokens(self, pattern: str) -> list[tuple[bool, list[int], str | None]]:
        """The pattern as (whether a space stands before the name, tokens of the text, name)."""
        parts: list[tuple[bool, list[int], str | None]] = []
        for text, name in pattern_parts(pattern):
            spaced = bool(parts) and text[:1].isspace()
            parts.append((text[-1:].isspace(), self._tokenize([text], spaced=spaced)[0], name))
        return parts

    def _tokenize(self, texts: Sequence[str], *, spaced: bool) -> list[list[int]]:
        lead = self.backbone.word_space if spaced else ""
        stripped = [text.strip() for text in texts]
        ids = self.backbone.tokenize([lead + text if text else "" for text in stripped])
        # A text that spells out a special token ("<mask>") must not become one.
        return [[token for token in row if token not in self._special] for row in ids]

    def _input_ids(self, frame: pd.DataFrame) -> list[list[int]]:
        texts = field_texts(frame, self.definition.texts)
        slots = [(spaced, name) for spaced, _, name in self._parts if name and name != MASK]

        @cache
        def tokens(column: str, spaced: bool) -> list[list[int]]:
            return self._tokenize(texts[column].tolist(), spaced=spaced)

        asked = []
        for candidate in self.definition.candidates.values() or [CANDIDATE]:
            columns = [tokens(candidate if name == CANDIDATE else name, spaced) for spaced, name in slots]
            asked.append([self._fill(fields) for fields in zip(*columns, strict=True)])
        return [ids for row in zip(*asked, strict=True) for ids in row]

    def _fill(self, fields: Sequence[list[int]]) -> list[int]:
        kept = levelled([len(field) for field in fields], self._room)
        texts = (field[:length] for field, length in zip(fields, kept, strict=True))
        ids = list(self.backbone.prefix)
        for _, tokens, name in self._parts:
            ids += tokens
            if name == MASK:
                ids.append(self.backbone.sentinel)
            elif name is not None:
                ids += next(texts)
        return ids + self.backbone.suffix

    def _target_tokens(self, verbalizers: Mapping[str, str]) -> np.ndarray:
        """(words, T) int32: sentinel, word, closing; shorter words are filled up with `IGNORED`."""
        labels = (WRONG, RIGHT) if self.definition.candidates else self.definition.labels
        words = self._tokenize([verbalizers[label] for label in labels], spaced=True)
        first: dict[int, str] = {}
        for label, tokens in zip(labels, words, strict=True):
            word = verbalizers[label]
            if not tokens or self.backbone.tokenizer.unk_token_id in tokens:
                raise UserError(
                    f"The verbalizer '{word}' of label '{label}' in task '{self.definition.name}' is no word of the "
                    f"tokenizer of '{self.backbone.name}'; choose another word."
                )
            if tokens[0] in first:
                other = first[tokens[0]]
                raise UserError(
                    f"The verbalizers '{verbalizers[other]}' (label '{other}') and '{word}' (label "
                    f"'{label}') of task '{self.definition.name}' begin with the same token of '{self.backbone.name}' "
                    "and could not be told apart; choose another word for one of them."
                )
            first[tokens[0]] = label
        targets = np.full((len(labels), 2 + max(map(len, words))), IGNORED, np.int32)
        for row, tokens in zip(targets, words, strict=True):
            row[: len(tokens) + 2] = [self.backbone.sentinel, *tokens, self.backbone.closing]
        return targets
