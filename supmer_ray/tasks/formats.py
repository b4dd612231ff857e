"""The formats that turn sentences into encoder inputs: the paper's three (section 3.1, appendix A) and one with a tail.

Token ids of sentences go in, one encoder input with a sentinel where the answer belongs comes out. An
input that would be too long has its sentences shortened, never its frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from supmer_ray.errors import UserError

if TYPE_CHECKING:
    from supmer_ray.config import TasksConfig
    from supmer_ray.model.backbone import Backbone

PAIR_ANSWERS = ("yes", "no", "maybe")
LETTERS = ("A", "B", "C", "D")
TAILS = (
    "{text} topic : {mask} .",
    "{text} It is about {mask} .",
    "{text} This is {mask} .",
    "{text} It was {mask} .",
    "{text} In a word , {mask} .",
    "{mask} : {text}",
)
"""Ways to ask for a word that fits a sentence, as few-shot patterns do."""

Ids = Sequence[int] | np.ndarray


def shortened(lengths: Sequence[int], room: int) -> list[int]:
    """How many tokens each text keeps so that all together have at most `room`.

    In proportion to their lengths, rounded up; what that is too much is taken from the longest, so
    that a single word beside a long passage is the last to go.

    Example:
        >>> shortened([1, 500], 400)
        [1, 399]
    """
    total = sum(lengths)
    if total <= room:
        return list(lengths)
    kept = [-(-length * room // total) for length in lengths]
    for _ in range(sum(kept) - room):
        kept[kept.index(max(kept))] -= 1
    return kept


def shorten(parts: Sequence[Ids], room: int) -> list[list[int]]:
    """The beginnings of `parts` that `shortened` keeps."""
    kept = shortened([len(part) for part in parts], room)
    return [np.asarray(part[:length]).tolist() for part, length in zip(parts, kept, strict=True)]


@dataclass(frozen=True)
class Formats:
    """The fixed pieces of every format, tokenized once, so that building a task needs no tokenizer.

    Attributes:
        prefix, suffix: special ids around an encoder input.
        sentinel, closing: ids around an answer in the decoder's target.
        words: id of each answer word.
        option_marks: ids of "? A.", ". B.", ". C.", ". D.".
        question: ids of ". ? The correct one is".
        tails: ids before and after the sentence in each of `TAILS`.
        max_length: longest encoder input.
        anchor_length, candidate_length: longest anchor and candidate of a multiple choice.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    sentinel: int
    closing: int
    words: dict[str, int]
    option_marks: tuple[tuple[int, ...], ...]
    question: tuple[int, ...]
    tails: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    max_length: int
    anchor_length: int
    candidate_length: int

    @staticmethod
    def of(backbone: Backbone, config: TasksConfig) -> Formats:
        """The formats in the vocabulary of `backbone`, with the lengths that `config` allows.

        Raises:
            UserError: two answers begin with the same token, so that the model could not tell them apart; or
                `config.max_length` leaves a multiple choice of the mixture no text.
        """
        answers = (*PAIR_ANSWERS, *LETTERS)
        # Behind the sentinel, and in the marks of the options, an answer is a word of its own.
        spaced = backbone.tokenize([backbone.word_space + answer for answer in answers])
        words = {word: ids[0] for word, ids in zip(answers, spaced, strict=True)}
        for group in (PAIR_ANSWERS, LETTERS):
            if len({words[word] for word in group}) < len(group):
                raise UserError(
                    f"The tokenizer of '{backbone.name}' begins two of the answers {', '.join(group)} with the same "
                    "token; choose a backbone whose vocabulary holds them."
                )
        marks = backbone.tokenize([("? A." if letter == "A" else f". {letter}.") for letter in LETTERS])

        def piece(text: str) -> tuple[int, ...]:
            lead = backbone.word_space if text[:1].isspace() else ""
            return tuple(backbone.tokenize([lead + text.strip()])[0]) if text.strip() else ()

        def ids(text: str) -> tuple[int, ...]:
            before, mask, after = text.partition("{mask}")
            pieces = [piece(part) for part in (before, after)]
            return (*pieces[0], backbone.sentinel, *pieces[1]) if mask else pieces[0]

        tails = [tail.split("{text}") for tail in TAILS]
        made = Formats(
            prefix=tuple(backbone.prefix),
            suffix=tuple(backbone.suffix),
            sentinel=backbone.sentinel,
            closing=backbone.closing,
            words=words,
            option_marks=tuple(tuple(mark) for mark in marks),
            question=tuple(backbone.tokenize([". ? The correct one is"])[0]),
            tails=tuple((ids(before), ids(after)) for before, after in tails),
            max_length=config.max_length,
            anchor_length=config.anchor_length,
            candidate_length=config.candidate_length,
        )
        needed = made.frame + len(LETTERS) + 1
        if config.max_length < needed and not {"nss", "scss", "scc"}.isdisjoint(config.types):
            raise UserError(
                f"tasks.max_length is {config.max_length}, and a multiple choice takes {needed} tokens of "
                f"'{backbone.name}' to have any text; raise it."
            )
        return made

    @property
    def frame(self) -> int:
        """Tokens of a multiple choice besides its anchor and its candidates."""
        fixed = (*self.option_marks, self.question, self.prefix, self.suffix)
        return sum(map(len, fixed)) + 1

    def target(self, word: int) -> list[int]:
        """The decoder's target for the id of an answer word: (sentinel, answer, closing)."""
        return [self.sentinel, word, self.closing]

    def sentence_pair(self, first: Ids, second: Ids) -> list[int]:
        """`S1 ⟨sentinel⟩ S2`; too long: both sides shortened in proportion."""
        room = self.max_length - len(self.prefix) - len(self.suffix) - 1
        left, right = shorten([first, second], room)
        return [*self.prefix, *left, self.sentinel, *right, *self.suffix]

    def multiple_choice(self, anchor: Ids, candidates: Sequence[Ids]) -> list[int]:
        """`ANCHOR ? A. C1 . B. C2 . C. C3 . D. C4 . ? The correct one is ⟨sentinel⟩`.

        The anchor and the candidates keep to their own limits first; if the whole is still too long,
        all are shortened in proportion.
        """
        parts = [anchor[: self.anchor_length], *(candidate[: self.candidate_length] for candidate in candidates)]
        first, *options = shorten(parts, self.max_length - self.frame)
        return self._choice(first, options)

    def single_sentence(self, sentence: Ids) -> list[int]:
        """`SENTENCE ? A. ⟨centroid⟩ . B. ⟨centroid⟩ . …`: option k is vector k, written −1−k."""
        options = [[-1 - k] for k in range(len(LETTERS))]
        (cut,) = shorten([sentence], self.max_length - self.frame - len(options))
        return self._choice(cut, options)

    def sentence_tail(self, sentence: Ids, tail: int) -> list[int]:
        """One of `TAILS` around the sentence, which is shortened where it is too long."""
        before, after = self.tails[tail]
        room = self.max_length - len(before) - len(after) - len(self.prefix) - len(self.suffix)
        (cut,) = shorten([sentence], room)
        return [*self.prefix, *before, *cut, *after, *self.suffix]

    def _choice(self, anchor: list[int], options: list[list[int]]) -> list[int]:
        listed = [token for mark, option in zip(self.option_marks, options, strict=True) for token in (*mark, *option)]
        return [*self.prefix, *anchor, *listed, *self.question, self.sentinel, *self.suffix]
