"""Examples of different lengths side by side without padding, and attention within each of them.

Positions of all examples stand one after the other in one (N, …) tensor, so that everything but
attention works on real positions only. Attention runs over groups of examples of equal shape, with a
position bias that all of them share and no mask at all; on a GPU, where a group for each length would
be too many kernels, one of our own (`model/fused.py`) takes all lengths together.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, scaled_dot_product_attention

SMALL = 16
"""Positions of a decoder's bias, if it decodes no more: the fewest that a program of our kernels reads."""


FUSED_WIDTHS = (16, 32, 64, 128)
"""Features of a head that our kernels take."""


@dataclass(frozen=True)
class Layout:
    """Where each of B examples stands among the packed positions.

    Attributes:
        widths: positions of each example, N in all.
        keys: how many of them, from the first on, others may attend to; the rest is padding, which is
            encoded (a mixed query may need it) but never read within its own example.
    """

    widths: tuple[int, ...]
    keys: tuple[int, ...]
    _made: dict[torch.device, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.widths)

    @property
    def positions(self) -> int:
        return sum(self.widths)

    @cached_property
    def groups(self) -> list[tuple[int, int, int]]:
        """(examples, width, keys) of each run of examples of equal shape."""
        return [(len(list(run)), *shape) for shape, run in groupby(zip(self.widths, self.keys, strict=True))]

    @cached_property
    def places(self) -> Tensor:
        """(N,) the place of each position within its example."""
        widths = torch.tensor(self.widths)
        return torch.arange(self.positions) - torch.repeat_interleave(widths.cumsum(0) - widths, widths)

    def union(self, other: Layout) -> Layout:
        """Of two layouts of the same widths: a position is a key if it is one in either."""
        return Layout(self.widths, tuple(map(max, self.keys, other.keys)))

    def behind(self, rows: int) -> Layout:
        """The layout with `rows` more positions before each example: its soft prompt."""
        return Layout(tuple(w + rows for w in self.widths), tuple(k + rows for k in self.keys))

    def examples(self, device: torch.device) -> Tensor:
        """(N,) which example each position belongs to."""
        owners = torch.repeat_interleave(torch.arange(len(self)), torch.tensor(self.widths))
        return moved(owners, device)

    def real(self, device: torch.device) -> Tensor:
        """(N,) whether each position is no padding."""
        keys = torch.repeat_interleave(torch.tensor(self.keys), torch.tensor(self.widths))
        return moved(self.places < keys, device)

    def table(self, device: torch.device) -> Tensor:
        """(3, B) int32: where each example starts, its width, and its keys; made once for all layers."""
        if device not in self._made:
            starts = [0, *accumulate(self.widths)][:-1]
            self._made[device] = moved(torch.tensor([starts, self.widths, self.keys], dtype=torch.int32), device)
        return self._made[device]

    def rectangle(self, packed: Tensor) -> tuple[Tensor, Tensor | None]:
        """Packed (N, d) → (B, longest, d), and a mask (B, longest) of the keys, None where every position is one."""
        longest = max(self.widths)
        if len(set(self.widths)) == 1:
            rectangle = packed.view(len(self), longest, -1)
        else:
            rows = torch.repeat_interleave(torch.arange(len(self)) * longest, torch.tensor(self.widths)) + self.places
            rectangle = packed.new_zeros(len(self) * longest, packed.shape[1])
            rectangle = rectangle.index_copy(0, moved(rows, packed.device), packed).view(len(self), longest, -1)
        if min(self.keys) == longest:
            return rectangle, None
        return rectangle, moved(torch.arange(longest) < torch.tensor(self.keys)[:, None], packed.device)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; a GPU copies it without the host waiting."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def fused_kernels(tensor: Tensor) -> bool:
    """Whether our own kernels take it: on a GPU, unless fused ones are switched off, as they have no second derivative.

    Where they cannot be compiled, before Ampere, and in double precision, torch's take each group of equal examples.
    """
    if not tensor.is_cuda or tensor.dtype == torch.float64 or not torch.backends.cuda.flash_sdp_enabled():
        return False
    return compiles_kernels() and _from_ampere(tensor.device)


