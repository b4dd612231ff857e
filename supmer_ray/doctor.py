"""What this machine and cluster have, what a run would use, and whether the meta-step is right here."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from supmer_ray.errors import UserError, first_line
from supmer_ray.golden import TOLERANCE, differences, load_golden

_PACKAGES = ("supmer-ray", "torch", "transformers", "ray", "datasets", "pyarrow", "pandas", "safetensors")


def replay(file: Path) -> int:
    """Print the largest difference of each quantity of a golden file; 1 if any exceeds 1e-9, else 0.

    Raises:
        UserError: the file is missing or is not a golden file.
    """
    golden = load_golden(file)
    try:
        found = differences(golden)
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{file} or its JSON is not whole ({type(error).__name__}: {first_line(error)}).") from None
    width = max(map(len, found))
    print(f"{file}: {golden.tasks} tasks, T5 with d = {golden.backbone.d_model}, float64")
    for quantity, difference in found.items():
        print(f"  {quantity:{width}}  {difference:.2e}  {'ok' if difference <= TOLERANCE else 'DIFFERS'}")
    worst = max(found.values())
    right = worst <= TOLERANCE
    print(f"largest difference {worst:.2e}: {'within' if right else 'ABOVE'} {TOLERANCE:g}")
    return 0 if right else 1


def describe() -> None:
    """Print the versions, the cluster, the cache and what a run with default settings would use."""
    import torch

    from supmer_ray.cluster import connect, require_room
    from supmer_ray.config import WorkersConfig
    from supmer_ray.embedded import resolve
    from supmer_ray.model.packed import compiles_kernels
    from supmer_ray.registry import home

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("python", platform.python_version())
    for package in _PACKAGES:
        try:
            table.add_row(package, version(package))
        except PackageNotFoundError:
            table.add_row(package, "missing: install it with pip")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    table.add_row(
        "this machine", f"{os.cpu_count()} CPUs, {memory:.0f} GiB memory, torch with {torch.get_num_threads()} threads"
    )
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    table.add_row("GPUs here", ", ".join(gpus) or "none")
    if gpus and not compiles_kernels():
        table.add_row(
            "GPU kernels", "slower ones of torch: ours need triton (install it with pip) and a C compiler such as gcc"
        )
    try:
        resources = connect()
        table.add_row("cluster", f"{len(resources.node_cpus)} nodes, {resources.cpus:g} CPUs, {resources.gpus:g} GPUs")
        workers = WorkersConfig()
        require_room(resources, workers)
        device = "GPU" if resources.has_gpus_for(workers) else "CPU"
        table.add_row(
            "a default run", f"{workers.count} worker on a {device}, {workers.builders} builder of meta-tasks"
        )
    except UserError as error:
        table.add_row("cluster", str(error))
    table.add_row("cache", str(home()))
    try:
        table.add_row("embedded backbone", resolve("embedded"))
    except UserError as error:
        table.add_row("embedded backbone", str(error))
    Console(soft_wrap=True, markup=False, emoji=False).print(table)
