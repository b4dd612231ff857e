"""Documents become sentences, and sentences become token ids.

Texts flow in; for each document a list of sentences and a list of their ids flow out. Boundaries come from
nupunkt, a Punkt splitter that carries its model (Kiss and Strunk, 2006), within paragraphs: a blank line
always ends a sentence, so a headline never runs into the first line of its article.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from functools import cache

import nupunkt
import pyarrow as pa

MINIMUM_WORDS = 3
BLANK_LINE = re.compile(r"\n\s*\n")

Tokenize = Callable[[Sequence[str]], list[list[int]]]
"""Texts to token ids without special tokens."""


def split(text: str) -> list[str]:
    """The sentences of a document, whitespace evened out.

    Pieces under three words or without any letter (bylines, rules, page numbers) are left out; the
    sentences around one then count as neighbours.
    """
    splitter = nupunkt.load("default")
    sentences = []
    for paragraph in BLANK_LINE.split(text.replace("\r\n", "\n")):
        for raw in splitter.tokenize(paragraph):
            words = raw.split()
            if len(words) >= MINIMUM_WORDS and any(map(str.isalpha, raw)):
                sentences.append(" ".join(words))
    return sentences


def cut(documents: Sequence[str], tokenize: Tokenize, longest: int) -> pa.Table:
    """Sentences and ids of some documents.

    Args:
        longest: tokens kept of a sentence; its text is kept whole.

    Returns:
        One row a document: `digest` (SHA-256 of its text), `sentences` list<string> and
        `tokens` list<list<int32>>, equally long.
    """
    sentences = [split(text) for text in documents]
    ids = iter(tokenize([sentence for document in sentences for sentence in document]))
    tokens = [[next(ids)[:longest] for _ in document] for document in sentences]
    return pa.table(
        {
            "digest": pa.array([hashlib.sha256(text.encode()).digest() for text in documents], pa.binary()),
            "sentences": pa.array(sentences, pa.list_(pa.string())),
            "tokens": pa.array(tokens, pa.list_(pa.list_(pa.int32()))),
        }
    )


@cache
def tokenizer_of(backbone: str) -> Tokenize:
    """The tokenizer of a backbone, loaded once a process and without the model's weights."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the cluster decides what runs at once
    from transformers import AutoTokenizer

    from supmer_ray.embedded import resolve

    tokenizer = AutoTokenizer.from_pretrained(resolve(backbone), trust_remote_code=False)
    # A text that spells one out ("[MASK]") must not ask for an answer there.
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    # mT5 writes its sentinels with the mark of a space before them.
    pieces = tokenizer.get_vocab().items()
    special |= {number for piece, number in pieces if piece.removeprefix("▁").startswith("<extra_id_")}

    def tokenize(texts: Sequence[str]) -> list[list[int]]:
        rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        return [row if special.isdisjoint(row) else [token for token in row if token not in special] for row in rows]

    return tokenize
