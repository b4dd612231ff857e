"""Every kind of source gives its documents in order, and a source that cannot be used says why."""

import json

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow.fs import LocalFileSystem

from supmer_ray.config import PrepareConfig
from supmer_ray.data import sources
from supmer_ray.data.prepare import prepare
from supmer_ray.data.sources import JsonLines, open_source, require_disjoint
from supmer_ray.data.store import MANIFEST
from supmer_ray.errors import UserError

TEXTS = ["One line.", 'Two\nlines, and a "quote".', "Drei Wörter hier."]


def texts_of(name):
    return [text for piece in open_source(str(name)).pieces for text in piece.texts()]


@pytest.fixture
def rows():
    return pa.table({"text": TEXTS, "number": [1, 2, 3], "title": ["a", "b", "c"]})


def json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_text_file_is_cut_at_blank_lines(tmp_path):
    file = tmp_path / "news.txt"
    file.write_text("\ufeffA title\nand a line\n\n\nNext one\n   \nLast one", encoding="utf-8")
    assert texts_of(file) == ["A title\nand a line\n", "Next one\n", "Last one"]


def test_folder_of_text_files_one_document_each(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "TEXT_FILES_A_PIECE", 2)
    for name in ("b/2", "a/10", "a/1", "c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.txt").write_text(f"{name}\n\nsecond paragraph")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    assert [text.split("\n")[0] for text in texts_of(tmp_path)] == ["a/1", "a/10", "b/2", "c"]
    assert len(open_source(str(tmp_path)).pieces) == 2
    assert [text.split("\n")[0] for text in texts_of(tmp_path / "a" / "*.txt")] == ["a/1", "a/10"]
    assert [text.split("\n")[0] for text in texts_of(tmp_path / "*" / "1*.txt")] == ["a/1", "a/10"]
    (tmp_path / "a").rename(tmp_path / "[2024]")  # only * stands for something else
    assert [text.split("\n")[0] for text in texts_of(tmp_path / "[2024]" / "*.txt")] == ["a/1", "a/10"]
    assert len(texts_of(f"file://{tmp_path}")) == 4


def test_a_file_that_links_lead_to_is_read_once(tmp_path):
    folder = tmp_path / "news"
    folder.mkdir()
    (folder / "b.txt").write_text("One line.")
    (folder / "a.txt").symlink_to("b.txt")
    (folder / "round").symlink_to(".")
    (folder / "more").symlink_to(tmp_path / "else")
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "c.txt").write_text("Another line.")
    assert texts_of(folder) == ["One line.", "Another line."]
    [[one, other]] = [piece.paths for piece in open_source(str(folder)).pieces]
    assert (one, other) == (str(folder / "b.txt"), str(folder / "more" / "c.txt"))


def test_a_glob_of_all_depths_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("A text.")
    with pytest.raises(UserError, match=r"holds \*\*; name the folder instead"):
        texts_of(tmp_path / "**" / "*.txt")


def test_a_long_document_in_a_csv(tmp_path):
    rows = [["a", "short"]] * 5 + [["b", "word " * 600_000]] + [["c", "short"]]
    pd.DataFrame(rows, columns=["title", "text"]).to_csv(tmp_path / "long.csv", index=False)
    assert [len(text) for text in texts_of(tmp_path / "long.csv")] == [len(row[1]) for row in rows]


def test_parquet_by_row_groups(tmp_path, rows):
    pa.parquet.write_table(rows, tmp_path / "rows.parquet", row_group_size=2)
    assert texts_of(tmp_path / "rows.parquet") == TEXTS
    assert len(open_source(str(tmp_path / "rows.parquet")).pieces) == 2
    assert texts_of(f"{tmp_path / 'rows.parquet'}::title") == ["a", "b", "c"]


