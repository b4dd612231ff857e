"""Trains the embedded backbone on the catalog's train documents: its decoder, and the last layers of its encoder.

Every input stands behind a prompt of vocabulary rows and vectors. The model learns to name words behind a mask, words
from around a sentence, words of classes that the prompt tells of, and the answers of the paper's five task types. Out
come `weights.safetensors` and the card that says what was measured. Every step is a function of the seed and its
number, so a run that was cut off goes on from its last checkpoint as if nothing had happened.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from supmer_ray.config import TasksConfig
from supmer_ray.embedded.assemble import (
    SENTINEL_LIFT,
    assemble,
    load_encoder,
    load_own,
    new_model,
    own_parameters,
)
from supmer_ray.embedded.card import write_card
from supmer_ray.embedded.corpus import SENTENCE_TOKENS, TaskStore, cluster, embed, read, task_corpus
from supmer_ray.embedded.words import WORD_SHARE, Lexicon, WordExample, WordExamples, random_rows
from supmer_ray.errors import UserError, require_path, require_writable
from supmer_ray.files import whole_file
from supmer_ray.model.backbone import Backbone
from supmer_ray.tasks.formats import Formats
from supmer_ray.tasks.types import ANSWERS, TaskDraw

if TYPE_CHECKING:
    from supmer_ray.data.store import Store

CHECKPOINT_BLOCKS = 4

KINDS = (*WORD_SHARE, *ANSWERS)

TASK_BATCH = {"nsp": (4, 12), "nss": (2, 8), "scsp": (4, 12), "scss": (2, 8), "scc": (4, 12)}
"""(tasks, examples a task) of a batch of tasks."""

WARM_UP = 0.03


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of a training run.

    Attributes:
        blocks: of `batches` batches; the words of a block are sorted by length, so that little is padded.
        batch: examples of a batch of words.
        rate: highest AdamW rate of the decoder; it rises over the first 3 % of the steps and falls to 0 over the rest.
        encoder_rate: the same of the encoder's tuned layers.
        tasks: share of the batches that ask one of the five task types.
        prompt: longest prompt.
        scale, noise: standard deviations of the logarithm of a factor of each prompt row, and of what is added to each
            of its numbers, in half of the examples: tuned prompts are no vocabulary rows.
        limit: documents read from each source; None: all.
        tuned_layers: the encoder's last layers, which are trained with the decoder; what lies below stays as it was
            fetched.
        decoder_layers: of the decoder, which starts from as many of the encoder's last.
        precision: of products, "bfloat16" or "float32", which is several times faster where the processor has no
            instructions for half precision.
    """

    blocks: int = 72
    batches: int = 64
    batch: int = 64
    rate: float = 5e-4
    encoder_rate: float = 1e-4
    weight_decay: float = 0.01
    tasks: float = 0.25
    prompt: int = 16
    scale: float = 0.4
    noise: float = 0.03
    seed: int = 0
    limit: int | None = None
    tuned_layers: int = 3
    decoder_layers: int = 2
    precision: str = "bfloat16"

    @property
    def steps(self) -> int:
        return self.blocks * self.batches


@dataclass(frozen=True)
class Batch:
    """Examples behind their prompts.

    Attributes:
        kind: one of KINDS, or "words" for a mix of the word kinds.
        ids: (B, P + L) token ids; −1−k stands for row k of the example's `vectors`.
        mask: (B, P + L) whether a position is no padding.
        vectors: (B, K, d).
        changed: factors (B, P, 1) of the prompt's rows and what is added to them (B, P, d); None: they stay.
        answers, shares: (B, n) ids of the words asked for, and their shares, which add up to 1.
    """

    kind: str
    ids: Tensor
    mask: Tensor
    vectors: Tensor
    changed: tuple[Tensor, Tensor] | None
    answers: Tensor
    shares: Tensor


@dataclass
class Progress:
    """What a run has done.

    Attributes:
        seconds: of training, reading not counted.
        tokens: encoded, prompts included.
        changes: (block, blocks): up to `block` the run was planned for so many.
    """

    block: int = 0
    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    changes: list[tuple[int, int]] = field(default_factory=list)


