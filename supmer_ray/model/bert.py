"""The forward of a BERT encoder with a BERT decoder, frozen, on packed rows: what `model/t5.py` is for T5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from supmer_ray.model.packed import SMALL, Layout, attention, decoding_modules, moved, pooled_cross_attention, product


class BertForward:
    """The two halves of an `EncoderDecoderModel` of a `BertModel` and a `BertLMHeadModel` of equal width.

    Args:
        model: frozen, where it will compute and in the precision that it will keep.
    """

    def __init__(self, model: Any) -> None:
        self._encoder = model.encoder
        self._decoder, head = decoding_modules(model.decoder.bert, model.decoder.cls)
        self._transform, self._head = head.predictions.transform, head.predictions.decoder
        self._merged: dict[int, tuple[Tensor, Tensor]] = {}

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether `model` is made of these two parts and nothing between them."""
        parts = (type(model.encoder).__name__, type(model.decoder).__name__)
        return parts == ("BertModel", "BertLMHeadModel") and not hasattr(model, "enc_to_dec_proj")

    def encode(self, embeddings: Tensor, layout: Layout) -> Tensor:
        """Packed (N, d) embeddings → packed (N, d) last hidden states."""
        places = moved(layout.places, embeddings.device)
        x = self._embedded(self._encoder.embeddings, embeddings, places)
        for layer in self._encoder.encoder.layer:
            x = self._self_attention(layer.attention, x, layout, None)
            x = self._feed_forward(layer, x)
        return x

    def decode(self, states: Tensor, layout: Layout, decoder_ids: Tensor, first: int = 0) -> Tensor:
        """Packed (N, d) states, (B, T) decoder ids → (B, T − first, vocabulary) logits, from position `first` on."""
        count, steps = decoder_ids.shape
        rectangle, held = layout.rectangle(states)
        embeddings = self._decoder.embeddings
        words = embeddings.word_embeddings(decoder_ids).to(states.dtype).view(count * steps, -1)
        whole = Layout((steps,) * count, (steps,) * count)
        x = self._embedded(embeddings, words, moved(whole.places, words.device))
        size = max(steps, SMALL)
        causal = torch.full((1, 1, size, size), -torch.inf, dtype=x.dtype, device=x.device).triu(1)
        for layer in self._decoder.encoder.layer:
            x = self._self_attention(layer.attention, x, whole, causal)
            cross = layer.crossattention
            attend = cross.self
            heads, width = attend.num_attention_heads, attend.attention_head_size
            queries = product(x, attend.query.weight, attend.query.bias).view(count, steps, heads, width)
            shape = (heads, width, rectangle.shape[-1])
            # A key bias adds the same to every score of a query, and a value bias to every output.
            found = pooled_cross_attention(
                queries, rectangle, held, attend.key.weight.view(shape), attend.value.weight.view(shape), attend.scaling
            )
            found = found.view(count * steps, -1) + attend.value.bias.to(x.dtype)
            x = self._added(cross.output, x, found)
            x = self._feed_forward(layer, x)
        dense = self._transform.dense
        asked = x.view(count, steps, -1)[:, first:].flatten(0, 1)
        x = self._transform.transform_act_fn(product(asked, dense.weight, dense.bias))
        x = self._normed(x, self._transform.LayerNorm)
        return product(x, self._head.weight, self._head.bias).view(count, steps - first, -1)

    def _embedded(self, embeddings: Any, words: Tensor, places: Tensor) -> Tensor:
        own = embeddings.position_embeddings(places) + embeddings.token_type_embeddings.weight[0]
        return self._normed(words + own.to(words.dtype), embeddings.LayerNorm)

    def _self_attention(self, layer: Any, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
        attend = layer.self
        weight, offset = self._side_by_side(attend)
        if bias is not None:
            bias = bias.expand(1, attend.num_attention_heads, -1, -1)
        qkv = product(x, weight, offset)
        found = attention(qkv, layout, attend.num_attention_heads, bias=bias, scale=attend.scaling)
        return self._added(layer.output, x, found)

    def _feed_forward(self, layer: Any, x: Tensor) -> Tensor:
        dense = layer.intermediate.dense
        inner = layer.intermediate.intermediate_act_fn(product(x, dense.weight, dense.bias))
        return self._added(layer.output, x, inner)

    def _added(self, output: Any, x: Tensor, inner: Tensor) -> Tensor:
        return self._normed(x + product(inner, output.dense.weight, output.dense.bias), output.LayerNorm)

    def _normed(self, x: Tensor, norm: Any) -> Tensor:
        return layer_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)

    def _side_by_side(self, attend: Any) -> tuple[Tensor, Tensor]:
        """The query, key and value projections as one; the module's own become views of it."""
        key = id(attend)
        if key not in self._merged:
            parts = (attend.query, attend.key, attend.value)
            weight = torch.cat([part.weight.detach() for part in parts])
            bias = torch.cat([part.bias.detach() for part in parts])
            for part, own in zip(parts, weight.chunk(3), strict=True):
                part.weight.data = own
            self._merged[key] = weight, bias
        return self._merged[key]