def test_csv(tmp_path, rows):
    pa.csv.write_csv(rows, tmp_path / "rows.csv")
    assert texts_of(tmp_path / "rows.csv") == TEXTS
    (tmp_path / "rows.csv").write_text("text\n2023\n17\n")
    assert texts_of(tmp_path / "rows.csv") == ["2023", "17"]
    # What another column holds beyond the first megabyte is none of our business.
    lines = [f"A text of some length,{number}" for number in range(60_000)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,number", *lines, "The last text,none", ""]))
    assert texts_of(tmp_path / "rows.csv")[-1] == "The last text"


def test_json_lines_and_lists(tmp_path, rows):
    file = json_lines(tmp_path / "rows.jsonl", [*rows.to_pylist(), {"text": None}])
    assert texts_of(file) == TEXTS
    file.rename(tmp_path / "rows.json")
    assert texts_of(tmp_path / "rows.json") == TEXTS
    (tmp_path / "rows.json").write_text(json.dumps(rows.to_pylist(), indent=1))
    assert texts_of(tmp_path / "rows.json") == TEXTS


@given(st.lists(st.text(max_size=12), min_size=1, max_size=8), st.integers(1, 40))
def test_pieces_of_json_lines_hold_each_line_once(tmp_path_factory, texts, size):
    file = json_lines(tmp_path_factory.mktemp("lines") / "rows.jsonl", [{"text": text} for text in texts])
    total = file.stat().st_size
    pieces = [
        JsonLines(LocalFileSystem(), str(file), "text", start, min(start + size, total))
        for start in range(0, total, size)
    ]
    assert [text for piece in pieces for text in piece.texts()] == texts


@pytest.mark.parametrize("shards", [1, 2])
def test_saved_data_sets(tmp_path, rows, shards):
    data = datasets.Dataset.from_dict(rows.to_pydict())
    data.save_to_disk(tmp_path / "one", num_shards=shards)
    assert texts_of(tmp_path / "one") == TEXTS
    datasets.DatasetDict({"test": data.select([0]), "train": data}).save_to_disk(tmp_path / "dict")
    assert texts_of(f"{tmp_path / 'dict'}::title") == ["a", "b", "c"]
    datasets.DatasetDict({"dev": data}).save_to_disk(tmp_path / "other")
    with pytest.raises(UserError, match=r"no split 'train'.*dev"):
        open_source(str(tmp_path / "other"))


def test_catalog_source():
    assert len(texts_of("product-reviews")) > 150


def test_bad_bytes_cost_only_themselves(tmp_path):
    (tmp_path / "news.txt").write_bytes("Ein Café am Eck.".encode("latin-1"))
    assert texts_of(tmp_path / "news.txt") == ["Ein Caf\ufffd am Eck."]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "no file, folder or catalog source"),
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\n ", "holds no text"),
        ("wide.txt", "Text in UTF-16.".encode("utf-16"), "not UTF-8"),
        ("empty.jsonl", b"", "holds no text"),
        ("empty.csv", b"", "Cannot read .*empty.csv"),
        ("header.csv", b"text,label\n", "holds no text"),
        ("other.csv", b"body,label\nx,y\n", "no column 'text' .it has body, label.*::COLUMN"),
        ("other.jsonl", b'{"body": "x"}\n', "Line 1 of .*other.jsonl has no column 'text' .it has body"),
        ("list.jsonl", b'["x"]\n', "Line 1 of .*no JSON object"),
        ("number.jsonl", b'{"text": 3}\n', "Line 1 of .*has a int as 'text'"),
        ("broken.jsonl", b"{text}\n", "Line 1 of .*broken.jsonl is not JSON"),
        ("broken.json", b"[1,", "Cannot read .*broken.json"),
        ("broken.parquet", b"PAR1 no", "Cannot read .*broken.parquet"),
        ("folder/broken.parquet", b"PAR1 no", "Cannot read .*broken.parquet"),
        ("folder/state.json", b"{}", "Cannot read .*folder"),
        ("folder/dataset_dict.json", b"[]", "Cannot read .*folder"),
        ("picture.png", b"\x89PNG", "no text format"),
    ],
)
def test_a_source_that_cannot_be_used(tmp_path, name, content, message):
    source = tmp_path / name
    source.parent.mkdir(exist_ok=True)
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_source(str(source if source.parent == tmp_path else source.parent))
    assert "\n" not in str(caught.value)


def test_columns_that_hold_no_text(tmp_path, rows):
    pa.parquet.write_table(rows, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"column 'number' .* holds int64"):
        open_source(f"{tmp_path / 'rows.parquet'}::number")


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "half \\ud83d of it"}\n')
    assert texts_of(tmp_path / "rows.jsonl") == ["half ? of it"]


