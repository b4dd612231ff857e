"""The forward of any other encoder-decoder: the library's own, on rows padded to the longest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import MoEModelOutput

from supmer_ray.model.packed import Layout


class LibraryForward:
    """Calls an `AutoModelForSeq2SeqLM` as it is."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def encode(self, embeddings: Tensor, layout: Layout) -> Tensor:
        """Packed (N, d) embeddings → packed (N, d) last hidden states."""
        rectangle, held = layout.rectangle(embeddings.to(self._model.dtype))
        states = self._model.get_encoder()(inputs_embeds=rectangle, attention_mask=_mask(rectangle, held))
        states = states.last_hidden_state
        return torch.cat([own[:width] for own, width in zip(states.unbind(), layout.widths, strict=True)])

    def decode(self, states: Tensor, layout: Layout, decoder_ids: Tensor, first: int = 0) -> Tensor:
        """Packed (N, d) states, (B, T) decoder ids → (B, T − first, vocabulary) logits, from position `first` on."""
        rectangle, held = layout.rectangle(states)
        return self._model(
            # Mixtures of experts look for their routers' scores in it, which are absent here; others do not mind.
            encoder_outputs=MoEModelOutput(last_hidden_state=rectangle),
            attention_mask=_mask(rectangle, held),
            decoder_input_ids=decoder_ids,
            use_cache=False,
        ).logits[:, first:]


def _mask(rectangle: Tensor, held: Tensor | None) -> Tensor:
    """(B, L) 1 at the positions that count."""
    return (torch.ones(rectangle.shape[:2], device=rectangle.device) if held is None else held).long()
