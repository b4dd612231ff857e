"""The task types and their formats: what an example holds, and that a task depends on its index alone."""

from dataclasses import replace
from itertools import combinations, groupby
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_tiny_bart, make_tiny_t5

from supmer_ray.config import PAPER_TASK_TYPES, TASK_TYPES, PrepareConfig, TasksConfig
from supmer_ray.data.store import (
    FAMILIES,
    BackboneRecord,
    Family,
    FamilyOutline,
    Manifest,
    Outline,
    SentenceWriter,
    Store,
    family_record,
    file_records,
    item_rows,
    write_family,
    write_manifest,
)
from supmer_ray.errors import UserError
from supmer_ray.files import Place
from supmer_ray.model.backbone import load_backbone
from supmer_ray.model.prompted import micro_batches
from supmer_ray.tasks.batch import Examples, TaskBatch
from supmer_ray.tasks.builder import TaskBuilder, task_type_of_step
from supmer_ray.tasks.collate import collate
from supmer_ray.tasks.formats import LETTERS, PAIR_ANSWERS, Formats, shorten, shortened
from supmer_ray.tasks.types import ANSWERS, FAMILY, TaskDraw, balanced, domain_similarity, require_domains

PREFIX, SUFFIX, SENTINEL, CLOSING = 1, 2, 3, 4
WORDS = {word: 10 + number for number, word in enumerate((*PAIR_ANSWERS, *LETTERS))}
MARKS = ((30, 31), (32, 33), (32, 34), (32, 35))
QUESTION = (32, 30, 40, 41)
TAILS = (((), (50, SENTINEL, 51)), ((SENTINEL, 52), ()))
KEYWORDS = [[300 + 10 * domain + number for number in range(4)] for domain in range(9)]
"""Of each domain, four words of its own."""
FIRST_ROW = 1000
"""Sentence row r consists of the id FIRST_ROW + r, so that an example tells which rows it was made of."""
DOMAINS = 9


def make_formats(max_length=80, anchor_length=40, candidate_length=12):
    return Formats(
        (PREFIX,), (SUFFIX,), SENTINEL, CLOSING, WORDS, MARKS, QUESTION, TAILS,
        max_length, anchor_length, candidate_length,
    )  # fmt: skip


