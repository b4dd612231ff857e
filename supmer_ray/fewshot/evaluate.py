"""One method on one task with all its data seeds: what a comparison is made of.

A task's rows and a method go in, one outcome for each seed and test task comes out. Every method sees the
same K-shot draws. A step is chosen on the dev split, never on the test split, which is scored once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import isdir
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from supmer_ray.config import VOCABULARY_ROWS, AdaptConfig
from supmer_ray.errors import require_new_folder
from supmer_ray.fewshot.adapt import (
    AdaptRun,
    Evaluation,
    Progress,
    adapt,
    judged,
    score,
    vocabulary_prompt,
)
from supmer_ray.fewshot.adapted import RECORD, Adapted, AdaptedRecord, save_adapted
from supmer_ray.fewshot.definition import TaskDefinition, TaskRows, require_same_labels
from supmer_ray.fewshot.encoding import Split, TaskEncoder, input_limit
from supmer_ray.fewshot.finetune import finetune
from supmer_ray.fewshot.method import Method
from supmer_ray.fewshot.probe import features, parameters, probe
from supmer_ray.fewshot.sampling import FewShotDraw, draw, test_rows
from supmer_ray.files import Place, require_outside
from supmer_ray.meta.state import Checkpoint
from supmer_ray.model.backbone import Backbone
from supmer_ray.model.regularizer import IdentityRegularizer


@dataclass(frozen=True)
class Outcome:
    """What a method reached with one data seed, as a row of a results file.

    Attributes:
        train, test: the task that it was adapted on, and the one that it was tested on.
        best_step: the step that the dev split chose.
        seconds: wall time of this seed, its share of what ran together: learning, choosing and testing.
        trained_parameters: how many numbers the K examples changed.
    """

    method: str
    train: str
    test: str
    seed: int
    shots: int
    dev_accuracy: float
    test_accuracy: float
    best_step: int
    seconds: float
    trained_parameters: int


def evaluate_method(
    backbone: Backbone,
    method: Method,
    source: TaskRows,
    targets: Sequence[TaskRows],
    seeds: Sequence[int],
    config: AdaptConfig,
    *,
    checkpoint: Checkpoint | None = None,
    prompt_length: int = 10,
    vocabulary_rows: int = VOCABULARY_ROWS,
    pattern: int = 0,
    token_budget: int | None = None,
    progress: Progress | None = None,
) -> list[Outcome]:
    """Adapt on `source` with every seed, and test on every target.

    Args:
        targets: tasks with the same labels in the same order; `source` itself for its own test split.
        config: already with the method's changes.
        checkpoint: where the prompt starts and which ψ regularizes its gradient; None: vocabulary rows
            and the raw gradient.
        prompt_length: rows of a prompt that starts from vocabulary rows.
        vocabulary_rows: the ids of those rows are below this.
        pattern: number of the pattern; a task that has fewer uses its last.

    Raises:
        UserError: rows that do not fit a definition, too few examples of a class, or other labels.
    """
    started = time.perf_counter()
    for target in targets:
        require_same_labels(source.definition, target.definition)
    draws = [draw(source.definition, source.frames, config.shots, seed) for seed in seeds]
    tests = [test_rows(target.frames, config.max_test) for target in targets]
    if method.learns == "probe":
        learned = _probes(backbone, source, targets, draws, tests, config, token_budget)
    else:
        rows = 0
        if method.learns == "prompt":
            rows = len(checkpoint.prompt) if checkpoint else prompt_length
        limit = input_limit(backbone, rows, config.max_length)
        encoder = TaskEncoder(backbone, source.definition, max_length=limit, pattern=pattern)
        splits = [
            TaskEncoder(backbone, target.definition, max_length=limit, pattern=pattern).split(test)
            for target, test in zip(targets, tests, strict=True)
        ]
        runs = _runs(backbone, encoder, draws, seeds, checkpoint, rows, vocabulary_rows)
        if method.learns == "prompt":
            learned = _prompts(backbone, runs, splits, config, token_budget, progress)
        elif method.learns == "weights":
            learned = _weights(backbone, runs, splits, config, token_budget)
        else:
            learned = _nothing(backbone, runs, splits, token_budget)
    seconds = (time.perf_counter() - started) / len(seeds)
    return [
        Outcome(
            method=method.name,
            train=source.definition.name,
            test=target.definition.name,
            seed=seed,
            shots=config.shots,
            dev_accuracy=one.best.accuracy,
            test_accuracy=accuracy,
            best_step=one.best.step,
            seconds=seconds,
            trained_parameters=one.parameters,
        )
        for seed, one in zip(seeds, learned, strict=True)
        for target, accuracy in zip(targets, one.accuracies, strict=True)
    ]


@dataclass(frozen=True)
class _Learned:
    """What came of one seed: the choice, how much was trained, and the accuracy on each target."""

    best: Evaluation
    parameters: int
    accuracies: list[float]


def _runs(
    backbone: Backbone,
    encoder: TaskEncoder,
    draws: Sequence[FewShotDraw],
    seeds: Sequence[int],
    checkpoint: Checkpoint | None,
    prompt_length: int,
    vocabulary_rows: int = VOCABULARY_ROWS,
) -> list[AdaptRun]:
    def prompt(seed: int) -> Tensor:
        if checkpoint:
            return checkpoint.prompt.cpu()
        return vocabulary_prompt(backbone, prompt_length, seed, below=vocabulary_rows)

    # One object for all runs: runs that share their regularizer are regularized in one call.
    regularizer = checkpoint.regularizer if checkpoint else IdentityRegularizer()
    return [
        AdaptRun(
            train=encoder.split(drawn.train),
            dev=encoder.split(drawn.dev),
            verbalizer_ids=encoder.verbalizer_ids,
            seed=seed,
            prompt=prompt(seed),
            regularizer=regularizer,
        )
        for drawn, seed in zip(draws, seeds, strict=True)
    ]


def _accuracies(
    backbone: Backbone,
    prompts: Tensor,
    runs: Sequence[AdaptRun],
    splits: Sequence[Split],
    token_budget: int | None,
    progress: Progress | None = None,
) -> list[list[float]]:
    """For each run the accuracy on each split, with its row of `prompts` (runs, P, d)."""
    words = [run.verbalizer_ids for run in runs]
    by_split = []
    for split in splits:
        examples = [split.examples] * len(runs)
        scores = score(backbone, prompts, examples, words, token_budget=token_budget, progress=progress)
        by_split.append([judged(split, own)[0] for own in scores])
    return [list(own) for own in zip(*by_split, strict=True)]


def _prompts(
    backbone: Backbone,
    runs: Sequence[AdaptRun],
    splits: Sequence[Split],
    config: AdaptConfig,
    token_budget: int | None,
    progress: Progress | None,
) -> list[_Learned]:
    results = adapt(backbone, runs, config, token_budget=token_budget, progress=progress)
    prompts = torch.stack([result.prompt for result in results]).to(backbone.device)
    tested = _accuracies(backbone, prompts, runs, splits, token_budget)
    return [_Learned(one.best, one.prompt.numel(), own) for one, own in zip(results, tested, strict=True)]


def _weights(
    backbone: Backbone, runs: Sequence[AdaptRun], splits: Sequence[Split], config: AdaptConfig, token_budget: int | None
) -> list[_Learned]:
    learned = []
    for run in runs:  # each has a language model of its own, so one after the other
        tuned, best = finetune(backbone, run, config, token_budget=token_budget)
        [tested] = _accuracies(tuned, run.prompt[None].to(tuned.device), [run], splits, token_budget)
        learned.append(_Learned(best, sum(weight.numel() for weight in tuned.model.parameters()), tested))
        del tuned  # not kept beside the next one's
    return learned


def _nothing(
    backbone: Backbone, runs: Sequence[AdaptRun], splits: Sequence[Split], token_budget: int | None
) -> list[_Learned]:
    none = runs[0].prompt[None].to(backbone.device)  # (1, 0, d): all runs are the same model
    [found] = _accuracies(backbone, none, runs[:1], [*splits, *(run.dev for run in runs)], token_budget)
    tested, devs = found[: len(splits)], found[len(splits) :]
    return [_Learned(Evaluation(0, accuracy, float("nan")), 0, tested) for accuracy in devs]


def _probes(
    backbone: Backbone,
    source: TaskRows,
    targets: Sequence[TaskRows],
    draws: Sequence[FewShotDraw],
    tests: Sequence[pd.DataFrame],
    config: AdaptConfig,
    token_budget: int | None,
) -> list[_Learned]:
    limit = input_limit(backbone, 0, config.max_length)

    def data(definition: TaskDefinition, frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        states = features(backbone, definition, frame, max_length=limit, token_budget=token_budget)
        return states, frame[definition.label].map(definition.labels.index).to_numpy(np.int64)

    tested = [data(target.definition, test) for target, test in zip(targets, tests, strict=True)]
    learned = []
    for drawn in draws:
        classifier, best = probe(*data(source.definition, drawn.train), *data(source.definition, drawn.dev))
        accuracies = [float((classifier.predict(states) == answers).mean()) for states, answers in tested]
        learned.append(_Learned(best, parameters(classifier), accuracies))
    return learned


def adapt_task(
    backbone: Backbone,
    task: TaskRows,
    checkpoint: Checkpoint | None,
    seed: int,
    config: AdaptConfig,
    out: Path,
    *,
    prompt_length: int,
    pattern: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> AdaptedRecord:
    """Adapt one task with one seed and keep the prompt in the folder `out`, ready for `predict`.

    Args:
        pattern: number of the task's pattern.
        prompt_length: rows of a prompt that starts from vocabulary rows.

    Raises:
        UserError: `out` is none to write into or holds what is read, rows that do not fit the definition, too few
            examples of a class, or a prompt, a pattern or words that the backbone cannot use.
    """
    definition = task.definition
    require_new_folder(out, overwrite=overwrite, marker=RECORD)
    if overwrite:
        folder = [Place.of(backbone.name)] if isdir(backbone.name) else []
        require_outside(
            Place.of(out), {"file of the task": map(Place.of, definition.data.places()), "backbone": folder}
        )
    rows = len(checkpoint.prompt) if checkpoint else prompt_length
    limit = input_limit(backbone, rows, config.max_length)
    encoder = TaskEncoder(backbone, definition, max_length=limit, pattern=pattern)
    drawn = draw(definition, task.frames, config.shots, seed)
    test = encoder.split(test_rows(task.frames, config.max_test))
    [run] = _runs(backbone, encoder, [drawn], [seed], checkpoint, rows)
    [result] = adapt(backbone, [run], config, progress=progress)
    [[accuracy]] = _accuracies(backbone, result.prompt[None].to(backbone.device), [run], [test], None, progress)
    record = AdaptedRecord(
        definition=definition,
        pattern=min(pattern, len(definition.patterns) - 1),
        backbone=backbone.name,
        backbone_fingerprint=backbone.fingerprint,
        tokenizer_fingerprint=backbone.tokenizer_fingerprint,
        config=config,
        seed=seed,
        regularized=checkpoint is not None and checkpoint.config.regularizer.enabled,
        best_step=result.best.step,
        dev_accuracy=result.best.accuracy,
        test_accuracy=accuracy,
    )
    save_adapted(Adapted(result.prompt.numpy(), record), out, overwrite=overwrite)
    return record
