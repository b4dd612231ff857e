"""Trains the decoder of the embedded backbone on the catalog's train documents.

The fetched encoder is frozen and read under a random prompt of vocabulary rows; the decoder learns to name words
behind a mask, words from around a sentence, and the answers of the paper's five task types. Out come
`decoder.safetensors` and the card that says what was measured. Every step is a function of the seed and its number,
so a run that was cut off goes on from its last checkpoint as if nothing had happened.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import EncoderDecoderModel

from supmer_ray.embedded.assemble import SENTINEL_LIFT, load_encoder, load_own, new_decoder, own_state
from supmer_ray.embedded.card import write_card
from supmer_ray.embedded.corpus import (
    SENTENCE_TOKENS,
    WORD_SHARE,
    Lexicon,
    TaskStore,
    WordExamples,
    cluster,
    embed,
    read,
    task_corpus,
)
from supmer_ray.errors import UserError
from supmer_ray.model.backbone import Backbone
from supmer_ray.model.prompted import encode_prompted
from supmer_ray.tasks.batch import Examples, collate
from supmer_ray.tasks.formats import Formats
from supmer_ray.tasks.types import ANSWERS, TaskDraw

if TYPE_CHECKING:
    from supmer_ray.data.store import Store

CHECKPOINT_BLOCKS = 4

WordExample = tuple[list[int], np.ndarray, np.ndarray]
"""An encoder input, ids of the words asked for, and their shares."""

KINDS = (*WORD_SHARE, *ANSWERS)

TASK_BATCH = {"nsp": (4, 12), "nss": (2, 8), "scsp": (4, 12), "scss": (2, 8), "scc": (4, 12)}
"""(tasks, examples a task) of a batch of tasks."""


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of a training run.

    Attributes:
        blocks: of `batches` batches; a block is encoded once and trained on `passes` times, because the
            encoder is where the time goes.
        batch: examples of a batch of words.
        rate: highest AdamW rate; it rises over the first 3 % of the steps and falls to 0 over the rest.
        tasks: share of the batches that ask one of the five task types.
        prompt: longest random prompt.
        limit: documents read from each source; None: all.
    """

    blocks: int = 100
    batches: int = 32
    passes: int = 2
    batch: int = 64
    rate: float = 6e-4
    weight_decay: float = 0.01
    tasks: float = 0.15
    prompt: int = 20
    seed: int = 0
    limit: int | None = None

    @property
    def steps(self) -> int:
        return self.blocks * self.batches * self.passes


@dataclass(frozen=True)
class Encoded:
    """A batch behind the encoder.

    Attributes:
        kind: one of KINDS, or "words" for a mix of the word kinds.
        states, mask: (B, P + L, d) and (B, P + L).
        answers, shares: (B, n) ids of the words asked for, and their shares, which add up to 1.
    """

    kind: str
    states: Tensor
    mask: Tensor
    answers: Tensor
    shares: Tensor


@dataclass
class Progress:
    """What a run has done.

    Attributes:
        seconds: of training, reading not counted.
        tokens: encoded, prompts included.
        changes: (block, blocks, passes): up to `block` the run was planned with these.
    """

    block: int = 0
    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    changes: list[tuple[int, int, int]] = field(default_factory=list)


