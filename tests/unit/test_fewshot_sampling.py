"""The K-shot draw: K and K of each class, apart, the same again."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supmer_ray.errors import UserError
from supmer_ray.fewshot import sampling
from supmer_ray.fewshot.definition import TaskDefinition
from supmer_ray.fewshot.sampling import draw


def definition(labels: list[str]) -> TaskDefinition:
    return TaskDefinition.model_validate(
        {
            "name": "letters",
            "data": {"catalog": "letters"},
            "fields": ["text"],
            "patterns": ["{text} {mask}"],
            "verbalizers": {label: f"word {label}" for label in labels},
        }
    )


def frames(counts: dict[str, int], test: int = 7) -> dict[str, pd.DataFrame]:
    rows = [(f"{label} {number}", label) for label, count in counts.items() for number in range(count)]
    train = pd.DataFrame(rows, columns=["text", "label"]).sample(frac=1, random_state=0).reset_index(drop=True)
    return {"train": train, "test": pd.DataFrame({"text": [f"test {n}" for n in range(test)], "label": "a"})}


@settings(deadline=None)
@given(
    counts=st.dictionaries(st.sampled_from("abcde"), st.integers(8, 20), min_size=2),
    shots=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_k_of_each_class_apart_and_the_same_again(counts, shots, seed):
    task, rows = definition(sorted(counts)), frames(counts)
    drawn = draw(task, rows, shots, seed)
    for split in (drawn.train, drawn.dev):
        assert split["label"].value_counts().to_dict() == dict.fromkeys(counts, shots)
        assert set(split["text"]) <= set(rows["train"]["text"])
    assert not set(drawn.train["text"]) & set(drawn.dev["text"])
    again = draw(task, rows, shots, seed)
    pd.testing.assert_frame_equal(drawn.train, again.train)
    pd.testing.assert_frame_equal(drawn.dev, again.dev)
    fewer = draw(task, rows, 1, seed)
    assert set(fewer.train["text"]) <= set(drawn.train["text"])
    assert set(fewer.dev["text"]) <= set(drawn.dev["text"])


def test_seeds_draw_differently_but_are_tested_on_the_same_rows():
    task, rows = definition(["a", "b"]), frames({"a": 50, "b": 50}, test=100)
    first, second = (draw(task, rows, 8, seed) for seed in (0, 1))
    assert set(first.train["text"]) != set(second.train["text"])
    tested = sampling.test_rows(rows, 10)
    pd.testing.assert_frame_equal(tested, sampling.test_rows(rows, 10))
    assert len(tested) == 10 and set(tested["text"]) < set(rows["test"]["text"])
    for most in (None, 100, 1000):
        pd.testing.assert_frame_equal(sampling.test_rows(rows, most), rows["test"])


def test_a_draw_is_no_stretch_of_the_file():
    task, rows = definition(["a", "b"]), frames({"a": 50, "b": 50})
    own = rows["train"].query("label == 'a'")["text"].tolist()
    for seed in range(4):
        drawn = draw(task, rows, 8, seed)
        for split in (drawn.train, drawn.dev):
            places = sorted(own.index(text) for text in split.query("label == 'a'")["text"])
            assert (np.diff(places) > 1).sum() > 2


def test_few_test_rows_are_a_sample_in_their_order():
    tested = sampling.test_rows(frames({"a": 4, "b": 4}, test=100), 10)["text"]
    places = [int(text.removeprefix("test ")) for text in tested]
    assert places == sorted(places) and len(set(places)) == 10
    assert places[-1] >= 50, "not the first ones: a file may be sorted by label"


def test_too_few_rows_name_class_count_and_need():
    with pytest.raises(UserError, match=r"Class 'b' of task 'letters' has 5 rows .* needs 6: 3 to train and 3 for"):
        draw(definition(["a", "b"]), frames({"a": 9, "b": 5}), 3, 0)
    with pytest.raises(UserError, match=r"Class 'c' .* has 0 rows"):
        draw(definition(["a", "b", "c"]), frames({"a": 9, "b": 9}), 3, 0)
