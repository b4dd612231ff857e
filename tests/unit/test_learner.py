"""One worker's step: the curriculum moves on, steps that are not finite are left out, validation keeps its rate."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import make_tiny_t5

from supmer_ray.config import load_run_config
from supmer_ray.meta.curriculum import draw_mixing
from supmer_ray.meta.learner import Learner
from supmer_ray.meta.reduce import reduce_sums
from supmer_ray.meta.state import MetaState
from supmer_ray.model.backbone import load_backbone
from supmer_ray.tasks.batch import Examples, TaskBatch

SETTINGS = ["prompt.length=3", "meta.steps=8", "tasks.tasks_per_step=2", "schedule.stop_after_bad_steps=2"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return load_backbone(str(make_tiny_t5(tmp_path_factory.mktemp("t5"), ["a day of rain and of light"] * 9)))


def learner_of(backbone, **place):
    config = load_run_config(None, SETTINGS)
    return Learner(config, backbone, MetaState.fresh(config, backbone), **place)


@pytest.fixture
def learner(backbone):
    return learner_of(backbone)


def batch_of(seed, vector=None, tasks=2):
    """So many tasks; with a vector, that stands in every input."""
    generator = np.random.default_rng(seed)

    def examples():
        ids = generator.integers(5, 12, (tasks, 4, 6)).tolist()
        vectors = None if vector is None else np.full((1, 32), vector)
        inputs = [[[-1, *row] if vector is not None else row for row in task] for task in ids]
        labels = [[[3, int(generator.choice([5, 6])), 4] for _ in task] for task in ids]
        parts = [Examples.of(*both, vectors, (5, 6)) for both in zip(inputs, labels, strict=True)]
        return Examples.concat(parts)

    return TaskBatch(examples(), examples(), examples(), generator.random(tasks), ["nsp"] * tasks)


def test_the_curriculum_follows_the_similarity_of_the_steps(learner):
    config, before = learner.config.meta.curriculum, None
    for step in range(4):
        row = learner.train_step(batch_of(step))
        lambdas = [draw_mixing(config, before or 0.0, 0, 2 * step + task) for task in (0, 1)]
        assert row["mixing"] == pytest.approx(np.mean(lambdas))
        before = row["similarity"] if before is None else (before + row["similarity"]) / 2
        assert row["running_similarity"] == pytest.approx(before)
    assert row["mixing"] < 1


def test_another_worker_mixes_its_own_tasks(backbone):
    learner = learner_of(backbone, rank=1, workers=2)
    learner.state.progress.similarity, learner.state.progress.step = 0.8, 3
    row = learner.train_step(batch_of(0, tasks=1))
    config = learner.config
    assert row["mixing"] == pytest.approx(draw_mixing(config.meta.curriculum, 0.8, config.seed, 3 * 2 + 1))


def test_a_step_that_is_not_finite_leaves_all_as_it_was_and_a_good_one_lets_the_next_pass(learner):
    state, bad = learner.state, batch_of(0, np.nan)
    learner.train_step(batch_of(1))
    prompt, similarity = state.prompt.detach().clone(), state.progress.similarity
    row = learner.train_step(bad)
    assert row["skipped"] == 1 and np.isnan(row["query_loss"])
    assert torch.equal(state.prompt, prompt) and state.progress.similarity == similarity
    learner.train_step(batch_of(2))
    assert not torch.equal(state.prompt, prompt)
    assert learner.train_step(bad)["skipped"] == 2, "the second in all and the first in a row"
    with pytest.raises(FloatingPointError, match="2 meta-steps in a row had a gradient that is not finite"):
        learner.train_step(bad)


def test_means_are_over_all_tasks(learner):
    batch = batch_of(0)
    found = learner.step(learner.state.prompt, learner.state.inner_rates(), batch, np.full(8, 0.5))
    mean, metrics, asked = reduce_sums(found, {"mixing": 1.0, "tokens": 90}, (True, False))
    torch.testing.assert_close(mean.prompt, found.prompt / 2)
    torch.testing.assert_close(mean.inner_rates, found.inner_rates / 2)
    for own, total in zip(mean.regularizer, found.regularizer, strict=True):
        torch.testing.assert_close(own, total / 2)
    torch.testing.assert_close(metrics["similarity"], found.tasks["similarity"].mean())
    assert metrics["mixing"] == 0.5 and metrics["tokens"] == 45 and (asked > 0).tolist() == [True, False]


def test_validation_adapts_at_the_rate_of_the_start(learner):
    batch = batch_of(0, tasks=1)
    losses, right = learner.step.query_metrics(learner.state.prompt, torch.tensor([0.1]), batch)
    learner.state.progress.step = 8  # the outer rate has decayed to nothing
    found = learner.validate(SimpleNamespace(validation_task=lambda name, index: batch), ["nsp"])
    assert found["nsp"]["loss"] == pytest.approx(float(losses.mean()))
    assert found["nsp"]["accuracy"] == pytest.approx(float(right.mean()))
    unadapted, _ = learner.step.query_metrics(learner.state.prompt, torch.tensor([0.0]), batch)
    assert found["nsp"]["loss"] != pytest.approx(float(unadapted.mean()))


def test_workers_share_the_validation_tasks(backbone):
    asked = []
    for rank in (0, 1):
        own = []
        builder = SimpleNamespace(validation_task=lambda *task, own=own: own.append(task) or batch_of(0, tasks=1))
        learner_of(backbone, rank=rank, workers=2).validate(builder, ["nsp", "nss"])
        asked.append(own)
    assert not set(asked[0]) & set(asked[1])
    assert sorted(asked[0] + asked[1]) == [(name, index) for name in ("nsp", "nss") for index in range(4)]
