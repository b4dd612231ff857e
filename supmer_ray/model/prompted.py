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
from torch.nn.functional import pad

from supmer_ray.model.backbone import Backbone
from supmer_ray.model.packed import Layout, moved

IGNORED = -100
"""A label that counts for nothing."""

ANSWER = 1
"""The decoder position that names the answer, behind the sentinel."""


@dataclass(frozen=True)
class Rows:
    """A micro-batch of B examples, one after the other.

    Attributes:
        input_ids: (N,) token ids; −1−k stands for row k of the example's own `vectors`.
        layout: where each example stands among the N positions.
        decoder_input_ids: (B, T) what the decoder reads.
        labels: (B, T) what it should say, `IGNORED` where nothing is asked.
        choices: (B, C) the answers that each example may have, −1 where it has fewer.
        task: (B,) which prompt each example belongs to.
        vectors: (tasks, K, d) embeddings that are put straight into the sequence, or None.
    """

    input_ids: Tensor
    layout: Layout
    decoder_input_ids: Tensor
    labels: Tensor
    choices: Tensor
    task: Tensor
    vectors: Tensor | None = None

    def __len__(self) -> int:
        return len(self.layout)

    @staticmethod
    def concat(first: Rows, second: Rows) -> Rows:
        """The examples of both, which belong to the same tasks but insert vectors of their own."""
        second_ids, vectors = second.input_ids, first.vectors
        if first.vectors is not None and second.vectors is not None:
            second_ids = torch.where(second_ids < 0, second_ids - first.vectors.shape[1], second_ids)
            vectors = torch.cat([first.vectors, second.vectors], dim=1)
        widest = max(first.choices.shape[1], second.choices.shape[1])
        choices = [pad(own.choices, (0, widest - own.choices.shape[1]), value=-1) for own in (first, second)]
        return Rows(
            torch.cat([first.input_ids, second_ids]),
            Layout(first.layout.widths + second.layout.widths, first.layout.keys + second.layout.keys),
            torch.cat([first.decoder_input_ids, second.decoder_input_ids]),
            torch.cat([first.labels, second.labels]),
            torch.cat(choices),
            torch.cat([first.task, second.task]),
            vectors,
        )


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


def encode_prompted(backbone: Backbone, prompts: Tensor, rows: Rows) -> tuple[Tensor, Layout]:
    """Encode [θ_task; x] for every example.

    Args:
        prompts: (tasks, P, d).

    Returns:
        Packed encoder states (N + B·P, d), and where each example stands among them.
    """
    embeddings = backbone.embed(rows.input_ids.clamp_min(0))
    if rows.vectors is not None:
        own = rows.task[rows.layout.examples(rows.task.device)]
        inserted = rows.vectors.to(embeddings.dtype)[own, (-1 - rows.input_ids).clamp_min(0)]
        embeddings = torch.where(rows.input_ids[:, None] < 0, inserted, embeddings)
    layout = rows.layout.behind(prompts.shape[1])
    behind = layout.places >= prompts.shape[1]
    texts, before = (moved(where.nonzero()[:, 0], prompts.device) for where in (behind, ~behind))
    # The sum over a task's examples is taken in the precision of the prompts, not in that of the states.
    own_prompts = prompts[rows.task].to(embeddings.dtype).flatten(0, 1)  # (B · P, d)
    packed = embeddings.new_empty(layout.positions, embeddings.shape[1])
    packed.index_copy_(0, texts, embeddings)
    packed.index_copy_(0, before, own_prompts)
    return backbone.encode(packed, layout), layout


def label_losses(
    backbone: Backbone, states: Tensor, layout: Layout, rows: Rows, *, answers_only: bool = False
) -> Tensor:
    """Σ_t −log p(y_t | y_<t, [θ; x]) of each example, (B,), in float32 or wider.

    Args:
        answers_only: only the answer's position counts, and p there is among the example's choices alone.
    """
    if answers_only:
        logits = backbone.logits(states, layout, rows.decoder_input_ids[:, : ANSWER + 1], first=ANSWER)[:, 0]
        return -choice_log_p(logits, rows.choices, rows.labels[:, ANSWER])
    logits = backbone.logits(states, layout, rows.decoder_input_ids)
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), rows.labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(rows.labels.shape).sum(dim=1)


def choice_log_p(logits: Tensor, choices: Tensor, answers: Tensor) -> Tensor:
    """log p of `answers` (B,) among the `choices` (B, C) that are not −1: (B, vocabulary) logits → (B,)."""
    own = logits.gather(1, choices.clamp_min(0)).masked_fill(choices < 0, -torch.inf)
    place = (choices == answers[:, None]).to(torch.int8).argmax(dim=1, keepdim=True)
    return torch.log_softmax(own, dim=1).gather(1, place)[:, 0]


def prompt_gradients(
    backbone: Backbone,
    prompts: Tensor,
    batches: Iterable[Rows],
    sizes: Tensor,
    *,
    answers_only: bool = False,
    differentiable: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The raw gradient of every task's prompt, and the task's embedding.

    Args:
        prompts: (tasks, P, d), requiring a gradient.
        batches: micro-batches that together hold every task's examples once.
        sizes: (tasks,) examples of each task.
        answers_only: of the loss, see `label_losses`.
        differentiable: keep the graph from the gradients back to `prompts` (second order).

    Returns:
        g (tasks, P, d), of each task's mean loss; h (tasks, d), the mean encoder state over all real
        positions of the task's examples, prompt included, detached; the mean losses (tasks,).
    """
    tasks, _, width = prompts.shape
    gradients, losses = torch.zeros_like(prompts), prompts.new_zeros(tasks)
    sums, positions = prompts.new_zeros(tasks, width), prompts.new_zeros(tasks)
    for rows in batches:
        states, layout = encode_prompted(backbone, prompts, rows)
        each = label_losses(backbone, states, layout, rows, answers_only=answers_only)
        share = each.to(prompts.dtype) / sizes[rows.task]
        gradients = gradients + torch.autograd.grad(share.sum(), prompts, create_graph=differentiable)[0]
        losses.index_add_(0, rows.task, share.detach())
        # h reads real positions only: padding says nothing about the task.
        real = layout.real(prompts.device).to(prompts.dtype)
        member = torch.zeros(tasks, layout.positions, dtype=prompts.dtype, device=prompts.device)
        member.scatter_(0, rows.task[layout.examples(prompts.device)][None], real[None])
        # What one task has that is not finite stays its own: its gradient tells, and 0 · NaN would be every task's.
        sums += member @ states.detach().to(prompts.dtype).nan_to_num(0.0, 0.0, 0.0)
        positions += member.sum(dim=1)
    return gradients, sums / positions[:, None], losses


def answer_logits(backbone: Backbone, states: Tensor, layout: Layout) -> Tensor:
    """(B, vocabulary) logits of the word that follows the sentinel, for scoring verbalizers."""
    # Filled on the device: a copy from the host would wait for the encoder.
    decoder_ids = torch.full((len(layout), ANSWER + 1), backbone.sentinel, device=states.device)
    decoder_ids[:, 0] = backbone.start
    return backbone.logits(states, layout, decoder_ids, first=ANSWER)[:, 0]
