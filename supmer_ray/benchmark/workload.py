"""What is measured: a frozen model of a named size with random weights, and meta-tasks of given lengths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import T5Config, T5ForConditionalGeneration

from supmer_ray.model.backbone import Backbone
from supmer_ray.tasks.batch import Examples, TaskBatch

SIZES: dict[str, dict[str, Any]] = {
    "mini": {"d_model": 384, "d_kv": 32, "d_ff": 1536, "num_layers": 4, "num_heads": 8},
    "t5-small": {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "t5-base": {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    "t5-large": {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
    "t5-xl": {
        "d_model": 2048,
        "d_kv": 64,
        "d_ff": 5120,
        "num_layers": 24,
        "num_heads": 32,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
}
"""Shapes of the published T5 models; `mini` is T5-efficient-mini's, `t5-xl` Flan-T5-XL's."""

VOCABULARY = 32128
ANSWERS = (100, 200, 300, 400)
SENTINEL, CLOSING = VOCABULARY - 1, VOCABULARY - 2


def random_backbone(size: str, device: torch.device, dtype: torch.dtype) -> Backbone:
    """A frozen T5 of a named size with random weights, made where it will be used."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "dropout_rate": 0.0,
    }
    with torch.device(device):
        model: Any = T5ForConditionalGeneration(T5Config(**settings, **SIZES[size]))
    model = model.to(dtype)
    backbone = Backbone(model, None, size)
    backbone.pad, backbone.sentinel, backbone.closing = 0, SENTINEL, CLOSING
    return backbone


@dataclass(frozen=True)
class Lengths:
    """Tokens of an example, prompt not counted.

    Attributes:
        name: as the user asked for it.
        pool: (n,) lengths to draw from.
    """

    name: str
    pool: np.ndarray

    @staticmethod
    def fixed(length: int) -> Lengths:
        return Lengths(str(length), np.array([length]))

    @staticmethod
    def spread(mean: int, limit: int) -> Lengths:
        """A gamma distribution of shape 4 around `mean`, as lengths of text are spread, at most `limit`."""
        drawn = np.random.default_rng(0).gamma(4.0, mean / 4.0, 4096)
        return Lengths(f"about {mean}", np.clip(drawn.round().astype(np.int64), 8, limit))

    @staticmethod
    def of_store(store: Path, max_length: int) -> Lengths:
        """The lengths of 60 meta-tasks of each type that training on `store` would draw."""
        from supmer_ray.config import PAPER_TASK_TYPES, TasksConfig
        from supmer_ray.data.store import Outline, Store
        from supmer_ray.model.backbone import load_backbone
        from supmer_ray.tasks.builder import TaskBuilder
        from supmer_ray.tasks.formats import Formats
        from supmer_ray.tasks.types import require_domains

        require_domains(Outline.open(store), PAPER_TASK_TYPES)
        opened = Store.open(store)
        backbone = load_backbone(opened.manifest.backbone.name)
        config = TasksConfig(max_length=max_length)
        formats = Formats.of(backbone, config)
        builder = TaskBuilder(opened, formats, config, seed=0)
        tasks = [builder.validation_task(name, index) for name in PAPER_TASK_TYPES for index in range(60)]
        return Lengths(f"of {store.name}", np.concatenate([task.query.lengths for task in tasks]))


def task_batch(tasks: int, support: int, query: int, lengths: Lengths, seed: int) -> tuple[TaskBatch, np.ndarray]:
    """Random tokens in examples of drawn lengths, and λ ~ Beta(1, b) of each task with s = ½: none is 1.

    So every query is mixed with its partner, which is the most work that a step can be.
    """
    rng = np.random.default_rng(seed)

    def examples(count: int) -> Examples:
        drawn = rng.choice(lengths.pool, count)
        inputs = [rng.integers(10, VOCABULARY - 200, length) for length in drawn]
        labels = [[SENTINEL, int(answer), CLOSING] for answer in rng.choice(ANSWERS, count)]
        return Examples.of(inputs, labels)

    parts = [
        TaskBatch(examples(support), examples(query), examples(query), np.array([rng.random()]), ["random"])
        for _ in range(tasks)
    ]
    return TaskBatch.concat(parts), np.repeat(rng.beta(1.0, 2.0**0.5 - 1.0, tasks), query)


def step_flops(size: str, batch: TaskBatch, prompt: int) -> float:
    """Floating-point operations that a meta-step cannot do without, on real positions only.

    Forward and the gradient towards the prompt. The weights are frozen, so the backward of a product with weights is
    as much as its forward, and that of attention (both operands are activations) twice as much. Cross-attention counts
    as T·H readings of each state, the cheaper of the two ways. Nothing that is computed twice is counted twice.
    """
    s = SIZES[size]
    d, inner, layers, heads = s["d_model"], s["d_kv"] * s["num_heads"], s["num_layers"], s["num_heads"]
    feed = (3 if "gated" in s.get("feed_forward_proj", "") else 2) * d * s["d_ff"]
    total = 0.0
    for examples, steps, decoded in ((batch.support, 3, True), (batch.query, 2, True), (batch.partner, 0, False)):
        widths = examples.lengths + prompt
        linear = 2.0 * widths.sum() * layers * (4 * d * inner + feed)
        attention = 4.0 * (widths.astype(float) ** 2).sum() * layers * inner
        total += 2 * linear + 3 * attention
        if decoded:
            rows = len(examples) * steps
            decoder = 2.0 * rows * layers * (6 * d * inner + feed) + 2.0 * rows * d * VOCABULARY
            cross = 4.0 * widths.sum() * steps * heads * d * layers
            total += 2 * decoder + 3 * cross
    return total
