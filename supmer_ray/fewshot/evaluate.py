"""Many few-shot runs side by side: every method on the same K-shot draws of every task and seed.

Definitions, methods and seeds go in, one outcome for each combination comes out. All of them adapt
together as one batch of per-example prompts. A step is chosen on the dev split, never on the test
split, which is scored once, with the chosen prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from supmer_ray.config import AdaptConfig
from supmer_ray.errors import require_new_folder
from supmer_ray.fewshot.adapt import AdaptResult, AdaptRun, Progress, adapt, vocabulary_prompt
from supmer_ray.fewshot.adapted import Adapted, AdaptedRecord, save_adapted
from supmer_ray.fewshot.definition import TaskDefinition
from supmer_ray.fewshot.encoding import TaskEncoder, input_limit
from supmer_ray.fewshot.sampling import draw
from supmer_ray.meta.state import Checkpoint
from supmer_ray.model.backbone import Backbone
from supmer_ray.model.regularizer import IdentityRegularizer

PROMPT_TUNING, SUPMER = "prompt-tuning", "supmer"


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one method reached on one task with one data seed."""

    method: str
    task: str
    seed: int
    result: AdaptResult

    def row(self) -> dict[str, str | int | float | None]:
        """The outcome as a row of a results file."""
        return {
            "method": self.method,
            "task": self.task,
            "seed": self.seed,
            "dev_accuracy": self.result.best.accuracy,
            "test_accuracy": self.result.test_accuracy,
            "best_step": self.result.best.step,
        }


def evaluate(
    backbone: Backbone,
    definitions: Sequence[TaskDefinition],
    methods: Mapping[str, Checkpoint | None],
    seeds: Sequence[int],
    config: AdaptConfig,
    *,
    prompt_length: int,
    token_budget: int = 4096,
    progress: Progress | None = None,
) -> list[Outcome]:
    """Adapt and test every method on every task with every seed.

    Args:
        methods: name → the checkpoint that a run starts from, or None for prompt tuning from
            vocabulary rows with the raw gradient.
        prompt_length: rows of the prompts of methods without a checkpoint; all methods must agree.

    Raises:
        UserError: data that does not fit a definition, or too few examples of a class.
    """
    identity = IdentityRegularizer()
    runs: list[AdaptRun] = []
    names: list[str] = []
    for definition in definitions:
        frames = definition.read()
        limit = input_limit(backbone, prompt_length, config.max_length)
        encoder = TaskEncoder(backbone, definition, max_length=limit)
        test = None
        for seed in seeds:
            drawn = draw(definition, frames, config.shots, seed, config.max_test)
            # The test split is the same for every seed and method, so it is encoded once.
            test = test or encoder.split(drawn.test)
            train, dev = encoder.split(drawn.train), encoder.split(drawn.dev)
            for name, checkpoint in methods.items():
                prompt = checkpoint.prompt.cpu() if checkpoint else vocabulary_prompt(backbone, prompt_length, seed)
                regularizer = checkpoint.regularizer if checkpoint else identity
                ids = encoder.verbalizer_ids
                runs.append(AdaptRun(definition.name, train, dev, ids, seed, prompt, regularizer, test))
                names.append(name)
    results = adapt(backbone, runs, config, token_budget=token_budget, progress=progress)
    return [Outcome(name, run.task, run.seed, result) for name, run, result in zip(names, runs, results, strict=True)]


def adapt_task(
    backbone: Backbone,
    definition: TaskDefinition,
    checkpoint: Checkpoint | None,
    seed: int,
    config: AdaptConfig,
    out: Path,
    *,
    prompt_length: int,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Outcome:
    """Adapt one task with one seed and keep the prompt in the folder `out`, ready for `predict`."""
    require_new_folder(out, overwrite=overwrite)
    method = SUPMER if checkpoint else PROMPT_TUNING
    (outcome,) = evaluate(
        backbone,
        [definition],
        {method: checkpoint},
        [seed],
        config,
        prompt_length=prompt_length,
        progress=progress,
    )
    record = AdaptedRecord(
        definition=definition,
        backbone=backbone.name,
        backbone_fingerprint=backbone.fingerprint,
        tokenizer_fingerprint=backbone.tokenizer_fingerprint,
        config=config,
        seed=seed,
        regularized=checkpoint is not None,
        best_step=outcome.result.best.step,
        dev_accuracy=outcome.result.best.accuracy,
        test_accuracy=outcome.result.test_accuracy,
    )
    save_adapted(Adapted(outcome.result.prompt, record), out, overwrite=overwrite)
    return outcome
