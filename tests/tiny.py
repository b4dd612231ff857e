"""A T5 small enough for a test: random weights, but a real tokenizer trained on the test's own text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

SPECIAL = ["<pad>", "</s>", "<unk>", "<extra_id_0>", "<extra_id_1>"]


def make_tiny_t5(folder: Path, texts: Iterable[str]) -> Path:
    """Write a random 2-layer T5 (d = 32, at most 2,000 word pieces) into `folder`, and return it.

    The same texts give the same files. The tokenizer ends every text with `</s>`, as T5's does.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=2000, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer numbers its pieces in another order each time.
    pieces = SPECIAL + sorted(tokenizer.get_vocab().keys() - set(SPECIAL))
    tokenizer.model = models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="<unk>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=["<extra_id_0>", "<extra_id_1>"],
    )
    config = T5Config(
        vocab_size=len(fast),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(config)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
