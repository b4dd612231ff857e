"""Prompt tuning of many runs at once: θ ← AdamW(θ, ψ_φ(g; h)), ψ fixed.

A run is one prompt with its K-shot draw: a task, a data seed and a method. Runs differ only in their
prompt and their examples, so a micro-batch mixes examples of all of them and one backward gives every
run's gradient; each run's step, choice and result are those it would have alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from supmer_ray.config import VOCABULARY_ROWS, AdaptConfig
from supmer_ray.fewshot.encoding import Split, label_probabilities
from supmer_ray.model.backbone import Backbone
from supmer_ray.model.prompted import (
    IGNORED,
    Rows,
    answer_logits,
    encode_prompted,
    micro_batches,
    prompt_gradients,
)
from supmer_ray.tasks.batch import Examples, widened
from supmer_ray.tasks.collate import collate, to_device

Progress = Callable[[str, int, int], None]
"""Called with what is being done ("adapt" or "test"), how much of it is done, and of how much."""


@dataclass(frozen=True, eq=False)
class AdaptRun:
    """One prompt to adapt.

    Attributes:
        train, dev: the K-shot draw, encoded.
        verbalizer_ids: (words,) first tokens of the words that answer, as `TaskEncoder` has them.
        seed: of the order of the training examples.
        prompt: (P, d) float32 to start from; all runs that adapt together share P.
        regularizer: ψ, called with (runs, P, d) gradients and (runs, d) task embeddings; runs that
            share the object are regularized in one call.
    """

    train: Split
    dev: Split
    verbalizer_ids: np.ndarray
    seed: int
    prompt: Tensor
    regularizer: nn.Module


@dataclass(frozen=True)
class Evaluation:
    """A prompt on the dev split; `loss` is the mean −log probability of the right label among the labels."""

    step: int
    accuracy: float
    loss: float

    def beats(self, other: Evaluation) -> bool:
        """Higher accuracy, then lower loss. A loss that is not a number never wins."""
        if self.accuracy != other.accuracy:
            return self.accuracy > other.accuracy and not np.isnan(self.loss)
        return self.loss < other.loss


@dataclass(frozen=True, eq=False)
class AdaptResult:
    """What came of a run.

    Attributes:
        prompt: (P, d) float32 on the CPU, the best step's.
        best: the dev evaluation that chose it; step 0 is the prompt as it was given.
        evaluations: every dev evaluation, in order.
        losses: (steps,) mean training loss of each step's batch, before the step.
    """

    prompt: Tensor
    best: Evaluation
    evaluations: list[Evaluation]
    losses: np.ndarray


def vocabulary_prompt(backbone: Backbone, length: int, seed: int, below: int = VOCABULARY_ROWS) -> Tensor:
    """(length, d) float32: the prompt of plain prompt tuning, rows of random words with ids under `below`."""
    return backbone.random_rows(length, below, torch.Generator().manual_seed(seed)).cpu()


def adapt(
    backbone: Backbone,
    runs: Sequence[AdaptRun],
    config: AdaptConfig,
    *,
    token_budget: int | None = None,
    progress: Progress | None = None,
) -> list[AdaptResult]:
    """Adapt every run's prompt and choose its best step on its dev split.

    Args:
        token_budget: padded tokens of a micro-batch, prompt included; unset: what suits the device.

    Returns:
        One result for each run, in order.
    """
    prompts = nn.Parameter(torch.stack([run.prompt for run in runs]).to(backbone.device))  # (runs, P, d)
    # AdamW works element by element, so one optimizer over the stack is exactly one for each run.
    optimizer = torch.optim.AdamW([prompts], lr=config.rate, weight_decay=config.weight_decay)
    pool, batches = _Pool([run.train.examples for run in runs]), [training_batches(run, config.batch) for run in runs]
    tokens = [run.verbalizer_ids for run in runs]
    history: list[list[Evaluation]] = [[] for _ in runs]
    best: list[Evaluation] = []
    chosen = prompts.detach().clone()
    losses: list[Tensor] = []

    def evaluate(step: int) -> None:
        scores = score(
            backbone, prompts.detach(), [run.dev.examples for run in runs], tokens, token_budget=token_budget
        )
        for number, (run, own) in enumerate(zip(runs, scores, strict=True)):
            evaluation = Evaluation(step, *judged(run.dev, own))
            history[number].append(evaluation)
            if step == 0:
                best.append(evaluation)
            elif evaluation.beats(best[number]):
                best[number] = evaluation
                chosen[number] = prompts.detach()[number]

    evaluate(0)
    for step in range(1, config.steps + 1):
        drawn = [next(stream) for stream in batches]
        gradients, embeddings, loss = run_gradients(
            backbone, prompts, pool, drawn, token_budget=token_budget, answers_only=config.loss == "answers"
        )
        losses.append(loss)
        prompts.grad = _clipped(_regularized(runs, gradients, embeddings), config.clip)
        optimizer.step()
        if step % config.evaluate_every == 0 or step == config.steps:
            evaluate(step)
        if progress:
            progress("adapt", step, config.steps)

    curves = torch.stack(losses, dim=1).cpu().numpy()  # (runs, steps)
    return [
        AdaptResult(chosen[number].float().cpu(), best[number], history[number], curves[number])
        for number in range(len(runs))
    ]


def score(
    backbone: Backbone,
    prompts: Tensor,
    examples: Sequence[Examples],
    verbalizer_ids: Sequence[np.ndarray],
    *,
    token_budget: int | None = None,
    progress: Progress | None = None,
) -> list[np.ndarray]:
    """Probability of every word that answers, of every run, for its own examples.

    Args:
        prompts: (runs, P, d).
        examples: for each run what to score; runs may share an object.
        verbalizer_ids: for each run the (words,) first tokens of its words.

    Returns:
        For each run (examples, words) float64, rows that sum to 1.
    """
    pool = _Pool(examples)
    rows, task = pool.rows([np.arange(len(part)) for part in examples])
    labels = max(map(len, verbalizer_ids))
    # A run with fewer labels repeats its first one in the places that are then masked out.
    ids = torch.tensor([[*own, *[own[0]] * (labels - len(own))] for own in verbalizer_ids], device=backbone.device)
    absent = torch.tensor([[number >= len(own) for number in range(labels)] for own in verbalizer_ids]).to(ids.device)
    cuts = micro_batches(pool.lengths[rows], prompts.shape[1], token_budget or backbone.token_budget)
    found, done = [], 0
    with torch.no_grad():
        for chosen in cuts:
            batch = pool.collate(backbone, rows[chosen], task[chosen])
            logits = answer_logits(backbone, *encode_prompted(backbone, prompts, batch))
            own = logits.gather(1, ids[batch.task]).double().masked_fill(absent[batch.task], -torch.inf)
            # On the device until all are there: a GPU is not waited for between micro-batches.
            found.append(own.softmax(dim=1))
            done += len(chosen)
            if progress:
                progress("test", done, len(rows))
    result = np.empty((len(rows), labels))
    result[np.concatenate(cuts)] = torch.cat(found).cpu().numpy()
    return [result[task == run, : len(own)] for run, own in enumerate(verbalizer_ids)]


def run_gradients(
    backbone: Backbone,
    prompts: Tensor,
    pool: _Pool,
    drawn: Sequence[np.ndarray],
    *,
    token_budget: int | None,
    answers_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """g (runs, P, d), h (runs, d) and the mean losses (runs,) of each run's own batch.

    Args:
        prompts: (runs, P, d), requiring a gradient.
        drawn: for each run the numbers of its examples in this step.
    """
    rows, task = pool.rows(drawn)
    sizes = to_device(np.array([len(numbers) for numbers in drawn]), prompts.device)
    cuts = micro_batches(pool.lengths[rows], prompts.shape[1], token_budget or backbone.token_budget)
    batches = (pool.collate(backbone, rows[chosen], task[chosen]) for chosen in cuts)
    return prompt_gradients(backbone, prompts, batches, sizes, answers_only=answers_only)


class _Pool:
    """The example sets of several runs in one flat array; a set that runs share stands there once."""

    def __init__(self, sets: Sequence[Examples]) -> None:
        distinct = list({id(part): part for part in sets}.values())
        width = max(part.labels.shape[1] for part in distinct)
        self._examples = Examples.concat(
            [replace(part, labels=widened(part.labels, width, IGNORED)) for part in distinct]
        )
        starts = np.cumsum([0] + [len(part) for part in distinct])
        first = {id(part): start for part, start in zip(distinct, starts, strict=False)}
        self._first = [first[id(part)] for part in sets]
        self.lengths = self._examples.lengths

    def rows(self, numbers: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """For each run the numbers of some of its examples → rows of the pool, and the run of each."""
        rows = np.concatenate([own + first for own, first in zip(numbers, self._first, strict=True)])
        return rows, np.repeat(np.arange(len(numbers)), [len(own) for own in numbers])

    def collate(self, backbone: Backbone, rows: np.ndarray, task: np.ndarray) -> Rows:
        """These rows of the pool as a micro-batch, each with its run's prompt."""
        batch = collate(backbone, self._examples, rows)
        return replace(batch, task=to_device(task.astype(np.int64), backbone.device))


