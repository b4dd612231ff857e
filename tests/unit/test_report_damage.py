"""What a report refuses: runs and evaluations that are cut short, half copied or mixed up, each in one sentence."""

import json

import pandas as pd
import pytest

from supmer_ray.config import EvaluateConfig, RunConfig
from supmer_ray.errors import UserError
from supmer_ray.report import report

STEP = {"kind": "step", "step": 1, "step_seconds": 1.0, "data_wait_seconds": 0.0, "tokens": 10}
RUN = {"config": RunConfig().model_dump(mode="json"), "store": "/nowhere"}
EVALUATION = {
    "config": EvaluateConfig().model_dump(mode="json"),
    "curve": None,
    "suite": {"name": "tasks"},
    "seeds": 1,
}


def without(values, key):
    return json.dumps({name: value for name, value in values.items() if name != key})


@pytest.mark.parametrize(
    ("changed", "content"),
    [
        ("run.json", json.dumps(RUN)[:40]),
        ("run.json", ""),
        ("run.json", "[1]"),
        ("run.json", without(RUN, "config")),
        ("run.json", without(RUN, "store")),
        ("metrics.jsonl", json.dumps(STEP) + "\n17\n"),
        ("metrics.jsonl", '{"step": 1}\n'),
        ("metrics.jsonl", without(STEP, "step_seconds")),
    ],
)
def test_a_damaged_run_is_one_sentence(tmp_path, changed, content):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps(RUN))
    (run / "metrics.jsonl").write_text(json.dumps(STEP))
    (run / changed).write_text(content)
    with pytest.raises(UserError, match=rf"/run/{changed} is damaged; use another copy of it, or leave its folder out"):
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
        ("results.parquet", b"PAR1"),
        ("results.parquet", b""),
    ],
)
def test_a_damaged_evaluation_is_one_sentence(tmp_path, changed, content):
    made = tmp_path / "made"
    made.mkdir()
    (made / "evaluation.json").write_text(json.dumps(EVALUATION))
    pd.DataFrame({"train": ["a"], "method": ["b"]}).to_parquet(made / "results.parquet")
    (made / changed).write_bytes(content)
    with pytest.raises(UserError, match=rf"/made/{changed} is damaged; use another copy of it"):
        report([made], tmp_path / "out")
    assert not (tmp_path / "out").exists()
