"""T5's forward for a frozen model and a few decoder positions, on packed rows.

The same numbers as the library's modules give, from the same weights, with less work: no padding, no
position bias or mask for each example, queries, keys and values in one product, residuals added inside
the product, and cross-attention without keys and values of its own. Covers T5, T5 v1.1, Flan-T5 and
mT5 (gated or not, tied or not).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, rms_norm
from torch.utils.checkpoint import checkpoint
from transformers.activations import NewGELUActivation

from supmer_ray.model.packed import (
    SMALL,
    Layout,
    add_product,
    attention,
    decoding_modules,
    fused_kernels,
    half_on_cpu,
    pooled_cross_attention,
    product,
)

_GELU_NEW = partial(gelu, approximate="tanh")

BIAS_STEP = 128
"""The shared position bias grows by this many positions at a time."""


class T5Forward:
    """The encoder and the decoder of a `T5ForConditionalGeneration`.

    Args:
        model: frozen, where it will compute and in the precision that it will keep.

    Attributes:
        checkpointing: keep only each block's input for the backward, and compute the rest again: less memory, a third
            more work.
        compiled: on a CPU, have torch compile the norms, the longest chains of small operations, into one kernel each.
    """

    checkpointing = False
    compiled = False

    def __init__(self, model: Any) -> None:
        self._encoder = model.encoder
        self._decoder, self._head = decoding_modules(model.decoder, model.lm_head)
        config = model.config
        self._heads: int = config.num_heads
        self._eps: float = config.layer_norm_epsilon
        # mT5 ties its embeddings and does not scale.
        scaled = getattr(config, "scale_decoder_outputs", config.model_type == "t5" and config.tie_word_embeddings)
        self._output_scale = config.d_model**-0.5 if scaled else 1.0
        self._bias: Tensor | None = None
        self._causal: Tensor | None = None
        self._merged: dict[int, Tensor] = {}

    def encode(self, embeddings: Tensor, layout: Layout) -> Tensor:
        """Packed (N, d) embeddings → packed (N, d) last hidden states."""
        x, delta = embeddings, None
        bias = self._position_bias(max(layout.widths))
        for block in self._encoder.block:
            if self.checkpointing and torch.is_grad_enabled():
                x, delta = checkpoint(self._encoder_block, block, x, delta, layout, bias, use_reentrant=False)
            else:
                x, delta = self._encoder_block(block, x, delta, layout, bias)
        _, normed = self._add_norm(x, delta, self._encoder.final_layer_norm)
        return normed.to(x.dtype)

    def decode(self, states: Tensor, layout: Layout, decoder_ids: Tensor, first: int = 0) -> Tensor:
        """Packed (N, d) states, (B, T) decoder ids → (B, T − first, vocabulary) logits, from position `first` on."""
        count, steps = decoder_ids.shape
        rectangle, held = layout.rectangle(states)
        x = self._decoder.embed_tokens(decoder_ids).to(states.dtype)
        bias = self._decoder_bias(max(steps, SMALL))
        whole = Layout((steps,) * count, (steps,) * count)
        x, delta = x.reshape(count * steps, -1), None
        for block in self._decoder.block:
            own, cross, feed = block.layer
            x, normed = self._add_norm(x, delta, own.layer_norm)
            qkv = product(normed, self._side_by_side(own.SelfAttention))
            heads = attention(qkv, whole, self._heads, bias=bias, scale=1.0)
            x, delta = _onto(x, heads, own.SelfAttention.o.weight)
            attend = cross.EncDecAttention
            shape = (self._heads, -1, rectangle.shape[-1])
            x, normed = self._add_norm(x, delta, cross.layer_norm)
            queries = product(normed, attend.q.weight).view(count, steps, self._heads, -1)
            key, value = attend.k.weight.view(shape), attend.v.weight.view(shape)
            heads = pooled_cross_attention(queries, rectangle, held, key, value, 1.0)
            x, delta = _onto(x, heads.view(count * steps, -1), attend.o.weight)
            x, delta = self._feed_forward(x, delta, feed)
        _, normed = self._add_norm(x, delta, self._decoder.final_layer_norm)
        asked = normed.view(count, steps, -1)[:, first:].flatten(0, 1) * self._output_scale
        return product(asked, self._head.weight).view(count, steps - first, -1)

    def constants(self) -> list[Tensor]:
        """What it has made of the weights at its first use, and keeps."""
        return [*self._merged.values(), *(bias for bias in (self._bias, self._causal) if bias is not None)]

    def _encoder_block(
        self, block: Any, x: Tensor, delta: Tensor | None, layout: Layout, bias: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        own, feed = block.layer
        attend = own.SelfAttention
        x, normed = self._add_norm(x, delta, own.layer_norm)
        qkv = product(normed, self._side_by_side(attend))
        heads = attention(qkv, layout, self._heads, bias=bias, scale=1.0)
        return self._feed_forward(*_onto(x, heads, attend.o.weight), feed)

    def _feed_forward(self, x: Tensor, delta: Tensor | None, layer: Any) -> tuple[Tensor, Tensor | None]:
        dense = layer.DenseReluDense
        x, normed = self._add_norm(x, delta, layer.layer_norm)
        if hasattr(dense, "wi_0"):
            # The library writes this activation as eight operations, each of which keeps its result.
            act = _GELU_NEW if isinstance(dense.act, NewGELUActivation) else dense.act
            inner = act(product(normed, dense.wi_0.weight)) * product(normed, dense.wi_1.weight)
        else:
            inner = product(normed, dense.wi.weight)
            inner = torch.relu_(inner) if isinstance(dense.act, torch.nn.ReLU) else dense.act(inner)
        return _onto(x, inner, dense.wo.weight)

    def _add_norm(self, x: Tensor, delta: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
        """x + delta, and its norm in the precision of the weights, where products read it."""
        if delta is not None:
            from supmer_ray.model.fused import AddNorm

            return AddNorm.apply(x, delta, norm.weight, self._eps)
        if x.dtype == torch.float64:
            # The library takes the variance in float32 even here, and numbers recorded with it hold that rounding.
            return x, norm(x)
        # One kernel, with sums in float32 where x itself is bfloat16.
        if x.is_cuda and (fused_kernels(x) or x.dtype == norm.weight.dtype == torch.bfloat16):
            return x, rms_norm(x, x.shape[-1:], norm.weight, self._eps)
        return x, _RootMeanSquare.apply(x, norm.weight, self._eps, self.compiled)

    def _decoder_bias(self, size: int) -> Tensor:
        """(1, heads, size, size): the decoder's own bias, and that no position sees a later one."""
        if self._causal is None or self._causal.shape[-1] < size:
            bias = self._decoder.block[0].layer[0].SelfAttention.compute_bias(size, size).detach()
            later = torch.full((size, size), -torch.inf, dtype=bias.dtype, device=bias.device).triu(1)
            self._causal = (bias + later).contiguous()
        return self._causal

    def _side_by_side(self, attend: Any) -> Tensor:
        """(3 · inner, d): the query, key and value matrices as one; the module's own become views of it."""
        key = id(attend)
        if key not in self._merged:
            parts = (attend.q, attend.k, attend.v)
            merged = torch.cat([part.weight.detach() for part in parts])
            for part, own in zip(parts, merged.chunk(3), strict=True):
                part.weight.data = own
            self._merged[key] = merged
        return self._merged[key]

    def _position_bias(self, longest: int) -> Tensor:
        """(1, heads, L, L), L ≥ longest: relative, so a shorter example reads its corner."""
        if self._bias is None or self._bias.shape[-1] < longest:
            size = -(-longest // BIAS_STEP) * BIAS_STEP
            bias = self._encoder.block[0].layer[0].SelfAttention.compute_bias(size, size).detach()
            # A CPU computes scores in float32 whatever the weights are.
            self._bias = (bias.float() if half_on_cpu(bias) else bias).contiguous()
        return self._bias


def _onto(x: Tensor, inner: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """x + inner Wᵀ; or x, and the product, which the kernel of the next norm adds."""
    if fused_kernels(x):
        return x, product(inner, weight)
    return add_product(x, inner, weight), None


class _RootMeanSquare(torch.autograd.Function):
    """x / rms(x) · weight, for a frozen weight, in as few passes over x as may be; twice differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, compiled: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.compiled = eps, compiled
        return (_compiled(_normed) if compiled else _normed)(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight = ctx.saved_tensors
        back = _compiled(_normed_backward) if ctx.compiled else _normed_backward
        return back(gradient, x, weight, ctx.eps), None, None, None


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiled on its first call, for any number of positions."""
    return torch.compile(function, dynamic=True)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (x * _inverse_rms(x, eps)).to(weight.dtype).mul_(weight)


def _normed_backward(gradient: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """d/dx: (w·g − x · (x · (w·g)) / (d · rms²)) / rms."""
    inverse = _inverse_rms(x, eps)
    weighted = (gradient * weight).to(x.dtype)
    along = torch.linalg.vecdot(weighted, x).unsqueeze(-1) * inverse.square() / x.shape[-1]
    return (weighted - x * along) * inverse


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return torch.rsqrt(norm.square() / x.shape[-1] + eps).to(x.dtype)
