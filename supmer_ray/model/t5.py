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
    Layout,
    add_product,
    attention,
    decoding_modules,
    half_on_cpu,
    pooled_cross_attention,
    product,
)

_GELU_NEW = partial(gelu, approximate="tanh")

BIAS_STEP = 64
"""The shared position bias grows by this many positions at a time."""


class T5Forward:
    """The encoder and the decoder of a `T5ForConditionalGeneration`.

    Args:
        model: frozen, where it will compute and in the precision that it will keep.

    Attributes:
        checkpointing: keep only each block's input for the backward, and compute the rest again: less memory, a third
            more work.
        compiled: have torch compile the norms, which are the longest chains of small operations, into one kernel each.
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
        self._merged: dict[int, Tensor] = {}

    def encode(self, embeddings: Tensor, layout: Layout) -> Tensor:
        """Packed (N, d) embeddings → packed (N, d) last hidden states."""
        x = embeddings
        bias = self._position_bias(max(layout.widths))
        for block in self._encoder.block:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(self._encoder_block, block, x, layout, bias, use_reentrant=False)
            else:
                x = self._encoder_block(block, x, layout, bias)
        return self._norm(x, self._encoder.final_layer_norm).to(x.dtype)

    def decode(self, states: Tensor, layout: Layout, decoder_ids: Tensor, first: int = 0) -> Tensor:
        """Packed (N, d) states, (B, T) decoder ids → (B, T − first, vocabulary) logits, from position `first` on."""
        count, steps = decoder_ids.shape
        rectangle, held = layout.rectangle(states)
        x = self._decoder.embed_tokens(decoder_ids).to(states.dtype)
        bias = self._decoder.block[0].layer[0].SelfAttention.compute_bias(steps, steps)
        causal = torch.full((steps, steps), -torch.inf, dtype=bias.dtype, device=x.device).triu(1)
        bias = (bias + causal).detach()
        whole = Layout((steps,) * count, (steps,) * count)
        x = x.reshape(count * steps, -1)
        for block in self._decoder.block:
            own, cross, feed = block.layer
            qkv = product(self._norm(x, own.layer_norm), self._side_by_side(own.SelfAttention))
            heads = attention(qkv, whole, self._heads, bias=bias, scale=1.0)
            x = add_product(x, heads, own.SelfAttention.o.weight)
            attend = cross.EncDecAttention
            shape = (self._heads, -1, rectangle.shape[-1])
            queries = product(self._norm(x, cross.layer_norm), attend.q.weight).view(count, steps, self._heads, -1)
            key, value = attend.k.weight.view(shape), attend.v.weight.view(shape)
            heads = pooled_cross_attention(queries, rectangle, held, key, value, 1.0)
            x = add_product(x, heads.view(count * steps, -1), attend.o.weight)
            x = self._feed_forward(x, feed)
        asked = x.view(count, steps, -1)[:, first:].flatten(0, 1)
        x = self._norm(asked, self._decoder.final_layer_norm) * self._output_scale
        return product(x, self._head.weight).view(count, steps - first, -1)

    def constants(self) -> list[Tensor]:
        """What it has made of the weights at its first use, and keeps."""
        return [*self._merged.values(), *([] if self._bias is None else [self._bias])]

    def _encoder_block(self, block: Any, x: Tensor, layout: Layout, bias: Tensor) -> Tensor:
        own, feed = block.layer
        attend = own.SelfAttention
        qkv = product(self._norm(x, own.layer_norm), self._side_by_side(attend))
        heads = attention(qkv, layout, self._heads, bias=bias, scale=1.0)
        return self._feed_forward(add_product(x, heads, attend.o.weight), feed)

    def _norm(self, x: Tensor, norm: Any) -> Tensor:
        if x.dtype == torch.float64:
            # The library takes the variance in float32 even here, and numbers recorded with it hold that rounding.
            return norm(x)
        # Products read what comes out, in the precision of the weights.
        if fused_norm(x, norm.weight) and not self.compiled:
            return rms_norm(x, x.shape[-1:], norm.weight, self._eps)
        return _RootMeanSquare.apply(x, norm.weight, self._eps, self.compiled)

    def _feed_forward(self, x: Tensor, layer: Any) -> Tensor:
        dense = layer.DenseReluDense
        normed = self._norm(x, layer.layer_norm)
        if hasattr(dense, "wi_0"):
            # The library writes this activation as eight operations, each of which keeps its result.
            act = _GELU_NEW if isinstance(dense.act, NewGELUActivation) else dense.act
            inner = act(product(normed, dense.wi_0.weight)) * product(normed, dense.wi_1.weight)
        else:
            inner = product(normed, dense.wi.weight)
            inner = torch.relu_(inner) if isinstance(dense.act, torch.nn.ReLU) else dense.act(inner)
        return add_product(x, inner, dense.wo.weight)

    def _side_by_side(self, attend: Any) -> Tensor:
        """(3 · inner, d): the query, key and value matrices as one; the module's own become views of it."""
        key = id(attend)
        if key not in self._merged:
            parts = (attend.q, attend.k, attend.v)
            merged = torch.cat([part.weight.detach() for part in parts])
            inner = len(attend.q.weight)
            for place, part in enumerate(parts):
                part.weight.data = merged[place * inner : (place + 1) * inner]
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


def fused_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's own norm is one kernel there, with sums in float32: bfloat16 throughout on a GPU."""
    return x.is_cuda and x.dtype == weight.dtype == torch.bfloat16


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
