"""Task definitions: what a YAML may say, and what each mistake answers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pandas as pd
import pytest
import yaml
from huggingface_hub.utils import logging

from supmer_ray.errors import UserError
from supmer_ray.fewshot import builtin
from supmer_ray.fewshot.definition import load_definition, pattern_parts

ROWS = [
    {"title": "a fine day", "body": "sun and wind", "kind": "good"},
    {"title": "rain again", "body": "NA", "kind": "bad"},
]
TESTED = [{**row, "title": f"{row['title']} indeed"} for row in ROWS]


def task(folder: Path, **changes) -> Path:
    values = {
        "name": "weather",
        "data": {"files": {"train": "train.csv", "test": "test.csv"}},
        "fields": ["title", "body"],
        "label": "kind",
        "patterns": ["{title} : {body} It is {mask} ."],
        "verbalizers": {"good": "great", "bad": "terrible"},
    } | changes
    for split, rows in (("train", ROWS), ("test", TESTED)):
        pd.DataFrame(rows).to_csv(folder / f"{split}.csv", index=False)
    file = folder / "weather.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return file


def test_reads_files_beside_the_yaml(tmp_path, monkeypatch):
    file = task(tmp_path)
    monkeypatch.chdir("/")
    frames = load_definition(file).read()
    assert frames["train"].to_dict("records") == ROWS  # the cell "NA" stays text
    assert list(frames["test"].columns) == ["title", "body", "kind"]


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_reads_other_formats_with_numbers_for_labels(tmp_path, ending):
    rows = pd.DataFrame({"title": ["a", "b"], "body": ["c", None], "kind": [0, 1]})
    file = tmp_path / f"rows{ending}"
    if ending == ".parquet":
        rows.to_parquet(file)
    else:
        file.write_text("\n".join(map(json.dumps, rows.to_dict("records"))).replace("NaN", "null") + "\n\n")
    source = {"files": {"train": file.name, "test": shutil.copy(file, tmp_path / f"other{ending}").name}}
    definition = load_definition(task(tmp_path, data=source, verbalizers={0: "terrible", 1: "great"}))
    assert definition.labels == ("0", "1")
    assert definition.read()["test"].to_dict("records") == [
        {"title": "a", "body": "c", "kind": "0"},
        {"title": "b", "body": "", "kind": "1"},
    ]


@pytest.mark.parametrize("on_disk", [True, False])
def test_reads_a_datasets_folder_with_class_names(tmp_path, on_disk, monkeypatch):
    folder = tmp_path / "set"
    if on_disk:
        features = datasets.Features(
            title=datasets.Value("string"),
            body=datasets.Value("string"),
            kind=datasets.ClassLabel(names=["bad", "good"]),
        )
        rows = datasets.Dataset.from_list([row | {"kind": int(row["kind"] == "good")} for row in ROWS], features)
        datasets.DatasetDict(train=rows, validation=rows).save_to_disk(folder)
    else:
        folder.mkdir()
        for split in ("train", "validation"):
            pd.DataFrame(ROWS).to_parquet(folder / f"{split}.parquet")
    source = {"dataset": {"name": str(folder), "splits": {"train": "train", "test": "validation"}}}
    frames = load_definition(task(tmp_path, data=source)).read()
    assert frames["test"]["kind"].tolist() == ["good", "bad"]
    monkeypatch.chdir("/")
    source["dataset"]["name"] = "set"  # beside the YAML, not in the working folder
    assert load_definition(task(tmp_path, data=source)).read()["test"].equals(frames["test"])
    source["dataset"]["splits"]["test"] = "validatoin"
    with pytest.raises(UserError, match=r"has no split 'validatoin'; did you mean 'validation'"):
        load_definition(task(tmp_path, data=source)).read()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patterns": ["{titel} It is {mask} ."]}, r"'patterns' in .*weather.yaml.*\{titel\}.*did you mean 'title'"),
        ({"patterns": ["{title} It is good ."]}, r"has 0 times \{mask\}; write it exactly once"),
        ({"patterns": ["{title} {mask} {mask}"]}, r"has 2 times \{mask\}"),
        ({"patterns": ["It is {mask} ."]}, "uses no field"),
        ({"patterns": ["{title is {mask} ."]}, r"the braces of pattern '\{title is \{mask\} .' do not pair up"),
        ({"patterns": ["{title} is} {mask} ."]}, "braces .* do not pair up"),
        ({"patterns": ["{title!r} is {mask} ."]}, "more or less than a name in braces"),
        ({"patterns": [{"text": "{titel} {mask}"}]}, r"names \{titel\}, which is no field; did you mean 'title'"),
        (
            {"patterns": [{"verbalizers": {"good": "true"}}]},
            r"Missing key 'patterns\.0\.text' in .*weather.yaml; write it",
        ),
        (
            {"patterns": [{"text": "{title} {mask}", "words": {}}]},
            r"Unknown key 'patterns\.0\.words' in .*; known are: text, verbalizers",
        ),
        (
            {"patterns": [{"text": "{title} {mask}", "verbalizers": {"good": "true", "well": "false"}}]},
            r"pattern '\{title\} \{mask\}' has words for good, well, but the task's labels are bad, good; give each a",
        ),
        (
            {"patterns": [{"text": "{title} {mask}", "verbalizers": {"good": True, "bad": False}}]},
            r"'patterns\.0\.verbalizers' in .* a word that YAML reads as False; put it in quotes",
        ),
        ({"fields": ["title", "mask"]}, "'mask' stands for"),
        ({"label": "body"}, "label's column 'body' is one of the texts as well"),
        ({"candidates": {"good": "body"}}, "one candidate leaves no choice"),
        ({"candidates": {True: "x", False: "y"}}, "YAML reads as False; put it in quotes"),
        ({"candidates": {1: "x", "1": "y", 2: "z"}}, "written twice, as a number and as a text"),
        ({"fields": ["candidate"], "candidates": {"a": "x", "b": "y"}}, "'candidate' stands for one candidate"),
        ({"candidates": {"good": "body", "bad": "third"}}, "a column is named twice among fields and candidates"),
        ({"fields": ["title"], "candidates": {"good": "x", "bad": "y"}}, r"names \{body\}, which is no field"),
        (
            {"fields": ["title"], "candidates": {"good": "x", "bad": "y"}, "patterns": ["{title} is {mask} ."]},
            r"has 0 times \{candidate\}; write it exactly once",
        ),
        (
            {"fields": ["title"], "candidates": {"good": "x", "bad": "y"}, "patterns": ["{title} {mask} {candidate}"]},
            "with candidates, verbalizers are the words for 'wrong' and 'right', not for bad, good",
        ),
        ({"patterns": ["{title} {mask} {candidate}"]}, r"names \{candidate\}, which is no field"),
        ({"fields": ["title", "title"]}, "listed twice"),
        ({"verbalizers": {"good": True, "bad": False}}, "YAML reads as False; put it in quotes"),
        ({"verbalizers": {"good": "great", "bad": " "}}, "label 'bad' has an empty word"),
        ({"verbalizers": {"good": ["great", "fine"], "bad": "bad"}}, "'good' has several words; give it one"),
        ({"verbalizers": {"good": "great"}}, "'verbalizers' in .*weather.yaml"),
        ({"verbalizer": {"good": "great"}}, "Unknown key 'verbalizer' in .*weather.yaml; did you mean 'verbalizers'"),
        ({"data": {"catalog": "bbc-topic", "files": {"train": "a.csv", "test": "b.csv"}}}, "exactly one of catalog"),
    ],
)
def test_refuses_a_wrong_definition(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_definition(task(tmp_path, **changes))


def test_names_label_row_and_file_of_a_label_without_verbalizer(tmp_path):
    definition = load_definition(task(tmp_path, verbalizers={"good": "great", "poor": "terrible"}))
    with pytest.raises(UserError, match=r"Row 2 of .*train.csv has the label 'bad', .*add a line \"'bad': WORD\""):
        definition.read()


CHOICE = {
    "fields": ["opening"],
    "candidates": {"first": "a", "second": "b"},
    "patterns": ["{opening} ? {mask} , {candidate}"],
    "verbalizers": {"right": "great", "wrong": "terrible"},
}


def test_candidates_are_columns_and_their_labels_the_task_s(tmp_path):
    source = {"files": {"train": "choices.csv", "test": "others.csv"}}
    definition = load_definition(task(tmp_path, data=source, **CHOICE))

    def write(frame):
        for split in source["files"].values():
            frame.to_csv(tmp_path / split, index=False)

    assert definition.labels == ("first", "second")
    row = {"opening": "rain", "a": "sun", "b": "wind", "kind": "second"}
    write(pd.DataFrame([row | {"else": 1}]))
    assert definition.read()["test"].to_dict("records") == [row]
    write(pd.DataFrame([row | {"kind": "third"}]))
    with pytest.raises(UserError, match=r"'third', which has no candidate .* \"'third': COLUMN\" under candidates"):
        definition.read()
    write(pd.DataFrame([row | {"b": " "}]))
    with pytest.raises(
        UserError, match=r"Row 1 of .*choices.csv has the label 'second', but its candidate 'b' is empty"
    ):
        definition.read()
    write(pd.DataFrame([row]).drop(columns="b"))
    with pytest.raises(UserError, match=r"choices.csv has no column 'b'"):
        definition.read()


def test_names_a_missing_label_column_and_file(tmp_path):
    definition = load_definition(task(tmp_path))
    pd.DataFrame(ROWS).drop(columns="kind").to_csv(tmp_path / "test.csv", index=False)
    with pytest.raises(UserError, match=r"test.csv has no column 'kind'; its columns are: title, body"):
        definition.read()
    (tmp_path / "test.csv").write_text("title,body,kind\n")
    with pytest.raises(UserError, match=r"test.csv holds no rows"):
        definition.read()
    (tmp_path / "test.csv").unlink()
    with pytest.raises(UserError, match=r"no file .*test.csv"):
        definition.read()


def test_test_rows_are_others_than_those_to_train_on(tmp_path):
    for given in ("train.csv", "./train.csv", str(tmp_path / "train.csv")):
        with pytest.raises(UserError, match=r"^Train and test rows are both .*train\.csv, so test rows would be"):
            load_definition(task(tmp_path, data={"files": {"train": "train.csv", "test": given}}))
    named = {"dataset": {"name": "sst2", "splits": {"train": "train", "test": "train"}}}
    with pytest.raises(UserError, match=r"both are 'train', so test rows would be trained on; name two"):
        load_definition(task(tmp_path, data=named))


def test_rows_that_are_tested_or_stand_there_twice_are_not_drawn_from(tmp_path):
    file = task(tmp_path)
    pd.DataFrame([ROWS[0], TESTED[1], ROWS[1], ROWS[0]]).to_csv(tmp_path / "train.csv", index=False)
    frames = load_definition(file).read()
    assert frames["train"].to_dict("records") == ROWS
    assert frames["test"].to_dict("records") == TESTED


def test_a_cell_that_holds_bytes_is_refused(tmp_path):
    pd.DataFrame([{**ROWS[0], "body": b"sun"}]).to_parquet(tmp_path / "rows.parquet")
    definition = load_definition(task(tmp_path, data={"files": {"train": "rows.parquet", "test": "test.csv"}}))
    with pytest.raises(UserError, match=r"Row 1 of .*rows.parquet holds bytes as 'body'; store that column as text"):
        definition.read()


def test_a_cell_with_several_texts_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"title": "a", "body": ["b", "c"], "kind": "good"}\n')
    definition = load_definition(task(tmp_path, data={"files": {"train": "rows.jsonl", "test": "test.csv"}}))
    with pytest.raises(UserError, match=r"Row 1 of .*rows.jsonl holds more than one text as 'body'"):
        definition.read()


def test_rows_are_counted_as_the_file_counts_them_whatever_is_left_out(tmp_path):
    left_out = '{"title": "a", "body": "b", "kind": "other"}\n'
    (tmp_path / "rows.jsonl").write_text(left_out * 2 + '{"title": "a", "body": ["b", "c"], "kind": "good"}\n')
    files = {"files": {"train": "rows.jsonl", "test": "test.csv"}}
    with pytest.raises(UserError, match=r"Row 3 of .*rows.jsonl holds more than one text as 'body'"):
        load_definition(task(tmp_path, data=files, where={"kind": ["good"]})).read()
    with pytest.raises(UserError, match=r"No row of .*rows.jsonl passes the 'where' of task"):
        load_definition(task(tmp_path, data=files, where={"kind": ["none"]})).read()


def test_names_the_row_without_a_label(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"title": "a", "body": "b", "kind": "good"}\n{"title": "c", "body": "d"}\n')
    definition = load_definition(task(tmp_path, data={"files": {"train": "rows.jsonl", "test": "test.csv"}}))
    with pytest.raises(UserError, match=r"Row 2 of .*rows.jsonl has no 'kind'"):
        definition.read()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.txt", "a", r"ends in '.txt'; write a file that ends in .csv, .jsonl or .parquet"),
        ("rows.jsonl", '{"a": 1}\n{"a": ', r"Line 2 of .*rows.jsonl is not JSON"),
        ("rows.jsonl", "[1]\n", r"Line 1 of .*rows.jsonl is a JSON list"),
        ("rows.parquet", "title,body\n", r"Cannot read .*rows.parquet as parquet"),
        ("rows.csv", "", r"Cannot read .*rows.csv as csv"),
        ("rows.csv", "title,body\nrain, again,wet\n", r"rows.csv has rows with more cells than its header"),
    ],
)
def test_refuses_a_damaged_file(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    definition = load_definition(task(tmp_path, data={"files": {"train": name, "test": "test.csv"}}))
    with pytest.raises(UserError, match=message):
        definition.read()


def test_builtin_definitions_load_and_an_unknown_name_is_answered():
    names = builtin.names("definitions")
    assert {"bbc-topic", "subjectivity", "film-sentiment", "product-sentiment"} <= set(names)
    for name in names:
        assert load_definition(name).name == name
    with pytest.raises(UserError, match=r"no task 'bbc-topics'; .* did you mean 'bbc-topic'"):
        load_definition("bbc-topics")
    with pytest.raises(UserError, match=r"Cannot read missing.yaml"):
        load_definition("missing.yaml")


def test_the_domains_of_sentiment_differ_in_their_rows_alone():
    film, *others = [load_definition(f"{name}-sentiment") for name in ("film", "product", "news", "tweet")]
    for other in others:
        own = {"name": film.name, "description": film.description, "data": film.data}
        assert other.model_copy(update=own) == film and other.labels == film.labels


def test_missing_dataset_folder_is_one_sentence(tmp_path):
    source = {"dataset": {"name": str(tmp_path / "nothing")}}
    with pytest.raises(UserError, match=r"Cannot read the data set"):
        load_definition(task(tmp_path, data=source)).read()


def test_a_doubled_brace_is_a_brace():
    assert "".join(text for text, _ in pattern_parts("{{{a}}} is {mask}")) == "{} is "


def test_an_unreachable_hub_is_one_sentence(tmp_path):
    """In a process of its own: the hub's client decides at import whether it may connect."""
    code = "from supmer_ray.fewshot.definition import load_definition; load_definition('sst-2').read()"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}  # where nothing was fetched before
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "UserError: Cannot read the data set 'nyu-mll/glue'" in done.stderr.splitlines()[-1]
    assert "give the rows as files" in done.stderr.splitlines()[-1]


def test_the_hub_s_client_is_silent_about_its_retries(monkeypatch):
    before, said = logging.get_verbosity(), []
    logging.set_verbosity_warning()

    def unreachable(*_):
        said.append(logging.get_verbosity())
        raise ConnectionError("no hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    try:
        with pytest.raises(UserError, match=r"Cannot read the data set 'nyu-mll/glue' \(no hub\)"):
            load_definition("sst-2").read()
    finally:
        logging.set_verbosity(before)
    assert said == [logging.ERROR]


def test_a_path_that_leads_nowhere_is_one_sentence(tmp_path):
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    definition = load_definition(task(tmp_path, data={"files": {"train": "loop.csv", "test": "test.csv"}}))
    with pytest.raises(UserError, match=r"^Cannot read .*/loop\.csv as csv \(.*symbolic links"):
        definition.read()
    with pytest.raises(UserError, match=r"^The path .* holds a NUL, which no file's name may; write it without\.$"):
        load_definition(task(tmp_path, data={"files": {"train": "a\0.csv", "test": "test.csv"}}))
