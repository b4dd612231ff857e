"""Adapting tasks × seeds together, beside one run after the other in the plain way, on the embedded backbone."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from supmer_ray.config import AdaptConfig
from supmer_ray.fewshot.adapt import AdaptRun, adapt, vocabulary_prompt
from supmer_ray.fewshot.definition import load_definition
from supmer_ray.fewshot.encoding import TaskEncoder, input_limit
from supmer_ray.fewshot.sampling import draw
from supmer_ray.model.backbone import Backbone, load_backbone
from supmer_ray.model.library import LibraryForward
from supmer_ray.model.regularizer import IdentityRegularizer

TASKS = ("bbc-topic", "subjectivity", "film-sentiment", "product-sentiment", "reuters-r8", "newsgroups")
SEEDS = range(5)
PROMPT = 10
CONFIG = AdaptConfig(steps=3, max_length=128, evaluate_every=3, max_test=32)


def measure_fewshot(device: str, repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Seconds together (packed) and one after the other (the library's forward, padded), and whether they agree."""
    ours = load_backbone("embedded", device=device)
    plain = load_backbone("embedded", device=device)
    plain.forward = LibraryForward(plain.model)
    runs = _runs(ours)
    times: dict[str, list[float]] = {"together": [], "one after the other": []}
    results: dict[str, list[Any]] = {}
    ways: dict[str, Callable[[], list[Any]]] = {
        "together": lambda: adapt(ours, runs, CONFIG),
        "one after the other": lambda: [adapt(plain, [run], CONFIG)[0] for run in runs],
    }
    for round_ in range(min(repeats, 3)):
        for name, way in ways.items():
            started = time.perf_counter()
            results[name] = way()
            times[name].append(time.perf_counter() - started)
        say(f"round {round_ + 1}: " + ", ".join(f"{name} {values[-1]:.1f} s" for name, values in times.items()))
    base = results["one after the other"]
    same = [a.test_accuracy == b.test_accuracy for a, b in zip(results["together"], base, strict=True)]
    medians = {name: median(values) for name, values in times.items()}
    ratio = medians["one after the other"] / medians["together"]
    say(f"{len(runs)} runs together are {ratio:.1f} times as fast; {sum(same)} of {len(same)} accuracies are equal")
    return {"runs": len(runs), "seconds": medians, "speedup": ratio, "equal_accuracies": sum(same)}


def _runs(backbone: Backbone) -> list[AdaptRun]:
    found = []
    for name in TASKS:
        definition = load_definition(name)
        frames = definition.read()
        encoder = TaskEncoder(backbone, definition, max_length=input_limit(backbone, PROMPT, CONFIG.max_length))
        for seed in SEEDS:
            drawn = draw(definition, frames, CONFIG.shots, seed, CONFIG.max_test)
            train, dev, test = (encoder.split(part) for part in (drawn.train, drawn.dev, drawn.test))
            prompt = vocabulary_prompt(backbone, PROMPT, seed)
            found.append(AdaptRun(name, train, dev, encoder.verbalizer_ids, seed, prompt, IdentityRegularizer(), test))
    return found
