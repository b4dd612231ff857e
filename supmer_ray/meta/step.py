"""The bi-level meta-step (paper, section 3.2 and algorithm 1), for any number of tasks at once.

Support, query and partner examples of some meta-tasks go in; the summed meta-gradients of θ, φ and
the inner rates come out, with each task's agreement, gate and losses. Every forward holds examples of
several tasks, each behind its own task's prompt (`model.prompted`), cut into micro-batches by a token
budget. Sums over micro-batches are exact, because the query loss reaches θ and φ only through the
adapted prompts θ': its gradient there is summed first, and pulled back through the inner steps once.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from supmer_ray.errors import UserError
from supmer_ray.model.backbone import WITH_SCORES, Backbone
from supmer_ray.model.packed import Layout
from supmer_ray.model.prompted import ANSWER, Rows, choice_log_p, encode_prompted, micro_batches, prompt_gradients
from supmer_ray.tasks.batch import Examples, TaskBatch
from supmer_ray.tasks.collate import collate, to_device

MIXED_POSITIONS = ANSWER + 1
"""The decoder positions that carry the mixed target: the sentinel and the label word."""

PHASES = ("support", "query", "reduce")
"""What lies between a step's marks."""


@dataclass(frozen=True)
class MetaGradients:
    """What a meta-step found, summed over its T tasks.

    Attributes:
        prompt: (P, d) Σ_τ ∇_θ L.
        regularizer: Σ_τ ∇_φ (L + R), one tensor a parameter.
        inner_rates: (inner steps,) Σ_τ ∇_α L.
        tasks: (T,) tensors by name: query_loss, support_loss, similarity (s_τ), gate (z),
            gate_penalty (R), gradient_norm (‖g‖), update_norm (‖ψ‖), update_cosine (cos(g, ψ)).
        support_gradient, update: (T, P, d) g and ψ of the last inner step.
        task_embedding: (T, d) h of the last inner step.
        marks: when the step began, had its adapted prompts, and ended, and what the caller adds (`MetaStep.mark`);
            `seconds` reads them.
    """

    prompt: Tensor
    regularizer: list[Tensor]
    inner_rates: Tensor
    tasks: dict[str, Tensor]
    support_gradient: Tensor = field(repr=False)
    update: Tensor = field(repr=False)
    task_embedding: Tensor = field(repr=False)
    marks: list[Any] = field(default_factory=list, repr=False)

    def seconds(self) -> dict[str, float]:
        """What the step took by phase: "support" (the inner steps), "query" (the rest) and, where the caller has
        marked its end, "reduce".

        On a GPU, ask only after the host has waited for it anyway.
        """
        if not isinstance(self.marks[0], float):
            self.marks[-1].synchronize()
        return {name: _between(*ends) for name, ends in zip(PHASES, pairwise(self.marks), strict=False)}


def _between(one: Any, other: Any) -> float:
    return other - one if isinstance(one, float) else one.elapsed_time(other) / 1e3


