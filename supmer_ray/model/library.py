"""The forward of any other encoder-decoder: the library's own, on rows padded to the longest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from supmer_ray.model.packed import Layout


class LibraryForward:
    """Calls an `AutoModelForSeq2SeqLM` as it is."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def encode(self, embeddings: Tensor, layout: Layout) -> Tensor:
        """Packed (N, d) embeddings → packed (N, d) last hidden states."""
        rectangle, _ = layout.rectangle(embeddings)
        keys = torch.tensor(layout.keys)[:, None]
        mask = (torch.arange(rectangle.shape[1]) < keys).long().to(embeddings.device)
        rectangle = rectangle.to(self._model.dtype)
        states = self._model.get_encoder()(inputs_embeds=rectangle, attention_mask=mask).last_hidden_state
        return torch.cat([own[:width] for own, width in zip(states.unbind(), layout.widths, strict=True)])

    def decode(self, states: Tensor, layout: Layout, decoder_ids: Tensor) -> Tensor:
        """Packed (N, d) states, (B, T) decoder ids → (B, T, vocabulary) logits."""
        rectangle, held = layout.rectangle(states)
        mask = torch.ones(rectangle.shape[:2], device=states.device) if held is None else held
        return self._model(
            encoder_outputs=BaseModelOutput(last_hidden_state=rectangle),
            attention_mask=mask.long(),
            decoder_input_ids=decoder_ids,
            use_cache=False,
        ).logits
