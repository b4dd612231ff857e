"""The thirteen tasks from files in the layouts in which their benchmarks publish them."""

import json

import pytest

from supmer_ray.errors import UserError
from supmer_ray.fewshot import builtin
from supmer_ray.fewshot.definition import load_definition

QUOTED = 'He said "fine" , twice'

# What each benchmark's file says, and the rows that it means: fields, then the definition's label.
TSV = {
    "sst-2": ("SST-2/{}.tsv", "sentence\tlabel\na gorgeous film\t1\n" + QUOTED + "\t0\n",
              [("a gorgeous film", "positive"), (QUOTED, "negative")]),
    "mrpc": ("MRPC/{}.tsv", "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tHe left .\tHe went .\n"
             "0\t9\t10\t" + QUOTED + "\tNo\n",
             [("He left .", "He went .", "equivalent"), (QUOTED, "No", "not_equivalent")]),
    "qqp": ("QQP/{}.tsv", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tWho?\tWho is it?\t1\n"
            "4\t5\t6\tbroken off\n7\t8\t9\tWhy?\tWhen?\t0\n",
            [("Who?", "Who is it?", "duplicate"), ("Why?", "When?", "not_duplicate")]),
    "qnli": ("QNLI/{}.tsv", "index\tquestion\tsentence\tlabel\n0\tWhen?\tIn 1902.\tentailment\n"
             "1\tWho?\tIn May.\tnot_entailment\n",
             [("In 1902.", "When?", "entailment"), ("In May.", "Who?", "not_entailment")]),
    "rte": ("RTE/{}.tsv", "index\tsentence1\tsentence2\tlabel\n0\tRain fell.\tIt was wet.\tentailment\n"
            "1\tRain fell.\tIt was dry.\tnot_entailment\n",
            [("Rain fell.", "It was wet.", "entailment"), ("Rain fell.", "It was dry.", "not_entailment")]),
}  # fmt: skip

JSONL = {
    "boolq": ("BoolQ/{}.jsonl", [{"question": "is it", "passage": "It is.", "idx": 0, "label": True},
                                 {"question": "was it", "passage": "No.", "idx": 1, "label": False}],
              [("It is.", "is it", "True"), ("No.", "was it", "False")]),
    "cb": ("CB/{}.jsonl", [{"premise": "p", "hypothesis": "h", "label": label, "idx": n}
                           for n, label in enumerate(("entailment", "contradiction", "neutral"))],
           [("p", "h", label) for label in ("entailment", "contradiction", "neutral")]),
    "wic": ("WiC/{}.jsonl", [{"word": "bank", "sentence1": "a", "sentence2": "b", "idx": 0, "label": True, "start1": 0,
                              "start2": 1, "end1": 3, "end2": 4, "version": 1.1}],
            [("a", "b", "bank", "True")]),
}  # fmt: skip

CSV = {
    "mr": ("mr/{}.csv", '0,"dull, long"\n1,bright\n', [("dull, long", "neg"), ("bright", "pos")]),
    "cr": ("cr/{}.csv", "0,broke\n1,works\n", [("broke", "negative"), ("works", "positive")]),
    "sst-5": ("sst-5/{}.csv", "0,a\n2,b\n4,c\n", [("a", "very negative"), ("b", "neutral"), ("c", "very positive")]),
    "subj": ("subj/{}.csv", "0,I loved it\n1,He dies\n", [("I loved it", "subjective"), ("He dies", "objective")]),
    "trec": ("trec/{}.csv", "0,What is it ?\n5,How many ?\n", [("What is it ?", "DESC"), ("How many ?", "NUM")]),
}

TEST_SPLIT = {"BoolQ": "val", "CB": "val", "WiC": "val", "mr": "test", "cr": "test", "sst-5": "test", "subj": "test"}
TEST_SPLIT["trec"] = "test"


@pytest.mark.parametrize("name", [*TSV, *JSONL, *CSV])
def test_reads_the_published_layout(name, tmp_path):
    place, content, expected = (TSV | JSONL | CSV)[name]
    text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
    folder = place.split("/")[0]
    (tmp_path / folder).mkdir()
    for split in ("train", TEST_SPLIT.get(folder, "dev")):
        (tmp_path / place.format(split)).write_text(text, encoding="utf-8")
    definition = load_definition(name).from_folder(tmp_path)
    frames = definition.read()
    assert [tuple(row) for row in frames["test"].itertuples(index=False)] == expected
    assert frames["train"].empty, "the same rows, and what is tested is not drawn from"
    assert definition.patterns == load_definition(name).patterns


def test_all_thirteen_have_a_published_layout_and_the_catalog_has_none():
    with_layout = {name for name in builtin.names("definitions") if load_definition(name).published}
    assert with_layout == {*TSV, *JSONL, *CSV} and len(with_layout) == 13
    own = load_definition("bbc-topic")
    assert own.from_folder("/nowhere") is own


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("sst-2", "sentence\ttarget\na\t1\n", r"train.tsv has no column 'label'; its columns are: sentence, target"),
        ("sst-2", "sentence\tlabel\n", r"train.tsv holds no rows"),
        ("sst-2", "sentence\tlabel\na\t7\n", r"Row 1 of .*train.tsv has the label '7', which has no verbalizer"),
        ("mr", "0,a,b\n", r"train.csv has 3 columns instead of 2 \(label, text\)"),
        ("boolq", '{"passage": "a"\n', r"Line 1 of .*train.jsonl is not JSON"),
        ("rte", None, r"There is no file .*RTE/train.tsv; check the folder of the published files"),
    ],
)
def test_refuses_what_is_not_that_layout(name, text, message, tmp_path):
    definition = load_definition(name).from_folder(tmp_path)
    own = definition.data.published
    if text is not None:
        own.train.parent.mkdir()
        own.train.write_text(text)
        own.test.write_text(text)
    with pytest.raises(UserError, match=message):
        definition.read()


def test_where_keeps_the_rows_with_these_values(tmp_path):
    (tmp_path / "rows.csv").write_text("text,topic,label\na,x,0\nb,y,1\nc,x,1\nd,z,0\n")
    (tmp_path / "test.csv").write_text("text,topic,label\ne,x,0\nf,z,1\n")
    source = (
        "name: t\ndata: {files: {train: rows.csv, test: test.csv}}\nwhere: {topic: [%s]}\nfields: [text]\n"
        "patterns: ['{text} {mask}']\nverbalizers: {0: bad, 1: good}\n"
    )
    (tmp_path / "t.yaml").write_text(source % "x, z")
    assert load_definition(tmp_path / "t.yaml").read()["train"]["text"].tolist() == ["a", "c", "d"]
    (tmp_path / "t.yaml").write_text(source % "w")
    with pytest.raises(UserError, match=r"No row of .*rows.csv passes the 'where' of task 't'"):
        load_definition(tmp_path / "t.yaml").read()


@pytest.mark.parametrize("name", TSV)
def test_the_hub_and_the_files_give_the_same_split(name):
    definition = load_definition(name)
    assert definition.published.test.stem == "dev" and definition.data.dataset.splits.test == "validation"
