"""Sentences and pairs of neighbours become vectors: mean-pooled states of the frozen encoder.

Token ids flow in, one float16 vector for each item flows out, to a file for each stretch of rows. The
stretches are fixed by the store alone, so any number of actors writes the same files (paper, section 3.1).

Torch is imported where it computes: the processes that only look for the files start without it.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from supmer_ray.data.store import Sentences, item_rows
from supmer_ray.errors import UserError, first_line
from supmer_ray.files import Place
from supmer_ray.tasks.batch import Examples

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem
    from torch import Tensor

    from supmer_ray.model.backbone import Backbone
    from supmer_ray.model.packed import Layout

STRETCH = 512
"""Rows of sentences that one file of embeddings covers."""

TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 65536}
"""Padded tokens in one forward: a CPU works best out of its cache, a GPU wants many."""

IN_HAND = {"cpu": 1, "cuda": 2}
"""Stretches that an actor is given at a time: on a GPU one is laid out, or written, while the other is computed."""


def framed(
    backbone: Backbone, tokens: np.ndarray, first: np.ndarray, behind: np.ndarray, longest: int | None = None
) -> Examples:
    """Spans of `tokens`, each between the tokens that the model expects around a text.

    Args:
        first, behind: (n,) where each span starts, and the place behind its end.
        longest: positions of each at most, frame included; unset: those that the model has.
    """
    before, after = len(backbone.prefix), len(backbone.suffix)
    lengths = behind - first
    if longest := longest or backbone.max_positions:
        lengths = np.minimum(lengths, longest - before - after)
    widths = lengths + before + after
    offsets = np.concatenate([[0], np.cumsum(widths)])
    # A span's own tokens stand `before` places behind the frame's first; where the frame is, anything is read.
    places = np.arange(offsets[-1]) + np.repeat(first - before - offsets[:-1], widths)
    ids = tokens[np.clip(places, 0, max(0, len(tokens) - 1))] if len(tokens) else np.zeros(len(places), np.int32)
    for place, special in enumerate(backbone.prefix):
        ids[offsets[:-1] + place] = special
    for place, special in enumerate(backbone.suffix):
        ids[offsets[1:] - after + place] = special
    return Examples(
        tokens=ids.astype(np.int32, copy=False),
        offsets=offsets,
        labels=np.full((len(first), 1), backbone.closing, np.int32),
        task=np.zeros(len(first), np.int32),
        vectors=np.zeros((1, 0, 0), np.float32),
        choices=np.zeros((1, 0), np.int32),
    )


def mean_pooled(backbone: Backbone, examples: Examples, token_budget: int) -> Tensor:
    """Mean over the real positions of the encoder's last hidden states.

    A GPU has been told what to do when it returns, and may still be at it.

    Args:
        examples: n framed texts.
        token_budget: padded tokens in one forward.

    Returns:
        (n, d) float32, on the backbone's device.
    """
    import torch

    from supmer_ray.model.prompted import micro_batches
    from supmer_ray.tasks.collate import collate, to_device

    result = torch.empty(len(examples), backbone.d_model, device=backbone.device)
    # What the backbone makes once, the gradient of a later prompt may need: no inference mode.
    with torch.no_grad():
        for chosen in micro_batches(examples.lengths, 0, token_budget):
            rows = collate(backbone, examples, chosen)
            states = backbone.encode(backbone.embed(rows.input_ids), rows.layout)
            result.index_copy_(0, to_device(chosen, backbone.device), _means(states, rows.layout))
    return result


def _means(states: Tensor, layout: Layout) -> Tensor:
    """Packed (N, d) → (B, d) float32: the mean over each example's keys."""
    import torch

    if states.is_cuda:  # a kernel for each example would take as long as the forward
        rectangle, held = layout.rectangle(states)
        if held is None:
            return rectangle.mean(dim=1, dtype=torch.float32)
        weights = held / held.sum(dim=1, keepdim=True)
        return torch.einsum("bl,bld->bd", weights, rectangle.float())
    parts = zip(states.split(layout.widths), layout.keys, strict=True)
    return torch.stack([own[:keys].mean(dim=0, dtype=torch.float32) for own, keys in parts])


def stretch_rows(stretch: int, sentences: int) -> range:
    """The rows of a stretch in a table of so many sentences."""
    return range(stretch * STRETCH, min((stretch + 1) * STRETCH, sentences))


