"""The Ray cluster that a command runs on: reach it, see what it has, refuse what would not fit."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from supmer_ray.config import WorkersConfig
from supmer_ray.errors import UserError

KNOCK_SECONDS = 20.0
"""How long a cluster may take to accept a connection."""

SETTLE_SECONDS = 5.0
"""How long what has just ended may take to give its CPUs back."""

RESTART_SECONDS = 10.0
"""How long CPUs must be free after they were taken: a run that restarts its workers gives them back for a moment."""

TURN = ("supmer-start", "supmer")
"""Name and namespace of the actor that stands for the run that is starting."""

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
        except ValueError:
            if "RAY_ADDRESS" not in os.environ:
                raise
            raise UserError(
                f"RAY_ADDRESS={address} is no address of a cluster that a driver can join; write HOST:PORT of its "
                "head, or unset it (the address of its dashboard is for 'ray job submit' alone)."
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


def take_turn(workers: WorkersConfig, tell: Callable[[str], None], *, gpu: bool = False) -> Callable[[], None]:
    """Wait until a run is the only one that starts, and what it needs of the cluster is free.

    Ray Train reserves a run's workers, and its builders take what is left: two runs that start at once could each
    have their workers and leave none a CPU to build with.

    Args:
        tell: told once what the run waits for.
        gpu: each worker takes a GPU.

    Returns:
        What to call when the run has all that it needs; a driver that dies gives its turn back too.
    """
    import ray

    class Turn:
        """An actor of which there can be one, for as long as its driver lives."""

    need = {"CPU": needed_cpus(workers)} | ({"GPU": float(workers.count)} if gpu else {})
    began = time.monotonic()
    name, namespace = TURN
    turn: Any = None
    busy, told = began - RESTART_SECONDS, False
    while True:
        now, reason = time.monotonic(), "another run to have started"
        if turn is None:
            with suppress(ValueError):  # there is one already
                turn = ray.remote(Turn).options(num_cpus=0, name=name, namespace=namespace).remote()
        if turn is not None:
            available = ray.available_resources()
            short = [what for what, count in need.items() if available.get(what, 0.0) < count]
            if not short and now - busy >= RESTART_SECONDS:
                return lambda: ray.kill(turn)
            if short:
                busy = now
            what = (short or list(need))[0]
            reason = f"{need[what]:g} {what}s; {available.get(what, 0.0):g} of the cluster's are free"
        if not told and now - began > SETTLE_SECONDS:
            tell(f"The run waits for {reason}.")
            told = True
        time.sleep(0.5)


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
    holding = sum(int(cpus / workers.cpus + 1e-9) for cpus in resources.node_cpus)
    if workers.count > holding:
        nodes = ", ".join(f"{cpus:g}" for cpus in resources.node_cpus)
        raise UserError(
            f"{holding} workers of {workers.cpus:g} CPUs fit the cluster's nodes of {nodes} CPUs, and workers.count is "
            f"{workers.count}; lower one of them."
        )
    if workers.gpu and workers.count > resources.gpus:
        raise UserError(
            f"{workers.count} workers with a GPU each need {workers.count} GPUs, but the cluster has "
            f"{resources.gpus:g}; lower workers.count or set workers.gpu to false."
        )
