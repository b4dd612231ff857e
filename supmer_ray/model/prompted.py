"""One forward for many tasks: each example gathers its own task's soft prompt.

Only the prompt differs between tasks, so a micro-batch may hold examples of several tasks, and one
backward gives the gradient of every task's prompt at once. Micro-batches are sorted by length and cut
by a budget of padded tokens; sums over them are exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
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


def micro_batches(lengths: np.ndarray, overhead: int, token_budget: int) -> list[np.ndarray]:
    """Cut examples into micro-batches of at most `token_budget` padded tokens.

    Args:
        lengths: (n,) tokens of each example.
        overhead: tokens that every example has besides its own (the prompt's length).
        token_budget: rows × (overhead + longest) of a micro-batch stays within this; one example
            that is longer than the budget gets a micro-batch of its own.

    Returns:
        Index arrays that together hold each of 0 … n−1 exactly once, longest examples first.
    """
    order = np.argsort(-lengths, kind="stable")
    batches: list[np.ndarray] = []
    start = 0
    while start < len(order):
        rows = max(1, token_budget // (overhead + int(lengths[order[start]])))
        batches.append(order[start : start + rows])
        start += rows
    return batches


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


def prompt_gradients(
    backbone: Backbone, prompts: Tensor, batches: Iterable[Rows], sizes: Tensor, *, differentiable: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The raw gradient of every task's prompt, and the task's embedding.

    Args:
        prompts: (tasks, P, d), requiring a gradient.
        batches: micro-batches that together hold every task's examples once.
        sizes: (tasks,) examples of each task.
        differentiable: keep the graph from the gradients back to `prompts` (second order).

    Returns:
        g (tasks, P, d), of each task's mean loss; h (tasks, d), the mean encoder state over all real
        positions of the task's examples, prompt included, detached; the mean losses (tasks,).
    """
    tasks, _, width = prompts.shape
    gradients, losses = torch.zeros_like(prompts), prompts.new_zeros(tasks)
    sums, positions = prompts.new_zeros(tasks, width), prompts.new_zeros(tasks)
    for rows in batches:
        states, mask = encode_prompted(backbone, prompts, rows)
        share = label_losses(backbone, states, mask, rows).to(prompts.dtype) / sizes[rows.task]
        gradients = gradients + torch.autograd.grad(share.sum(), prompts, create_graph=differentiable)[0]
        losses.index_add_(0, rows.task, share.detach())
        # h reads real positions only: padding says nothing about the task.
        real = mask.to(prompts.dtype)
        sums.index_add_(0, rows.task, torch.einsum("bl,bld->bd", real, states.detach().to(prompts.dtype)))
        positions.index_add_(0, rows.task, real.sum(dim=1))
    return gradients, sums / positions[:, None], losses


def answer_logits(backbone: Backbone, states: Tensor, mask: Tensor) -> Tensor:
    """(B, vocabulary) logits of the word that follows the sentinel, for scoring verbalizers."""
    decoder_ids = states.new_tensor([backbone.start, backbone.sentinel], dtype=torch.long).expand(len(states), 2)
    return backbone.logits(states, mask, decoder_ids)[:, 1]