class Pretraining:
    """A run: its text, its model and its optimizer.

    Raises:
        UserError: the encoder's archive cannot be fetched, or has fewer layers than are asked for.
    """

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        torch.manual_seed(config.seed)
        encoder, tokenizer = load_encoder()
        most = len(encoder.encoder.layer)
        if not (0 <= config.tuned_layers <= most and 1 <= config.decoder_layers <= most):
            raise UserError(
                f"The encoder has {most} layers: of them 0 to {most} can be tuned, and a decoder can start from 1 to "
                f"{most}; not {config.tuned_layers} and {config.decoder_layers}."
            )
        self.model = new_model(copy.deepcopy(encoder), tokenizer, config.decoder_layers)
        self.model.requires_grad_(False)
        self.decoder: Any = self.model.decoder
        layers, frozen = self.model.encoder.encoder.layer, most - config.tuned_layers
        self._tuned = layers[frozen:]
        # What takes no gradient has its weights in that precision too: the lower layers, and the vectors of sentences,
        # which are those of the encoder as it was fetched.
        self._dtype: torch.dtype = getattr(torch, config.precision)
        self._frozen = copy.deepcopy(layers[:frozen]).to(self._dtype)
        self.backbone = Backbone(new_model(encoder.to(self._dtype), tokenizer, 1), tokenizer, "all-MiniLM-L6-v2")
        self.parameters = own_parameters(self.model, config.tuned_layers)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        groups = [
            {"params": [p for name, p in self.parameters.items() if name.startswith(part)], "peak": rate}
            for part, rate in (("encoder.", config.encoder_rate), ("decoder.", config.rate))
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=config.weight_decay)
        lengths = TasksConfig(max_length=412, anchor_length=80, candidate_length=SENTENCE_TOKENS)
        self.formats = Formats.of(self.backbone, lengths)
        self.progress = Progress()

    def read_text(self) -> None:
        """Read the text and cluster a part of it; minutes."""
        splits = {"train": False, "held out": True}
        corpora = {split: read(self.backbone, held_out=flag, limit=self.config.limit) for split, flag in splits.items()}
        train = corpora["train"]
        lexicon = Lexicon.of(train, self.backbone.tokenizer.get_vocab())
        parts = {split: task_corpus(corpus) for split, corpus in corpora.items()}
        embeddings = {split: embed(part, self.backbone) for split, part in parts.items()}
        centroids = cluster(embeddings["train"], self.config.seed)
        self.stores = {split: TaskStore(part, embeddings[split], centroids) for split, part in parts.items()}
        self.words = {
            split: WordExamples(corpus, lexicon, self.backbone, self.stores[split], self.config.prompt)
            for split, corpus in corpora.items()
        }
        if self.progress.block == 0:
            counts = np.bincount(train.tokens, minlength=len(lexicon.matter))
            share = counts * (lexicon.matter + 0.3 * lexicon.manner) + 0.05
            bias = torch.from_numpy(np.log(share / share.sum())).float()
            with torch.no_grad():
                self.decoder.cls.predictions.bias.copy_(bias - bias.mean())
                self.decoder.cls.predictions.bias[self.backbone.sentinel] += SENTINEL_LIFT

    def block(self, number: int) -> list[Batch]:
        """The batches of a block."""
        config = self.config
        generator = np.random.default_rng((config.seed, number))
        tasks = generator.binomial(config.batches, config.tasks)
        kinds = [list(ANSWERS)[k] for k in generator.integers(0, len(ANSWERS), tasks)]
        drawn = generator.choice(list(WORD_SHARE), (config.batches - tasks) * config.batch, p=list(WORD_SHARE.values()))
        examples = sorted((self.words["train"].draw(str(kind), generator) for kind in drawn), key=len)
        cuts = [examples[first : first + config.batch] for first in range(0, len(examples), config.batch)]
        batches = [self.batch("words", cut, generator) for cut in cuts]
        return batches + [self.task_batch(kind, "train", generator) for kind in kinds]

    def task_batch(self, kind: str, split: str, generator: np.random.Generator, *, plain: bool = False) -> Batch:
        """Draw tasks of one type, each under a prompt of its own."""
        tasks, size = TASK_BATCH[kind]
        draw = TaskDraw(cast("Store", self.stores[split]), self.formats, kind, "train", generator)
        drawn = []
        for _ in range(tasks):
            [examples] = draw.examples(draw.domains()[0], [size])
            prompt = [] if plain else random_rows(self.config.prompt, generator)
            vectors = examples.vectors[0] if examples.vectors.size else np.zeros((0, self.backbone.d_model), np.float32)
            for number, label in enumerate(examples.labels):
                body = examples.tokens[examples.offsets[number] : examples.offsets[number + 1]].tolist()
                drawn.append(WordExample(prompt, body, label[1:2].astype(np.int64), np.ones(1), vectors))
        return self.batch(kind, drawn, generator, plain=plain)

    def batch(
        self, kind: str, drawn: Sequence[WordExample], generator: np.random.Generator, *, plain: bool = False
    ) -> Batch:
        """Drawn examples side by side, padded."""
        config = self.config
        count, width = len(drawn), self.backbone.d_model
        answers = np.zeros((count, max(len(example.words) for example in drawn)), np.int64)
        shares = np.zeros(answers.shape, np.float32)
        ids = np.full((count, max(map(len, drawn))), self.backbone.pad, np.int64)
        vectors = np.zeros((count, max(1, *(len(example.vectors) for example in drawn)), width), np.float32)
        for row, example in enumerate(drawn):
            answers[row, : len(example.words)], shares[row, : len(example.words)] = example.words, example.shares
            ids[row, : len(example)] = [*example.prompt, *example.body]
            vectors[row, : len(example.vectors)] = example.vectors
        lengths = np.array([len(example) for example in drawn])
        changed = None
        longest = max(len(example.prompt) for example in drawn)
        if longest and not plain:
            rows = np.arange(longest) < np.array([len(example.prompt) for example in drawn])[:, None]
            rows &= generator.random((count, 1)) < 0.5
            scale = np.exp(generator.normal(0, config.scale, (count, longest, 1)).astype(np.float32) * rows[..., None])
            noise = generator.standard_normal((count, longest, width), np.float32) * (config.noise * rows[..., None])
            changed = torch.from_numpy(scale.astype(np.float32)), torch.from_numpy(noise.astype(np.float32))
        return Batch(
            kind,
            torch.from_numpy(ids),
            torch.from_numpy(np.arange(ids.shape[1]) < lengths[:, None]),
            torch.from_numpy(vectors),
            changed,
            torch.from_numpy(answers),
            torch.from_numpy(shares),
        )

    def states(self, batch: Batch) -> Tensor:
        """The encoder's last hidden states, (B, P + L, d) float32."""
        embeddings = self.model.encoder.embeddings
        mask = batch.mask[:, None, None].expand(-1, 1, batch.mask.shape[1], -1)
        with torch.no_grad():
            words = embeddings.word_embeddings(batch.ids.clamp_min(0))
            rows = torch.arange(len(words))[:, None]
            inserted = batch.vectors[rows, (-1 - batch.ids).clamp_min(0)]
            words = torch.where(batch.ids[..., None] < 0, inserted, words)
            if batch.changed:
                scale, noise = batch.changed
                prompt = words[:, : noise.shape[1]]
                prompt.mul_(scale).add_(noise)
            places = embeddings.position_embeddings.weight[: words.shape[1]]
            x = embeddings.LayerNorm(words + places + embeddings.token_type_embeddings.weight[0])
            x = x.to(self._dtype)
            for layer in self._frozen:
                x = layer(x, mask)
        with self._products():
            for layer in self._tuned:
                x = layer(x, mask)
        return x.float()

    def losses(self, batch: Batch, generator: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the answer (B, vocabulary), its cross-entropy (B,), and the mean one of the frame around it."""
        backbone = self.backbone
        count = np.asarray((batch.shares > 0).sum(1))
        said = batch.answers[torch.arange(len(count)), torch.from_numpy(generator.integers(0, count))]
        fixed = torch.full_like(said, backbone.start), torch.full_like(said, backbone.sentinel)
        states = self.states(batch)
        with self._products():
            hidden = self.decoder.bert(
                input_ids=torch.stack([*fixed, said], dim=1),
                encoder_hidden_states=states,
                encoder_attention_mask=batch.mask.long(),
                use_cache=False,
            ).last_hidden_state.float()  # (B, 3, d)
        logits = self.decoder.cls(hidden[:, 1])
        frame = self.decoder.cls(hidden[:4, ::2]).flatten(0, 1)
        around = torch.tensor([backbone.sentinel, backbone.closing]).repeat(len(frame) // 2)
        answer_loss = -(batch.shares * logits.log_softmax(-1).gather(1, batch.answers)).sum(1)
        return logits, answer_loss, torch.nn.functional.cross_entropy(frame, around)

    def _products(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._dtype == torch.bfloat16)

    def train_block(self, batches: Sequence[Batch]) -> float:
        """Train on a block; the mean loss of its answers."""
        config = self.config
        done = self.progress
        generator = np.random.default_rng((config.seed, done.block, 1))
        torch.manual_seed(config.seed * 1_000_003 + done.block)
        self.decoder.train()
        warm_up = max(1, round(WARM_UP * config.steps))
        mean = 0.0
        for number in generator.permutation(len(batches)):
            fraction = min((done.steps + 1) / warm_up, (config.steps - done.steps) / (config.steps - warm_up + 1))
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak"] * fraction
            _, answer_losses, frame_loss = self.losses(batches[number], generator)
            (answer_losses.mean() + frame_loss).backward()
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            mean += answer_losses.mean().item() / len(batches)
            done.steps += 1
        done.block += 1
        done.tokens += sum(int(batch.mask.sum()) for batch in batches)
        return mean

    @torch.no_grad()
    def evaluate(self, batches: int = 8) -> dict[str, dict[str, float]]:
        """Loss and accuracy of each kind on the held-out documents, without a prompt where none is needed.

        Accuracy: of "masked", how often the masked word is the likeliest of the whole vocabulary; of the other word
        kinds, how often the likeliest word is one of those asked for; of a task type, how often the right answer is the
        likeliest of its answers.
        """
        self.decoder.eval()
        measured = {}
        for number, kind in enumerate(KINDS):
            generator = np.random.default_rng((20230301, number))
            losses, hits = [], []
            for _ in range(batches):
                if kind in WORD_SHARE:
                    drawn = [self.words["held out"].draw(kind, generator, plain=True) for _ in range(self.config.batch)]
                    batch = self.batch(kind, drawn, generator, plain=True)
                else:
                    batch = self.task_batch(kind, "held out", generator, plain=True)
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
        with whole_file(file) as scratch:
            save_file(tensors, scratch, metadata=texts)

    def resume(self, file: Path) -> None:
        """Go on from a checkpoint; `blocks` may differ, to end sooner or later than planned.

        Raises:
            UserError: the checkpoint was made with other settings.
        """
        with safe_open(file, "pt") as opened:
            progress, settings = (json.loads(opened.metadata()[key]) for key in ("progress", "config"))
        before = PretrainConfig(**settings)
        if replace(before, blocks=self.config.blocks) != self.config:
            raise UserError(f"{file} was made with other settings; name an empty output folder or the same settings.")
        tensors = load_file(file)
        load_own(self.model, {name: tensors[f"weight.{name}"] for name in self.parameters})
        self.progress = Progress(**progress)
        if before != self.config:
            self.progress.changes.append((self.progress.block, before.blocks))
        for name, parameter in self.parameters.items():
            if f"exp_avg.{name}" in tensors:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.progress.steps)),
                    "exp_avg": tensors[f"exp_avg.{name}"],
                    "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
                }

    def export(self, file: Path) -> None:
        """Write what was trained in float16, the file that the package ships."""
        state = {name: value.detach().half().contiguous() for name, value in self.parameters.items()}
        with whole_file(file) as scratch:
            save_file(state, scratch)


def pretrain(output: Path, config: PretrainConfig, command: str = "") -> None:
    """Train to the end, or go on with the run in `output`; write weights.safetensors, CARD.md and `model` there.

    The package ships the first two; `model` is the folder that the other commands take as a backbone.

    Args:
        command: what the card says makes the weights again.

    Raises:
        UserError: the catalog cannot be fetched, or `output` holds a run of other settings or cannot be written to.
    """
    require_path(output)
    checkpoint = output / "checkpoint.safetensors"
    require_writable(checkpoint)
    run = Pretraining(config)
    if checkpoint.is_file():
        run.resume(checkpoint)
    run.read_text()
    output.mkdir(parents=True, exist_ok=True)
    clock = time.perf_counter()
    done = run.progress
    # The next block is drawn beside the training on this one.
    with ThreadPoolExecutor(1) as beside:
        coming = beside.submit(run.block, done.block)
        while done.block < config.blocks:
            batches = coming.result()
            if done.block + 1 < config.blocks:
                coming = beside.submit(run.block, done.block + 1)
            loss = run.train_block(batches)
            done.seconds += time.perf_counter() - clock
            clock = time.perf_counter()
            print(f"block {done.block} of {config.blocks}, {done.seconds / 60:.1f} min, loss {loss:.3f}", flush=True)
            if done.block % CHECKPOINT_BLOCKS == 0 or done.block == config.blocks:
                run.save(checkpoint)
    run.export(output / "weights.safetensors")
    # What is measured is what is shipped: the weights as they come back from float16.
    load_own(run.model, load_file(output / "weights.safetensors"))
    (output / "CARD.md").write_text(write_card(run, run.evaluate(), command), encoding="utf-8")
    shutil.rmtree(output / "model", ignore_errors=True)
    assemble(output / "weights.safetensors", output / "model")
