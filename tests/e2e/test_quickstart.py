"""The README's first command, in small: the same functions, fewer documents, steps and seeds."""

import json

import pytest
import ray

from supmer_ray import quickstart as module
from supmer_ray.meta.state import load_checkpoint
from supmer_ray.model.backbone import load_backbone


@pytest.mark.slow
def test_the_quickstart_leaves_a_checkpoint_and_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "PREPARE", {**module.PREPARE, "domains": 10, "max_documents": 40})
    monkeypatch.setattr(module, "RUN", {**module.RUN, "meta": {**module.RUN["meta"], "steps": 2}})
    monkeypatch.setattr(module, "SEEDS", (0, 1))
    monkeypatch.setattr(module, "ADAPT", module.ADAPT.model_copy(update={"shots": 2, "steps": 1, "max_test": 8}))
    out = tmp_path / "quickstart"
    try:
        outcomes = module.quickstart(out)
    finally:
        ray.shutdown()
    rows = json.loads((out / "results.json").read_text())
    assert len(rows) == len(outcomes) == len(module.TASKS) * len(module.METHODS) * 2
    assert {(row["method"], row["train"]) for row in rows} == {(m, t) for m in module.METHODS for t in module.TASKS}
    assert load_checkpoint(out / "run" / "checkpoint", load_backbone("embedded")).config.meta.steps == 2
    said = capsys.readouterr().out
    assert "subjectivity" in said and f"--checkpoint {out / 'run' / 'checkpoint'}" in said
