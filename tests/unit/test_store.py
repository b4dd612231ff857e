"""A store gives back what was written into it, and refuses to open when anything is amiss."""

import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supmer_ray.config import PrepareConfig
from supmer_ray.data.domains import empty_family
from supmer_ray.data.store import (
    BATCH_ROWS,
    FAMILIES,
    BackboneRecord,
    Family,
    Manifest,
    Sentences,
    SentenceWriter,
    Store,
    count_items,
    family_record,
    file_records,
    item_rows,
    write_family,
    write_manifest,
)
from supmer_ray.errors import UserError


def write_sentences(folder, documents, a_time):
    """`documents`: for each, the lengths of its sentences; sentence k of document i reads "i k" and holds ids k."""
    with SentenceWriter(folder) as writer:
        for first in range(0, len(documents), a_time):
            part = documents[first : first + a_time]
            texts = [[f"{first + i} {k}" for k in range(len(lengths))] for i, lengths in enumerate(part)]
            tokens = [[[k] * length for k, length in enumerate(lengths)] for lengths in part]
            writer.write(pa.array(texts, pa.list_(pa.string())), pa.array(tokens, pa.list_(pa.list_(pa.int32()))))
    return writer


FAMILY = Family(
    centroids=np.arange(6, dtype=np.float32).reshape(2, 3),
    items=np.array([4, 0, 2, 1, 3], np.int64),
    starts=np.array([0, 3, 5], np.int64),
    train_ends=np.array([2, 4], np.int64),
    keywords=np.array([[7, 5], [9, -1]], np.int32),
)


@pytest.fixture
def folder(tmp_path):
    """A small whole store: documents of 3 and 2 sentences, and one of none, which does not count."""
    writer = write_sentences(tmp_path, [[2, 1, 4], [], [3, 3]], 3)
    for name in FAMILIES:
        write_family(tmp_path, name, FAMILY if name == "ss" else empty_family(3))
    manifest = Manifest(
        corpus="c",
        documents=writer.documents,
        sentences=writer.sentences,
        tokens=writer.tokens,
        backbone=BackboneRecord(name="b", fingerprint="f", tokenizer_fingerprint="t", d_model=3),
        families={name: family_record(FAMILY if name == "ss" else empty_family(3)) for name in FAMILIES},
        settings=PrepareConfig(sources=("text.txt",)),
        files=file_records(tmp_path),
    )
    write_manifest(tmp_path, manifest)
    return tmp_path


def test_rows_come_back(folder):
    store = Store.open(folder)
    assert len(store) == 5
    assert [store.text(row) for row in range(5)] == ["0 0", "0 1", "0 2", "2 0", "2 1"]
    assert [store.document(row) for row in range(5)] == [0, 0, 0, 1, 1]
    assert store.document_rows(1) == range(0, 3)
    assert store.document_rows(4) == range(3, 5)
    assert store.tokens(2).tolist() == [2, 2, 2, 2]
    assert store.tokens(2).dtype == np.int32
    assert (store.manifest.documents, store.manifest.sentences, store.manifest.tokens) == (2, 5, 13)
    with pytest.raises(IndexError):
        store.text(5)
    with pytest.raises(IndexError):
        store.tokens(-1)


def test_family_comes_back_by_domain_and_split(folder):
    store = Store.open(folder)
    family = store.family("ss")
    assert family.domains == 2
    assert family.rows(0, "train").tolist() == [4, 0]
    assert family.rows(0, "validation").tolist() == [2]
    assert family.rows(1, "train").tolist() == [1]
    assert family.usable("train", 2).tolist() == [0]
    assert family.keywords.tolist() == [[7, 5], [9, -1]]
    assert family.usable("validation", 1).tolist() == [0, 1]
    assert store.manifest.families["ss"].train == 3
    assert store.family("nsp").usable("train", 1).tolist() == []
    with pytest.raises(ValueError, match="neither"):
        family.rows(0, "test")


def test_the_table_does_not_depend_on_how_the_text_arrived(tmp_path):
    lengths = np.random.default_rng(0).integers(0, 5, 4000)
    documents = [[1] * length for length in lengths]
    files = []
    for a_time in (len(documents), 700, 33):
        (tmp_path / str(a_time)).mkdir()
        writer = write_sentences(tmp_path / str(a_time), documents, a_time)
        files.append((tmp_path / str(a_time) / "sentences.arrow").read_bytes())
        assert writer.sentences == lengths.sum()
    assert files[0] == files[1] == files[2]


def test_rows_beyond_the_first_batch(tmp_path):
    documents = [[1, 2]] * BATCH_ROWS
    write_sentences(tmp_path, documents, 1000)
    sentences = Sentences(tmp_path)
    for row in (0, BATCH_ROWS - 1, BATCH_ROWS, 2 * BATCH_ROWS - 1):
        assert sentences.text(row) == f"{row // 2} {row % 2}"
        assert len(sentences.tokens(row)) == row % 2 + 1
        assert row in sentences.document_rows(row)
    for rows in (range(0), range(3, 10), range(BATCH_ROWS - 2, BATCH_ROWS + 3), range(2 * BATCH_ROWS)):
        tokens, starts = sentences.span(rows)
        own = [sentences.tokens(row) for row in rows]
        assert starts.tolist() == np.cumsum([0, *map(len, own)]).tolist() and tokens.dtype == np.int32
        assert tokens.tolist() == np.concatenate([tokens[:0], *own]).tolist()


@given(st.lists(st.integers(0, 7), min_size=1), st.integers(1, 9))
def test_items_are_what_the_families_say(sizes, step):
    starts = np.concatenate([[0], np.cumsum(sizes)])
    document = [*np.repeat(np.arange(len(sizes)), sizes).tolist(), None, None]
    total = sum(sizes)
    wanted = {
        "ss": list(range(total)),
        "nsp": [row for row in range(total) if document[row] == document[row + 1] and sizes[document[row]] >= 3],
        "nss": [row for row in range(total) if document[row] == document[row + 2] and sizes[document[row]] >= 4],
    }
    for name, rows in wanted.items():
        parts = [item_rows(name, starts, first, min(first + step, total)) for first in range(0, total, step)]
        assert [row for part in parts for row in part] == rows
        assert count_items(name, starts) == len(rows)


def test_no_store(tmp_path):
    with pytest.raises(UserError, match=r"no store at .*nowhere"):
        Store.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"manifest\.json"):
        Store.open(tmp_path)


def test_another_version_is_refused(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["schema_version"] = 99
    manifest["unheard_of"] = 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"another version .*99.*prepare it again"):
        Store.open(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 2}', "[" * 100_000])
def test_a_damaged_manifest_is_refused(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        Store.open(folder)


@pytest.mark.parametrize(("key", "name"), [("files", "sentences.arrow"), ("files", "nss.rows.npy"), ("families", "ss")])
def test_a_manifest_that_leaves_something_out_is_refused(folder, key, name):
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest[key][name]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json is damaged; prepare the store again"):
        Store.open(folder)


@pytest.mark.parametrize("name", ["sentences.arrow", "documents.npy", "ss.rows.npy", "nsp.safetensors"])
def test_a_damaged_file_is_refused(folder, name):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-1])
    with pytest.raises(UserError, match=f"{name} has {len(whole) - 1} bytes instead of {len(whole)}"):
        Store.open(folder)
    (folder / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=f"{name} has changed"):
        Store.open(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        Store.open(folder)
