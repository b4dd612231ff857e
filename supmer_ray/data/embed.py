"""Sentences and pairs of neighbours become vectors: mean-pooled states of the frozen encoder.

Token ids flow in, one float16 vector for each item flows out, to a file for each stretch of rows. The
stretches are fixed by the store alone, so any number of actors writes the same files (paper, section 3.1).

Torch is imported where it computes: the processes that only look for the files start without it.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from supmer_ray.data.store import Sentences, item_rows
from supmer_ray.errors import UserError

if TYPE_CHECKING:
    from supmer_ray.model.backbone import Backbone

STRETCH = 512
"""Rows of sentences that one file of embeddings covers."""

TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 65536}
"""Padded tokens in one forward: a CPU works best out of its cache, a GPU wants many."""


def frame(backbone: Backbone, *parts: np.ndarray) -> np.ndarray:
    """Token ids (n,) of `parts` in a row, between the tokens that the model expects around a text."""
    ids = np.concatenate(parts)
    if backbone.max_positions:
        ids = ids[: backbone.max_positions - len(backbone.prefix) - len(backbone.suffix)]
    return np.concatenate([backbone.prefix, ids, backbone.suffix]).astype(np.int64)


def mean_pooled(backbone: Backbone, inputs: Sequence[np.ndarray], tokens_per_batch: int) -> np.ndarray:
    """Mean over the real positions of the encoder's last hidden states.

    Args:
        inputs: n framed token sequences.
        tokens_per_batch: padded tokens in one forward.

    Returns:
        (n, d) float32.
    """
    import torch

    from supmer_ray.model.prompted import micro_batches
    from supmer_ray.tasks.batch import Examples, collate

    result = np.empty((len(inputs), backbone.d_model), np.float32)
    examples = Examples.of(inputs, [[backbone.closing]] * len(inputs))
    for chosen in micro_batches(examples.lengths, 0, tokens_per_batch):
        rows = collate(examples, chosen, pad=backbone.pad, start=backbone.start, device=backbone.device)
        with torch.inference_mode():
            states = backbone.encode(backbone.embed(rows.input_ids), rows.layout)
            sums = [
                own[:keys].sum(dim=0, dtype=torch.float32) / keys
                for own, keys in zip(states.split(rows.layout.widths), rows.layout.keys, strict=True)
            ]
            result[chosen] = torch.stack(sums).cpu().numpy()
    return result


def sentence_file(folder: Path, stretch: int) -> Path:
    """Where the vectors of a stretch's sentences lie: (sentences, d) float16, by row."""
    return folder / f"sentences-{stretch:08d}.npy"


def pair_file(folder: Path, stretch: int) -> Path:
    """Where the vectors of the pairs that start in a stretch lie: (pairs, d) float16, by row."""
    return folder / f"pairs-{stretch:08d}.npy"


def stretch_rows(stretch: int, sentences: int) -> range:
    """The rows of a stretch in a table of so many sentences."""
    return range(stretch * STRETCH, min((stretch + 1) * STRETCH, sentences))


class Embedder:
    """An actor that embeds stretches of a store's sentences and pairs into files.

    Args:
        store: folder with the sentence table.
        scratch: folder for the vectors.
        backbone: name of the frozen model.
        gpu: whether it has reserved a GPU.
    """

    def __init__(self, store: Path, scratch: Path, backbone: str, gpu: bool) -> None:
        import torch

        from supmer_ray.model.backbone import load_backbone

        device = "cuda" if gpu and torch.cuda.is_available() else "cpu"
        self.store, self.scratch = store, scratch
        self.backbone = load_backbone(backbone, device=device, threads=1)
        self.budget = TOKENS_PER_BATCH[device]

    @cached_property
    def sentences(self) -> Sentences:
        """The sentence table. Opened by the first call, whose error reaches the driver as it is.

        Raises:
            UserError: the output is not seen from this node.
        """
        try:
            return Sentences(self.store)
        except FileNotFoundError:
            raise UserError(
                f"The node {socket.gethostname()} does not see {self.store.parent}, where the store is to be; name an "
                "output that every node of the cluster sees."
            ) from None

    def embed(self, stretch: int) -> int:
        """Write a stretch's two files; returns its sentences."""
        rows = stretch_rows(stretch, len(self.sentences))
        tokens = self.sentences.tokens
        inputs = [frame(self.backbone, tokens(row)) for row in rows]
        pairs = item_rows("nsp", self.sentences.starts, rows.start, rows.stop)
        inputs += [frame(self.backbone, tokens(row), tokens(row + 1)) for row in pairs]
        vectors = mean_pooled(self.backbone, inputs, self.budget)
        if not np.isfinite(vectors).all():
            raise ValueError(f"the backbone gives embeddings that are not finite for {rows}")
        half = vectors.astype(np.float16)
        np.save(sentence_file(self.scratch, stretch), half[: len(rows)], allow_pickle=False)
        np.save(pair_file(self.scratch, stretch), half[len(rows) :], allow_pickle=False)
        return len(rows)