def training_batches(run: AdaptRun, size: int) -> Iterator[np.ndarray]:
    """Numbers of training examples, `size` rows a batch: every epoch a new order, cut without replacement."""
    generator = np.random.default_rng(run.seed)
    while True:
        order = generator.permutation(len(run.train))
        for start in range(0, len(order), size):
            yield run.train.examples_of(order[start : start + size])


@torch.no_grad()
def _regularized(runs: Sequence[AdaptRun], gradients: Tensor, embeddings: Tensor) -> Tensor:
    groups: dict[int, list[int]] = {}
    for number, run in enumerate(runs):
        groups.setdefault(id(run.regularizer), []).append(number)
    if len(groups) == 1:
        return runs[0].regularizer(gradients, embeddings)[0]
    result = torch.empty_like(gradients)
    for numbers in groups.values():
        result[numbers], _ = runs[numbers[0]].regularizer(gradients[numbers], embeddings[numbers])
    return result


def _clipped(gradients: Tensor, limit: float) -> Tensor:
    norms = gradients.flatten(1).norm(dim=1)
    return gradients * (limit / (norms + 1e-6)).clamp_max(1.0)[:, None, None]


def accuracy_and_loss(probabilities: np.ndarray, answers: np.ndarray) -> tuple[float, float]:
    """Share of right answers, and the mean −log probability of the right label, of (n, labels) probabilities."""
    right = probabilities[np.arange(len(answers)), answers]
    accuracy = float((probabilities.argmax(axis=1) == answers).mean())
    return accuracy, float(-np.log(np.maximum(right, np.finfo(np.float64).tiny)).mean())


def judged(split: Split, scores: np.ndarray) -> tuple[float, float]:
    """Accuracy and mean −log p of the right label, from the (examples, words) probabilities of a split's examples."""
    return accuracy_and_loss(label_probabilities(scores, split.offered), split.answers)
