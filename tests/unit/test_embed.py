"""The embedding actor: what it writes of a stretch, and what it refuses to write."""

from types import SimpleNamespace

import numpy as np
import pytest

from supmer_ray.data import embed
from supmer_ray.data.embed import Embedder, Stretch, frame
from supmer_ray.errors import UserError
from supmer_ray.files import Place

STRETCH = Stretch(0, np.arange(6, dtype=np.int32), np.array([0, 2, 4, 6]), 2, np.array([0, 1]))


@pytest.fixture
def embedder(tmp_path, monkeypatch):
    """An actor whose model gives the vectors that it is told."""

    def loaded(vectors):
        made = Embedder(Place.of(tmp_path), "tiny", False)
        made.backbone, made.budget = SimpleNamespace(max_positions=None, prefix=[], suffix=[]), 100
        monkeypatch.setattr(embed, "mean_pooled", lambda backbone, inputs, budget: np.array(vectors, np.float32))
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


def test_a_pair_that_is_too_long_for_the_positions_loses_its_end():
    backbone = SimpleNamespace(max_positions=6, prefix=[101], suffix=[102])
    assert frame(backbone, np.array([7, 8]), np.array([9, 10, 11])).tolist() == [101, 7, 8, 9, 10, 102]
    assert frame(backbone, np.array([7])).tolist() == [101, 7, 102]