class MetaStep:
    """Computes meta-gradients on one device.

    Args:
        backbone: the frozen model.
        regularizer: ψ_φ, or `IdentityRegularizer`.
        second_order: differentiate through the inner gradients too (exact MAML).
        answers_only: losses tell a task's answers from each other and not from all words.
        token_budget: encoder tokens of a micro-batch, prompts included; unset: what suits the device.

    Raises:
        UserError: second order with weights in bfloat16.
    """

    def __init__(
        self,
        backbone: Backbone,
        regularizer: nn.Module,
        *,
        second_order: bool = False,
        answers_only: bool = False,
        token_budget: int | None = None,
    ) -> None:
        if second_order and backbone.dtype == torch.bfloat16:
            raise UserError(
                "meta.order second needs more digits than bfloat16 weights give; set workers.precision: float32."
            )
        self.backbone = backbone
        self.regularizer = regularizer
        self.second_order = second_order
        self.answers_only = answers_only
        suits = min(backbone.token_budget, WITH_SCORES) if second_order else backbone.token_budget
        self.token_budget = token_budget or suits

    def __call__(self, prompt: Tensor, inner_rates: Tensor, batch: TaskBatch, mixing: np.ndarray) -> MetaGradients:
        """One meta-step.

        Args:
            prompt: (P, d) θ.
            inner_rates: (inner steps,) α of each inner step.
            batch: T tasks.
            mixing: (queries,) λ of each query example; 1 leaves it alone.
        """
        # Fused attention kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH) if self.second_order else nullcontext():
            return self._meta_gradients(prompt, inner_rates, batch, mixing)

    def _meta_gradients(
        self, prompt: Tensor, inner_rates: Tensor, batch: TaskBatch, mixing: np.ndarray
    ) -> MetaGradients:
        marks = [self.mark()]
        theta = prompt.detach().requires_grad_()
        rates = inner_rates.detach().requires_grad_()
        support = self._micro_batches(batch.support, theta.shape[0])
        adapted = theta.expand(len(batch), *theta.shape)
        # Without inner steps (a prompt that is pre-trained, not meta-learned) nothing is adapted and no gate is asked.
        gradient = update = torch.zeros_like(adapted)
        embedding, support_loss, gate = theta.new_zeros(len(batch), theta.shape[1]), *theta.new_zeros(2, len(batch))
        for rate in rates:
            gradient, embedding, support_loss = self._support_gradient(adapted, batch.support, support)
            update, gate = self.regularizer(gradient, embedding)
            adapted = adapted - rate * update

        marks.append(self.mark())
        query_gradient, query_loss = self._query_gradient(adapted, batch, mixing)
        agreement = torch.cosine_similarity(query_gradient, update.detach(), dim=-1).mean(dim=-1)
        similarity = (1 + agreement) / 2
        delta = to_device(batch.domain_similarity, gate.device).to(gate.dtype)
        penalty = (delta / 2 + similarity / 2 - gate) ** 2

        parameters = list(self.regularizer.parameters())
        outputs, seeds = [adapted], [query_gradient]
        if penalty.requires_grad:
            outputs.append(penalty)
            seeds.append(torch.ones_like(penalty))
        prompt_gradient, rate_gradient, *phi_gradients = torch.autograd.grad(
            outputs, [theta, rates, *parameters], seeds, allow_unused=True, materialize_grads=True
        )
        gradient, update = gradient.detach(), update.detach()
        cosine = torch.cosine_similarity(gradient.flatten(1), update.flatten(1), dim=1)
        marks.append(self.mark())
        return MetaGradients(
            prompt=prompt_gradient,
            regularizer=phi_gradients,
            inner_rates=rate_gradient,
            tasks={
                "query_loss": query_loss,
                "support_loss": support_loss,
                "similarity": similarity,
                "gate": gate.detach(),
                "gate_penalty": penalty.detach(),
                "gradient_norm": gradient.flatten(1).norm(dim=1),
                "update_norm": update.flatten(1).norm(dim=1),
                "update_cosine": cosine,
            },
            support_gradient=gradient,
            update=update,
            task_embedding=embedding,
            marks=marks,
        )

    def mark(self) -> Any:
        """Now, in seconds; on a GPU a mark in its own stream of work, for which the host does not wait."""
        if self.backbone.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def query_metrics(self, prompt: Tensor, inner_rates: Tensor, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """Unmixed query losses (T,) and accuracies (T,) after the inner steps: what validation reports.

        An example counts as right when its answer outscores every other answer of its own task.
        """
        adapted = prompt.detach().expand(len(batch), *prompt.shape)
        support = self._micro_batches(batch.support, prompt.shape[0])
        for rate in inner_rates:
            gradient, embedding, _ = self._support_gradient(adapted, batch.support, support, differentiable=False)
            with torch.no_grad():
                adapted = adapted - rate * self.regularizer(gradient, embedding)[0]
        losses, right = adapted.new_zeros(len(batch)), adapted.new_zeros(len(batch))
        counts = self._counts(batch.query, len(batch))
        with torch.no_grad():
            for index in self._micro_batches(batch.query, prompt.shape[0]):
                rows = collate(self.backbone, batch.query, index)
                states, layout = encode_prompted(self.backbone, adapted, rows)
                logits = self._target_logits(states, layout, rows)
                (own,) = self._log_p(logits, rows.choices, rows.labels)
                losses.index_add_(0, rows.task, -own.sum(dim=1).to(losses.dtype))
                among = logits[:, ANSWER].gather(1, rows.choices.clamp_min(0))
                best = among.masked_fill(rows.choices < 0, -torch.inf).argmax(dim=1, keepdim=True)
                hit = rows.choices.gather(1, best)[:, 0] == rows.labels[:, ANSWER]
                right.index_add_(0, rows.task, hit.to(right.dtype))
        return losses / counts, right / counts

    def _micro_batches(self, examples: Examples, prompt_length: int) -> list[np.ndarray]:
        return micro_batches(examples.lengths, prompt_length, self.token_budget)

    def _counts(self, examples: Examples, tasks: int) -> Tensor:
        counts = np.bincount(examples.task, minlength=tasks).astype(np.float32)
        return to_device(counts, self.backbone.device)

    def _support_gradient(
        self, adapted: Tensor, support: Examples, index: list[np.ndarray], *, differentiable: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """g (T, P, d), h (T, d) and the support loss (T,) at the prompts `adapted` (T, P, d).

        In second order g keeps its graph to `adapted`; otherwise it is a constant.
        """
        second_order = self.second_order and differentiable
        at = adapted if second_order else adapted.detach().requires_grad_()
        batches = (collate(self.backbone, support, part) for part in index)
        sizes = self._counts(support, len(at)).to(at.dtype)
        return prompt_gradients(
            self.backbone, at, batches, sizes, answers_only=self.answers_only, differentiable=second_order
        )

    def _target_logits(self, states: Tensor, layout: Layout, rows: Rows) -> Tensor:
        return self.backbone.logits(states, layout, rows.decoder_input_ids[:, :MIXED_POSITIONS])

    def _log_p(self, logits: Tensor, choices: Tensor, *targets: Tensor) -> list[Tensor]:
        """log p of each of `targets` (B, T) at the positions that count: (B, 2), or (B, 1) of answers alone."""
        if self.answers_only:
            return [choice_log_p(logits[:, ANSWER], choices, target[:, ANSWER])[:, None] for target in targets]
        log_p = torch.log_softmax(logits, dim=-1)
        return [log_p.gather(2, target[:, :MIXED_POSITIONS, None])[..., 0] for target in targets]

    def _query_gradient(self, adapted: Tensor, batch: TaskBatch, mixing: np.ndarray) -> tuple[Tensor, Tensor]:
        """∂L/∂θ' (T, P, d) and L (T,) of the mixed query loss at θ' = `adapted`."""
        at = adapted.detach().requires_grad_()
        counts = self._counts(batch.query, len(batch)).to(at.dtype)
        gradient, loss = torch.zeros_like(at), at.new_zeros(len(batch))
        prompt_length = at.shape[1]
        lengths = batch.query.lengths
        joint = np.maximum(lengths, batch.partner.lengths)
        # λ = 1 leaves a query alone: its partner need not be encoded at all.
        for chosen, widths, examples in ((mixing == 1, lengths, 1), (mixing != 1, joint, 2)):
            where = np.flatnonzero(chosen)
            for part in micro_batches(widths[where] * examples, prompt_length * examples, self.token_budget):
                index = where[part]
                losses, rows = self._mixed_losses(at, batch, index, mixing[index], alone=examples == 1)
                losses = losses.to(at.dtype) / counts[rows.task]
                (piece,) = torch.autograd.grad(losses.sum(), at)
                gradient += piece
                loss.index_add_(0, rows.task, losses.detach())
        return gradient, loss

    def _mixed_losses(
        self, at: Tensor, batch: TaskBatch, index: np.ndarray, mixing: np.ndarray, *, alone: bool
    ) -> tuple[Tensor, Rows]:
        """Σ KL(target ‖ p) over the mixed positions, of each example in `index`."""
        if alone:
            rows = collate(self.backbone, batch.query, index)
            states, layout = encode_prompted(self.backbone, at, rows)
            (own,) = self._log_p(self._target_logits(states, layout, rows), rows.choices, rows.labels)
            return -own.sum(dim=1), rows
        # The shorter of the two is encoded with padding, because the union of both masks reads it there.
        widths = np.maximum(batch.query.lengths[index], batch.partner.lengths[index])
        rows, partner = (collate(self.backbone, part, index, widths=widths) for part in (batch.query, batch.partner))
        states, _ = encode_prompted(self.backbone, at, Rows.concat(rows, partner))
        own_states, partner_states = states.chunk(2)
        union = rows.layout.union(partner.layout).behind(at.shape[1])
        keep = to_device(mixing, states.device)[union.examples(states.device), None]
        mixed = mixed_states(own_states, partner_states, keep)
        # A mixed example may have the answers of both; one that they share stands there once.
        shared = (partner.choices[:, :, None] == rows.choices[:, None, :]).any(dim=2)
        choices = torch.cat([rows.choices, partner.choices.masked_fill(shared, -1)], dim=1)
        own, other = self._log_p(self._target_logits(mixed, union, rows), choices, rows.labels, partner.labels)
        counted = slice(ANSWER, MIXED_POSITIONS) if self.answers_only else slice(MIXED_POSITIONS)
        same = (rows.labels == partner.labels)[:, counted]
        weight = to_device(mixing, own.device).to(own.dtype)[:, None]
        # −H(target): 0 where both labels agree, for the target is then one word.
        negative_entropy = torch.xlogy(weight, weight) + torch.xlogy(1 - weight, 1 - weight)
        cross = weight * own + (1 - weight) * other
        return (torch.where(same, 0.0, negative_entropy) - cross).sum(dim=1), rows


def mixed_states(own: Tensor, partner: Tensor, keep: Tensor) -> Tensor:
    """λ·own + (1 − λ)·partner of (N, d) states, λ (N, 1), in float32 at least: the target has the same λ."""
    keep = keep.to(torch.promote_types(own.dtype, torch.float32))
    return (keep * own + (1 - keep) * partner).to(own.dtype)
