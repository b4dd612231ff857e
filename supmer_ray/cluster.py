"""The Ray cluster that a command runs on: reach it, see what it has, refuse what would not fit."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest

from supmer_ray.config import WorkersConfig
from supmer_ray.errors import UserError

KNOCK_SECONDS = 20.0
"""How long a cluster may take to accept a connection."""

BUILDER_CPUS = 0.5
"""What a worker reserves for each of its builders of meta-tasks: they wait for its steps most of the time."""


@dataclass(frozen=True)
class Resources:
    """What a cluster has.

    Attributes:
        node_cpus, node_gpus: the CPUs and GPUs of each living node.
        grows: an autoscaler adds nodes where a reservation waits for them.
    """

    node_cpus: tuple[float, ...]
    node_gpus: tuple[float, ...] = ()
    grows: bool = False

    @property
    def cpus(self) -> float:
        """Of all nodes together."""
        return sum(self.node_cpus)

    @property
    def gpus(self) -> float:
        """Of all nodes together."""
        return sum(self.node_gpus)

    def has_gpus_for(self, workers: WorkersConfig) -> bool:
        """Whether each worker gets a GPU: as the configuration says, or where there are any."""
        return self.gpus > 0 if workers.gpu is None else workers.gpu

    def holding(self, workers: WorkersConfig) -> int:
        """How many such workers the nodes hold, each on one node with its builders and, where it gets one, its GPU."""
        return self.fitting(reserved_cpus(workers), gpu=self.has_gpus_for(workers))

    def fitting(self, each: float, *, gpu: bool) -> int:
        """How many processes of `each` CPUs, and of a GPU, the nodes hold, each on one node."""
        nodes = zip_longest(self.node_cpus, self.node_gpus, fillvalue=0.0)
        return sum(int(min(cpus / each + 1e-9, gpus if gpu else math.inf)) for cpus, gpus in nodes)

    def __str__(self) -> str:
        """The nodes, those that are alike together: "2 of 4 CPUs, 1 of 16 CPUs and 8 GPUs"."""
        kinds = Counter(zip_longest(self.node_cpus, self.node_gpus, fillvalue=0.0)).items()
        return ", ".join(
            f"{count} of {cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "") for (cpus, gpus), count in kinds
        )


def connect() -> Resources:
    """Join the cluster that `RAY_ADDRESS` or this machine has, or start one of this machine's cores.

    Raises:
        UserError: `RAY_ADDRESS` names a cluster that does not answer.
    """
    # Ray 2.60 announces changes of defaults at every start; our users can do nothing about them.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    # A cluster that starts here shares its cores with its workers' builders and with all else that a machine does:
    # threads that spin while they wait for each other would make every step several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = (tuple(node.get(what, 0.0) for node in alive) for what in ("CPU", "GPU"))
    return Resources(cpus, gpus, _grows(sum(cpus)))


def _grows(cpus: float) -> bool:
    """Whether an autoscaler has told the cluster of nodes that it could add."""
    from ray._private.state import state

    return (state.get_max_resources_from_cluster_config() or {}).get("CPU", 0) > cpus


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


def reserved_cpus(workers: WorkersConfig) -> float:
    """What one worker reserves on its node: its own CPUs, and those of its builders."""
    return workers.cpus + workers.builders * BUILDER_CPUS


def waits_for_room() -> bool:
    """Whether this driver's job has asked for a reservation that the cluster has no room for yet."""
    import ray
    from ray.util.placement_group import placement_group_table

    job = ray.get_runtime_context().get_job_id()  # the end of the number of what it has made
    groups = placement_group_table().items()
    return any(number.endswith(job) and group["state"] == "PENDING" for number, group in groups)


def require_room(resources: Resources, workers: WorkersConfig) -> None:
    """Refuse workers that the cluster cannot hold at a time, also when it is idle: their run would wait for ever.

    Raises:
        UserError: too few CPUs or GPUs, with the numbers.
    """
    holding = resources.holding(workers)
    if holding >= workers.count or resources.grows:
        return
    gpu = resources.has_gpus_for(workers)
    each = f"{reserved_cpus(workers):g} CPUs ({workers.cpus:g} to train, {BUILDER_CPUS:g} for each builder)"
    each += " and a GPU" if gpu else ""
    fewer = [f"lower workers.count to {holding}"] if holding else []
    others = ["set workers.gpu to false"] if gpu else [] if holding else ["lower workers.cpus or workers.builders"]
    instead = ", or ".join([*fewer, *others])
    what = f"A worker of {each} does" if workers.count == 1 else f"{workers.count} workers of {each} do"
    raise UserError(f"{what} not fit the cluster, whose nodes ({resources}) hold {holding} of such; {instead}.")
