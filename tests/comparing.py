"""A small comparison on real headlines, that the tests of evaluating and of reporting share."""

import pytest
import yaml

from supmer_ray.config import EvaluateConfig
from supmer_ray.data.catalog import labelled
from supmer_ray.evaluate import evaluate
from supmer_ray.fewshot.method import load_method
from supmer_ray.fewshot.plan import Plan
from supmer_ray.fewshot.suite import Curve, Suite
from supmer_ray.files import Place
from supmer_ray.reading import build

META = {
    "prompt": {"length": 4},
    "tasks": {"tasks_per_step": 2, "support": 6, "query": 6, "max_length": 120, "mixture": {"scsp": 1}},
    "meta": {"steps": 2, "prompt_rate": 0.3},
    "schedule": {"validate_every": 2, "checkpoint_every": 2, "validation_tasks": 1},
    "workers": {"cpus": 0.5},  # and as much for its builder: two such are on two CPUs
}
ADAPT = {"shots": 4, "steps": 3, "batch": 8, "evaluate_every": 3, "max_length": 60, "max_test": 40}


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    """Two tasks with the same labels on BBC's real headlines: sport or business, and the same for politics or tech."""
    folder = tmp_path_factory.mktemp("tasks")
    frame = labelled("bbc-topic")
    for name, labels in (("games", ["sport", "business"]), ("state", ["politics", "tech"])):
        own = frame[frame["label"].isin(labels)].assign(label=lambda rows, one=labels[0]: rows["label"] == one)
        for split in ("train", "test"):
            own[own["split"] == split].groupby("label").head(30).to_csv(folder / f"{name}-{split}.csv", index=False)
        values = {
            "name": name,
            "data": {"files": {"train": f"{name}-train.csv", "test": f"{name}-test.csv"}},
            "fields": ["headline"],
            "patterns": ["{headline} : {mask} ."],
            "verbalizers": {"True": "yes", "False": "no"},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture(scope="session")
def plan(tasks, tiny_t5, tiny_store):
    def make(methods, store=True, curve=None, checkpoints=None, **changes):
        games, state = str(tasks / "games.yaml"), str(tasks / "state.yaml")
        suite = Suite.model_validate({"name": "pair", "tasks": [{"train": games, "test": [games, state]}, state]})
        values = {"backbone": str(tiny_t5), "adapt": ADAPT, "run": META} | changes
        return Plan(
            suite,
            [load_method(name) for name in methods],
            build(EvaluateConfig, values, "the test"),
            seeds=2,
            curve=curve,
            store=Place.of(tiny_store) if store else None,
            checkpoints=checkpoints,
        )

    return make


METHODS = ["prompt-tuning", "supmer", "ppt", "zero-shot", "linear-probe", "ft"]
"""One of each way to learn, and a second one that is meta-trained."""


@pytest.fixture(scope="session")
def compared(ray_cluster, plan, tmp_path_factory):
    """The folder of a finished evaluation of `METHODS`, its rows, and what it said on the way."""
    out, said = tmp_path_factory.mktemp("compared") / "out", []
    return out, evaluate(plan(METHODS), out, progress=lambda *what, **_: said.append(what)), said


@pytest.fixture(scope="session")
def along_shots(ray_cluster, plan, tmp_path_factory):
    """The folder of a finished evaluation at two values of K, and its rows."""
    out = tmp_path_factory.mktemp("along") / "shots"
    curve = Curve(name="shots", description="By K.", key="adapt.shots", values=(2, 8))
    return out, evaluate(plan(["prompt-tuning", "zero-shot"], store=False, curve=curve), out)