def family_of(rows, centroids):
    """Items in round robin over the domains, nine tenths for training."""
    order = np.argsort(rows % DOMAINS, kind="stable")
    starts = np.searchsorted((rows % DOMAINS)[order], np.arange(DOMAINS + 1))
    ends = starts[1:] - np.maximum(1, np.diff(starts) // 10)
    return Family(centroids, starts.astype(np.int64), ends.astype(np.int64), np.array(KEYWORDS, np.int32), rows[order])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    sizes = [int(size) for size in np.random.default_rng(0).integers(1, 12, 120)]
    row = 0
    with SentenceWriter(folder) as writer:
        for size in sizes:
            tokens = [[FIRST_ROW + row + k] * (1 + (row + k) % 5) for k in range(size)]
            texts = [[f"sentence {row + k}" for k in range(size)]]
            writer.write(pa.array(texts, pa.list_(pa.string())), pa.array([tokens], pa.list_(pa.list_(pa.int32()))))
            row += size
    starts = np.concatenate([[0], np.cumsum(sizes)])
    centroids = np.random.default_rng(1).normal(size=(DOMAINS, 6)).astype(np.float32)
    families = {name: family_of(item_rows(name, starts, 0, row), centroids) for name in FAMILIES}
    for name, family in families.items():
        write_family(folder, name, family)
    manifest = Manifest(
        corpus="c", documents=len(sizes), sentences=row, tokens=writer.tokens,
        backbone=BackboneRecord(name="b", fingerprint="f", tokenizer_fingerprint="t", d_model=6),
        families={name: family_record(family) for name, family in families.items()},
        settings=PrepareConfig(sources=("x",)), files=file_records(folder),
    )  # fmt: skip
    write_manifest(folder, manifest)
    return Store.open(folder)


def make_builder(store, seed=0, **tasks):
    return TaskBuilder(store, make_formats(), TasksConfig(**{"support": 12, "query": 12, **tasks}), seed)


def draw_of(store, name, seed=0):
    return TaskDraw(store, make_formats(), name, "train", np.random.default_rng(seed))


def rows_in(ids):
    """The sentence row of each text of an input, in order."""
    return [int(token) - FIRST_ROW for token, _ in groupby(ids) if token >= FIRST_ROW]


def inputs_of(examples):
    return [examples.tokens[a:b] for a, b in zip(examples.offsets, examples.offsets[1:], strict=False)]


def answers_of(examples):
    names = {number: word for word, number in WORDS.items()}
    return [names[int(label)] for label in examples.labels[:, 1]]


@pytest.mark.parametrize("index", range(6))
def test_neighbouring_sentence_prediction(store, index):
    task = make_builder(store).validation_task("nsp", index)
    for ids, answer in zip(inputs_of(task.support), answers_of(task.support), strict=True):
        first, second = rows_in(ids)
        same = store.document(first) == store.document(second)
        assert {"yes": same and second == first + 1, "maybe": same and abs(second - first) > 1, "no": not same}[answer]
        assert list(ids).count(SENTINEL) == 1


@pytest.mark.parametrize("index", range(6))
def test_neighbouring_sentence_selection(store, index):
    task = make_builder(store).validation_task("nss", index)
    for ids, answer in zip(inputs_of(task.query), answers_of(task.query), strict=True):
        before, anchor, *candidates = rows_in(ids)
        assert anchor == before + 1
        right = LETTERS.index(answer)
        assert candidates[right] == anchor + 1
        assert anchor + 1 not in candidates[:right] + candidates[right + 1 :]
        documents = {store.document(row) == store.document(anchor) for row in candidates}
        assert documents == {True, False}, "distractors come from the same and from other documents"


def test_the_distractor_of_the_same_document_stands_at_any_letter(store):
    builder, places = make_builder(store, mixture={"nss": 1}), set()
    for index in range(12):
        examples = builder.task(index).query
        for ids, answer in zip(inputs_of(examples), answers_of(examples), strict=True):
            _, anchor, *candidates = rows_in(ids)
            del candidates[LETTERS.index(answer)]
            places.add(tuple(store.document(row) == store.document(anchor) for row in candidates))
    assert places == {(True, False, False), (False, True, False), (False, False, True)}


def test_a_foreign_sentence_is_any_of_another_document(store):
    row = next(row for row in range(len(store)) if len(store.document_rows(row)) > 3)
    draw = draw_of(store, "nsp")
    drawn = {draw._foreign(row) for _ in range(20 * len(store))}
    assert drawn == set(range(len(store))) - set(store.document_rows(row))


def test_a_sentence_of_the_same_document_is_any_outside_the_stretch(store):
    row = next(row for row in range(len(store)) if len(own := store.document_rows(row)) > 6 and row == own.start + 3)
    draw = draw_of(store, "nsp")
    drawn = {draw._same_document(row, row - 1, row + 1) for _ in range(200)}
    assert drawn == set(store.document_rows(row)) - {row - 1, row, row + 1}


def domain_of(row):
    return row % DOMAINS


def test_every_domain_is_drawn_for_a_task_and_for_its_partner(store):
    draw = draw_of(store, "scsp")
    own, partner = zip(*([int(domain) for (domain,) in draw.domains()] for _ in range(200)), strict=True)
    assert set(own) == set(partner) == set(range(DOMAINS))
    assert all(one != other for one, other in zip(own, partner, strict=True))


def test_an_item_of_another_domain_is_any_of_them(store):
    draw = draw_of(store, "scss")
    others = draw._others(np.array([4]))
    drawn = {draw._other(others) for _ in range(15_000)}
    assert drawn == {int(row) for domain in range(DOMAINS) if domain != 4 for row in draw.family.rows(domain, "train")}


@pytest.fixture(params=[2, 3, None], ids=["2 items a domain", "3 items a domain", "all items"])
def small_store(request, store, monkeypatch):
    """The store, with so many validation items a domain for single sentences."""
    family = store.family("ss")
    if request.param:
        family = replace(family, train_ends=family.starts[1:] - request.param)
    monkeypatch.setitem(store._families, "ss", family)
    return store


@pytest.mark.parametrize("index", range(6))
def test_same_cluster_sentence_prediction(small_store, index):
    task = make_builder(small_store).validation_task("scsp", index)
    for examples in (task.support, task.query, task.partner):
        anchors = set()
        for ids, answer in zip(inputs_of(examples), answers_of(examples), strict=True):
            marker = list(ids).index(SENTINEL)
            (first,), (second,) = rows_in(ids[:marker]), rows_in(ids[marker:])
            assert first != second, "no sentence is its own partner"
            assert (domain_of(first) == domain_of(second)) == (answer == "yes")
            anchors.add(domain_of(first))
        assert len(anchors) == 1


@pytest.mark.parametrize("index", range(6))
def test_same_cluster_sentence_selection(small_store, index):
    builder = make_builder(small_store, mixture={"scss": 1})
    task = builder.task(index) if index % 2 else builder.validation_task("scss", index)
    for examples in (task.support, task.query, task.partner):
        for ids, answer in zip(inputs_of(examples), answers_of(examples), strict=True):
            anchor, *candidates = rows_in(ids)
            assert anchor not in candidates, "no sentence is its own partner"
            matches = [domain_of(row) == domain_of(anchor) for row in candidates]
            assert matches == [letter == answer for letter in LETTERS]
            assert len(set(candidates)) == len(LETTERS), "no candidate stands twice"


def test_distractors_of_other_domains_are_drawn_one_by_one(store):
    """Three times one of eight domains: 2.6 different ones on average."""
    examples = make_builder(store, mixture={"scss": 1}, query=40).task(0).query
    several = [len({domain_of(row) for row in rows_in(ids)}) - 1 for ids in inputs_of(examples)]
    assert 2.3 < np.mean(several) < 2.9


@pytest.mark.parametrize("index", range(6))
def test_sentence_cluster_classification_inserts_centroids(store, index):
    task = make_builder(store).validation_task("scc", index)
    centroids = store.family("ss").centroids
    for ids, answer in zip(inputs_of(task.support), answers_of(task.support), strict=True):
        (row,) = rows_in(ids)
        assert [int(token) for token in ids if token < 0] == [-1, -2, -3, -4]
        np.testing.assert_array_equal(task.support.vectors[0, LETTERS.index(answer)], centroids[domain_of(row)])
    assert not np.array_equal(task.support.vectors, task.partner.vectors)


@pytest.mark.parametrize("index", range(6))
def test_sentence_cluster_keyword_asks_for_a_word_of_the_domain(store, index):
    task = make_builder(store).validation_task("sck", index)
    seen = {}
    for examples in (task.support, task.query):
        for ids, word in zip(inputs_of(examples), examples.labels[:, 1].tolist(), strict=True):
            (row,) = rows_in(ids)
            assert word in KEYWORDS[domain_of(row)]
            assert seen.setdefault(domain_of(row), word) == word, "a domain keeps its word within a task"
            assert list(ids).count(SENTINEL) == 1 and (50 in ids or 52 in ids)
    assert len(seen) == 4
    assert {bool(50 in ids) for ids in inputs_of(task.support)} != {True, False}, "one pattern a task"


def test_every_pattern_asks_for_keywords(store):
    builder = make_builder(store, mixture={"sck": 1})
    assert {50 in inputs_of(builder.task(index).support)[0] for index in range(12)} == {True, False}


def test_no_two_domains_are_asked_for_one_keyword(store, monkeypatch):
    alike = np.tile(np.array([7, 8, 9, 6], np.int32), (DOMAINS, 1))
    monkeypatch.setitem(store._families, "ss", replace(store.family("ss"), keywords=alike))
    for seed in range(5):
        assert sorted(draw_of(store, "sck", seed)._keywords(np.arange(4))) == [6, 7, 8, 9]


@pytest.mark.parametrize("name", PAPER_TASK_TYPES)
def test_sets_are_balanced_and_of_the_asked_size(store, name):
    task = make_builder(store, support=10, query=14).validation_task(name, 0)
    for examples, size in ((task.support, 10), (task.query, 14), (task.partner, 14)):
        counts = [answers_of(examples).count(answer) for answer in ANSWERS[name]]
        assert sum(counts) == size
        assert max(counts) - min(counts) <= 1


def test_a_task_is_a_function_of_its_index(store):
    def same(one, other):
        for a, b in ((one.support, other.support), (one.query, other.query), (one.partner, other.partner)):
            np.testing.assert_array_equal(a.tokens, b.tokens)
            np.testing.assert_array_equal(a.labels, b.labels)

    first, second = make_builder(store), make_builder(store)
    for index in (7, 3, 7):
        same(first.task(index), second.task(index))
    assert not np.array_equal(first.task(0).support.tokens, make_builder(store, seed=1).task(0).support.tokens)
    one = first.shard(2, 0, 1)
    halves = TaskBatch.concat([first.shard(2, rank, 2) for rank in (0, 1)])
    same(one, halves)
    assert one.names == halves.names and len(set(one.names)) == 1


def test_other_seeds_have_other_types_and_validation_tasks(store):
    mixture = dict.fromkeys(TASK_TYPES, 1.0)
    types = [[task_type_of_step(mixture, seed, step) for step in range(20)] for seed in (0, 1)]
    assert types[0] != types[1]
    tasks = [make_builder(store, seed=seed).validation_task("nsp", index) for seed, index in ((0, 0), (0, 1), (1, 0))]
    for one, other in combinations(tasks, 2):
        assert not np.array_equal(one.support.tokens, other.support.tokens)


@pytest.mark.parametrize("name", ["nsp", "scc"])
def test_a_task_says_how_alike_its_domains_and_its_partners_are(store, monkeypatch, name):
    drawn, domains = [], TaskDraw.domains
    monkeypatch.setattr(TaskDraw, "domains", lambda draw: drawn.append(domains(draw)) or drawn[-1])
    task = make_builder(store).validation_task(name, 0)
    [(own, partner)] = drawn
    centroids = store.family(FAMILY[name]).centroids
    assert task.domain_similarity[0] == pytest.approx(domain_similarity(centroids[own], centroids[partner]))
    assert task.domain_similarity[0] < 0.99


@pytest.mark.parametrize("name", TASK_TYPES)
def test_training_and_validation_tasks_draw_from_their_own_items(store, name):
    """Anchors, and with them all that shares their domain or is taken from another one."""
    family = store.family(FAMILY[name])
    builder = make_builder(store, mixture={name: 1})
    for split, draw in (("train", builder.task), ("validation", lambda index: builder.validation_task(name, index))):
        items = {int(row) for domain in range(DOMAINS) for row in family.rows(domain, split)}
        for task in map(draw, range(4)):
            for examples in (task.support, task.query, task.partner):
                for ids in inputs_of(examples):
                    first, *others = rows_in(ids)
                    # A "maybe" of three sentences moves on to the middle one; what is no neighbour may be any sentence.
                    assert first in items or (name == "nsp" and first - 1 in items)
                    assert FAMILY[name] != "ss" or items.issuperset(others)


def test_a_step_has_the_tasks_of_its_number(store):
    builder = make_builder(store, tasks_per_step=2)
    for step in (0, 3):
        wanted = TaskBatch.concat([builder.task(2 * step), builder.task(2 * step + 1)])
        np.testing.assert_array_equal(builder.shard(step, 0, 1).support.tokens, wanted.support.tokens)


def test_a_choice_keeps_to_the_limits_of_its_parts():
    formats = make_formats(max_length=400, anchor_length=40, candidate_length=12)
    ids = formats.multiple_choice([70] * 60, [[80 + number] * 30 for number in range(4)])
    assert [ids.count(token) for token in (70, 80, 81, 82, 83)] == [40, 12, 12, 12, 12]


def test_the_mixture_decides_how_often_a_type_comes():
    drawn = [task_type_of_step({"nsp": 3, "scc": 1}, 0, step) for step in range(2000)]
    assert set(drawn) == {"nsp", "scc"}
    assert 0.70 < drawn.count("nsp") / 2000 < 0.80


def test_support_and_query_share_no_item_where_a_domain_holds_few(store):
    draw = TaskDraw(store, make_formats(), "nsp", "validation", np.random.default_rng(0))
    rows = {int(row) for row in draw.family.rows(0, "validation")}
    assert 4 <= len(rows) < 32
    support, query = ({next(share) for _ in range(40)} for share in draw._shares(0, (16, 16), 1))
    assert not support & query and support | query == rows
    train = replace(draw, split="train")
    assert len(train.family.rows(0, "train")) >= 8
    one, other = train._shares(0, (4, 4), 1)
    assert one is other, "there are enough: a set goes on where the one before it has ended"
    # Thirteen of four classes ask some class four times, in both sets: eight items.
    seven = SimpleNamespace(rows=lambda domain, split: np.arange(7))
    one, other = replace(train, store=SimpleNamespace(family=lambda name: seven))._shares(0, (13, 13), 4)
    assert one is not other
    two = SimpleNamespace(family=lambda name: SimpleNamespace(rows=lambda domain, split: np.arange(2)))
    one, other = ([next(share) for _ in range(3)] for share in replace(train, store=two)._shares(0, (4, 4), 1))
    assert {*one} | {*other} == {0, 1} and not {*one} & {*other}
    one, other = replace(train, store=two, name="scsp")._shares(0, (4, 4), 1)
    assert one is other, "a question takes two"


def test_too_few_domains_are_refused(store):
    def outline(family=None, **manifest):
        """What a driver sees of the store, perhaps with another family of single sentences."""
        seen = Outline(Place.of(store.path), store.manifest.model_copy(update=manifest))
        if family is not None:
            seen._families["ss"] = family
        return seen

    require_domains(Outline.open(store.path), TASK_TYPES)
    family = Outline.open(store.path).family("ss")
    few = FamilyOutline(family.centroids[:3], family.starts[:4], family.train_ends[:3], family.keywords[:3])
    require_domains(outline(few), ["nsp", "nss", "scsp", "scss"])
    with pytest.raises(UserError, match=rf"'scc' needs 8 domains .* train items, and the store {store.path} has 3"):
        require_domains(outline(few), TASK_TYPES)
    nameless = replace(family, keywords=np.full((DOMAINS, 4), -1, np.int32))
    with pytest.raises(UserError, match=r"'sck' needs 8 domains .* and 4 or more keywords"):
        require_domains(outline(nameless), TASK_TYPES)
    # One document has them all, others may have none.
    require_domains(outline(documents=1), ["scsp", "scss"])
    with pytest.raises(UserError, match="'nsp' takes sentences of other documents"):
        require_domains(outline(documents=1), TASK_TYPES)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=6), st.integers(0, 400))
