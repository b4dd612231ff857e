"""Some of the examples as tensors: a micro-batch, laid out for a forward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from supmer_ray.model.packed import Layout, moved
from supmer_ray.model.prompted import IGNORED, Rows
from supmer_ray.tasks.batch import Examples

if TYPE_CHECKING:
    from supmer_ray.model.backbone import Backbone


def collate(backbone: Backbone, examples: Examples, rows: np.ndarray, *, widths: np.ndarray | None = None) -> Rows:
    """The chosen rows, one after the other, as tensors on the backbone's device.

    The decoder reads `start` first; the rest of its input is the labels shifted by one.

    Args:
        rows: (B,) numbers of the examples.
        widths: (B,) positions to encode of each row, at least its length; unset: its length.
    """
    device, pad, start = backbone.device, backbone.pad, backbone.start
    lengths = examples.lengths[rows]
    widths = lengths if widths is None else widths
    place = np.arange(widths.sum()) - np.repeat(np.cumsum(widths) - widths, widths)
    real = place < np.repeat(lengths, widths)
    ids = np.full(len(place), pad, np.int64)
    ids[real] = examples.tokens[(np.repeat(examples.offsets[rows], widths) + place)[real]]
    labels = examples.labels[rows].astype(np.int64)
    said = np.where(labels == IGNORED, pad, labels)[:, :-1]
    decoder_ids = np.concatenate([np.full((len(rows), 1), start, np.int64), said], axis=1)
    task = examples.task[rows].astype(np.int64)
    return Rows(
        input_ids=to_device(ids, device),
        layout=Layout(tuple(widths.tolist()), tuple(lengths.tolist())),
        decoder_input_ids=to_device(decoder_ids, device),
        labels=to_device(labels, device),
        choices=to_device(examples.choices[task].astype(np.int64), device),
        task=to_device(task, device),
        vectors=to_device(examples.vectors, device) if examples.vectors.shape[1] else None,
    )


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array as a tensor on `device`; a GPU copies it without the host waiting."""
    return moved(torch.from_numpy(array), device)
