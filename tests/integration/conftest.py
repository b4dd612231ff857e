"""One local Ray cluster for all integration tests, and real text for them."""

import urllib.request
from dataclasses import dataclass
from typing import Any

import boto3
import pytest
import ray
import torch
from comparing import along_shots, compared, plan, tasks  # noqa: F401
from faults import SETTINGS
from moto.server import ThreadedMotoServer
from ray.util.placement_group import PlacementGroup, PlacementGroupID, placement_group_table, remove_placement_group
from tiny import make_tiny_t5

from supmer_ray.config import PrepareConfig, load_run_config
from supmer_ray.data.catalog import unlabelled
from supmer_ray.data.prepare import prepare
from supmer_ray.train import train


@dataclass(frozen=True)
class Bucket:
    """Two folders on an S3-compatible server.

    Attributes:
        uri: of a run, with the server's address and the keys.
        store: of a store, likewise.
    """

    uri: str
    store: str
    client: Any

    def keys(self):
        """What lies on the server, marks of folders left out."""
        entries = self.client.list_objects_v2(Bucket="runs").get("Contents", ())
        return sorted(entry["Key"] for entry in entries if not entry["Key"].endswith("/"))

    def put(self, folder):
        """Copy a folder to where the run's lies."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self.client.upload_file(str(file), "runs", f"team/first/{file.relative_to(folder)}")

    def fetch(self, into):
        """Copy what lies in the run's folder; returns where."""
        for key in self.keys():
            file = into / key
            file.parent.mkdir(parents=True, exist_ok=True)
            self.client.download_file("runs", key, str(file))
        return into / "team" / "first"


@pytest.fixture
def bucket():
    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    # Servers of one process share what they hold.
    urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"").close()
    keys = {"aws_access_key_id": "writer", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", **keys)
    client.create_bucket(Bucket="runs")
    where = f"endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    folder = "s3://writer:secret@runs/team"
    yield Bucket(f"{folder}/first?{where}", f"{folder}/store?{where}", client)
    server.stop()


@pytest.fixture(scope="session")
def ray_cluster():
    """A cluster of two CPUs on this machine, whatever the machine has."""
    with pytest.MonkeyPatch.context() as patch:
        # Metrics reach the node's port every second, not every ten, and are dropped there after two. The environment
        # tells the dashboard's agent, to which Ray's `_system_config` is not passed on; that tells this process, which
        # has read the environment when Ray was imported.
        reporting = {"metrics_report_interval_ms": 1000}
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        # Ray Train's controller takes a worker's snapshots one at a time, one each time that it looks.
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        ray.init(
            "local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, _system_config=reporting
        )
        yield
        ray.shutdown()


@pytest.fixture(autouse=True)
def threads_are_as_they_were():
    """A test that trains in its own process takes a node's share of its cores."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_reservation_outlives_its_test():
    """What a test that failed has reserved is given back: the next one would wait for it until its time is over."""
    yield
    if ray.is_initialized():
        for group, entry in placement_group_table().items():
            if entry["state"] != "REMOVED":
                remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group)))


@pytest.fixture(scope="session")
def bbc_texts():
    """The train documents of the catalog's BBC news."""
    return [document.text for document in unlabelled("bbc")]


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory, bbc_texts):
    """The folder of a random T5 whose vocabulary comes from BBC news."""
    return make_tiny_t5(tmp_path_factory.mktemp("tiny-t5"), bbc_texts[:200])


@pytest.fixture(scope="session")
def tiny_store_progress():
    """What is said while `tiny_store` is made."""
    return []


@pytest.fixture(scope="session")
def tiny_store(ray_cluster, tiny_t5, tiny_store_progress, tmp_path_factory):
    """The folder of a store of 60 BBC articles in 12 domains, prepared with the tiny T5."""
    out = tmp_path_factory.mktemp("tiny-store") / "store"
    config = PrepareConfig(sources=("bbc",), backbone=str(tiny_t5), domains=12, max_documents=60)
    prepare(config, out, progress=lambda *message: tiny_store_progress.append(message))
    return out


@pytest.fixture(scope="session")
def undisturbed(ray_cluster, tiny_store, tmp_path_factory):
    """A run from beginning to end, that the disturbed ones are compared with."""
    return train(load_run_config(None, SETTINGS), tiny_store, tmp_path_factory.mktemp("runs") / "undisturbed")
