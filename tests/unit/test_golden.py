"""The golden numbers: the code that trains meets every recorded quantity within 1e-9 in float64."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from supmer_ray.golden import TOLERANCE, differences, load_golden, meta_gradients, recorded_rounding, task_batch
from supmer_ray.meta.step import MetaStep

FILE = Path(__file__).parents[1] / "fixtures" / "meta_step.safetensors"


@pytest.fixture(scope="module")
def golden():
    return load_golden(FILE)


def test_every_quantity_meets_the_recorded_one(golden):
    found = differences(golden)
    assert len(found) == 12
    assert all(difference < TOLERANCE for difference in found.values()), found


@pytest.mark.parametrize("token_budget", [20, 50, 130])
def test_micro_batches_change_nothing(golden, token_budget):
    whole = meta_gradients(golden, [0, 1, 2])
    cut = meta_gradients(golden, [0, 1, 2], token_budget=token_budget)
    torch.testing.assert_close(cut.prompt, whole.prompt, rtol=1e-10, atol=1e-12)
    for found, expected in zip(cut.regularizer, whole.regularizer, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_the_query_loss_rounds_to_the_recorded_one(golden):
    """The record is the mean of two mini-batches' float32 losses; ours, rounded likewise, is equal to the last bit."""
    step = MetaStep(golden.backbone, golden.regularizer)
    half = golden.facts["query_per_task"] // 2
    for task, facts in enumerate(golden.facts["per_task"]):
        batch, mixing = task_batch(golden, [task])
        adapted = golden.tensors["prompt"] - golden.facts["inner_lr"] * meta_gradients(golden, [task]).update
        losses, _ = step._mixed_losses(adapted, batch, np.arange(2 * half), mixing, alone=False)
        mini_batches = [np.float64(np.float32(part.mean().item())) for part in losses.split(half)]
        assert np.mean(mini_batches) == facts["query_kl"]


@pytest.mark.parametrize(("value", "single"), [(8.803784370422363, True), (0.5264561661817274, False), (0.5, False)])
def test_single_precision_records_are_told_apart(value, single):
    assert (recorded_rounding(value) > 0) == single


def test_a_wrong_step_is_found_out(golden):
    """Were ψ not applied, the comparison must fail: it is not satisfied by anything."""
    with torch.no_grad():
        golden.regularizer.bias[0].add_(1e-3)
    try:
        found = differences(golden)
    finally:
        with torch.no_grad():
            golden.regularizer.bias[0].sub_(1e-3)
    assert found["regularized gradient psi"] > TOLERANCE
    assert found["support gradient g"] < TOLERANCE


def test_what_is_no_number_never_agrees(golden):
    gate = "task1.out.gate"
    found = differences(replace(golden, tensors={**golden.tensors, gate: golden.tensors[gate] * math.nan}))
    assert [name for name, difference in found.items() if not difference < TOLERANCE] == ["gate z"]
    assert found["gate z"] == math.inf
