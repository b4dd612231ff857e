"""The plain meta-step that ours is measured against: task by task, everything padded, the library's forward.

Float32, one task after the other, every example padded to the longest that is allowed, queries and
partners in two separate passes: what the paper's setting comes to when it is written down directly. It
computes the same gradients.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from supmer_ray.meta.step import MIXED_POSITIONS
from supmer_ray.model.backbone import Backbone
from supmer_ray.tasks.batch import Examples, TaskBatch


class SequentialStep:
    """One meta-step, first order, one inner step.

    Args:
        backbone: only its model is used.
        max_length: tokens to which every example is padded.
    """

    def __init__(self, backbone: Backbone, regularizer: nn.Module, max_length: int) -> None:
        self.backbone, self.regularizer, self.max_length = backbone, regularizer, max_length

    def __call__(
        self, prompt: Tensor, rate: float, batch: TaskBatch, mixing: np.ndarray
    ) -> tuple[Tensor, list[Tensor]]:
        """(P, d) Σ ∇_θ L, and Σ ∇_φ (L + R)."""
        parameters = list(self.regularizer.parameters())
        prompt_sum = torch.zeros_like(prompt)
        phi_sums = [torch.zeros_like(parameter) for parameter in parameters]
        for task in range(len(batch)):
            theta = prompt.detach().requires_grad_()
            ids, mask, labels = self._padded(batch.support, task)
            states = self._encode(theta, ids, mask)
            full = self._with_prompt(mask, theta)
            loss = nn.functional.cross_entropy(
                self._decode(states, full, labels).flatten(0, 1), labels.flatten(), reduction="sum"
            ) / len(ids)
            (gradient,) = torch.autograd.grad(loss, theta)
            weight = full[..., None].to(states.dtype)
            embedding = (states.detach() * weight).sum((0, 1)) / weight.sum((0, 1))
            update, gate = self.regularizer(gradient[None], embedding[None])
            adapted = theta - rate * update[0]
            at = adapted.detach().requires_grad_()
            query_loss = self._mixed(at, batch, task, float(mixing[batch.query.task == task][0]))
            (query_gradient,) = torch.autograd.grad(query_loss, at)
            agreement = torch.cosine_similarity(query_gradient, update[0].detach(), dim=-1).mean()
            penalty = (float(batch.domain_similarity[task]) / 2 + (1 + agreement) / 4 - gate[0]) ** 2
            found = torch.autograd.grad(
                [adapted, penalty], [theta, *parameters], [query_gradient, torch.ones_like(penalty)]
            )
            prompt_sum += found[0]
            for total, part in zip(phi_sums, found[1:], strict=True):
                total += part
        return prompt_sum, phi_sums

    def _mixed(self, at: Tensor, batch: TaskBatch, task: int, keep: float) -> Tensor:
        ids, mask, labels = self._padded(batch.query, task)
        partner_ids, partner_mask, partner_labels = self._padded(batch.partner, task)
        states = keep * self._encode(at, ids, mask) + (1 - keep) * self._encode(at, partner_ids, partner_mask)
        logits = self._decode(states, self._with_prompt(mask | partner_mask, at), labels)[:, :MIXED_POSITIONS]
        log_p = logits.log_softmax(-1)
        target = torch.zeros_like(log_p)
        for own, share in ((labels, keep), (partner_labels, 1 - keep)):
            at_label = own[:, :MIXED_POSITIONS, None]
            target.scatter_add_(2, at_label, torch.full_like(at_label, 1, dtype=target.dtype) * share)
        return (torch.xlogy(target, target) - target * log_p).sum() / len(ids)

    def _padded(self, examples: Examples, task: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = np.flatnonzero(examples.task == task)
        ids = torch.full((len(rows), self.max_length), self.backbone.pad)
        mask = torch.zeros(len(rows), self.max_length, dtype=torch.long)
        for at, row in enumerate(rows):
            own = examples.tokens[examples.offsets[row] : examples.offsets[row + 1]]
            ids[at, : len(own)] = torch.from_numpy(own.astype(np.int64))
            mask[at, : len(own)] = 1
        labels = torch.from_numpy(examples.labels[rows].astype(np.int64))
        device = self.backbone.device
        return ids.to(device), mask.to(device), labels.to(device)

    def _with_prompt(self, mask: Tensor, prompt: Tensor) -> Tensor:
        return torch.cat([mask.new_ones(len(mask), len(prompt)), mask], dim=1)

    def _encode(self, prompt: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        embeddings = torch.cat([prompt.expand(len(ids), -1, -1), self.backbone.embedding(ids)], dim=1)
        encoder = self.backbone.model.get_encoder()
        return encoder(inputs_embeds=embeddings, attention_mask=self._with_prompt(mask, prompt)).last_hidden_state

    def _decode(self, states: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        start = torch.full_like(labels[:, :1], self.backbone.start)
        return self.backbone.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=mask,
            decoder_input_ids=torch.cat([start, labels[:, :-1]], dim=1),
            use_cache=False,
        ).logits
