"""One forward for many tasks: each example gathers its own task's soft prompt.

Only the prompt differs between tasks, so a micro-batch may hold examples of several tasks, and one
backward gives the gradient of every task's prompt at once. Sums over micro-batches are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from supmer_ray.model.backbone import Backbone

IGNORED = -100
"""A label that counts for nothing."""


@dataclass(frozen=True)
class Rows:
    """A padded micro-batch of B examples.

    Attributes:
        input_ids: (B, L) token ids; −1−k stands for row k of the example's own `vectors`.
        attention_mask: (B, L) 1 where a position is real.
        decoder_input_ids: (B, T) what the decoder reads.
        labels: (B, T) what it should say, `IGNORED` where nothing is asked.
        task: (B,) which prompt each example belongs to.
        vectors: (tasks, K, d) embeddings that are put straight into the sequence, or None.
    """

    input_ids: Tensor
    attention_mask: Tensor
    decoder_input_ids: Tensor
    labels: Tensor
    task: Tensor
    vectors: Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


def encode_prompted(backbone: Backbone, prompts: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Encode [θ_task; x] for every example.

    Args:
        prompts: (tasks, P, d).

    Returns:
        Encoder states (B, P + L, d) and their mask (B, P + L).
    """
    embeddings = backbone.embed(rows.input_ids.clamp_min(0))
    if rows.vectors is not None:
        slots = rows.input_ids < 0
        index = torch.where(slots, -1 - rows.input_ids, 0)
        inserted = rows.vectors.to(embeddings.dtype)[rows.task[:, None], index]
        embeddings = torch.where(slots[..., None], inserted, embeddings)
    own = prompts.to(embeddings.dtype)[rows.task]
    ones = rows.attention_mask.new_ones(len(rows), prompts.shape[1])
    mask = torch.cat([ones, rows.attention_mask], dim=1)
    return backbone.encode(torch.cat([own, embeddings], dim=1), mask), mask


def label_losses(backbone: Backbone, states: Tensor, mask: Tensor, rows: Rows) -> Tensor:
    """Σ_t −log p(y_t | y_<t, [θ; x]) of each example, (B,), in float32 or wider."""
    logits = backbone.logits(states, mask, rows.decoder_input_ids)
    wide = logits.float() if logits.dtype != torch.float64 else logits
    losses = torch.nn.functional.cross_entropy(
        wide.transpose(1, 2), rows.labels, ignore_index=IGNORED, reduction="none"
    )
    return losses.sum(dim=1)


def answer_logits(backbone: Backbone, states: Tensor, mask: Tensor) -> Tensor:
    """(B, vocabulary) logits of the word that follows the sentinel, for scoring verbalizers."""
    decoder_ids = states.new_tensor([backbone.start, backbone.sentinel], dtype=torch.long).expand(len(states), 2)
    return backbone.logits(states, mask, decoder_ids)[:, 1]
