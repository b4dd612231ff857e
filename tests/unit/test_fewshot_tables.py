"""Tables in and out: cells stay what the file says, and what cannot be read is one sentence."""

import json

import pandas as pd
import pytest

from supmer_ray.errors import UserError
from supmer_ray.fewshot.tables import read_table, read_tsv, write_table


@pytest.mark.parametrize("text", ["a\rb", "a\nb", 'a "b", c', "007", "NA", ""])
@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_texts_come_back_as_they_were(tmp_path, text, ending):
    frame = pd.DataFrame({"text": [text, "c"], "n": ["1", "2"]})
    write_table(frame, tmp_path / f"rows{ending}")
    found = read_table(tmp_path / f"rows{ending}")
    assert found.astype(str).to_numpy().tolist() == [[text, "1"], ["c", "2"]]


def test_a_lone_carriage_return_is_text_of_a_glue_table(tmp_path):
    (tmp_path / "train.tsv").write_bytes(b"\xef\xbb\xbfid\ttext\tlabel\r\n0\ta\rb\t1\r\n1\tbroken\r\n")
    assert read_tsv(tmp_path / "train.tsv").to_dict("records") == [{"id": "0", "text": "a\rb", "label": "1"}]


def test_an_empty_line_of_one_column_is_an_empty_text(tmp_path):
    (tmp_path / "one.csv").write_text("text\na\n\nb\n")
    assert read_table(tmp_path / "one.csv")["text"].tolist() == ["a", "", "b"]
    (tmp_path / "two.csv").write_text("text,n\na,1\n\nb,2\n")
    assert read_table(tmp_path / "two.csv")["text"].tolist() == ["a", "b"]


def test_a_stored_index_is_a_column(tmp_path):
    pd.DataFrame({"id": [7, 9], "text": ["a", "b"]}).set_index("id").to_parquet(tmp_path / "rows.parquet")
    assert read_table(tmp_path / "rows.parquet").to_numpy().tolist() == [[7, "a"], [9, "b"]]


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path, ending):
    text = "text,n\na,1\n" if ending == ".csv" else json.dumps({"text": "a", "n": 1})
    (tmp_path / f"rows{ending}").write_text(text, encoding="utf-8-sig")
    assert list(read_table(tmp_path / f"rows{ending}").columns) == ["text", "n"]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.csv", "text,label,text\na,1,b\n", r"two columns named 'text'; rename one"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b \\ud83d"}\n', r"^Line 2 of .* holds half of a character"),
        ("a.csv", "", r"Cannot read"),
        ("a.jsonl", '{"text": ' + "[" * 100_000, r"^Line 1 of .* is not JSON; write one JSON object a line"),
        ("a.csv", "\ntext\na\nb\n", r"^The first line of .*a\.csv, which should name its column, is blank"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=sentence) as refused:
        read_table(tmp_path / name)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "cell", "instead"),
    [("a.parquet", 2**100, r"\.csv or \.jsonl instead"), ("a.jsonl", b"\xff", r"\.csv or \.parquet instead")],
)
def test_what_a_format_cannot_hold_is_one_sentence_and_no_file(tmp_path, name, cell, instead):
    with pytest.raises(UserError, match=rf"^Cannot write .*{name} \(.*\); write a file that ends in {instead}\.$"):
        write_table(pd.DataFrame({"id": pd.Series([cell], dtype=object)}), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_no_table(tmp_path):
    with pytest.raises(UserError, match=r"^Cannot read .* as a table with tabs \(.*\); use another copy"):
        read_tsv(tmp_path)


def test_a_column_without_a_name_keeps_none(tmp_path):
    (tmp_path / "rows.csv").write_text("headline,,n\na,b,1\n")
    frame = read_table(tmp_path / "rows.csv")
    assert list(frame.columns) == ["headline", "", "n"]
    write_table(frame, tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_text() == "headline,,n\na,b,1\n"