def test_texts_are_shortened_in_proportion_and_none_is_lost(lengths, room):
    kept, total = shortened(lengths, room), sum(lengths)
    assert sum(kept) == min(room, total)
    for keep, length in zip(kept, lengths, strict=True):
        assert 0 <= keep <= length
        assert abs(keep - length * min(1, room / max(1, total))) < len(lengths)
        assert keep or not length or room < np.count_nonzero(lengths)
    assert shorten([range(length) for length in lengths], room) == [list(range(keep)) for keep in kept]


@given(st.lists(st.lists(st.integers(50, 60), min_size=1, max_size=150), min_size=5, max_size=5), st.integers(32, 120))
def test_no_format_exceeds_its_length_or_loses_its_frame(parts, max_length):
    formats = make_formats(max_length)
    pair = formats.sentence_pair(parts[0], parts[1])
    choice = formats.multiple_choice(parts[0], parts[1:])
    single = formats.single_sentence(parts[0])
    tails = [formats.sentence_tail(parts[0], tail) for tail in range(len(TAILS))]
    for ids in (pair, choice, single, *tails):
        assert len(ids) <= max_length
        assert ids[0] == PREFIX and ids[-1] == SUFFIX and list(ids).count(SENTINEL) == 1
    for ids in (choice, single):
        assert ids[-2 - len(QUESTION) : -2] == list(QUESTION)
        assert [t for t in ids if t in (31, 33, 34, 35)] == [31, 33, 34, 35]


