"""From real text to a store on a real cluster, and what stops it before it starts."""

import json
import shutil
import time

import numpy as np
import pyarrow as pa
import pytest
import ray
from cluster import assert_all_is_free
from ray.exceptions import OutOfMemoryError

from supmer_ray.data import prepare as module
from supmer_ray.data.embed import Embedder, Vectors, mean_pooled
from supmer_ray.data.prepare import prepare
from supmer_ray.data.sentences import split
from supmer_ray.data.store import FAMILIES, Store, count_items
from supmer_ray.errors import UserError
from supmer_ray.files import Place
from supmer_ray.model.backbone import load_backbone
from supmer_ray.tasks.batch import Examples

DOCUMENTS = 60


@pytest.fixture(scope="session")
def prepared(tiny_store, tiny_store_progress):
    """The tests' store of the catalog's BBC text, its configuration, and what was said while it was built."""
    store = Store.open(tiny_store)
    return store, store.manifest.settings, tiny_store_progress


@pytest.fixture
def files(tmp_path, bbc_texts):
    """The same documents as JSON lines."""
    file = tmp_path / "bbc.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in bbc_texts[:DOCUMENTS]))
    return file


def test_the_table_is_the_text_in_order(prepared, bbc_texts, tiny_t5):
    store, _, _ = prepared
    wanted = [(i, sentence) for i, text in enumerate(bbc_texts[:DOCUMENTS]) for sentence in split(text)]
    assert [(store.document(row), store.text(row)) for row in range(len(store))] == wanted
    backbone = load_backbone(str(tiny_t5))
    for row in range(0, len(store), 50):
        assert store.tokens(row).tolist() == backbone.tokenize([store.text(row)])[0][:128]


def test_families_hold_every_item_once(prepared):
    store, config, _ = prepared
    for name in FAMILIES:
        family = store.family(name)
        rows = [family.rows(domain, split) for domain in range(family.domains) for split in ("train", "validation")]
        items = np.sort(np.concatenate(rows))
        assert len(np.unique(items)) == len(items) == store.manifest.families[name].items
        assert 2 <= family.domains <= config.domains
        for row in items:
            after = {"ss": 0, "nsp": 1, "nss": 2}[name]
            assert row + after in store.document_rows(row)


def test_centroids_are_the_encoders_mean_states(prepared, tiny_t5):
    store, _, _ = prepared
    backbone = load_backbone(str(tiny_t5))
    assert store.manifest.backbone.fingerprint == backbone.fingerprint
    assert store.manifest.backbone.tokenizer_fingerprint == backbone.tokenizer_fingerprint
    for name, width in (("ss", 1), ("nsp", 2), ("nss", 2)):
        family = store.family(name)
        rows = np.concatenate([family.rows(0, "train"), family.rows(0, "validation")])
        assert not backbone.prefix
        texts = [np.concatenate([store.tokens(row + after) for after in range(width)]) for row in rows]
        inputs = [[*text, *backbone.suffix] for text in texts]
        vectors = mean_pooled(backbone, Examples.of(inputs, [[backbone.closing]] * len(rows)), 4096).numpy()
        np.testing.assert_allclose(family.centroids[0], vectors.mean(axis=0), atol=2e-3)
        # Each vector once more, alone and unpadded.
        alone = mean_pooled(backbone, Examples.of(inputs[:1], [[backbone.closing]]), 1)
        np.testing.assert_allclose(vectors[0], alone[0], atol=1e-5)


def test_progress_and_manifest_count_the_same(prepared):
    store, _, said = prepared
    stages = list(dict.fromkeys(stage for stage, *_ in said))
    assert stages[-3:] == ["Cutting sentences", "Embedding sentences", "Finding domains"]
    last = {stage: (done, total, unit) for stage, done, total, unit in said}
    assert last["Cutting sentences"] == (DOCUMENTS, None, "documents")
    assert last["Embedding sentences"] == (len(store), len(store), "sentences")
    items = sum(record.items for record in store.manifest.families.values())
    assert last["Finding domains"] == (items, items, "items")
    assert store.manifest.documents == DOCUMENTS
    assert store.manifest.tokens == sum(len(store.tokens(row)) for row in range(len(store)))
    assert sorted(file.name for file in store.path.iterdir()) == sorted([*store.manifest.files, "manifest.json"])


def test_other_workers_and_blocks_make_the_same_store(prepared, files, tmp_path, monkeypatch):
    store, config, _ = prepared
    monkeypatch.setattr("supmer_ray.data.sources.LINES_PIECE_BYTES", 20_000)
    monkeypatch.setattr(module, "BLOCK_BYTES", 10_000)
    monkeypatch.setattr(module, "PORTION", 1)
    monkeypatch.setitem(module.IN_HAND, "cpu", 2)  # as an actor on a GPU has
    other = config.model_copy(update={"sources": (str(files),), "embedders": 1, "max_documents": None})
    again = prepare(other, tmp_path / "store")
    assert again.files == store.manifest.files
    assert again.corpus == store.manifest.corpus
    assert again.families == store.manifest.families


def test_an_actor_that_runs_out_of_memory_is_replaced(prepared, files, tmp_path, monkeypatch):
    """As Ray tells of one that its memory monitor killed, which is no `RayActorError`."""
    store, config, _ = prepared
    mark = tmp_path / "killed"

    class Killed(Embedder):
        def embed(self, stretch):
            if not mark.exists():
                mark.touch()
                raise OutOfMemoryError("killed")
            return super().embed(stretch)

    monkeypatch.setattr(module, "Embedder", Killed)
    manifest = prepare(config.model_copy(update={"sources": (str(files),)}), tmp_path / "store")
    assert mark.exists() and manifest.families == store.manifest.families


