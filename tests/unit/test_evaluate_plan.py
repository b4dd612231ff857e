"""What a comparison is called on disk, what it was made of, and what it must not delete: all without Ray."""

import pytest

from supmer_ray.config import EvaluateConfig, build
from supmer_ray.errors import UserError
from supmer_ray.evaluate import Plan
from supmer_ray.fewshot.method import load_method
from supmer_ray.fewshot.suite import Curve, Suite


def make_plan(*tasks, methods=("zero-shot",), curve=None, **changes):
    suite = Suite.model_validate({"name": "s", "tasks": list(tasks) or ["bbc-topic"]})
    config = build(EvaluateConfig, changes, "the test")
    return Plan(suite, [load_method(name) for name in methods], config, curve=curve)


def sources(*values):
    curve = Curve(name="corpora", key="prepare.sources", values=values)
    return make_plan("bbc-topic", "/tasks/a.yaml", curve=curve, prepare={"sources": ["bbc"]})


def test_points_with_paths_have_files_of_their_own():
    plan = sources(["/data/a/train.jsonl"], ["/data/b/train.jsonl"])
    names = [cell.name for cell in plan.cells()]
    assert names == [
        f"sources-data-{letter}-train.jsonl---{task}--zero-shot" for letter in "ab" for task in ("bbc-topic", "a")
    ]
    many = [[f"/a/long/folder/{number}.jsonl" for number in range(20)] for _ in range(2)]
    many[1][-1] = "/another.jsonl"
    first, second = (cell.name for cell in sources(*many).cells()[::2])
    assert first != second and len(first) < 100


def test_points_that_would_share_a_file_are_refused():
    with pytest.raises(UserError, match=r"Two values of the curve 'corpora' have the name 'sources-data-a-b-'; write"):
        sources(["/data/a/b"], ["/data/a-b"]).points()