SPELLED = [
    f"it is a text ? {letter}. about it . {letter}. {word} , {word} : topic" for letter in LETTERS for word in WORDS
]


@pytest.mark.parametrize(("make", "space"), [(make_tiny_bart, " "), (make_tiny_t5, "")])
def test_answers_are_the_tokens_of_words_behind_a_space(tmp_path, make, space):
    """A byte-level BPE tells " A" from "A"; what is asked for is the letter that the options show."""
    backbone = load_backbone(str(make(tmp_path, SPELLED * 5)))
    formats = Formats.of(backbone, TasksConfig(max_length=60, anchor_length=20, candidate_length=10))
    assert backbone.word_space == space
    for word, number in formats.words.items():
        assert [number] == backbone.tokenize([space + word])[0]
    for letter, mark in zip(LETTERS, formats.option_marks, strict=True):
        assert formats.words[letter] in mark
    before, after = backbone.tokenize([f"{space}topic :", f"{space}."])
    assert formats.tails[0] == ((), (*before, backbone.sentinel, *after))


def test_a_choice_that_leaves_no_room_for_text_is_refused(tmp_path):
    backbone = load_backbone(str(make_tiny_t5(tmp_path, SPELLED * 5)))
    needed = Formats.of(backbone, TasksConfig()).frame + len(LETTERS) + 1
    enough, short = (TasksConfig().model_copy(update={"max_length": length}) for length in (needed, needed - 1))
    assert len(Formats.of(backbone, enough).multiple_choice([7] * 40, [[8]] * 4)) == needed
    with pytest.raises(UserError, match=rf"^tasks\.max_length is {needed - 1}, and a multiple choice takes {needed} "):
        Formats.of(backbone, short)
    pairs = short.model_copy(update={"mixture": {"nsp": 1.0}})
    assert len(Formats.of(backbone, pairs).sentence_pair([7] * 40, [8] * 40)) == needed - 1


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 40))
def test_balanced(seed, classes, count):
    counts = np.bincount(balanced(np.random.default_rng(seed), classes, count), minlength=classes)
    assert counts.sum() == count and counts.max() - counts.min() <= 1


