"""The Ray cluster that a command runs on: reach it, see what it has, refuse what would not fit."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import time
from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest

from supmer_ray.config import WorkersConfig
from supmer_ray.errors import UserError, first_line

KNOCK_SECONDS = 20.0
"""How long a cluster may take to accept a connection."""

BUILDER_CPUS = 0.5
"""What a worker reserves for each of its builders of meta-tasks: they wait for its steps most of the time."""

DRIVER_CPUS = 0.01
"""What the driver of a trial of several workers reserves: Ray Tune refuses a trial without resources."""

RAY_PARTS = 10_000
"""Ray counts resources in so many parts, to the nearest."""

SETTLE_SECONDS = 5.0
"""How long a run waits for room before it says so."""


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
        return self.fitting(reserved_cpus(workers), gpu_share=workers.gpu_share * self.has_gpus_for(workers))

    def fitting(self, each: float, *, gpu_share: float = 0.0) -> int:
        """How many processes of `each` CPUs, and of such a share of a GPU, the nodes hold, each on one node."""
        nodes = list(zip_longest(self.node_cpus, self.node_gpus, fillvalue=0.0))
        if not gpu_share:
            return sum(int(cpus / each + 1e-9) for cpus, _ in nodes)
        on_a_gpu = RAY_PARTS // round(gpu_share * RAY_PARTS)
        return sum(min(int(cpus / each + 1e-9), int(gpus) * on_a_gpu) for cpus, gpus in nodes)

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
            if address.startswith("ray://"):
                raise ValueError(address)  # a client is no driver: it would get to the cluster, and fail in the middle
            _knock(address)
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        except (ConnectionError, TimeoutError) as error:
            if "RAY_ADDRESS" not in os.environ:
                # One of 'ray start', which Ray notes beyond its end, or the one that was to start now.
                raise UserError(
                    f"The Ray cluster of this machine does not answer ({first_line(error)}); if one was started here, "
                    "clear it away with 'ray stop', and give the command again."
                ) from None
            raise UserError(
                f"The Ray cluster at RAY_ADDRESS={address} does not answer ({first_line(error)}); start it, or unset "
                "RAY_ADDRESS."
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
    return Resources(cpus, gpus, _grows())


def settle_data_actors(resources: Resources) -> None:
    """Have Ray Data make here, on the driver's node, the few actors that it keeps for the whole cluster.

    They stay on the node of whoever executes first, also after the job: on a worker's, an autoscaler could never take
    that node away again, and its loss would fill the logs of all who execute elsewhere.
    """
    import ray.data

    if len(resources.node_cpus) > 1 or resources.grows:
        ray.data.from_items([0]).map_batches(lambda batch: batch, num_cpus=0).materialize()


def _grows() -> bool:
    """Whether an autoscaler adds nodes to this cluster where a reservation waits for them.

    Ray has no question for it. Its newer autoscaler runs only where one was set up. The older one runs in every
    cluster; one that can add nodes reports each under the kind that it is of, and one that only looks on, under a name
    of the node's own, "node_…".
    """
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.experimental.internal_kv import _internal_kv_get

    if is_autoscaler_v2(fetch_from_server=True):
        return True
    status = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}")
    kinds = (status.get("autoscaler_report") or {}).get("node_type_mapping") or {}
    return any(not kind.startswith("node_") for kind in kinds.values())


def this_node_cpus() -> float:
    """The CPUs that Ray counts on the node of this process: it heeds the limits of a container."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    return next(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["NodeID"] == here)


def workers_a_node(workers: int) -> int:
    """How many of so many workers a node has, where they are spread evenly over those that have CPUs now."""
    import ray

    nodes = sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())
    return -(-workers // max(1, nodes))


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


class Waiting:
    """Says that reservations wait for room, once each time when they have done so for a while.

    What has just ended gives its CPUs back.

    Args:
        what: asked for them ("The run").
        workers: that are to find room together.
    """

    def __init__(self, what: str, workers: WorkersConfig) -> None:
        self._what, self._workers = what, workers
        self._since, self._said = math.inf, False

    def notice(self) -> str | None:
        """The sentence, where it is time for it."""
        if not waits():
            self._since, self._said = math.inf, False
            return None
        self._since = min(self._since, time.monotonic())
        if self._said or time.monotonic() - self._since < SETTLE_SECONDS:
            return None
        import ray

        self._said, free = True, ray.available_resources()
        workers = f"{self._workers.count} worker" + "s" * (self._workers.count > 1)
        return (
            f"{self._what} waits until the cluster has room for {workers} of {reserved_cpus(self._workers):g} CPUs; "
            f"{free.get('CPU', 0.0):g} CPUs and {free.get('GPU', 0.0):g} GPUs of it are free."
        )


def waits() -> bool:
    """Whether this driver's job has asked for reservations, and none but those of trials' drivers has found room."""
    import ray
    from ray.util.placement_group import placement_group_table

    job = ray.get_runtime_context().get_job_id()  # the end of the number of what it has made
    states = {
        group["state"]
        for number, group in placement_group_table().items()
        if number.endswith(job) and sum(bundle.get("CPU", 0) for bundle in group["bundles"].values()) > DRIVER_CPUS
    }
    return "PENDING" in states and "CREATED" not in states


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
    each += (" and a GPU" if workers.gpu_share == 1 else f" and {workers.gpu_share:g} of a GPU") if gpu else ""
    fewer = [f"lower workers.count to {holding}"] if holding else []
    others = ["set workers.gpu to false"] if gpu else [] if holding else ["lower workers.cpus or workers.builders"]
    instead = ", or ".join([*fewer, *others])
    what = f"A worker of {each} does" if workers.count == 1 else f"{workers.count} workers of {each} do"
    raise UserError(f"{what} not fit the cluster, whose nodes ({resources}) hold {holding} of such; {instead}.")
