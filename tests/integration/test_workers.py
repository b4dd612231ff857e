"""Two real worker processes over gloo begin together, are told alike, and find the gradients that one worker finds."""

import os
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from safetensors.torch import load_file, save_file

from supmer_ray.config import load_run_config
from supmer_ray.data.store import Store
from supmer_ray.errors import UserError
from supmer_ray.meta.loop import RefusedElsewhere, _require_same_step, _share, begun_together, make_formats
from supmer_ray.meta.reduce import reduce_sums
from supmer_ray.meta.state import MetaState
from supmer_ray.meta.step import MetaGradients, MetaStep
from supmer_ray.model.backbone import load_backbone
from supmer_ray.tasks.builder import TaskBuilder

STEPS = (0, 1)
SETTINGS = ["prompt.length=5", "tasks.support=6", "tasks.query=6", "tasks.tasks_per_step=4", "tasks.max_length=120"]


def mean_gradients(store_path, step, rank, workers, token_budget):
    """What `Learner.train_step` averages, for one step, as named float32 tensors."""
    torch.set_num_threads(1)
    config = load_run_config(None, SETTINGS)
    store = Store.open(store_path)
    backbone = load_backbone(store.manifest.backbone.name)
    state = MetaState.fresh(config, backbone)
    batch = TaskBuilder(store, make_formats(config, backbone), config.tasks, config.seed).shard(step, rank, workers)
    first = rank * len(batch)
    mixing = np.array([1.0, 0.4, 0.7, 0.9])[first : first + len(batch)]
    meta_step = MetaStep(backbone, state.regularizer, token_budget=token_budget)
    found = meta_step(state.prompt, state.inner_rates(), batch, mixing[batch.query.task])
    mean, metrics, _ = reduce_sums(found, {"mixing": mixing.sum()})
    phi = {f"phi.{number}": gradient.contiguous() for number, gradient in enumerate(mean.regularizer)}
    return {"theta": mean.prompt, "rates": mean.inner_rates, **phi, "metrics": torch.stack(list(metrics.values()))}


def meet(rank, folder):
    patience = timedelta(seconds=120)  # gloo's own is half an hour, longer than a test may take
    where = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2, timeout=patience)


def worker(rank, store_path, folder):
    meet(rank, folder)
    begin(rank, folder)
    share(rank, folder)
    for step in STEPS:
        save_file(mean_gradients(store_path, step, rank, 2, 4096), folder / f"{step}-{rank}.safetensors")
    torch.distributed.destroy_process_group()
    # A thread of gloo may still be dropping a tensor, for which it wants the GIL; if Python is being taken down
    # meanwhile, the process aborts (pytorch/pytorch#190489). Everything is written: leave without the teardown.
    os._exit(0)


def begin(rank, folder):
    """One of them refuses, and then their snapshots differ."""
    try:
        with begun_together(torch.device("cpu")):
            if rank:
                raise UserError("There is no store on this node.")
    except (UserError, RefusedElsewhere) as error:
        (folder / str(rank)).write_text(repr(error))
    _require_same_step(6, torch.device("cpu"))
    try:
        _require_same_step(6 - 3 * rank, torch.device("cpu"))
    except RuntimeError as error:
        (folder / f"step-{rank}").write_text(str(error))


def share(rank, folder):
    """Each begins elsewhere; then the second has a gradient that is no number, and the first is told to stop."""
    state = SimpleNamespace(
        prompt=torch.nn.Parameter(torch.full((2,), float(rank))),
        regularizer=torch.nn.Linear(2, 2),
        log_rates=torch.tensor([float(rank)]),
    )
    _share(state)
    own = torch.full((2,), float("nan") if rank else 1.0)
    found = MetaGradients(own, [torch.ones(2)], torch.ones(1), {"gate": torch.ones(1)}, None, None, None)
    mean, _, flags = reduce_sums(found, {"mixing": 1.0}, (rank == 0, False))
    told = {"mean": mean.prompt, "flags": (flags > 0).float(), "prompt": state.prompt.detach()}
    save_file({**told, "phi": state.regularizer.weight.detach()}, folder / f"told-{rank}.safetensors")


@pytest.fixture(scope="module")
def met(tiny_store, tmp_path_factory):
    """What two workers have written."""
    folder = tmp_path_factory.mktemp("met")
    torch.multiprocessing.spawn(worker, (tiny_store, folder), nprocs=2, daemon=True)
    return folder


def test_what_one_worker_refuses_ends_all(met):
    assert (met / "0").read_text() == "RefusedElsewhere()"
    assert "no store on this node" in (met / "1").read_text()
    for rank in (0, 1):
        assert "found snapshots of different steps, 3 to 6" in (met / f"step-{rank}").read_text()


def test_workers_begin_with_the_first_ones_state_and_are_told_alike(met):
    one, other = (load_file(met / f"told-{rank}.safetensors") for rank in (0, 1))
    assert one["prompt"].tolist() == [0, 0]
    for told in (one, other):
        assert torch.equal(told["prompt"], one["prompt"]) and torch.equal(told["phi"], one["phi"])
        assert told["mean"].isnan().all(), "both leave the step out"
        assert told["flags"].tolist() == [1, 0], "both stop"


def test_two_workers_and_micro_batches_agree_with_one_worker(met, tiny_store):
    for step in STEPS:
        one = mean_gradients(tiny_store, step, 0, 1, 1 << 20)
        micro = mean_gradients(tiny_store, step, 0, 1, 200)
        two, other = (load_file(met / f"{step}-{rank}.safetensors") for rank in (0, 1))
        for name, expected in one.items():
            scale = max(1.0, float(expected.abs().max()))
            for found in (micro, two, other):
                assert float((found[name] - expected).abs().max()) / scale < 1e-5, (step, name)
