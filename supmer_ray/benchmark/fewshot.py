"""Adapting tasks × seeds together, beside one run after the other, on the embedded backbone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from supmer_ray.config import AdaptConfig
from supmer_ray.fewshot.adapt import AdaptRun, adapt, judged, score, vocabulary_prompt
from supmer_ray.fewshot.definition import load_definition
from supmer_ray.fewshot.encoding import Split, TaskEncoder, input_limit
from supmer_ray.fewshot.sampling import draw, test_rows
from supmer_ray.model.backbone import Backbone, load_backbone
from supmer_ray.model.library import LibraryForward
from supmer_ray.model.packed import Layout
from supmer_ray.model.regularizer import IdentityRegularizer

TASKS = ("bbc-topic", "subjectivity", "film-sentiment", "product-sentiment", "reuters-r8", "newsgroups-three-topics")
SEEDS = range(5)
PROMPT = 10
CONFIG = AdaptConfig(shots=4, steps=1, evaluate_every=1, max_length=96, max_test=8)
"""One step and an evaluation before and after: short, yet every kind of work that a whole adaptation is made of."""

TOGETHER = "together"
PLAIN = "one by one, padded"
REFERENCE = 412
"""Positions beside the prompt to which the published code pads every example, as the step's baseline does."""


class PaddedForward(LibraryForward):
    """The library's forward with every example padded to one length, as the method is plainly written down.

    Args:
        width: positions of every example, prompt included.
    """

    def __init__(self, model: Any, width: int) -> None:
        super().__init__(model)
        self._width = width

    def encode(self, embeddings: Tensor, layout: Layout) -> Tensor:
        """Packed (N, d) embeddings → packed (N, d) last hidden states."""
        wide = Layout((self._width,) * len(layout), layout.keys)
        parts = [
            torch.nn.functional.pad(own, (0, 0, 0, self._width - len(own))) for own in embeddings.split(layout.widths)
        ]
        states = super().encode(torch.cat(parts), wide).split(self._width)
        return torch.cat([own[:width] for own, width in zip(states, layout.widths, strict=True)])


def measure_fewshot(device: str, repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Seconds of 30 runs together and one by one, and how many test accuracies agree with the plain way's.

    Of the ways that go one by one, the first takes our forward, the others the library's with every example padded: to
    the longest that these runs allow, and to what the published code pads to. On a CPU, seconds of its cores count
    beside those of the clock: other load changes them little.
    """
    ours, padded, published = (load_backbone("embedded", device=device, dtype=torch.float32) for _ in range(3))
    padded.forward = PaddedForward(padded.model, PROMPT + CONFIG.max_length)
    published.forward = PaddedForward(published.model, PROMPT + REFERENCE)
    half = load_backbone("embedded", device=device, dtype=torch.bfloat16)
    runs = _runs(ours)

    def one_by_one(backbone: Backbone) -> list[float]:
        return [accuracy for run in runs for accuracy in _tested(backbone, [run])]

    ways: dict[str, Callable[[], list[float]]] = {
        TOGETHER: lambda: _tested(ours, runs),
        "together, bfloat16": lambda: _tested(half, runs),
        "one by one": lambda: one_by_one(ours),
        PLAIN: lambda: one_by_one(padded),
        f"{PLAIN} to {REFERENCE}": lambda: one_by_one(published),
    }
    clocks = {"seconds": time.perf_counter, "core_seconds": time.process_time}
    times: dict[str, list[list[float]]] = {name: [] for name in ways}
    accuracies: dict[str, list[float]] = {}
    if ours.device.type == "cuda":  # kernels are compiled at their first use
        for way in ways.values():
            way()
    for round_ in range(min(repeats, 3)):
        for name, way in ways.items():
            started = [clock() for clock in clocks.values()]
            accuracies[name] = way()
            times[name].append([clock() - since for clock, since in zip(clocks.values(), started, strict=True)])
            seconds, core_seconds = times[name][-1]
            say(f"round {round_ + 1}, {name}: {seconds:.2f} s, {core_seconds:.2f} s of the cores")
    medians = {name: [median(values) for values in zip(*rounds, strict=True)] for name, rounds in times.items()}
    rows = {}
    for name, (seconds, core_seconds) in medians.items():
        speedup, core_speedup = medians[PLAIN][0] / seconds, medians[PLAIN][1] / core_seconds
        equal = sum(own == plain for own, plain in zip(accuracies[name], accuracies[PLAIN], strict=True))
        rows[name] = {
            "seconds": seconds,
            "core_seconds": core_seconds,
            "speedup": speedup,
            "core_speedup": core_speedup,
            "equal_accuracies": equal,
        }
        say(
            f"{len(runs)} runs {name}: {seconds:.1f} s, {speedup:.2f} times as fast as {PLAIN} ({core_speedup:.2f} by "
            f"seconds of the cores); {equal} of {len(runs)} test accuracies are equal"
        )
    lengths = [length for run, _ in runs for length in run.train.examples.lengths]
    return {"runs": len(runs), "mean_length": sum(lengths) / len(lengths), "ways": rows}


def _tested(backbone: Backbone, runs: Sequence[tuple[AdaptRun, Split]]) -> list[float]:
    """Adapt the runs together, and score each one's test split with the prompt that was chosen."""
    prompts = torch.stack([result.prompt for result in adapt(backbone, [run for run, _ in runs], CONFIG)])
    examples, words = [test.examples for _, test in runs], [run.verbalizer_ids for run, _ in runs]
    scores = score(backbone, prompts.to(backbone.device), examples, words)
    return [judged(test, own)[0] for (_, test), own in zip(runs, scores, strict=True)]


def _runs(backbone: Backbone) -> list[tuple[AdaptRun, Split]]:
    found = []
    for name in TASKS:
        definition = load_definition(name)
        frames = definition.read()
        rows = test_rows(frames, CONFIG.max_test)
        encoder = TaskEncoder(backbone, definition, max_length=input_limit(backbone, PROMPT, CONFIG.max_length))
        for seed in SEEDS:
            drawn = draw(definition, frames, CONFIG.shots, seed)
            train, dev, test = (encoder.split(part) for part in (drawn.train, drawn.dev, rows))
            prompt = vocabulary_prompt(backbone, PROMPT, seed)
            found.append((AdaptRun(train, dev, encoder.verbalizer_ids, seed, prompt, IdentityRegularizer()), test))
    return found
