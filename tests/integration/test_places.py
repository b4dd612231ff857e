"""Runs whose output lies in an S3-compatible store: stopped, resumed, and the same as one on a path."""

import json
import signal

import boto3
import pytest
from faults import SETTINGS, assert_same_weights, rows_of
from moto.server import ThreadedMotoServer

from supmer_ray.config import load_run_config
from supmer_ray.errors import Stopped, UserError
from supmer_ray.train import train


@pytest.fixture
def bucket():
    """The URI of a folder on an S3-compatible server, and a client for it."""
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"aws_access_key_id": "writer", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", **keys)
    client.create_bucket(Bucket="runs")
    where = f"endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    yield f"s3://writer:secret@runs/team/first?{where}", client
    server.stop()


@pytest.mark.slow
def test_a_run_in_an_object_store_is_stopped_and_resumed(undisturbed, tiny_store, bucket, tmp_path):
    out, client = bucket
    # A snapshot a step: an object store cannot append to the metrics file, which is written with each.
    config = load_run_config(None, [*SETTINGS, "schedule.checkpoint_every=1"])
    said = []

    def stop(row):
        said.append(row)
        if sum(row["kind"] == "step" for row in said) == 1:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped, match="go on with it by --resume"):
        train(config, tiny_store, out, progress=stop)
    with pytest.raises(UserError, match="already holds a run"):
        train(config, tiny_store, out)
    train(config, tiny_store, out, resume=True)

    for entry in client.list_objects_v2(Bucket="runs")["Contents"]:
        file = tmp_path / entry["Key"]
        if not entry["Key"].endswith("/"):
            file.parent.mkdir(parents=True, exist_ok=True)
            client.download_file("runs", entry["Key"], str(file))
    run = tmp_path / "team" / "first"
    assert [row["step"] for row in rows_of(run / "metrics.jsonl", "step")] == list(range(1, 13))
    assert_same_weights(run / "checkpoint", undisturbed.checkpoint)
    assert json.loads((run / "run.json").read_text())["store"] == str(tiny_store)
