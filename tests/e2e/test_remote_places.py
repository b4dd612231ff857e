"""Text in S3 and Google storage, a data set and a backbone on a hub: each behind a real server of its protocol."""

import json
import os
import re
import subprocess
import sys
import urllib.request

import boto3
import pytest
from gcp_storage_emulator.server import create_server
from hub import serve_hub
from moto.server import ThreadedMotoServer
from tiny import make_tiny_t5

from supmer_ray.data.catalog import unlabelled


@pytest.fixture(scope="module")
def texts():
    return [document.text for document in unlabelled("bbc")][:90]


@pytest.fixture
def bucket(texts):
    """The address of a folder of .txt files on an S3-compatible server."""
    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"aws_access_key_id": "reader", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", **keys)
    client.create_bucket(Bucket="news")
    for number, text in enumerate(texts[:30]):
        client.put_object(Bucket="news", Key=f"articles/{number:03}.txt", Body=text.encode())
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def google(texts):
    """The address of a JSON-lines object on a Google storage server."""
    server = create_server("localhost", 0, in_memory=True, default_bucket="news")
    server.start()
    address = f"localhost:{server._api._httpd.server_port}"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[30:60])
    upload = f"http://{address}/upload/storage/v1/b/news/o?uploadType=media&name=articles.jsonl"
    request = urllib.request.Request(upload, data=lines.encode(), headers={"Content-Type": "text/plain"})
    urllib.request.urlopen(request).close()
    yield address
    server.stop()


@pytest.fixture
def hub(texts, tmp_path):
    """The address of a hub with a backbone and a data set."""
    model = make_tiny_t5(tmp_path / "model", texts)
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[60:90]))
    with serve_hub({"acme/tiny-t5": model}, {"acme/news": data}) as address:
        yield address


def test_prepare_reads_every_remote_place(bucket, google, hub, texts, tmp_path):
    environment = {
        **os.environ,
        "AWS_ENDPOINT_URL": bucket,
        "AWS_ACCESS_KEY_ID": "reader",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "HF_ENDPOINT": hub,
        "HF_HOME": str(tmp_path / "hub-cache"),
        "HF_HUB_OFFLINE": "0",
    }
    sources = (
        "s3://news/articles",
        f"gs://anonymous@news/articles.jsonl?endpoint_override={google}&scheme=http",
        "hub:acme/news",
    )
    store = tmp_path / "store"
    command = ["prepare", "--backbone", "acme/tiny-t5", "--domains", "8", "--out", store]
    for source in sources:
        command += ["--source", source]
    code = "from supmer_ray.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((store / "manifest.json").read_text())
    assert manifest["documents"] == 90
    assert manifest["backbone"]["name"] == "acme/tiny-t5"
    assert re.search(r"\b90 documents", done.stdout)
