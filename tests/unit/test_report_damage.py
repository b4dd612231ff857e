"""What a report refuses: runs and evaluations that are cut short, half copied or mixed up, each in one sentence."""

import json

import pandas as pd
import pytest

from supmer_ray.config import EvaluateConfig, RunConfig
from supmer_ray.errors import UserError
from supmer_ray.report import report

STEP = {
    "kind": "step", "step": 1, "task_type": "nsp", "step_seconds": 1.0, "data_wait_seconds": 0.0, "tokens": 10,
    "query_loss": 2.0, "similarity": 0.5, "running_similarity": None, "mixing": 1.0, "gate": 0.5, "update_cosine": 0.9,
}  # fmt: skip
VALIDATION = {"kind": "validation", "step": 1, "validation": {"nsp": {"loss": 2.0, "accuracy": 0.5}}}
RUN = {"config": RunConfig().model_dump(mode="json"), "store": "/nowhere"}
EVALUATION = {
    "config": EvaluateConfig().model_dump(mode="json"),
    "curve": None,
    "suite": {"name": "tasks"},
    "seeds": 1,
}
CURVE = {"name": "shots", "description": "", "key": "adapt.shots", "values": [4, 8]}
RESULT = {
    "point": "", "method": "supmer", "train": "a", "test": "a", "seed": 0, "shots": 16, "test_accuracy": 0.5,
    "seconds": 1.0, "trained_parameters": 640,
}  # fmt: skip
LIKE = "was written by another version, or is damaged; leave its folder out"


def without(values, key):
    return json.dumps({name: value for name, value in values.items() if name != key})


def lines(*rows):
    return "\n".join(map(json.dumps, rows))


@pytest.fixture
def run(tmp_path):
    """A run of one step, whose store is gone."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps(RUN))
    (run / "metrics.jsonl").write_text(lines(STEP, VALIDATION))
    return run


@pytest.fixture
def made(tmp_path):
    """An evaluation of one row."""
    made = tmp_path / "made"
    made.mkdir()
    (made / "evaluation.json").write_text(json.dumps(EVALUATION))
    pd.DataFrame([RESULT]).to_parquet(made / "results.parquet")
    return made


def test_what_is_whole_is_drawn(run, made, tmp_path):
    page = report([run, made], tmp_path / "out").read_text()
    assert "1-signals" in page and "2-accuracies" in page and "There is no store at /nowhere" in page


@pytest.mark.parametrize(
    ("changed", "content"),
    [
        ("run.json", json.dumps(RUN)[:40]),
        ("run.json", ""),
        ("run.json", "[1]"),
        ("run.json", without(RUN, "config")),
        ("run.json", without(RUN, "store")),
        ("run.json", json.dumps({**RUN, "store": 5})),
        ("run.json", json.dumps({**RUN, "config": 5})),
        ("metrics.jsonl", json.dumps(STEP) + "\n17\n"),
        ("metrics.jsonl", '{"step": 1}\n'),
        ("metrics.jsonl", without(STEP, "step_seconds")),
        ("metrics.jsonl", without(STEP, "gate")),
        ("metrics.jsonl", lines({**STEP, "query_loss": "low"})),
        ("metrics.jsonl", lines(STEP, {**VALIDATION, "validation": {"nsp": {"loss": 1.0}}})),
        ("metrics.jsonl", lines(STEP, VALIDATION, {**VALIDATION, "step": 2, "validation": {}})),
    ],
)
def test_a_damaged_run_is_one_sentence(run, tmp_path, changed, content):
    (run / changed).write_text(content)
    with pytest.raises(UserError, match=rf"/run/{changed} {LIKE}"):
        report([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "content"),
    [
        ("evaluation.json", json.dumps(EVALUATION)[:40].encode()),
        ("evaluation.json", b"[1]"),
        ("evaluation.json", b"\xff\xfe"),
        ("evaluation.json", without(EVALUATION, "curve").encode()),
        ("evaluation.json", without(EVALUATION, "suite").encode()),
        ("evaluation.json", json.dumps({**EVALUATION, "curve": 5}).encode()),
        ("results.parquet", b"PAR1"),
        ("results.parquet", b""),
    ],
)
def test_a_damaged_evaluation_is_one_sentence(made, tmp_path, changed, content):
    (made / changed).write_bytes(content)
    with pytest.raises(UserError, match=rf"/made/{changed} {LIKE}"):
        report([made], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{name: value for name, value in RESULT.items() if name != "seconds"}],
        [{**RESULT, "test_accuracy": "good"}],
        [RESULT, RESULT],
        [{**RESULT, "point": "shots = 4"}],
    ],
    ids=["none", "a column less", "a text for a number", "one twice", "a point less"],
)
def test_results_of_another_shape_are_one_sentence(made, tmp_path, rows):
    (made / "evaluation.json").write_text(json.dumps({**EVALUATION, "curve": CURVE}))
    pd.DataFrame(rows, columns=None if rows else list(RESULT)).to_parquet(made / "results.parquet")
    with pytest.raises(UserError, match=rf"/made/results\.parquet {LIKE}"):
        report([made], tmp_path / "out")
    assert not (tmp_path / "out").exists()
