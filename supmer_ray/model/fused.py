"""GPU kernels, in Triton, for what torch has none for: attention of packed examples, and a residual with its norm.

Attention reads queries, keys and values where the one product has left them, of examples of any lengths, with a
position bias that all examples share; neither padding, nor a mask, nor a bias for each example is ever made, forwards
or backwards. Scores and sums are float32. The algorithm is FlashAttention-2's (Dao, 2023). Once differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from supmer_ray.model.packed import SMALL, Layout

LOG2_E = tl.constexpr(1.4426950408889634)

KERNELS = ("forward", "keys", "queries")

LARGE = 128
"""The most queries or keys that a program takes at once."""


@triton.jit
def _forward(
    qkv, table, bias, out, scores, scale, bias_head, bias_row, count, positions,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BIASED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A block of one example's queries, over all of its keys: its outputs, and log₂ Σ exp of its scores."""
    first, head, example = tl.program_id(0) * QUERIES, tl.program_id(1), tl.program_id(2)
    start, width, held = _example(table, count, example)
    if first >= width:
        return
    rows, features = first + tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    real = rows < width
    stride: tl.constexpr = 3 * HEADS * WIDTH
    q = qkv + start * stride + head * WIDTH
    k, v = q + HEADS * WIDTH, q + 2 * HEADS * WIDTH
    query = tl.load(q + rows[:, None] * stride + features[None, :], mask=real[:, None], other=0.0)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    found = tl.zeros([QUERIES, WIDTH], tl.float32)
    for at in range(0, held, KEYS):
        columns = at + tl.arange(0, KEYS)
        inside = columns < held
        key = tl.load(k + columns[None, :] * stride + features[:, None], mask=inside[None, :], other=0.0)
        score = tl.dot(query, key, input_precision="ieee") * (scale * LOG2_E)
        if BIASED:
            own_bias = tl.load(bias + head * bias_head + rows[:, None] * bias_row + columns[None, :])
            score += own_bias.to(tl.float32) * LOG2_E  # a number takes the precision of what it is multiplied with
        score = tl.where(inside[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weight, 1)
        value = tl.load(v + columns[:, None] * stride + features[None, :], mask=inside[:, None], other=0.0)
        found = found * shrink[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        top = higher
    found = found / total[:, None]
    place = out + (start + rows[:, None]) * (HEADS * WIDTH) + head * WIDTH + features[None, :]
    tl.store(place, found.to(out.dtype.element_ty), mask=real[:, None])
    tl.store(scores + head * positions + start + rows, top + tl.log2(total), mask=real)


@triton.jit
def _along(out, gradient, along, positions, HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Σ out · gradient of each position and head."""
    rows, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    real = rows < positions
    place = rows.to(tl.int64)[:, None] * (HEADS * WIDTH) + head * WIDTH + tl.arange(0, WIDTH)[None, :]
    one = tl.load(out + place, mask=real[:, None], other=0.0).to(tl.float32)
    other = tl.load(gradient + place, mask=real[:, None], other=0.0).to(tl.float32)
    tl.store(along + head * positions + rows, tl.sum(one * other, 1), mask=real)


@triton.jit
def _backward_keys(
    qkv, table, bias, gradient, scores, along, back, scale, bias_head, bias_row, count, positions,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BIASED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of one example's keys and values, over all of its queries."""
    first, head, example = tl.program_id(0) * KEYS, tl.program_id(1), tl.program_id(2)
    start, width, held = _example(table, count, example)
    if first >= width:
        return
    columns, features = first + tl.arange(0, KEYS), tl.arange(0, WIDTH)
    inside = columns < held
    stride: tl.constexpr = 3 * HEADS * WIDTH
    q = qkv + start * stride + head * WIDTH
    own = columns[:, None] * stride + features[None, :]
    key = tl.load(q + HEADS * WIDTH + own, mask=inside[:, None], other=0.0)
    value = tl.load(q + 2 * HEADS * WIDTH + own, mask=inside[:, None], other=0.0)
    of_key = tl.zeros([KEYS, WIDTH], tl.float32)
    of_value = tl.zeros([KEYS, WIDTH], tl.float32)
    if first < held:
        for at in range(0, width, QUERIES):
            rows = at + tl.arange(0, QUERIES)
            real = rows < width
            query = tl.load(q + rows[None, :] * stride + features[:, None], mask=real[None, :], other=0.0)
            score = tl.dot(key, query, input_precision="ieee") * (scale * LOG2_E)
            if BIASED:
                own_bias = tl.load(bias + head * bias_head + rows[None, :] * bias_row + columns[:, None])
                score += own_bias.to(tl.float32) * LOG2_E
            place = head * positions + start + rows
            weight = tl.exp2(score - tl.load(scores + place, mask=real, other=0.0)[None, :])
            weight = tl.where(inside[:, None] & real[None, :], weight, 0.0)
            above = gradient + (start + rows[:, None]) * (HEADS * WIDTH) + head * WIDTH + features[None, :]
            above = tl.load(above, mask=real[:, None], other=0.0)
            of_value += tl.dot(weight.to(above.dtype), above, input_precision="ieee")
            of_weight = tl.dot(value, tl.trans(above), input_precision="ieee")
            of_score = weight * (of_weight - tl.load(along + place, mask=real, other=0.0)[None, :])
            of_key += tl.dot(of_score.to(query.dtype), tl.trans(query), input_precision="ieee")
    to = back + start * stride + head * WIDTH + own
    written = (columns < width)[:, None]
    tl.store(to + HEADS * WIDTH, (of_key * scale).to(back.dtype.element_ty), mask=written)
    tl.store(to + 2 * HEADS * WIDTH, of_value.to(back.dtype.element_ty), mask=written)


@triton.jit
def _backward_queries(
    qkv, table, bias, gradient, scores, along, back, scale, bias_head, bias_row, count, positions,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BIASED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of one example's queries, over all of its keys."""
    first, head, example = tl.program_id(0) * QUERIES, tl.program_id(1), tl.program_id(2)
    start, width, held = _example(table, count, example)
    if first >= width:
        return
    rows, features = first + tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    real = rows < width
    stride: tl.constexpr = 3 * HEADS * WIDTH
    q = qkv + start * stride + head * WIDTH
    k, v = q + HEADS * WIDTH, q + 2 * HEADS * WIDTH
    own = rows[:, None] * stride + features[None, :]
    query = tl.load(q + own, mask=real[:, None], other=0.0)
    above = gradient + (start + rows[:, None]) * (HEADS * WIDTH) + head * WIDTH + features[None, :]
    above = tl.load(above, mask=real[:, None], other=0.0)
    place = head * positions + start + rows
    height = tl.load(scores + place, mask=real, other=0.0)
    common = tl.load(along + place, mask=real, other=0.0)
    of_query = tl.zeros([QUERIES, WIDTH], tl.float32)
    for at in range(0, held, KEYS):
        columns = at + tl.arange(0, KEYS)
        inside = columns < held
        across = columns[None, :] * stride + features[:, None]
        key = tl.load(k + across, mask=inside[None, :], other=0.0)
        value = tl.load(v + across, mask=inside[None, :], other=0.0)
        score = tl.dot(query, key, input_precision="ieee") * (scale * LOG2_E)
        if BIASED:
            own_bias = tl.load(bias + head * bias_head + rows[:, None] * bias_row + columns[None, :])
            score += own_bias.to(tl.float32) * LOG2_E  # a number takes the precision of what it is multiplied with
        weight = tl.where(inside[None, :] & real[:, None], tl.exp2(score - height[:, None]), 0.0)
        of_score = weight * (tl.dot(above, value, input_precision="ieee") - common[:, None])
        of_query += tl.dot(of_score.to(key.dtype), tl.trans(key), input_precision="ieee")
    to = back + start * stride + head * WIDTH + own
    tl.store(to, (of_query * scale).to(back.dtype.element_ty), mask=real[:, None])


@triton.jit
def _example(table, count, example):
    """Where an example starts, how many positions it has, and how many of them are keys."""
    start = tl.load(table + example).to(tl.int64)
    return start, tl.load(table + count + example), tl.load(table + 2 * count + example)


def block_sizes(longest: int, width: int, dtype: torch.dtype) -> dict[str, dict[str, int]]:
    """Queries and keys of a program, and its warps and stages, by kernel.

    For heads of up to 64 features in half precision the fastest of those tried on an H100; they need 96 KiB of shared
    memory there and 80 on GPUs before it, which all from Ampere on have. Wider ones take as little.

    Args:
        longest: positions of the longest example.
        width: features of a head.
    """
    if longest <= SMALL:
        return {kernel: {"QUERIES": SMALL, "KEYS": SMALL, "num_warps": 1} for kernel in KERNELS}
    if dtype == torch.float32:
        return {kernel: {"QUERIES": 32, "KEYS": 32, "num_warps": 4, "num_stages": 2} for kernel in KERNELS}
    if width > 64:
        sizes = {"QUERIES": 64, "num_warps": 4, "num_stages": 2}
        return {kernel: {**sizes, "KEYS": 32 if kernel == "queries" else 64} for kernel in KERNELS}
    forward = {"QUERIES": 128, "num_warps": 8} if longest > 256 else {"QUERIES": 64, "num_warps": 4}
    return {
        "forward": {**forward, "KEYS": 64, "num_stages": 3},
        "keys": {"QUERIES": 128, "KEYS": 64, "num_warps": 4, "num_stages": 2},
        "queries": {"QUERIES": 64, "KEYS": 32, "num_warps": 4, "num_stages": 3},
    }


def reach(longest: int) -> int:
    """How many positions a bias must have each way: a program reads whole blocks of it."""
    return SMALL if longest <= SMALL else -(-longest // LARGE) * LARGE


class PackedAttention(torch.autograd.Function):
    """Attention of each example to its own keys: `packed.attention`, in one kernel forwards and three backwards.

    Args:
        qkv: (N, 3 · inner) queries, keys and values side by side.
        bias: (1, heads, L, L) a constant, or None; filled up to `reach` where it is shorter.

    Returns:
        (N, inner).
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor | None, layout: Layout, heads: int, scale: float) -> Tensor:
        qkv, positions, inner = qkv.contiguous(), qkv.shape[0], qkv.shape[1] // 3
        table, longest = layout.table(qkv.device), max(layout.widths)
        if bias is not None:
            if (missing := reach(longest) - bias.shape[-1]) > 0:
                bias = torch.nn.functional.pad(bias, (0, missing, 0, missing))
            bias = bias.contiguous()  # columns are read in one piece
        out, scores = qkv.new_empty(positions, inner), qkv.new_empty(heads, positions, dtype=torch.float32)
        ctx.frame = _frame(layout, heads, inner, bias, scale)
        blocks = block_sizes(longest, inner // heads, qkv.dtype)
        grid = (triton.cdiv(longest, blocks["forward"]["QUERIES"]), heads, len(layout))
        _forward[grid](qkv, table, _or(bias, qkv), out, scores, **ctx.frame, **blocks["forward"])
        ctx.save_for_backward(qkv, table, bias, out, scores)
        ctx.longest = longest
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        qkv, table, bias, out, scores = ctx.saved_tensors
        gradient, back, along = gradient.contiguous(), torch.empty_like(qkv), torch.empty_like(scores)
        heads, count, positions = ctx.frame["HEADS"], ctx.frame["count"], len(qkv)
        _along[(triton.cdiv(positions, 64), heads)](
            out, gradient, along, positions, HEADS=heads, WIDTH=ctx.frame["WIDTH"], ROWS=64
        )
        blocks = block_sizes(ctx.longest, ctx.frame["WIDTH"], qkv.dtype)
        for kernel, name, cut in ((_backward_keys, "keys", "KEYS"), (_backward_queries, "queries", "QUERIES")):
            grid = (triton.cdiv(ctx.longest, blocks[name][cut]), heads, count)
            kernel[grid](qkv, table, _or(bias, qkv), gradient, scores, along, back, **ctx.frame, **blocks[name])
        return back, None, None, None, None


def _frame(layout: Layout, heads: int, inner: int, bias: Tensor | None, scale: float) -> dict[str, Any]:
    head, row = (0, 0) if bias is None else bias.stride()[1:3]
    return {
        "scale": scale, "bias_head": head, "bias_row": row, "count": len(layout), "positions": layout.positions,
        "HEADS": heads, "WIDTH": inner // heads, "BIASED": bias is not None,
    }  # fmt: skip


def _or(bias: Tensor | None, other: Tensor) -> Tensor:
    """What a kernel is given in place of a bias that it will not read."""
    return other if bias is None else bias


@triton.jit
def _add_norm(x, delta, weight, total, normed, inverses, size, eps, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    own, real = row * size + columns, columns < size
    summed = tl.load(x + own, mask=real, other=0.0).to(tl.float32) + tl.load(delta + own, mask=real, other=0.0)
    rounded = summed.to(total.dtype.element_ty)
    tl.store(total + own, rounded, mask=real)
    value = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, 0) / size + eps)
    tl.store(inverses + row, inverse)
    result = value * inverse * tl.load(weight + columns, mask=real, other=0.0).to(tl.float32)
    tl.store(normed + own, result.to(normed.dtype.element_ty), mask=real)


@triton.jit
def _add_norm_backward(
    total, weight, inverses, of_normed, of_total, back, size, ADDED: tl.constexpr, BLOCK: tl.constexpr
):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    own, real = row * size + columns, columns < size
    value = tl.load(total + own, mask=real, other=0.0).to(tl.float32)
    weighted = tl.load(of_normed + own, mask=real, other=0.0).to(tl.float32)
    weighted *= tl.load(weight + columns, mask=real, other=0.0).to(tl.float32)
    inverse = tl.load(inverses + row)
    along = tl.sum(weighted * value, 0) * inverse * inverse / size
    found = (weighted - value * along) * inverse
    if ADDED:
        found += tl.load(of_total + own, mask=real, other=0.0).to(tl.float32)
    tl.store(back + own, found.to(back.dtype.element_ty), mask=real)


class AddNorm(torch.autograd.Function):
    """x + delta, and its root-mean-square norm times a constant weight: (N, d), (N, d), (d,) → (N, d), (N, d)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x, delta = x.contiguous(), delta.contiguous()
        total, normed = torch.empty_like(x), torch.empty_like(x)
        inverses = x.new_empty(len(x), dtype=torch.float32)
        size = x.shape[1]
        ctx.blocks = {"BLOCK": triton.next_power_of_2(size), "num_warps": 4 if size <= 2048 else 8}
        _add_norm[(len(x),)](x, delta, weight, total, normed, inverses, size, eps, **ctx.blocks)
        ctx.save_for_backward(total, weight, inverses)
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor | None, of_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, inverses = ctx.saved_tensors
        if of_normed is None:
            return of_total, of_total, None, None
        of_normed, back = of_normed.contiguous(), torch.empty_like(total)
        added = of_normed if of_total is None else of_total.contiguous()
        _add_norm_backward[(len(total),)](
            total, weight, inverses, of_normed, added, back, total.shape[1], ADDED=of_total is not None, **ctx.blocks
        )
        return back, back, None, None