def test_who_waits_for_a_full_cluster_is_told_that_the_work_stands(ray_cluster, monkeypatch):
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.05)
    told = []

    @ray.remote(num_cpus=0)
    def late():
        time.sleep(0.5)
        return "done"

    assert ray.get(module._first([late.remote()], lambda: told.append("stands"))) == "done" and told


def test_single_sentences_leave_the_pair_families_empty(prepared, tmp_path, tiny_t5):
    store, config, _ = prepared
    file = tmp_path / "lines.txt"
    file.write_text("\n\n".join(store.text(row) for row in range(300)))
    update = {"sources": (str(file),), "domains": 5, "max_documents": 250}
    prepare(config.model_copy(update=update), tmp_path / "store")
    single = Store.open(tmp_path / "store")
    assert single.manifest.documents == 250
    assert single.manifest.families["ss"].items >= 250
    assert single.manifest.families["nsp"].items == single.family("nsp").domains == 0
    assert single.family("nss").usable("train", 1).tolist() == []


def refused(config, out, message, **update):
    """`prepare` fails with one sentence and leaves nothing beside what was there."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError, match=message) as caught:
        prepare(config.model_copy(update=update), out)
    assert "\n" not in str(caught.value)
    assert sorted(out.parent.iterdir()) == before


def test_what_is_refused(prepared, files, tmp_path):
    store, config, _ = prepared
    out = tmp_path / "new" / "store"
    out.parent.mkdir()
    refused(config, store.path, "already holds")
    refused(config, out, "no file, folder or catalog source", sources=("bbc", str(tmp_path / "none.txt")))
    refused(config, out, "backbone .*nowhere", backbone=str(tmp_path / "nowhere"))
    refused(config, out, "'embedders' is 9 but the cluster has 2 CPUs; write embedders: 2", embedders=9)
    refused(config, out, r"60 documents with \d+ .* too few for 5000 domains .* write domains: \d\d", domains=5000)
    with files.open("a") as stream:
        stream.write('{"body": 1}\n')
    refused(config, out, "Line 61 of .*bbc.jsonl has no column 'text'", sources=(str(files),), max_documents=None)


def test_only_a_store_is_overwritten(prepared, tmp_path, files):
    store, config, _ = prepared
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="something else than this command writes"):
        prepare(config, tmp_path, overwrite=True)
    out = tmp_path / "store"
    shutil.copytree(store.path, out)
    other = config.model_copy(update={"domains": 2, "sources": (str(files),), "max_documents": 25})
    made = prepare(other, out, overwrite=True)
    assert (store.manifest.documents, made.documents, Store.open(out).manifest.documents) == (DOCUMENTS, 25, 25)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bbc.jsonl", "store", "thesis.tex"]


def test_a_node_that_does_not_see_the_output_says_so(tmp_path):
    vectors = np.ones((2, 3), np.float16)
    with pytest.raises(UserError, match=rf"^The node \S+ does not see {tmp_path}/elsewhere, where the store is to be"):
        Vectors(Place.of(tmp_path / "elsewhere" / "shared")).write(0, vectors, vectors)
    (tmp_path / "shared").mkdir()
    seen = Vectors(Place.of(tmp_path / "shared"))
    seen.write(0, vectors, vectors[:1])
    assert seen.sentences(0).tolist() == vectors.tolist() and seen.pairs(0).shape == (1, 3)


def test_a_node_that_does_not_see_the_backbone_says_so(ray_cluster, tmp_path):
    table = module._cut(pa.table({"text": ["A day."], "problem": pa.nulls(1, pa.string())}), str(tmp_path / "no"), 9)
    [problem] = table["problem"].to_pylist()
    assert "A node of the cluster cannot load the tokenizer of" in problem and "every node sees it" in problem
    embedder = ray.remote(Embedder).remote(Place.of(tmp_path), str(tmp_path / "no"), False)
    with pytest.raises(UserError, match=rf"^Cannot load the backbone '{tmp_path}/no' \(.+\); name a folder with "):
        module._get(embedder.load.remote())


def test_what_one_portion_refuses_ends_the_search_for_domains(prepared, tmp_path, monkeypatch):
    """The vectors of the first stretch are there, of which k-means has all of its sample, and the others are not."""
    monkeypatch.setattr(module, "PORTION", 1)
    vectors = Vectors(Place.of(tmp_path / "shared"))
    (tmp_path / "shared").mkdir()
    many = np.random.default_rng(0).normal(size=(512, 8)).astype(np.float16)
    vectors.write(0, many, many[:511])
    config = prepared[1].model_copy(update={"domains": 2, "kmeans_sample": 100})
    monkeypatch.setattr(module.Portion, "chosen", lambda one, items: np.arange(100 if one.first == 0 else 0))
    starts = np.array([0, 512 * 40])
    counts = {name: count_items(name, starts) if name == "ss" else 0 for name in FAMILIES}
    said = []
    with pytest.raises(UserError, match=rf"^The node \S+ does not see {tmp_path}, where the store is to be"):
        module._find_domains(config, starts, vectors.folder, counts, 8, lambda *what: said.append(what))
    assert all(done <= 512 for _, done, *_ in said)
    assert_all_is_free()


def test_everything_is_given_back(prepared):
    assert_all_is_free()
