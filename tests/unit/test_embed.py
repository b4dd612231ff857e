"""The embedding actor: what it writes of a stretch, and what it refuses to write."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from supmer_ray.data import embed
from supmer_ray.data.embed import Embedder, Stretch, framed
from supmer_ray.errors import UserError
from supmer_ray.files import Place

STRETCH = Stretch(0, np.arange(6, dtype=np.int32), np.array([0, 2, 4, 6]), 2, np.array([0, 1]))


@pytest.fixture
def embedder(tmp_path, monkeypatch):
    """An actor whose model gives the vectors that it is told."""

    def loaded(vectors):
        made = Embedder(Place.of(tmp_path), "tiny", False)
        made.backbone, made.budget = SimpleNamespace(max_positions=None, prefix=[], suffix=[], closing=1), 100
        monkeypatch.setattr(embed, "mean_pooled", lambda backbone, examples, budget: torch.tensor(vectors).float())
        return made

    return loaded


def test_sentences_and_pairs_go_to_a_file_each(embedder):
    made = embedder([[1, 2], [3, 65504], [5, 6], [7, 8]])
    assert made.embed(STRETCH) == 2
    assert made.vectors.sentences(0).tolist() == [[1, 2], [3, 65504]]
    assert made.vectors.pairs(0).tolist() == [[5, 6], [7, 8]] and made.vectors.pairs(0).dtype == np.float16


@pytest.mark.parametrize("value", [70000, -70000, np.inf, np.nan])
def test_what_half_precision_cannot_hold_is_refused(embedder, tmp_path, value):
    with pytest.raises(UserError, match=r"^The backbone 'tiny' turns some sentences into numbers .* beyond 65504, "):
        embedder([[1, 2], [3, value], [5, 6], [7, 8]]).embed(STRETCH)
    assert list(tmp_path.iterdir()) == []


def _texts(examples):
    return [own.tolist() for own in np.split(examples.tokens, examples.offsets[1:-1])]


def test_a_stretch_is_its_sentences_and_its_pairs_of_neighbours_in_the_encoders_frame():
    backbone = SimpleNamespace(max_positions=None, prefix=[101, 103], suffix=[102], closing=1)
    stretch = Stretch(0, np.array([7, 8, 9, 10, 11, 12], np.int32), np.array([0, 2, 3, 6]), 2, np.array([1]))
    sentences, pair = [[101, 103, 7, 8, 102], [101, 103, 9, 102]], [101, 103, 9, 10, 11, 12, 102]
    assert _texts(stretch.framed(backbone)) == [*sentences, pair]


def test_a_pair_that_is_too_long_for_the_positions_loses_its_end():
    backbone = SimpleNamespace(max_positions=6, prefix=[101], suffix=[102], closing=1)
    tokens = np.array([7, 8, 9, 10, 11], np.int32)
    both = framed(backbone, tokens, np.array([0, 0]), np.array([5, 1]))
    assert _texts(both) == [[101, 7, 8, 9, 10, 102], [101, 7, 102]]
    assert _texts(framed(backbone, tokens, np.array([1]), np.array([5]), longest=4)) == [[101, 8, 9, 102]]


def test_a_text_without_tokens_is_its_frame():
    backbone = SimpleNamespace(max_positions=None, prefix=[], suffix=[1], closing=1)
    assert _texts(framed(backbone, np.zeros(0, np.int32), np.array([0, 0]), np.array([0, 0]))) == [[1], [1]]
    assert _texts(framed(backbone, np.array([7], np.int32), np.array([1]), np.array([1]))) == [[1]]
