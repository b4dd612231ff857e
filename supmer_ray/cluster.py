"""The Ray cluster that a command runs on: reach it, see what it has, refuse what would not fit."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from dataclasses import dataclass

from supmer_ray.config import WorkersConfig
from supmer_ray.errors import UserError

KNOCK_SECONDS = 20.0
"""How long a cluster may take to accept a connection."""

SETTLE_SECONDS = 5.0
"""How long what has just ended may take to give its CPUs back."""

BUILDER_CPUS = 0.5
"""What a builder of meta-tasks reserves: it is idle most of the time, waiting for the training step."""


@dataclass(frozen=True)
class Resources:
    """What a cluster has.

    Attributes:
        node_cpus: the CPUs of each living node.
        gpus: of all nodes together.
    """

    node_cpus: tuple[float, ...]
    gpus: float = 0.0

    @property
    def cpus(self) -> float:
        """Of all nodes together."""
        return sum(self.node_cpus)

    def has_gpus_for(self, workers: WorkersConfig) -> bool:
        """Whether each worker gets a GPU: as the configuration says, or if there are enough."""
        return self.gpus >= workers.count if workers.gpu is None else workers.gpu


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
    nodes = tuple(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"])
    return Resources(nodes, ray.cluster_resources().get("GPU", 0.0))


def this_node_cpus() -> float:
    """The CPUs that Ray counts on the node of this process: it heeds the limits of a container."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    return next(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["NodeID"] == here)


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


def needed_cpus(workers: WorkersConfig) -> float:
    """What the workers and the builders of a run reserve."""
    return workers.count * (workers.cpus + workers.builders * BUILDER_CPUS)


def waits_for(workers: WorkersConfig) -> str | None:
    """A sentence for a run that fits the cluster but not what is free of it now; it begins when others end."""
    import ray

    need, end = needed_cpus(workers), time.monotonic() + SETTLE_SECONDS
    while (free := ray.available_resources().get("CPU", 0.0)) < need:
        if time.monotonic() > end:
            return f"The run waits for {need:g} CPUs; {free:g} of the cluster's are free."
        time.sleep(0.5)
    return None


def require_room(resources: Resources, workers: WorkersConfig) -> None:
    """Refuse a run whose workers leave no CPU to build meta-tasks: it would wait for ever.

    Raises:
        UserError: too few CPUs or GPUs, with the numbers.
    """
    builders, need = workers.count * workers.builders, needed_cpus(workers)
    if need > resources.cpus:
        fits = int(resources.cpus // (workers.cpus + workers.builders * BUILDER_CPUS))
        instead = f"set workers.count to at most {fits}" if fits else f"give Ray at least {math.ceil(need)} CPUs"
        raise UserError(
            f"{workers.count} workers of {workers.cpus:g} CPUs and {builders} builders of {BUILDER_CPUS:g} need "
            f"{need:g} CPUs, but the cluster has {resources.cpus:g}; {instead}."
        )
    if workers.cpus > max(resources.node_cpus):
        raise UserError(
            f"A worker of {workers.cpus:g} CPUs has to lie on one node, and the largest has "
            f"{max(resources.node_cpus):g}; lower workers.cpus."
        )
    if workers.gpu and workers.count > resources.gpus:
        raise UserError(
            f"{workers.count} workers with a GPU each need {workers.count} GPUs, but the cluster has "
            f"{resources.gpus:g}; lower workers.count or set workers.gpu to false."
        )
