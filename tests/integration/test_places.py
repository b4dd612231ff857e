"""Stores and runs in an S3-compatible store: made, read, stopped, resumed, and the same as those on a path."""

import json
import signal

import pandas as pd
import pyarrow.fs
import pytest
from cluster import assert_all_is_free
from faults import SETTINGS, assert_same_weights, rows_of

from supmer_ray.cli import main
from supmer_ray.config import load_run_config
from supmer_ray.data.prepare import prepare
from supmer_ray.data.store import MANIFEST, Outline, Store, read_manifest
from supmer_ray.errors import Stopped, UserError
from supmer_ray.evaluate import evaluate
from supmer_ray.files import Place, read_sealed
from supmer_ray.report import report
from supmer_ray.train import train


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where this process keeps copies of stores."""
    monkeypatch.setenv("SUPMER_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "stores"


def test_a_store_in_an_object_store_is_that_of_a_path(tiny_store, bucket, cache):
    wanted = Store.open(tiny_store).manifest
    assert prepare(wanted.settings, bucket.store) == wanted
    assert bucket.keys() == sorted(f"team/store/{name}" for name in [*wanted.files, MANIFEST])
    assert "secret" not in read_manifest(bucket.store).model_dump_json()
    assert Outline.open(bucket.store).family("ss").domains == wanted.families["ss"].domains
    assert not cache.exists(), "what a driver needs to know takes no copy"
    store = Store.open(bucket.store)
    assert store.path.parent == cache and store.text(7) == Store.open(tiny_store).text(7)

    with pytest.raises(
        UserError, match=r"^The output s3://runs/team/store already holds .* --overwrite to replace it\.$"
    ):
        prepare(wanted.settings, bucket.store)
    fewer = wanted.settings.model_copy(update={"domains": 4, "max_documents": 20})
    other = prepare(fewer, bucket.store, overwrite=True)
    assert read_manifest(bucket.store) == other and Store.open(bucket.store).path != store.path
    with pytest.raises(UserError, match="too few for 5000 domains"):
        prepare(fewer.model_copy(update={"domains": 5000}), bucket.store, overwrite=True)
    assert read_manifest(bucket.store) == other, "what is refused leaves the store as it was"
    assert len(bucket.keys()) == len(wanted.files) + 1, "nor is anything left beside it"


def test_a_copy_is_made_once_and_again_where_it_is_damaged(tiny_store, bucket, cache):
    for file in sorted(path for path in tiny_store.rglob("*") if path.is_file()):
        bucket.client.upload_file(str(file), "runs", f"team/store/{file.relative_to(tiny_store)}")
    copy = Store.open(bucket.store).path
    (copy / "marked").touch()
    assert Store.open(bucket.store).path == copy and (copy / "marked").exists()
    (copy / "documents.npy").write_bytes(b"damaged")
    again = Store.open(bucket.store)
    assert again.document_rows(0) == Store.open(tiny_store).document_rows(0) and not (copy / "marked").exists()

    bucket.client.put_object(Bucket="runs", Key="team/store/documents.npy", Body=b"damaged")
    (copy / "documents.npy").unlink()
    with pytest.raises(
        UserError, match=r"^The store's file s3://runs/team/store/documents\.npy has 7 bytes instead of"
    ):
        Store.open(bucket.store)
    bucket.client.delete_object(Bucket="runs", Key="team/store/documents.npy")
    with pytest.raises(UserError, match=r"^The store's file s3://runs/team/store/documents\.npy is missing"):
        Store.open(bucket.store)
    bucket.client.put_object(Bucket="runs", Key="team/store/ss.safetensors", Body=b"damaged")
    with pytest.raises(UserError, match=r"^The store's file s3://runs/team/store/ss\.safetensors is missing or has ch"):
        Outline.open(bucket.store).family("ss")
    bucket.client.delete_object(Bucket="runs", Key=f"team/store/{MANIFEST}")
    with pytest.raises(UserError, match=rf"^s3://runs/team/store has no {MANIFEST}, so it is no store"):
        Store.open(bucket.store)


def test_what_is_written_in_part_is_no_store(bucket, monkeypatch):
    """Its last file tells a whole one, and is not there where the writing breaks off."""

    def make():
        with Place(bucket.store).workshop(last="m") as (folder, _):
            for name in ("m", "a", "z"):
                (folder / name).write_text(name)

    make()
    assert bucket.keys() == [f"team/store/{name}" for name in ("a", "m", "z")]
    copy = pyarrow.fs.copy_files

    def broken(source, target, **options):
        if target.endswith("/z"):
            raise OSError("Connection reset by peer")
        copy(source, target, **options)

    monkeypatch.setattr(pyarrow.fs, "copy_files", broken)
    with pytest.raises(UserError, match=r"^Cannot write to s3://runs/team/store \(Connection reset by peer\); check"):
        make()
    assert bucket.keys() == ["team/store/a"]


def test_a_bucket_that_refuses_is_one_sentence(tiny_store, bucket, cache):
    settings = Store.open(tiny_store).manifest.settings
    nowhere = bucket.store.replace("@runs/", "@none/")
    with pytest.raises(UserError, match=r"^(Cannot|The node \S+ cannot) \w+ (to )?s3://none/team") as refused:
        prepare(settings, nowhere)
    assert "secret" not in str(refused.value) and "\n" not in str(refused.value)
    assert bucket.keys() == []
    # Nor does what failed hold CPUs for as long as its traceback is kept.
    assert_all_is_free()


def test_a_run_in_an_object_store_is_read_where_it_lies(compared, plan, tasks, bucket, tmp_path):
    folder, rows, _ = compared
    bucket.put(folder / "runs" / "supmer")
    checkpoint = Place(bucket.uri) / "checkpoint"
    alone = evaluate(plan(["supmer"], store=False, checkpoints={"supmer": checkpoint}), tmp_path / "given")
    first = rows[rows["method"] == "supmer"].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone.drop(columns="seconds"), first.drop(columns="seconds"))
    assert "Meta-training, once for all tasks: supmer" in (tmp_path / "given" / "table.md").read_text()
    page = report([bucket.uri, tmp_path / "given"], tmp_path / "report").read_text()
    assert "Run first" in page and 'id="1-losses"' in page
    written = [file.read_text() for file in (tmp_path / "given").glob("*.[jm]*")]
    assert len(written) == 2 and not any("secret" in text for text in [page, *written])
    few = ["--shots", "2", "--steps", "1", "--set", "max_test=4"]
    out = ["--out", str(tmp_path / "adapted")]
    with pytest.raises(SystemExit) as ended:
        main(["adapt", "--task", str(tasks / "games.yaml"), "--checkpoint", checkpoint.where, *few, *out])
    assert ended.value.code == 0 and "secret" not in (tmp_path / "adapted" / "adapted.json").read_text()

    object_ = {"Bucket": "runs", "Key": "team/first/checkpoint/prompt.safetensors"}
    bucket.client.put_object(**object_, Body=b"damaged")
    with pytest.raises(UserError, match=r"^s3://runs/team/first/checkpoint/prompt\.safetensors is damaged"):
        read_sealed(checkpoint, "a checkpoint")
    bucket.client.delete_object(**object_)
    with pytest.raises(UserError, match=r"^s3://runs/team/first/checkpoint is not whole: prompt\.safetensors is miss"):
        read_sealed(checkpoint, "a checkpoint")
    with pytest.raises(UserError, match=r"^s3://runs/team/store is neither a run \(run\.json, metrics\.jsonl\) nor"):
        report([bucket.store], tmp_path / "other")
    nowhere = bucket.uri.replace("@runs/", "@none/")
    with pytest.raises(UserError, match=r"^s3://none/team/first is neither a run"):
        report([nowhere], tmp_path / "other")
    with pytest.raises(UserError, match=r"^(Cannot reach )?s3://none/team/first "):
        read_sealed(nowhere, "a checkpoint")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_run_in_an_object_store_is_stopped_and_resumed(undisturbed, tiny_store, bucket, tmp_path, monkeypatch):
    # The driver looks so often that it sees the first step before the last is over; the worker writes as ever.
    monkeypatch.setattr("supmer_ray.train.MetricsLog.REMOTE_SECONDS", 0.1)
    out = bucket.uri
    prepare(Store.open(tiny_store).manifest.settings, bucket.store)
    # A snapshot a step: an object store cannot append to the metrics file, which is written with each.
    config = load_run_config(None, [*SETTINGS, "schedule.checkpoint_every=1"])
    said = []

    def stop(row):
        said.append(row)
        if sum(row["kind"] == "step" for row in said) == 1:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped, match="continue it with --resume"):
        train(config, bucket.store, out, progress=stop)
    with pytest.raises(UserError, match="already holds a run"):
        train(config, bucket.store, out)
    with pytest.raises(UserError, match="was started on the store s3://runs/team/store; resume with that one"):
        train(config, tiny_store, out, resume=True)
    train(config, bucket.store, out, resume=True)

    run = bucket.fetch(tmp_path / "fetched")
    assert [row["step"] for row in rows_of(run / "metrics.jsonl", "step")] == list(range(1, 13))
    assert_same_weights(run / "checkpoint", undisturbed.checkpoint)
    assert json.loads((run / "run.json").read_text())["store"] == "s3://runs/team/store"
