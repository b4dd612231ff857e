"""What fits a cluster is told before anything waits for it."""

import pytest

from supmer_ray.cluster import Resources, require_room
from supmer_ray.config import WorkersConfig
from supmer_ray.errors import UserError


@pytest.mark.parametrize(
    ("nodes", "count", "cpus", "holding"),
    [((8, 8, 8), 4, 5, 3), ((3,) * 5, 6, 2, 5), ((1.4, 1.4, 1.4), 3, 1, 0)],
)
def test_a_worker_lies_on_one_node_with_its_builders(nodes, count, cpus, holding):
    """There are CPUs enough in all, but a worker cannot lie on two nodes, nor away from those who build for it."""
    assert sum(nodes) >= count * cpus + count / 2 or not holding
    with pytest.raises(UserError) as refused:
        require_room(Resources(nodes), WorkersConfig(count=count, cpus=cpus))
    instead = f"lower workers.count to {holding}" if holding else "lower workers.cpus or workers.builders"
    assert str(refused.value) == (
        f"{count} workers of {cpus + 0.5} CPUs ({cpus} to train, 0.5 for each builder) do not fit the cluster, whose "
        f"nodes ({len(nodes)} of {nodes[0]} CPUs) hold {holding} of such; {instead}."
    )
    if holding:
        require_room(Resources(nodes), WorkersConfig(count=holding, cpus=cpus))


def test_cpus_and_gpus_have_to_be_on_one_node():
    """Eight GPUs on a node of 32 CPUs, and many CPUs elsewhere: four workers of eight CPUs fit there, not eight."""
    nodes = Resources((32, 128), (8, 0))
    require_room(nodes, WorkersConfig(count=3, cpus=8))
    with pytest.raises(UserError, match=r"8\.5 CPUs .* and a GPU do not .*\(1 of 32 CPUs and 8 GPUs, 1 of 128 CPUs\)"):
        require_room(nodes, WorkersConfig(count=8, cpus=8))
    require_room(nodes, WorkersConfig(count=8, cpus=8, gpu=False))


def test_too_few_gpus_are_said_and_not_replaced_by_cpus():
    half = Resources((64,), (4,))
    with pytest.raises(UserError, match=r"lower workers\.count to 4, or set workers\.gpu to false\.$"):
        require_room(half, WorkersConfig(count=8))
    assert half.has_gpus_for(WorkersConfig()) and not Resources((64,)).has_gpus_for(WorkersConfig())


def test_where_nodes_come_when_they_are_asked_for_nothing_is_refused():
    require_room(Resources((0,), grows=True), WorkersConfig(count=8))
    with pytest.raises(UserError, match=r"\(1 of 0 CPUs\) hold 0 of such"):
        require_room(Resources((0,)), WorkersConfig(count=8))


def test_as_many_processes_fit_as_each_node_holds():
    assert Resources((4.0, 3.0)).fitting(2) == 3
    assert Resources((8.0,), node_gpus=(2.0,)).fitting(1, gpu_share=1) == 2
    assert Resources((1.0,), node_gpus=(2.0,)).fitting(1, gpu_share=1) == 1
    assert Resources((64.0, 8.0), node_gpus=(0.0, 4.0)).fitting(1, gpu_share=1) == 4


def test_a_gpu_holds_as_many_as_their_shares_allow():
    """A share lies on one GPU: of two GPUs three halves and more cannot be made of what two thirds leave."""
    assert Resources((64.0,), node_gpus=(1.0,)).fitting(1, gpu_share=0.1) == 10
    assert Resources((64.0,), node_gpus=(2.0,)).fitting(1, gpu_share=0.4) == 4
    assert Resources((64.0,), node_gpus=(2.0,)).fitting(1, gpu_share=0.6) == 2
    # Ray makes 0.1667 of it, and five of those are what a GPU holds.
    assert Resources((64.0,), node_gpus=(1.0,)).fitting(1, gpu_share=0.16666) == 5
    shared = WorkersConfig(gpu_share=0.25)
    assert Resources((64.0,), node_gpus=(2.0,)).holding(shared) == 8
    assert Resources((64.0,)).holding(shared) == 42  # no GPU to share: cores count
    with pytest.raises(UserError, match=r"1\.5 CPUs .* and 0\.25 of a GPU does not fit"):
        require_room(Resources((64.0,)), shared.model_copy(update={"gpu": True}))


def test_several_workers_of_a_run_cannot_share_a_gpu():
    with pytest.raises(ValueError, match=r"gpu_share is 0\.5 and count is 2, but each of several workers"):
        WorkersConfig(count=2, gpu_share=0.5)
