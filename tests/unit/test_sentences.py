"""Documents are cut where a reader would cut them, and ids stay with their sentences."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st
from tiny import make_tiny_t5

from supmer_ray.data.sentences import cut, split, tokenizer_of


def letters(texts):
    return [[ord(letter) for letter in text] for text in texts]


def test_sentences_within_paragraphs():
    text = (
        "Ink helps drive democracy in Asia\r\n\r\nDr. Smith came to\nthe village at 5 p.m. on Monday. He left soon "
        "afterwards.\n \nThe ink cost $3.50 in all."
    )
    assert split(text) == [
        "Ink helps drive democracy in Asia",
        "Dr. Smith came to the village at 5 p.m. on Monday.",
        "He left soon afterwards.",
        "The ink cost $3.50 in all.",
    ]


def test_short_and_wordless_pieces_are_left_out():
    assert split("Yes.\n\n- 12 -\n\n1 2 3 4 5\n\nBut this one stays.\n\nBy Reuters") == ["But this one stays."]
    assert split("  \n\n ") == []


def test_ids_are_shortened_but_text_is_not():
    table = cut(["First of the two. Second of the two.", "", "A third one here."], letters, 9)
    assert table["sentences"].to_pylist() == [
        ["First of the two.", "Second of the two."],
        [],
        ["A third one here."],
    ]
    assert table["tokens"].to_pylist() == [letters(["First of ", "Second of"]), [], letters(["A third o"])]
    assert table["digest"].to_pylist()[1] == hashlib.sha256(b"").digest()


@given(st.lists(st.text(alphabet=st.sampled_from("ab. \n!"), max_size=60), max_size=5))
def test_every_sentence_keeps_its_own_ids(documents):
    table = cut(documents, letters, 1000)
    assert len(table) == len(documents)
    for sentences, ids in zip(table["sentences"].to_pylist(), table["tokens"].to_pylist(), strict=True):
        assert ids == letters(sentences)
        assert all(len(sentence.split()) >= 3 for sentence in sentences)


def test_a_text_that_spells_out_a_special_token_does_not_ask_for_an_answer(tmp_path):
    tokenize = tokenizer_of(str(make_tiny_t5(tmp_path, ["rain fell all day"] * 9)))
    plain, spelled = tokenize(["rain fell all day", "rain <extra_id_0> fell </s> all <pad> day"])
    assert spelled == plain
    assert len(tokenize(["rain snow"])[0]) == 2, "an unknown word stays"
