"""Two real worker processes over gloo find the gradients that one worker finds."""

import os
from datetime import timedelta

import numpy as np
import torch
import torch.distributed
import torch.multiprocessing
from safetensors.torch import load_file, save_file

from supmer_ray.config import load_run_config
from supmer_ray.data.store import Store
from supmer_ray.errors import UserError
from supmer_ray.meta.loop import RefusedElsewhere, _require_same_step, begun_together, make_formats
from supmer_ray.meta.reduce import reduce_sums
from supmer_ray.meta.state import MetaState
from supmer_ray.meta.step import MetaStep
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
    for step in STEPS:
        save_file(mean_gradients(store_path, step, rank, 2, 4096), folder / f"{step}-{rank}.safetensors")
    torch.distributed.destroy_process_group()
    # A thread of gloo may still be dropping a tensor, for which it wants the GIL; if Python is being taken down
    # meanwhile, the process aborts (pytorch/pytorch#190489). Everything is written: leave without the teardown.
    os._exit(0)


def beginner(rank, folder):
    meet(rank, folder)
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
    torch.distributed.destroy_process_group()
    os._exit(0)


def test_what_one_worker_refuses_ends_all(tmp_path):
    torch.multiprocessing.spawn(beginner, (tmp_path,), nprocs=2, daemon=True)
    assert (tmp_path / "0").read_text() == "RefusedElsewhere()"
    assert "no store on this node" in (tmp_path / "1").read_text()
    for rank in (0, 1):
        assert "found snapshots of different steps, 3 to 6" in (tmp_path / f"step-{rank}").read_text()


def test_two_workers_and_micro_batches_agree_with_one_worker(tiny_store, tmp_path):
    torch.multiprocessing.spawn(worker, (tiny_store, tmp_path), nprocs=2, daemon=True)
    for step in STEPS:
        one = mean_gradients(tiny_store, step, 0, 1, 1 << 20)
        micro = mean_gradients(tiny_store, step, 0, 1, 200)
        two, other = (load_file(tmp_path / f"{step}-{rank}.safetensors") for rank in (0, 1))
        for name, expected in one.items():
            scale = max(1.0, float(expected.abs().max()))
            for found in (micro, two, other):
                assert float((found[name] - expected).abs().max()) / scale < 1e-5, (step, name)
