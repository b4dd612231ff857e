"""ψ_φ, the meta-gradient regularizer (paper, section 3.3; equations 4 to 6).

The raw gradient of a soft prompt goes in, a gradient that generalizes across domains comes out: a
stack of low-rank layers turns each row, the row keeps its raw norm, and a gate that reads the task's
embedding decides how much of the raw gradient to keep.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

RANK_LIMIT = 1920
"""The reference's rank where the hidden size allows it."""

_NORM_FLOOR = 1e-8


class Regularizer(nn.Module):
    """A learned map from the gradient of a prompt to the update direction that is applied.

    Args:
        d_model: d, width of a prompt row.
        rank: of the low-rank layers; None: min(1920, d).
        layers: how many of them.
        gate_hidden: hidden size of the gate's two-layer network.
        gated: False: the gate stands shut, ψ = ũ and z = 0 (the ablation without gate).
        two_sided: True: ψ(−g) = −ψ(g), because the layers read g and −g and the difference counts. The paper's layers
            end in a relu, so no element of ũ is negative, whatever the gradient's sign. Where a gradient only
            fluctuates, what is let through of it leads one way, and AdamW makes whole steps of that.

    Example:
        >>> psi = Regularizer(d_model=8, rank=4)
        >>> raw, task_embedding = torch.randn(3, 5, 8), torch.randn(3, 8)
        >>> update, gate = psi(raw, task_embedding)
        >>> update.shape, gate.shape
        (torch.Size([3, 5, 8]), torch.Size([3]))
    """

    def __init__(
        self,
        d_model: int,
        rank: int | None = None,
        layers: int = 2,
        gate_hidden: int = 24,
        *,
        gated: bool = True,
        two_sided: bool = False,
    ) -> None:
        super().__init__()
        self.rank = rank or min(RANK_LIMIT, d_model)
        self.u = nn.ParameterList(nn.Parameter(torch.empty(d_model, self.rank)) for _ in range(layers))
        self.v = nn.ParameterList(nn.Parameter(torch.empty(self.rank, d_model)) for _ in range(layers))
        self.bias = nn.ParameterList(nn.Parameter(torch.zeros(d_model)) for _ in range(layers))
        self.gated, self.two_sided = gated, two_sided
        if gated:
            self.gate_in = nn.Linear(d_model, gate_hidden)
            self.gate_out = nn.Linear(gate_hidden, 1)
        # Each layer starts near the projection UV = VᵀV, so that a fresh ψ passes on as much of the gradient as a
        # relu lets through; a random map would send the prompt off in random directions until φ has learned.
        # Near, not at it: the second relu would stand at its kink wherever the first is shut, and rounding decide.
        for u, v in zip(self.u, self.v, strict=True):
            nn.init.orthogonal_(v)
            nn.init.orthogonal_(u, gain=0.1)
            u.data.add_(v.detach().T)

    def gate(self, task_embedding: Tensor) -> Tensor:
        """z = σ(W₂ relu(W₁ h + b₁) + b₂): (tasks, d) → (tasks,)."""
        if not self.gated:
            return task_embedding.new_zeros(len(task_embedding))
        return torch.sigmoid(self.gate_out(torch.relu(self.gate_in(task_embedding)))).squeeze(-1)

    def transform(self, gradient: Tensor) -> Tensor:
        """ũ: each row of (…, P, d) through the low-rank layers, rescaled to its raw norm."""
        row = self._through_layers(gradient)
        if self.two_sided:
            row = row - self._through_layers(-gradient)
        raw_norm = gradient.norm(dim=-1, keepdim=True)
        return row / (row.norm(dim=-1, keepdim=True) + _NORM_FLOOR) * (raw_norm + _NORM_FLOOR)

    def _through_layers(self, row: Tensor) -> Tensor:
        for u, v, bias in zip(self.u, self.v, self.bias, strict=True):
            row = torch.relu(row @ v.T @ u.T + bias)
        return row

    def forward(self, gradient: Tensor, task_embedding: Tensor) -> tuple[Tensor, Tensor]:
        """ψ = (1 − z)·ũ + z·g.

        Args:
            gradient: (tasks, P, d) raw gradients.
            task_embedding: (tasks, d) mean encoder states of the support sets.

        Returns:
            The regularized gradients (tasks, P, d) and the gates z (tasks,).
        """
        z = self.gate(task_embedding)
        weight = z[:, None, None]
        return (1 - weight) * self.transform(gradient) + weight * gradient, z


class IdentityRegularizer(nn.Module):
    """The ablation without ψ: the raw gradient is applied as it is, and the gate stands fully open."""

    def forward(self, gradient: Tensor, task_embedding: Tensor) -> tuple[Tensor, Tensor]:
        """(tasks, P, d), (tasks, d) → the same gradient and gates of 1 (tasks,)."""
        return gradient, gradient.new_ones(len(gradient))
