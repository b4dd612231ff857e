"""Keywords: words that tell a domain from the others, counted on train sentences, whole words only."""

import numpy as np
import pyarrow as pa

from supmer_ray.data.keywords import KEYWORDS, keywords
from supmer_ray.data.store import Family, Sentences, SentenceWriter

THE, BALL, PART, BANK, SECRET, DOT = range(6)
WORDS = np.array([True, True, False, True, True, False])
CONTINUATIONS = np.array([False, False, True, False, False, False])


def test_keywords_are_whole_words_of_the_train_sentences(tmp_path):
    sport, money = [[THE, BALL, DOT]] * 3, [[THE, BANK], [THE, BANK, DOT], [THE, BANK, BALL, PART]]
    hidden = [[SECRET, SECRET], [SECRET]]  # validation items of the first domain
    tokens = [*sport, *money, *hidden]
    with SentenceWriter(tmp_path) as writer:
        texts = pa.array([[str(row) for row in range(len(tokens))]], pa.list_(pa.string()))
        writer.write(texts, pa.array([tokens], pa.list_(pa.list_(pa.int32()))))
    family = Family(
        centroids=np.zeros((2, 3), np.float32),
        items=np.array([0, 1, 2, 6, 7, 3, 4, 5]),
        starts=np.array([0, 5, 8]),
        train_ends=np.array([3, 8]),
        keywords=np.zeros((2, 0), np.int32),
    )
    found = keywords(Sentences(tmp_path), family, WORDS, CONTINUATIONS)
    assert found.shape == (2, min(KEYWORDS, len(WORDS))) and found.dtype == np.int32
    assert found[0].tolist()[:2] == [BALL, THE]
    assert found[1].tolist()[:2] == [BANK, THE], "the ball of 'ballpart' is no word of its own"
    assert SECRET not in found and BALL not in found[1]
    assert (found[:, 2:] == -1).all()
