"""Rows to ids: the pattern whole, one sentinel, never too long, words as targets."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_tiny_bart, make_tiny_t5

from supmer_ray.errors import UserError
from supmer_ray.fewshot import builtin
from supmer_ray.fewshot.definition import TaskDefinition, load_definition
from supmer_ray.fewshot.encoding import TaskEncoder, input_limit, label_probabilities, levelled
from supmer_ray.model.backbone import Backbone, load_backbone, outline
from supmer_ray.model.prompted import IGNORED

TEXT = "the film was great terrible and a fine story about rain question answer yes no in sunny places"
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Backbone:
    return load_backbone(str(make_tiny_t5(tmp_path_factory.mktemp("t5"), [TEXT] * 20)))


def definition(pattern: str = "{a} . question {b} ? answer {mask} .", **changes) -> TaskDefinition:
    return TaskDefinition.model_validate(
        {
            "name": "pairs",
            "data": {"catalog": "pairs"},
            "fields": ["a", "b"],
            "patterns": [pattern],
            "verbalizers": {"1": "great", "0": "terrible"},
        }
        | changes
    )


def choice() -> TaskDefinition:
    """Of three candidates, asked one by one."""
    return definition(
        "{a} ? {mask} , {candidate}",
        fields=["a"],
        candidates={"x": "one", "y": "two", "z": "three"},
        verbalizers={"right": "yes", "wrong": "no"},
    )


def ids_of(examples, row: int) -> list[int]:
    return examples.tokens[examples.offsets[row] : examples.offsets[row + 1]].tolist()


texts = st.lists(st.sampled_from([*WORDS, "<extra_id_0>", "</s>", "<pad>", "zebra", "{mask}", " "]), max_size=60).map(
    " ".join
)


@settings(deadline=None)
@given(rows=st.lists(st.tuples(texts, texts), min_size=1, max_size=4), limit=st.integers(12, 80))
def test_pattern_whole_one_sentinel_never_too_long(backbone, rows, limit):
    encoder = TaskEncoder(backbone, definition(), max_length=limit)
    examples = encoder.inputs(pd.DataFrame(rows, columns=["a", "b"]))
    first, second = backbone.tokenize([". question", "? answer"])
    [end] = backbone.tokenize(["."])
    for row in range(len(rows)):
        ids = ids_of(examples, row)
        assert len(ids) <= limit
        assert ids.count(backbone.sentinel) == 1
        assert ids[-3:] == [backbone.sentinel, *end, *backbone.suffix]
        bare = [token for token in ids if token not in (backbone.sentinel, *backbone.suffix)]
        joined = " ".join(map(str, bare))
        assert " ".join(map(str, first)) in joined and " ".join(map(str, second)) in joined
        assert ids.count(backbone.closing) == 0 and ids.count(backbone.pad) == 0


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 500), min_size=1, max_size=5), room=st.integers(0, 500))
def test_the_longest_fields_give_way_first_and_no_more_than_they_must(lengths, room):
    kept = levelled(lengths, room)
    assert sum(kept) == min(room, sum(lengths))
    for keep, length in zip(kept, lengths, strict=True):
        assert keep == length or max(kept) - 1 <= keep < length


def test_reads_as_the_pattern_says(backbone):
    rows = pd.DataFrame({"a": ["the film"], "b": ["fine story"]})
    encoder = TaskEncoder(backbone, definition("{b} : {a}{b} was {mask}"), max_length=50)
    expected = backbone.tokenize(["fine story : the film fine story was"])[0]
    assert ids_of(encoder.inputs(rows), 0) == [*backbone.prefix, *expected, backbone.sentinel, *backbone.suffix]


def test_targets_and_answers(backbone):
    rows = pd.DataFrame({"a": ["the film", "rain"], "b": ["a", "b"], "label": ["0", "1"]})
    encoder = TaskEncoder(backbone, definition(verbalizers={"1": "great", "0": "terrible rain"}), max_length=50)
    split = encoder.split(rows)
    great, terrible, rain = (tokens[0] for tokens in backbone.tokenize(["great", "terrible", "rain"]))
    assert encoder.verbalizer_ids.tolist() == [great, terrible]
    assert split.answers.tolist() == [1, 0]
    assert split.examples.labels.tolist() == [
        [backbone.sentinel, terrible, rain, backbone.closing],
        [backbone.sentinel, great, backbone.closing, IGNORED],
    ]


def test_a_pattern_may_have_words_of_its_own(backbone):
    """Only it asks for them, and what is written of a definition is what was read."""
    first, own = "{a} {mask}", {"text": "{a} question {mask}", "verbalizers": {"0": "no", "1": "yes"}}
    task = definition(patterns=[first, own])
    words = {word: tokens[0] for word, tokens in zip(WORDS, backbone.tokenize(WORDS), strict=True)}
    asked = [TaskEncoder(backbone, task, max_length=50, pattern=number).verbalizer_ids.tolist() for number in (0, 1)]
    assert asked == [[words["great"], words["terrible"]], [words["yes"], words["no"]]]
    written = task.model_dump(mode="json")
    assert written["patterns"] == [first, own] and TaskDefinition.model_validate(written) == task


def test_every_pattern_of_ours_asks_the_embedded_backbone():
    backbone = outline("embedded")
    for name in builtin.names("definitions"):
        task = load_definition(name)
        for number in range(len(task.patterns)):
            encoder = TaskEncoder(backbone, task, max_length=120, pattern=number)
            assert len(encoder.verbalizer_ids) == len(task.verbalizers)


def test_bart_words_keep_their_leading_space(tmp_path):
    """A byte-level BPE tells " great" from "great": inside a text the spaced word is meant."""
    bart = load_backbone(str(make_tiny_bart(tmp_path, [" ".join(WORDS), " ".join(reversed(WORDS))] * 20)))
    encoder = TaskEncoder(bart, definition("{a} was {mask} and {b}"), max_length=50)
    assert encoder.verbalizer_ids.tolist() == [row[0] for row in bart.tokenize([" great", " terrible"])]
    before, after = bart.tokenize(["the film was", " and rain"])
    rows = pd.DataFrame({"a": ["the film <mask>"], "b": [" rain "]})
    ids = ids_of(encoder.inputs(rows), 0)
    expected = [*bart.prefix, *before, bart.sentinel, *after, *bart.suffix]
    spaces = set(bart.tokenize([" "])[0])  # the space before the dropped "<mask>" remains
    assert [token for token in ids if token not in spaces] == expected
    assert input_limit(bart, 10, 412) == 54
    with pytest.raises(UserError, match=r"prompt of 64 rows leaves no room in the 64 positions"):
        input_limit(bart, 64, 412)


def test_refuses_words_that_cannot_be_told_apart_or_are_unknown(backbone):
    with pytest.raises(UserError, match=r"'great' \(label '1'\) and 'great film' \(label '0'\) .* same token"):
        TaskEncoder(backbone, definition(verbalizers={"1": "great", "0": "great film"}), max_length=50)
    with pytest.raises(UserError, match=r"verbalizer '☃' of label '0' .* is no word of the tokenizer"):
        TaskEncoder(backbone, definition(verbalizers={"1": "great", "0": "☃"}), max_length=50)
    with pytest.raises(UserError, match=r"leaves no room for the text in 7 tokens"):
        TaskEncoder(backbone, definition(), max_length=7)


def test_a_choice_asked_candidate_by_candidate_is_one_example_each(backbone):
    encoder = TaskEncoder(backbone, choice(), max_length=50)
    frame = pd.DataFrame(
        [["the film", "rain", "a fine story", "sunny", "y"], ["rain", "places", "great", "film", "x"]],
        columns=["a", "one", "two", "three", "label"],
    )
    split = encoder.split(frame)
    assert (len(split), len(split.examples)) == (2, 6)
    assert split.answers.tolist() == [1, 0]
    no, yes = (tokens[0] for tokens in backbone.tokenize(["no", "yes"]))
    assert encoder.verbalizer_ids.tolist() == [no, yes]  # wrong before right, however the YAML has them
    assert split.examples.labels[:, 1].tolist() == [no, yes, no, yes, no, no]
    asked = [(row.a, text) for row in frame.itertuples() for text in (row.one, row.two, row.three)]
    for number, (first, candidate) in enumerate(asked):
        left, right = backbone.tokenize([f"{first} ?", f", {candidate}"])
        assert ids_of(split.examples, number) == [*backbone.prefix, *left, backbone.sentinel, *right, *backbone.suffix]
    assert split.examples_of(np.array([1, 0])).tolist() == [3, 4, 5, 0, 1, 2]


def test_labels_of_a_choice_share_what_their_candidates_odds_say():
    scores = np.array([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1], [1.0, 0.0]])
    odds = np.array([[1, 3], [1 / 9, 0]])
    np.testing.assert_allclose(
        label_probabilities(scores, np.ones((2, 2), bool)), odds / odds.sum(axis=1, keepdims=True), atol=1e-12
    )
    np.testing.assert_allclose(
        label_probabilities(scores, np.array([[True, False], [True, True]])), [[1, 0], [1, 0]], atol=1e-12
    )
    assert label_probabilities(scores, None) is scores


def test_a_candidate_that_a_row_lacks_is_neither_trained_on_nor_predicted(backbone):
    rows = [["film", "rain", None, "sunny", "z"], ["rain", "places", "great", " ", "x"], ["rain", "", "", None, "x"]]
    frame = pd.DataFrame(rows, columns=["a", "one", "two", "three", "label"])
    encoder = TaskEncoder(backbone, choice(), max_length=50)
    split = encoder.split(frame[:2])
    assert split.offered.tolist() == [[True, False, True], [True, True, False]]
    assert split.examples_of(np.array([1, 0])).tolist() == [3, 4, 0, 2]
    with pytest.raises(UserError, match=r"Row 3 has no candidate \(one, two, three are empty\)"):
        encoder.split(frame)


@pytest.mark.parametrize("make", [make_tiny_t5, make_tiny_bart])
def test_an_outline_encodes_as_the_backbone_does(tmp_path, make):
    folder = str(make(tmp_path, [TEXT] * 20))
    whole, without_weights = load_backbone(folder), outline(folder)
    assert without_weights.device.type == "meta" and without_weights.max_positions == whole.max_positions
    rows = pd.DataFrame([["the film", "was great"]], columns=["a", "b"])
    one, other = (TaskEncoder(backbone, definition(), max_length=40) for backbone in (whole, without_weights))
    assert ids_of(one.inputs(rows), 0) == ids_of(other.inputs(rows), 0)
    assert one.verbalizer_ids.tolist() == other.verbalizer_ids.tolist()
