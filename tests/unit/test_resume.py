"""What was begun by an earlier version, whose configuration had fewer keys, goes on."""

import json

import pytest

from supmer_ray.config import EvaluateConfig, RunConfig, SweepConfig
from supmer_ray.errors import UserError
from supmer_ray.evaluate import _settled_precision
from supmer_ray.fewshot.plan import DESCRIPTION, require_same
from supmer_ray.files import Place
from supmer_ray.meta.run import CONFIG_FILE
from supmer_ray.reading import build
from supmer_ray.train import _require_same_run
from supmer_ray.tune import SWEEP_FILE, _require_same_sweep


def _of_an_earlier_version(values):
    """Without what has come since."""
    if isinstance(values, dict):
        return {
            key: _of_an_earlier_version(own) for key, own in values.items() if key not in ("two_sided", "gpu_share")
        }
    return values


def test_a_run(tmp_path):
    config = RunConfig()
    settings = {"store": "/store", "config": _of_an_earlier_version(config.model_dump(mode="json"))}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(settings))
    _require_same_run(Place(str(tmp_path)), config, Place("/store"), "digest")
    other = RunConfig.model_validate({"regularizer": {"two_sided": True}})
    with pytest.raises(UserError, match="was started with other values under 'regularizer'"):
        _require_same_run(Place(str(tmp_path)), other, Place("/store"), "digest")
    with pytest.raises(UserError, match=r"was started on the store /store; resume with that one"):
        _require_same_run(Place(str(tmp_path)), config, Place("/other"), "digest")
    laid_out = RunConfig.model_validate({"workers": {"count": 2}, "schedule": {"validate_every": 7}})
    _require_same_run(Place(str(tmp_path)), laid_out, Place("/store"), "digest")
    judged = RunConfig.model_validate({"schedule": {"validation_tasks": 1}})
    with pytest.raises(UserError, match=r"was started with schedule\.validation_tasks: \d+, .* resume with as many"):
        _require_same_run(Place(str(tmp_path)), judged, Place("/store"), "digest")


def test_a_run_of_a_later_version_is_refused(tmp_path):
    config = RunConfig().model_dump(mode="json")
    config["regularizer"]["sides"] = 3
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"store": "/store", "config": config}))
    with pytest.raises(UserError, match=r"^Unknown key 'regularizer\.sides' in .*run\.json"):
        _require_same_run(Place(str(tmp_path)), RunConfig(), Place("/store"), "digest")


def test_an_evaluation(tmp_path):
    config = EvaluateConfig().model_dump(mode="json")
    (tmp_path / DESCRIPTION).write_text(json.dumps({"config": _of_an_earlier_version(config), "seeds": 5}))
    assert require_same(tmp_path, {"config": {**config, "baseline": "supmer"}, "seeds": 5})["seeds"] == 5
    with pytest.raises(UserError, match="was started with another 'config'"):
        require_same(tmp_path, {"config": {**config, "pattern": 1}, "seeds": 5})


def test_an_evaluation_goes_on_on_another_cluster_and_computes_the_same(tmp_path):
    def description(**changes):
        config = build(EvaluateConfig, {"prepare": {"sources": ["bbc"]}, **changes}, "the test")
        return {"config": config.model_dump(mode="json")}

    (tmp_path / DESCRIPTION).write_text(json.dumps(description()))
    for key, value in {
        "gpu_share": 0.5,
        "tokens_per_micro_batch": 512,
        "run": {"workers": {"cpus": 3, "count": 2, "builders": 2}, "monitoring": {"loggers": ["tensorboard"]}},
        "prepare": {"sources": ["bbc"], "embedders": 2},
    }.items():
        require_same(tmp_path, description(**{key: value}))
    for key, value in {
        "run": {"workers": {"precision": "bfloat16"}},
        "prepare": {"sources": ["bbc"], "domains": 7},
        "precision": "float32",
    }.items():
        with pytest.raises(UserError, match="was started with another 'config'"):
            require_same(tmp_path, description(**{key: value}))


def test_an_evaluation_stays_in_the_precision_of_its_first_cells(tmp_path):
    (tmp_path / DESCRIPTION).write_text(json.dumps({"seeds": 5}))
    assert _settled_precision(tmp_path, "bfloat16") == "bfloat16"
    assert _settled_precision(tmp_path, "float32") == "bfloat16"
    assert require_same(tmp_path, {"seeds": 5}) == {"seeds": 5, "precision": "bfloat16"}


def test_a_sweep(tmp_path):
    sweep = SweepConfig.model_validate({"samples": 2, "space": {"prompt.length": {"int": (2, 4)}}})
    settings = {"store": "/store", "task": None, "sweep": sweep.model_dump(mode="json", by_alias=True)}
    (tmp_path / SWEEP_FILE).write_text(json.dumps({**_of_an_earlier_version(settings), "at_a_time": 1}))
    assert _require_same_sweep(tmp_path, settings)["at_a_time"] == 1
    with pytest.raises(UserError, match="was started with another configuration"):
        _require_same_sweep(tmp_path, {**settings, "sweep": {**settings["sweep"], "samples": 3}})
    (tmp_path / SWEEP_FILE).write_text("{")
    with pytest.raises(UserError, match=rf"{SWEEP_FILE} is damaged; start the sweep anew with --overwrite"):
        _require_same_sweep(tmp_path, settings)


@pytest.mark.parametrize("text", ["{", "[]", "5", "{}"])
def test_a_damaged_run(tmp_path, text):
    (tmp_path / CONFIG_FILE).write_text(text)
    with pytest.raises(UserError, match=rf"{CONFIG_FILE} is damaged; start the run anew with --overwrite"):
        _require_same_run(Place(str(tmp_path)), RunConfig(), Place("/store"), "digest")


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        json.dumps({"seeds": 5}).encode("utf-16"),
        json.dumps({"tasks": {"t": 5}}).encode(),
        json.dumps({"tasks": {"t": {"definition": {"patterns": []}}}}).encode(),
        b"[" * 100_000,
    ],
    ids=["cut short", "a list", "UTF-16", "no task", "no pattern", "deep"],
)
def test_a_damaged_evaluation(tmp_path, content):
    (tmp_path / DESCRIPTION).write_bytes(content)
    description = {"tasks": {"t": {"definition": {"patterns": ["{text} {mask}"]}}}, "config": {"pattern": 0}}
    with pytest.raises(UserError, match=rf"{DESCRIPTION} is damaged; start the evaluation anew with --overwrite"):
        require_same(tmp_path, description)


@pytest.mark.parametrize("text", ["[]", "5", "[" * 100_000])
def test_a_damaged_sweep(tmp_path, text):
    (tmp_path / SWEEP_FILE).write_text(text)
    with pytest.raises(UserError, match=rf"{SWEEP_FILE} is damaged; start the sweep anew with --overwrite"):
        _require_same_sweep(tmp_path, {"store": "/store", "task": None, "sweep": {}})