def test_folders_without_text(tmp_path):
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "kept.txt").write_text("Not for you.")
    with pytest.raises(UserError, match="holds no file in"):
        open_source(str(tmp_path))
    with pytest.raises(UserError, match="holds no file in"):
        open_source(str(tmp_path / "*.txt"))


def test_a_bad_line_is_named_in_any_piece(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "one"}\n{"text": "two"}\noops\n')
    piece = JsonLines(LocalFileSystem(), str(file), "text", 20, file.stat().st_size)
    with pytest.raises(UserError, match="Line 3 of"):
        list(piece.texts())


@pytest.mark.parametrize(
    "spelt", ["{out}", "{out}/kept.jsonl::body", "{out}/*.jsonl", "file://{out}/kept.jsonl::body", "~/out/kept.jsonl"]
)
def test_overwriting_spares_a_source_however_it_is_spelt(tmp_path, monkeypatch, spelt):
    monkeypatch.setenv("HOME", str(tmp_path))
    out = tmp_path / "out"
    out.mkdir()
    kept = json_lines(out / "kept.jsonl", [{"body": "A text."}])
    (out / MANIFEST).write_text("{}")
    config = PrepareConfig(sources=(spelt.format(out=out),))
    with pytest.raises(UserError, match=r"The source .* lies within the output .*out, which --overwrite would delete"):
        prepare(config, out, overwrite=True)
    assert kept.exists()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("{at}/a.txt", "{at}/./a.txt"),
        ("{at}/a.txt", "{at}/*.txt"),
        ("{at}", "{at}/rows.jsonl::text"),
        ("{at}/link.txt", "file://{at}/a.txt::x"),
        ("bbc", "bbc::x"),
    ],
)
def test_two_spellings_of_one_text_are_refused(tmp_path, first, second):
    (tmp_path / "a.txt").write_text("A text.")
    (tmp_path / "link.txt").symlink_to("a.txt")
    json_lines(tmp_path / "rows.jsonl", [{"text": "Another.", "body": "One more."}])
    given = [open_source(name.format(at=tmp_path)) for name in (first, second)]
    with pytest.raises(UserError, match=r"^The sources '.*' and '.*' both hold the text of .*; name it once\.$"):
        require_disjoint(given)
    require_disjoint([given[0], open_source(f"{tmp_path}/rows.jsonl::body")])


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_does_not_lie_among_its_text(tmp_path, overwrite):
    (tmp_path / "a.txt").write_text("A text.")
    with pytest.raises(UserError, match=r"^The output .*/store lies within the source .*, which would be read with it"):
        prepare(PrepareConfig(sources=(str(tmp_path),)), tmp_path / "store", overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_what_is_nested_too_deeply_is_one_sentence(tmp_path, name):
    (tmp_path / name).write_text(("" if name.endswith("n") else '{"text": ') + "[" * 100_000)
    with pytest.raises(UserError, match=r"rows\.json.*(is not JSON; write one|it is nested too deeply)"):
        open_source(str(tmp_path / name))


def test_a_name_that_cannot_be_is_one_sentence():
    with pytest.raises(UserError, match=r"^The source '~nobody-here/x' begins with the home of nobody here; write the"):
        open_source("~nobody-here/x")
    with pytest.raises(UserError, match=r"^The path .*/caf\\udce9 is not UTF-8; give it another name\.$"):
        open_source("caf\udce9")


def test_a_misspelt_catalog_name_and_address():
    with pytest.raises(UserError, match="did you mean 'reuters'"):
        open_source("reuterz")
    with pytest.raises(UserError, match="Cannot reach ftpx://somewhere/x"):
        open_source("ftpx://somewhere/x")


def test_keys_in_an_address_are_never_told():
    with pytest.raises(UserError, match=r"s3://bucket/x") as refused:
        open_source("s3://KEY:SECRET@bucket/x?endpoint_override=localhost:1&scheme=http&region=us-east-1")
    assert "SECRET" not in str(refused.value)


def test_an_unreachable_hub(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"Cannot read 'hub:nobody/nothing'.*hub is reachable"):
        open_source("hub:nobody/nothing")
