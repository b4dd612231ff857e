"""Runs whose output lies in an S3-compatible store: stopped, resumed, and the same as one on a path."""

import json
import signal

import pytest
from faults import SETTINGS, assert_same_weights, rows_of

from supmer_ray.config import load_run_config
from supmer_ray.errors import Stopped, UserError
from supmer_ray.train import train


@pytest.mark.slow
def test_a_run_in_an_object_store_is_stopped_and_resumed(undisturbed, tiny_store, bucket, tmp_path):
    out = bucket.uri
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

    run = bucket.fetch(tmp_path / "fetched")
    assert [row["step"] for row in rows_of(run / "metrics.jsonl", "step")] == list(range(1, 13))
    assert_same_weights(run / "checkpoint", undisturbed.checkpoint)
    assert json.loads((run / "run.json").read_text())["store"] == str(tiny_store)
