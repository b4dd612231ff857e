"""The frozen encoder-decoder f: any `AutoModelForSeq2SeqLM`, by folder or by hub name.

In come packed embeddings, out come encoder states and next-token logits. Everything that differs
between model families (sentinels, the frame around a text, the limit on positions, whose forward
computes) is settled here once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, ByT5Tokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from supmer_ray.embedded import resolve
from supmer_ray.errors import UserError, first_line
from supmer_ray.model.bert import BertForward
from supmer_ray.model.library import LibraryForward
from supmer_ray.model.packed import Layout, half_on_cpu
from supmer_ray.model.t5 import T5Forward

transformers_logging.disable_progress_bar()


WITH_SCORES = 16384
"""Most tokens of a micro-batch on a GPU where attention keeps the scores of each example and head for the backward."""


BYT5_SENTINELS = (258, 257)
"""Its masks count down from the last byte."""


class Forward(Protocol):
    """How a family of models computes, on packed rows."""

    def encode(self, embeddings: Tensor, layout: Layout) -> Tensor:
        """Packed (N, d) embeddings → packed (N, d) last hidden states."""
        ...

    def decode(self, states: Tensor, layout: Layout, decoder_ids: Tensor, first: int = 0) -> Tensor:
        """Packed (N, d) states, (B, T) decoder ids → (B, T − first, vocabulary) logits, from position `first` on."""
        ...


def forward_of(model: Any) -> Forward:
    """The fastest forward there is for `model`."""
    if model.config.model_type in ("t5", "mt5"):
        return T5Forward(model)
    if model.config.model_type == "encoder-decoder" and BertForward.fits(model):
        return BertForward(model)
    return LibraryForward(model)


class Backbone:
    """A frozen encoder-decoder language model with its tokenizer.

    Args:
        forward: what computes; unset: the fastest for `model`. Those take its weights for constants.
        gpu_share: what this process may take of a GPU that it shares with others.

    Attributes:
        d_model: width d of the encoder's embeddings and states.
        start: the id that the decoder reads first.
        sentinel, closing: the ids around an answer; the decoder's target is (sentinel, answer, closing).
            T5 has `<extra_id_0>` and `<extra_id_1>`, ByT5 the bytes FF and FE, which no text has; a model with a mask
            token uses it and its end token.
        pad: the id that fills; nothing attends to it.
        prefix, suffix: special ids that the tokenizer puts before and after a text.
        max_positions: longest encoder input, prompt included; None where positions are relative (T5).

    Raises:
        UserError: the model does not say what its decoder reads first, or its tokenizer has nothing to put an answer
            at.
    """

    def __init__(
        self, model: Any, tokenizer: Any, name: str, forward: Forward | None = None, *, gpu_share: float = 1.0
    ) -> None:
        model.eval().requires_grad_(False)
        if model.device.type == "cuda":
            # Torch would choose cuDNN's attention first, whose gradient is NaN behind some masks (pytorch#196678), and
            # which fails where it has no plan for a shape instead of leaving it to another kernel.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.gpu_share = gpu_share
        self.forward = forward or forward_of(model)
        self.embedding: torch.nn.Embedding = model.get_encoder().get_input_embeddings()
        # Some encoders (Pegasus, Marian) scale what they look up themselves, others have an embedding that does.
        self._scale: float = getattr(model.get_encoder(), "embed_scale", 1.0)
        self.d_model: int = self.embedding.embedding_dim
        encoder_config = getattr(model.config, "encoder", model.config)
        self.max_positions: int | None = getattr(encoder_config, "max_position_embeddings", None)
        places = (part for name, part in model.get_encoder().named_modules() if name.endswith("position_embeddings"))
        if self.max_positions and (padding := getattr(next(places, None), "padding_idx", None)) is not None:
            self.max_positions -= padding + 1  # RoBERTa counts positions from behind the padding's number
        of_generation = getattr(model, "generation_config", None)
        starts = (getattr(config, "decoder_start_token_id", None) for config in (model.config, of_generation))
        start = next((start for start in starts if start is not None), None)
        if start is None:
            raise UserError(
                f"The model '{name}' does not say what its decoder reads first; write decoder_start_token_id into its "
                "config.json."
            )
        self.start: int = start
        if tokenizer is not None:
            self._read_tokenizer()

    def _read_tokenizer(self) -> None:
        vocabulary = self.tokenizer.get_vocab()
        self.pad: int = self.tokenizer.pad_token_id
        # mT5 has them among its pieces of words, "▁" before them.
        pairs = [(f"{lead}<extra_id_0>", f"{lead}<extra_id_1>") for lead in ("", "▁")]
        found = next((pair for pair in pairs if vocabulary.keys() >= set(pair)), None)
        if isinstance(self.tokenizer, ByT5Tokenizer):
            # It has <extra_id_…> too, which the model was never trained with.
            self.sentinel, self.closing = BYT5_SENTINELS
        elif found:
            self.sentinel, self.closing = (vocabulary[token] for token in found)
        elif self.tokenizer.mask_token_id is not None:
            end = self.tokenizer.sep_token_id if self.tokenizer.eos_token_id is None else self.tokenizer.eos_token_id
            self.sentinel, self.closing = self.tokenizer.mask_token_id, end
        else:
            raise UserError(
                f"The tokenizer of '{self.name}' has neither <extra_id_0> nor a mask token to put an answer at; "
                "choose a T5, BART or other masked encoder-decoder."
            )
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        framed = self.tokenizer("a")["input_ids"]
        at = next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)
        self.prefix: list[int] = framed[:at]
        self.suffix: list[int] = framed[at + len(bare) :]

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @cached_property
    def token_budget(self) -> int:
        """Tokens of a micro-batch, prompts included, that suit the device.

        On a GPU as many as hide the launching of kernels behind them, but no more than half of its memory, or of this
        process's share of it, holds: they keep about one and a half times what the encoder's products put out, and a
        library's forward its scores too.
        """
        if self.device.type != "cuda":
            return 4096
        most = WITH_SCORES if isinstance(self.forward, LibraryForward) else 65536
        encoder = self.model.get_encoder().modules()
        kept = 1.5 * self.dtype.itemsize * sum(part.out_features for part in encoder if hasattr(part, "out_features"))
        memory = self.gpu_share * torch.cuda.get_device_properties(self.device).total_memory
        return max(4096, min(most, int(memory / 2 / kept)))

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the weights, the same in every precision: 256 values of each tensor, rounded to bfloat16."""
        digest = hashlib.sha256()
        for name, parameter in sorted(self.model.named_parameters()):
            flat = parameter.detach().reshape(-1)
            sample = flat[torch.from_numpy(_spread(flat.numel())).to(flat.device)]
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            digest.update(sample.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Identity of the vocabulary: tokens and their ids."""
        items = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        return hashlib.sha256(repr(items).encode()).hexdigest()

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        if not texts:
            return []
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    @cached_property
    def word_space(self) -> str:
        """What to write before a word that stands behind other text: a space where the vocabulary tells " a" from "a".

        Byte-level BPE (BART) does. Where the space is a token of its own, or is added anyway (T5), writing it would
        change the ids or nothing.
        """
        spaced, bare = self.tokenize([" a", "a"])
        return " " if spaced != bare and len(spaced) == len(bare) else ""

    def word_tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Which tokens begin a word of three letters or more, and which go on with the word before: (vocabulary,) bool.

        WordPiece marks the one that goes on (##), SentencePiece and byte-level BPE the one that begins (▁, Ġ).
        """
        pieces = self.tokenizer.get_vocab()
        size = max(self.embedding.num_embeddings, 1 + max(pieces.values()))
        begins, continues = np.zeros(size, bool), np.zeros(size, bool)
        mark = next((mark for mark in "▁Ġ" if any(piece.startswith(mark) for piece in pieces)), None)
        for piece, number in pieces.items():
            letters = piece.removeprefix(mark) if mark else piece.removeprefix("##")
            opens = piece.startswith(mark) if mark else not piece.startswith("##")
            begins[number] = opens and len(letters) >= 3 and letters.isalpha()
            continues[number] = not opens and letters[:1].isalnum()
        return begins, continues

    def embed(self, input_ids: Tensor) -> Tensor:
        """Ids (N,) → (N, d) input embeddings, as the encoder itself would look them up.

        On a CPU they, and all states after them, are float32 even where the weights are bfloat16.
        """
        embeddings = self.embedding(input_ids)
        if self._scale != 1.0:
            embeddings = embeddings * self._scale
        return embeddings.float() if half_on_cpu(embeddings) else embeddings

    def encode(self, embeddings: Tensor, layout: Layout) -> Tensor:
        """Packed (N, d) embeddings → packed (N, d) last hidden states of the encoder."""
        return self.forward.encode(embeddings, layout)

    def logits(self, states: Tensor, layout: Layout, decoder_input_ids: Tensor, first: int = 0) -> Tensor:
        """Packed (N, d) encoder states, decoder ids (B, T) → logits, float32 or wider.

        Args:
            first: logits are asked from this decoder position on; the vocabulary is large.

        Returns:
            (B, T − first, vocabulary).
        """
        logits = self.forward.decode(states, layout, decoder_input_ids, first)
        return logits if logits.dtype == torch.float64 else logits.float()

    def checkpoint_activations(self) -> None:
        """Compute the encoder's activations again in the backward instead of keeping them.

        Raises:
            UserError: this family's forward cannot.
        """
        instead = ", and lower workers.tokens_per_micro_batch where memory is short"
        self._t5_forward("checkpoint_activations", instead).checkpointing = True

    def compile_norms(self) -> None:
        """Have torch compile the norms at their first use, which takes some seconds; on a GPU kernels of ours do more.

        Raises:
            UserError: this family's forward has none of its own, or the machine lacks the compiler.
        """
        forward = self._t5_forward("compile_norms")
        if self.device.type == "cuda":
            return
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        if not shutil.which(compiler):
            raise UserError(
                f"workers.compile_norms needs the C++ compiler {compiler}, which is not on the PATH; install it, name "
                "another in the environment variable CXX, or set workers.compile_norms to false."
            )
        forward.compiled = True

    def _t5_forward(self, setting: str, instead: str = "") -> T5Forward:
        if not isinstance(self.forward, T5Forward):
            raise UserError(
                f"workers.{setting} works with T5 models, and '{self.name}' is none; set it to false{instead}."
            )
        return self.forward

    def random_rows(self, count: int, below: int, generator: torch.Generator) -> Tensor:
        """(count, d) float32: embeddings of random vocabulary ids under `below`, the start of a prompt."""
        below = min(below, self.embedding.num_embeddings)
        ids = torch.randint(below, (count,), generator=generator)
        return self.embed(ids.to(self.device)).detach().float().clone()


def _spread(size: int) -> np.ndarray:
    """Up to 256 numbers from 0 to `size` − 1, evenly.

    They are those of a float32 `torch.linspace` with fused multiply-add, of which fingerprints were made first. Torch
    gives others on processors that have none, so it is written out: products in float64 are exact, and rounded once.
    """
    count, end = min(256, size), np.float64(np.float32(size - 1))
    if count == 1:
        return np.zeros(1, np.int64)
    step, number = np.float64(np.float32(end) / np.float32(count - 1)), np.arange(count, dtype=np.float64)
    places = np.where(number < count // 2, step * number, end - step * (count - 1 - number)).astype(np.float32)
    return np.minimum(places.astype(np.int64), size - 1)  # float32 rounds the end of a large tensor up


def best_device() -> torch.device:
    """This machine's GPU, or its CPU where it has none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_backbone(
    name: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    threads: int | None = None,
    gpu_share: float = 1.0,
) -> Backbone:
    """Load a frozen backbone.

    Args:
        name: "embedded", a folder, or a hub name such as "google/flan-t5-base". Only safetensors
            weights are read (a pickle could run code) and remote code is never executed.
        dtype: of the weights; unset: bfloat16 on a GPU, float32 on a CPU, where bfloat16 is
            faster on some (AVX-512 or AMX with bfloat16) and slower on others.
        threads: CPU threads torch may use in this process; unset: leave torch's choice.
        gpu_share: what this process may take of its GPU.

    Raises:
        UserError: there is no such folder or what it holds is damaged, or the hub could not be reached or has no such
            model.
    """
    if threads:
        torch.set_num_threads(threads)
    if dtype is None:
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    with _loading(name) as place:
        # Unset, transformers would ask at a terminal whether to run a model's own code.
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        model = AutoModelForSeq2SeqLM.from_pretrained(place, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    return Backbone(model.to(device), tokenizer, name, gpu_share=gpu_share)


def outline(name: str) -> Backbone:
    """A backbone with its tokenizer and without its weights: enough to see whether tasks can be encoded for it.

    Raises:
        UserError: as `load_backbone` has it; weights are not looked at.
    """
    with _loading(name) as place:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForSeq2SeqLM.from_config(config, trust_remote_code=False)
        with suppress(OSError):
            model.generation_config = GenerationConfig.from_pretrained(place)
    return Backbone(model, tokenizer, name, LibraryForward(model))


@contextmanager
def _loading(name: str) -> Iterator[str]:
    """The place of a backbone's files, for the block that reads them; what fails there becomes one sentence.

    Raises:
        UserError: so it was.
    """
    place = resolve(name)
    try:
        _look_at_the_hub(place)
        yield place
    except Exception as error:  # of what kind damaged files make it, from ValueError to a bare Exception, varies
        raise UserError(
            f"Cannot load the backbone '{name}' ({first_line(error)}); name a folder with an encoder-decoder in "
            "safetensors, a model that the hub holds (is it reachable from here?), or 'embedded'."
        ) from None


def _look_at_the_hub(place: str) -> None:
    """Ask the hub once for a model that is neither a folder nor in the cache.

    Otherwise transformers would tell of ten attempts, for the better part of a minute, before it says that the hub
    cannot be reached.
    """
    if not Path(place).is_dir() and try_to_load_from_cache(place, "config.json") is None:
        get_hf_file_metadata(hf_hub_url(place, "config.json"))
