"""The Ray cluster that a command runs on: reach it, see what it has, refuse what would not fit."""

from __future__ import annotations

import logging
import math
import os
import socket
from dataclasses import dataclass

from supmer_ray.config import WorkersConfig
from supmer_ray.errors import UserError

KNOCK_SECONDS = 20.0
"""How long a cluster may take to accept a connection."""

BUILDER_CPUS = 0.5
"""What a builder of meta-tasks reserves: it is idle most of the time, waiting for the training step."""


@dataclass(frozen=True)
class Resources:
    """CPUs and GPUs of a cluster, and its nodes."""

    cpus: float
    gpus: float
    nodes: int


def connect() -> Resources:
    """Join the cluster that `RAY_ADDRESS` or this machine has, or start one of this machine's cores.

    Raises:
        UserError: `RAY_ADDRESS` names a cluster that does not answer.
    """
    # Ray 2.60 announces changes of defaults at every start; our users can do nothing about them.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    import ray
    import ray.data

    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "auto")
        try:
            _knock(address)
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        except (ConnectionError, TimeoutError) as error:
            raise UserError(
                f"The Ray cluster at RAY_ADDRESS={address} does not answer ({error}); start it, or unset RAY_ADDRESS."
            ) from None
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    total = ray.cluster_resources()
    nodes = sum(node["Alive"] for node in ray.nodes())
    return Resources(total.get("CPU", 0.0), total.get("GPU", 0.0), nodes)


def _knock(address: str) -> None:
    """Try the port of a cluster once: Ray itself would go on for ten minutes, and fill the screen meanwhile.

    Raises:
        ConnectionError: nothing answers there.
    """
    host, colon, port = address.rpartition(":")
    if colon and "/" not in address and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()
        except OSError as error:
            raise ConnectionError(str(error)) from None


def require_room(resources: Resources, workers: WorkersConfig) -> None:
    """Refuse a run whose workers leave no CPU to build meta-tasks: it would wait for ever.

    Raises:
        UserError: too few CPUs or GPUs, with the numbers.
    """
    builders = workers.count * workers.builders
    need = workers.count * workers.cpus + builders * BUILDER_CPUS
    if need > resources.cpus:
        fits = int(resources.cpus // (workers.cpus + workers.builders * BUILDER_CPUS))
        instead = f"set workers.count to at most {fits}" if fits else f"give Ray at least {math.ceil(need)} CPUs"
        raise UserError(
            f"{workers.count} workers of {workers.cpus:g} CPUs and {builders} builders of {BUILDER_CPUS:g} need "
            f"{need:g} CPUs, but the cluster has {resources.cpus:g}; {instead}."
        )
    if workers.gpu and workers.count > resources.gpus:
        raise UserError(
            f"{workers.count} workers with a GPU each need {workers.count} GPUs, but the cluster has "
            f"{resources.gpus:g}; lower workers.count or set workers.gpu to false."
        )