class Pretraining:
    """A run: its text, its decoder and its optimizer."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        torch.manual_seed(config.seed)
        encoder, tokenizer = load_encoder()
        self.decoder = new_decoder(encoder)
        # The encoder is the greater part of the work and takes no gradient: half precision is twice as fast.
        model: Any = EncoderDecoderModel(encoder=encoder.bfloat16(), decoder=self.decoder)
        model.config.decoder_start_token_id = tokenizer.cls_token_id
        self.backbone = Backbone(model, tokenizer, "embedded")
        words = self.decoder.bert.embeddings.word_embeddings.weight
        self.parameters = {name: p for name, p in self.decoder.named_parameters() if p is not words}
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.rate, betas=(0.9, 0.98), weight_decay=config.weight_decay
        )
        self.formats = Formats.of(self.backbone, max_length=412, anchor_length=80, candidate_length=SENTENCE_TOKENS)
        self.progress = Progress()

    def read_text(self) -> None:
        """Read the text and cluster a part of it; minutes."""
        splits = {"train": False, "held out": True}
        corpora = {split: read(self.backbone, held_out=flag, limit=self.config.limit) for split, flag in splits.items()}
        train = corpora["train"]
        lexicon = Lexicon.of(train, self.backbone.tokenizer.get_vocab())
        self.words = {split: WordExamples(corpus, lexicon, self.backbone) for split, corpus in corpora.items()}
        parts = {split: task_corpus(corpus) for split, corpus in corpora.items()}
        embeddings = {split: embed(part, self.backbone) for split, part in parts.items()}
        centroids = cluster(embeddings["train"], self.config.seed)
        self.stores = {split: TaskStore(part, embeddings[split], centroids) for split, part in parts.items()}
        if self.progress.block == 0:
            counts = np.bincount(train.tokens, minlength=len(lexicon.matter))
            share = counts * (lexicon.matter + 0.3 * lexicon.manner) + 0.05
            bias = torch.from_numpy(np.log(share / share.sum())).float()
            with torch.no_grad():
                self.decoder.cls.predictions.bias.copy_(bias - bias.mean())
                self.decoder.cls.predictions.bias[self.backbone.sentinel] += SENTINEL_LIFT

    def encoded_block(self, block: int) -> list[Encoded]:
        """The batches of a block: words sorted by length, so that little is padded, and tasks."""
        config = self.config
        generator = np.random.default_rng((config.seed, block))
        tasks = generator.binomial(config.batches, config.tasks)
        kinds = [list(ANSWERS)[k] for k in generator.integers(0, len(ANSWERS), tasks)]
        drawn = generator.choice(list(WORD_SHARE), (config.batches - tasks) * config.batch, p=list(WORD_SHARE.values()))
        examples = [self.words["train"].draw(str(kind), generator) for kind in drawn]
        examples.sort(key=lambda example: len(example[0]))
        cuts = [examples[first : first + config.batch] for first in range(0, len(examples), config.batch)]
        batches = [self.word_batch(cut, generator) for cut in cuts]
        return batches + [self.task_batch(kind, "train", generator) for kind in kinds]

    def word_batch(self, drawn: list[WordExample], generator: np.random.Generator, kind: str = "words") -> Encoded:
        """Encode drawn word examples, each under a prompt of its own."""
        answers = np.zeros((len(drawn), max(len(ids) for _, ids, _ in drawn)), np.int64)
        shares = np.zeros(answers.shape, np.float32)
        for row, (_, ids, weights) in enumerate(drawn):
            answers[row, : len(ids)], shares[row, : len(ids)] = ids, weights
        parts = [Examples.of([ids], [[self.backbone.closing]]) for ids, _, _ in drawn]
        return self._encode(kind, Examples.concat(parts), answers, shares, generator)

    def task_batch(self, kind: str, split: str, generator: np.random.Generator) -> Encoded:
        """Draw and encode tasks of one type, each under a prompt of its own."""
        tasks, size = TASK_BATCH[kind]
        draw = TaskDraw(cast("Store", self.stores[split]), self.formats, kind, "train", generator)
        examples = Examples.concat([draw.examples(draw.domains()[0], [size])[0] for _ in range(tasks)])
        answers = examples.labels[:, 1:2].astype(np.int64)
        return self._encode(kind, examples, answers, np.ones(answers.shape, np.float32), generator)

    @torch.no_grad()
    def _encode(
        self, kind: str, examples: Examples, answers: np.ndarray, shares: np.ndarray, generator: np.random.Generator
    ) -> Encoded:
        rows = collate(examples, np.arange(len(examples)), pad=self.backbone.pad, start=self.backbone.start)
        length = int(generator.integers(0, self.config.prompt + 1)) if generator.random() < 0.8 else 0
        ids = torch.from_numpy(generator.integers(0, 5000, (int(rows.task.max()) + 1, length)))
        packed, layout = encode_prompted(self.backbone, self.backbone.embed(ids), rows)
        states, held = layout.rectangle(packed)
        mask = torch.ones(states.shape[:2], dtype=torch.bool) if held is None else held
        return Encoded(kind, states, mask.long(), torch.from_numpy(answers), torch.from_numpy(shares))

    def losses(self, batch: Encoded, generator: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the answer (B, vocabulary), its cross-entropy (B,), and the mean one of the frame around it."""
        backbone = self.backbone
        count = np.asarray((batch.shares > 0).sum(1))
        said = batch.answers[torch.arange(len(count)), torch.from_numpy(generator.integers(0, count))]
        fixed = torch.full_like(said, backbone.start), torch.full_like(said, backbone.sentinel)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self.decoder.bert(
                input_ids=torch.stack([*fixed, said], dim=1),
                encoder_hidden_states=batch.states,
                encoder_attention_mask=batch.mask,
                use_cache=False,
            ).last_hidden_state.float()  # (B, 3, d)
        logits = self.decoder.cls(hidden[:, 1])
        frame = self.decoder.cls(hidden[:4, ::2]).flatten(0, 1)
        around = torch.tensor([backbone.sentinel, backbone.closing]).repeat(len(frame) // 2)
        answer_loss = -(batch.shares * logits.log_softmax(-1).gather(1, batch.answers)).sum(1)
        return logits, answer_loss, torch.nn.functional.cross_entropy(frame, around)

    def train_block(self, batches: list[Encoded]) -> float:
        """Train on an encoded block; the mean loss of its answers."""
        config = self.config
        done = self.progress
        generator = np.random.default_rng((config.seed, done.block, 1))
        torch.manual_seed(config.seed * 1_000_003 + done.block)
        self.decoder.train()
        warm_up = max(1, round(0.03 * config.steps))
        step = done.block * config.batches * config.passes
        mean = 0.0
        for number in np.concatenate([generator.permutation(len(batches)) for _ in range(config.passes)]):
            fraction = min((step + 1) / warm_up, (config.steps - step) / (config.steps - warm_up + 1))
            for group in self.optimizer.param_groups:
                group["lr"] = config.rate * fraction
            _, answer_losses, frame_loss = self.losses(batches[number], generator)
            (answer_losses.mean() + frame_loss).backward()
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            mean += answer_losses.mean().item() / (len(batches) * config.passes)
            step += 1
        done.block += 1
        done.steps += len(batches) * config.passes
        done.tokens += sum(int(batch.mask.sum()) for batch in batches)
        return mean

    @torch.no_grad()
    def evaluate(self, batches: int = 8) -> dict[str, dict[str, float]]:
        """Loss and accuracy of each kind on the held-out documents.

        Accuracy: of "masked", how often the masked word is the likeliest of the whole vocabulary; of "matter" and
        "manner", how often the likeliest word is one of those asked for; of a task type, how often the right
        answer is the likeliest of its answers.
        """
        self.decoder.eval()
        measured = {}
        for number, kind in enumerate(KINDS):
            generator = np.random.default_rng((20230301, number))
            losses, hits = [], []
            for _ in range(batches):
                if kind in WORD_SHARE:
                    drawn = [self.words["held out"].draw(kind, generator) for _ in range(self.config.batch)]
                    batch = self.word_batch(drawn, generator, kind)
                else:
                    batch = self.task_batch(kind, "held out", generator)
                logits, answer_losses, _ = self.losses(batch, generator)
                if kind in ANSWERS:
                    choices = torch.tensor([self.formats.words[word] for word in ANSWERS[kind]])
                    best = choices[logits[:, choices].argmax(1)]
                else:
                    best = logits.argmax(1)
                losses.append(answer_losses)
                hits.append(((best[:, None] == batch.answers) & (batch.shares > 0)).any(1).float())
            measured[kind] = {"loss": float(torch.cat(losses).mean()), "accuracy": float(torch.cat(hits).mean())}
        return measured

    def save(self, file: Path) -> None:
        """Write a checkpoint: weights, optimizer moments, progress."""
        tensors = {f"weight.{name}": p.detach() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                if parameter in self.optimizer.state:
                    tensors[f"{moment}.{name}"] = self.optimizer.state[parameter][moment]
        texts = {"progress": json.dumps(asdict(self.progress)), "config": json.dumps(asdict(self.config))}
        _replace(file, lambda new: save_file(tensors, new, metadata=texts))

    def resume(self, file: Path) -> None:
        """Go on from a checkpoint; `blocks` and `passes` may differ, to end sooner or later than planned.

        Raises:
            UserError: the checkpoint was made with other settings.
        """
        with safe_open(file, "pt") as opened:
            progress, settings = (json.loads(opened.metadata()[key]) for key in ("progress", "config"))
        before = PretrainConfig(**settings)
        if replace(before, blocks=self.config.blocks, passes=self.config.passes) != self.config:
            raise UserError(f"{file} was made with other settings; name an empty output folder or the same settings.")
        tensors = load_file(file)
        load_own(self.decoder, {name: tensors[f"weight.{name}"] for name in self.parameters})
        self.progress = Progress(**progress)
        if before != self.config:
            self.progress.changes.append((self.progress.block, before.blocks, before.passes))
        for name, parameter in self.parameters.items():
            if f"exp_avg.{name}" in tensors:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.progress.steps)),
                    "exp_avg": tensors[f"exp_avg.{name}"],
                    "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
                }

    def export(self, file: Path) -> None:
        """Write the decoder's own weights in float16, the file that the package ships."""
        state = {name: value.half().contiguous() for name, value in own_state(self.decoder).items()}
        _replace(file, lambda new: save_file(state, new))