@cache
def compiles_kernels() -> bool:
    """Whether our own kernels can be compiled: by Triton, which torch for CUDA brings on Linux, and a C compiler."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return importlib.util.find_spec("triton") is not None and compiler is not None


@cache
def _from_ampere(device: torch.device) -> bool:
    """Whether a GPU computes in bfloat16, and a program there may have the shared memory that ours need."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def half_on_cpu(tensor: Tensor) -> bool:
    """Whether it is bfloat16 on a CPU, where products are fast in half precision and nothing else is."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16


def decoding_modules(decoder: torch.nn.Module, head: torch.nn.Module) -> list[Any]:
    """The decoder and its head as they should compute: in float32 where they are bfloat16, on a GPU the head alone.

    They see a few positions only, so single precision costs little there; and of logits near 20, eight bits would leave
    steps of a tenth, and ties between answers.
    """
    weight = next(head.parameters())
    if weight.dtype != torch.bfloat16:
        return [decoder, head]
    if not half_on_cpu(weight):
        return [decoder, copy.deepcopy(head).float()]
    return list(copy.deepcopy(torch.nn.ModuleList([decoder, head])).float())


def attention(qkv: Tensor, layout: Layout, heads: int, *, bias: Tensor | None, scale: float) -> Tensor:
    """Attention of each example to its own keys.

    Args:
        qkv: (N, 3 · heads · width) queries, keys and values side by side.
        bias: (1, heads, L, L), L at least the longest example: what is added to the scores; float32 where
            `half_on_cpu(qkv)`.

    Returns:
        (N, heads · width).
    """
    inner = qkv.shape[1] // 3
    if fused_kernels(qkv) and inner // heads in FUSED_WIDTHS:
        from supmer_ray.model.fused import PackedAttention

        return PackedAttention.apply(qkv, bias, layout, heads, scale)
    found = []
    sizes = [count * width for count, width, _ in layout.groups]
    for part, (count, width, keys) in zip(qkv.split(sizes), layout.groups, strict=True):
        q, k, v = _apart(part, count, heads)
        k, v = k[:, :, :keys], v[:, :, :keys]
        own = None if bias is None else bias[:, :, :width, :keys]
        if half_on_cpu(qkv):
            o = _HalfAttention.apply(q, k, v, own, scale)
        else:
            o = scaled_dot_product_attention(q, k, v, attn_mask=own, scale=scale)
        found.append(o.transpose(1, 2).reshape(count * width, inner))
    return found[0] if len(found) == 1 else torch.cat(found)


def _apart(qkv: Tensor, count: int, heads: int) -> list[Tensor]:
    """Queries, keys and values (count, heads, width, w) of examples of equal width, as views."""
    # Taken apart in this order, their gradients are put side by side in one copy.
    parts = qkv.view(count, -1, 3, heads, qkv.shape[1] // (3 * heads)).unbind(2)
    return [part.transpose(1, 2) for part in parts]


class _HalfAttention(torch.autograd.Function):
    """Attention in bfloat16 on a CPU, example by example, so that the scores of one stay in the cache.

    Scores and their softmax are float32, which eight bits would spoil; every other product is bfloat16. Torch's fused
    kernel is slower there, above all backwards. Once differentiable.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        out = q.new_empty(q.shape)
        weights = []
        for at in range(len(q)):
            across = k[at].float().transpose(1, 2)
            if bias is None:
                scores = torch.bmm(q[at].float() * scale, across)
            else:
                scores = torch.baddbmm(bias[0], q[at].float(), across, alpha=scale)
            weights.append(torch.softmax(scores, dim=-1).to(q.dtype))
            torch.bmm(weights[-1], v[at], out=out[at])
        ctx.save_for_backward(q, k, v, out, *weights)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *weights = ctx.saved_tensors
        dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        along = (gradient * out).sum(dim=-1, keepdim=True)
        for at, own in enumerate(weights):
            torch.bmm(own.transpose(1, 2), gradient[at], out=dv[at])
            scores = torch.bmm(gradient[at], v[at].transpose(1, 2)).sub_(along[at]).mul_(own)
            torch.bmm(scores, k[at], out=dq[at])
            torch.bmm(scores.transpose(1, 2), q[at], out=dk[at])
        return dq.mul_(ctx.scale), dk.mul_(ctx.scale), dv, None, None


def pooled_cross_attention(
    queries: Tensor, states: Tensor, held: Tensor | None, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """Attention of a few decoder positions to encoder states whose keys and values are never made.

    q·(K h) = (Kᵀq)·h and Σ a (V h) = V (Σ a h): with T decoder positions and H heads, the states are read T·H
    times, which is far less work than projecting each of them while T is below the head width.

    Args:
        queries: (B, T, H, w).
        states: (B, L, d).
        held: (B, L) which states count; None: all.
        key, value: (H, w, d) projections of each head.

    Returns:
        (B, T, H · w), before any value bias.
    """
    count, steps, heads, width = queries.shape
    queries, key, value = queries.to(states.dtype), key.to(states.dtype), value.to(states.dtype)
    carried = torch.einsum("bthw,hwd->bthd", queries, key).reshape(count, steps * heads, -1)
    # The states come first in both products, so that their gradients lie as they do and are added up in one pass.
    scores = torch.bmm(states, carried.transpose(1, 2)) * scale  # (B, L, T · H)
    if held is not None:
        scores = scores.masked_fill(~held[:, :, None], -torch.inf)
    weights = torch.softmax(scores, dim=1, dtype=torch.promote_types(scores.dtype, torch.float32))
    pooled = torch.bmm(weights.to(states.dtype).transpose(1, 2), states).view(count, steps, heads, -1)
    return torch.einsum("bthd,hwd->bthw", pooled, value).reshape(count, steps, heads * width)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ (+ b), in the precision of the weight."""
    return linear(x.to(weight.dtype), weight, bias)


def add_product(x: Tensor, inner: Tensor, weight: Tensor) -> Tensor:
    """x + inner Wᵀ: the product in the precision of the weight, the sum in that of x."""
    if x.dtype == weight.dtype:
        return torch.addmm(x, inner.to(weight.dtype), weight.t())
    return x + product(inner, weight)
