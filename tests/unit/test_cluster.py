"""What fits a cluster is told before anything waits for it."""

import pytest

from supmer_ray.cluster import Resources, require_room
from supmer_ray.config import WorkersConfig
from supmer_ray.errors import UserError


@pytest.mark.parametrize(
    ("nodes", "count", "cpus", "holding"),
    [((8, 8, 8), 4, 5, 3), ((3,) * 5, 6, 2, 5)],
)
def test_workers_must_fit_the_nodes_one_by_one(nodes, count, cpus, holding):
    """There are CPUs enough in all, but a worker cannot lie on two nodes."""
    assert sum(nodes) >= count * cpus + count / 2
    with pytest.raises(UserError, match=f"^{holding} workers of {cpus} CPUs fit the cluster's nodes of {nodes[0]}, "):
        require_room(Resources(nodes), WorkersConfig(count=count, cpus=cpus))
    require_room(Resources(nodes), WorkersConfig(count=holding, cpus=cpus))


def test_builders_may_share_what_is_left():
    require_room(Resources((1.3, 1.3, 1.3, 1.3)), WorkersConfig(count=3))
    with pytest.raises(UserError, match=r"need 4\.5 CPUs, but the cluster has 4\.2"):
        require_room(Resources((1.4, 1.4, 1.4)), WorkersConfig(count=3))