@dataclass(frozen=True)
class Stretch:
    """What an embedding actor is told of a stretch of rows.

    Attributes:
        number: which stretch it is.
        tokens: those of its sentences and of the one behind them, end to end, int32.
        offsets: (sentences + 1 or + 2,) where each sentence starts in them.
        rows: how many sentences are its own.
        pairs: which of them begin a pair, counted from the first.
    """

    number: int
    tokens: np.ndarray
    offsets: np.ndarray
    rows: int
    pairs: np.ndarray

    @staticmethod
    def of(sentences: Sentences, number: int) -> Stretch:
        """A stretch of the sentence table."""
        span = stretch_rows(number, len(sentences))
        tokens, offsets = sentences.span(range(span.start, min(span.stop + 1, len(sentences))))
        pairs = item_rows("nsp", sentences.starts, span.start, span.stop) - span.start
        return Stretch(number, tokens, offsets, len(span), pairs)

    def framed(self, backbone: Backbone) -> Examples:
        """Its own sentences, then its pairs of neighbours, as the encoder reads them."""
        first = np.concatenate([self.offsets[: self.rows], self.offsets[self.pairs]])
        behind = np.concatenate([self.offsets[1 : self.rows + 1], self.offsets[self.pairs + 2]])
        return framed(backbone, self.tokens, first, behind)


class Vectors:
    """The files of vectors that the nodes share, two for each stretch.

    Raises:
        UserError: from what reads or writes: this node does not see the folder, or the object store refuses.
    """

    def __init__(self, folder: Place) -> None:
        self.folder = folder

    @cached_property
    def _opened(self) -> tuple[FileSystem, str]:
        return self.folder.filesystem()

    def sentences(self, stretch: int) -> np.ndarray:
        """(sentences, d) float16 vectors of a stretch's sentences, by row."""
        return self._read(f"sentences-{stretch:08d}.npy")

    def pairs(self, stretch: int) -> np.ndarray:
        """(pairs, d) float16 vectors of the pairs that start in a stretch, by row."""
        return self._read(f"pairs-{stretch:08d}.npy")

    def write(self, stretch: int, sentences: np.ndarray, pairs: np.ndarray) -> None:
        """Write both files of a stretch."""
        filesystem, path = self._opened
        for name, vectors in (("sentences", sentences), ("pairs", pairs)):
            with self._told("write to"), filesystem.open_output_stream(f"{path}/{name}-{stretch:08d}.npy") as stream:
                np.save(stream, vectors, allow_pickle=False)

    def _read(self, name: str) -> np.ndarray:
        filesystem, path = self._opened
        with self._told("read from"), filesystem.open_input_file(f"{path}/{name}") as stream:
            return np.load(BytesIO(stream.read()), allow_pickle=False)

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """What fails for the folder's sake, as a sentence."""
        try:
            yield
        except FileNotFoundError:
            raise UserError(
                f"The node {socket.gethostname()} does not see {self.folder.parent}, where the store is to be; "
                "name an output that every node of the cluster sees."
            ) from None
        except OSError as error:
            if not self.folder.remote:
                raise
            raise UserError(
                f"The node {socket.gethostname()} cannot {what} {self.folder.parent} ({first_line(error)}); "
                "check the address and the keys."
            ) from None


class Embedder:
    """An actor that embeds stretches of a store's sentences and pairs into files, from several threads on a GPU.

    Args:
        shared: folder for the vectors.
        backbone: name of the frozen model.
        gpu: whether it has reserved a GPU.
    """

    def __init__(self, shared: Place, backbone: str, gpu: bool) -> None:
        self.vectors = Vectors(shared)
        self.name, self.gpu = backbone, gpu
        self._computing = threading.Lock()

    def load(self) -> None:
        """Load the model. Not while the actor starts: Ray would hide what is refused behind the actor's death.

        Raises:
            UserError: this node cannot.
        """
        import torch

        from supmer_ray.model.backbone import load_backbone

        device = "cuda" if self.gpu and torch.cuda.is_available() else "cpu"
        self.backbone = load_backbone(self.name, device=device, threads=1)
        self.budget = TOKENS_PER_BATCH[device]

    def embed(self, stretch: Stretch) -> int:
        """Write a stretch's two files; returns its sentences.

        Raises:
            UserError: half precision cannot hold what the backbone gives.
        """
        examples = stretch.framed(self.backbone)
        with self._computing:  # the host's part; the GPU's is waited for outside, while the next is launched
            vectors = mean_pooled(self.backbone, examples, self.budget)
        with np.errstate(over="ignore"):
            half = vectors.cpu().numpy().astype(np.float16)
        # Asked of the halves: what is finite before may be too large for them.
        if not np.isfinite(half).all():
            raise UserError(
                f"The backbone '{self.name}' turns some sentences into numbers that are not finite or beyond "
                f"{np.finfo(np.float16).max:.0f}, the most that a store can keep; check its weights, or name another."
            )
        self.vectors.write(stretch.number, half[: stretch.rows], half[stretch.rows :])
        return stretch.rows