def _replace(file: Path, write: Callable[[Path], None]) -> None:
    new = file.with_suffix(".new")
    write(new)
    new.replace(file)


def pretrain(output: Path, config: PretrainConfig, threads: int = 1, command: str = "") -> None:
    """Train to the end, or go on with the run in `output`; write decoder.safetensors and CARD.md there.

    Args:
        threads: of the encoding, and as many again of the training beside it.
        command: what the card says makes the weights again.

    Raises:
        UserError: the catalog cannot be fetched, or `output` holds a run of other settings.
    """
    torch.set_num_threads(threads)
    checkpoint = output / "checkpoint.safetensors"
    run = Pretraining(config)
    if checkpoint.is_file():
        run.resume(checkpoint)
    run.read_text()
    output.mkdir(parents=True, exist_ok=True)
    clock = time.perf_counter()
    done = run.progress
    # The next block is encoded beside the training on this one.
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)) as beside:
        coming = None
        while done.block < config.blocks:
            batches = coming.result() if coming else run.encoded_block(done.block)
            if done.block + 1 < config.blocks:
                coming = beside.submit(run.encoded_block, done.block + 1)
            loss = run.train_block(batches)
            done.seconds += time.perf_counter() - clock
            clock = time.perf_counter()
            print(f"block {done.block} of {config.blocks}, {done.seconds / 60:.1f} min, loss {loss:.3f}", flush=True)
            if done.block % CHECKPOINT_BLOCKS == 0 or done.block == config.blocks:
                run.save(checkpoint)
    run.export(output / "decoder.safetensors")
    # What is measured is what is shipped: the weights as they come back from float16.
    load_own(run.decoder, load_file(output / "decoder.safetensors"))
    (output / "CARD.md").write_text(write_card(run, run.evaluate(), command), encoding="utf-8")