def test_what_is_left_over_falls_to_any_class_and_the_order_is_random():
    most = [np.bincount(balanced(np.random.default_rng(seed), 3, 4)).argmax() for seed in range(50)]
    assert set(most) == {0, 1, 2}
    firsts = {tuple(balanced(np.random.default_rng(seed), 2, 4)[:2].tolist()) for seed in range(50)}
    assert firsts == {(0, 0), (0, 1), (1, 0), (1, 1)}


lengths_arrays = st.lists(st.integers(1, 400), min_size=1, max_size=60).map(np.array)


@given(lengths_arrays, st.integers(0, 100), st.integers(64, 4096))
def test_micro_batches_hold_everyone_once_within_the_budget(lengths, overhead, budget):
    parts = micro_batches(lengths, overhead, budget)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(lengths)))
    for part in parts:
        assert len(part) == 1 or len(part) * (overhead + lengths[part].max()) <= budget


examples_strategy = st.lists(
    st.tuples(
        st.lists(st.integers(-3, 99), min_size=1, max_size=30), st.lists(st.integers(0, 99), min_size=3, max_size=3)
    ),
    min_size=1,
    max_size=12,
)  # fmt: skip


@settings(deadline=None)
@given(examples_strategy, st.randoms())
def test_collation_pads_and_loses_nothing(pairs, random):
    inputs, labels = zip(*pairs, strict=True)
    examples = Examples.of(inputs, labels, np.ones((3, 4)))
    order = np.array(random.sample(range(len(inputs)), len(inputs)))
    backbone = SimpleNamespace(pad=7, start=9, device=torch.device("cpu"))
    rows = collate(backbone, examples, order)
    assert rows.layout.widths == rows.layout.keys == tuple(len(inputs[number]) for number in order)
    widths = examples.lengths[order] + np.array([random.randint(0, 5) for _ in order])
    wide = collate(backbone, examples, order, widths=widths)
    assert wide.layout.widths == tuple(widths) and wide.layout.keys == rows.layout.keys
    parts = zip(rows.input_ids.split(rows.layout.widths), wide.input_ids.split(wide.layout.widths), strict=True)
    for at, (own, padded) in enumerate(parts):
        number = order[at]
        assert own.tolist() == inputs[number]
        assert padded.tolist() == inputs[number] + [7] * (len(padded) - len(own))
        assert rows.labels[at].tolist() == labels[number]
        assert rows.decoder_input_ids[at].tolist() == [9, *labels[number][:-1]]


def test_a_batch_comes_back_from_arrow(store):
    builder = make_builder(store)
    for name in ("nsp", "scc"):
        batch = TaskBatch.concat([builder.validation_task(name, index) for index in range(3)])
        back = TaskBatch.from_arrow(batch.to_arrow())
        assert back.names == batch.names
        np.testing.assert_array_equal(back.domain_similarity, batch.domain_similarity)
        for role in ("support", "query", "partner"):
            for array, value in vars(getattr(batch, role)).items():
                found = getattr(getattr(back, role), array)
                np.testing.assert_array_equal(found, value)
                assert found.dtype == value.dtype, (role, array)


def test_domain_similarity():
    up, right = np.array([[0.0, 2.0]]), np.array([[3.0, 0.0]])
    assert domain_similarity(up, up) == pytest.approx(1)
    assert domain_similarity(up, -up) == pytest.approx(0)
    assert domain_similarity(up, right) == pytest.approx(0.5)
    assert domain_similarity(np.concatenate([up, 1.5 * up]), up) == pytest.approx(1)
