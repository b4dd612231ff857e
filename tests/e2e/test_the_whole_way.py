"""The README's way through the command line, on real text and the embedded backbone, in small."""

import csv
import json
import subprocess
import sys

import pytest

from supmer_ray.cli import main
from supmer_ray.config import TASK_TYPES
from supmer_ray.data.catalog import labelled
from supmer_ray.embedded.learned import ship
from supmer_ray.errors import UserError

SMALL = [
    "prompt.length=8", "meta.steps=4", "tasks.tasks_per_step=2", "tasks.support=4", "tasks.query=4",
    "tasks.max_length=100", "schedule.validation_tasks=1", "schedule.validate_every=4", "schedule.checkpoint_every=2",
]  # fmt: skip


def supmer(*arguments):
    """Run the command as a user does: a process of its own, with a Ray of its own."""
    code = "from supmer_ray.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("way")


def test_prepare_train_adapt_predict(folder):
    store, run, adapted = folder / "store", folder / "run", folder / "adapted"
    said = supmer("prepare", "--source", "bbc", "--max-documents", 60, "--domains", 12, "--out", store)
    assert "60 documents" in said.stdout
    supmer("train", "--store", store, "--out", run, *(part for pair in SMALL for part in ("--set", pair)))
    assert {path.name for path in (run / "checkpoint").iterdir()} >= {"prompt.safetensors", "regularizer.safetensors"}
    assert not [path for path in run.rglob("*") if path.suffix in (".pkl", ".pt", ".bin")]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "step"] == [1, 2, 3, 4]

    task = folder / "headlines.yaml"
    frame = labelled("bbc-topic").query("label in ['sport', 'business']")
    for split in ("train", "test"):
        frame[frame["split"] == split][["headline", "label"]].head(60).to_csv(folder / f"{split}.csv", index=False)
    train = frame[frame["split"] == "train"].groupby("label").head(40)
    train[["headline", "label"]].to_csv(folder / "train.csv", index=False)
    task.write_text(
        "name: headlines\ndescription: sport or business\n"
        "data:\n  files: {train: train.csv, test: test.csv}\n"
        "fields: [headline]\nlabel: label\n"
        "patterns: ['{headline} topic : {mask} .', {text: 'is it about money ? {mask} . {headline}', "
        "verbalizers: {sport: 'no', business: 'yes'}}]\n"
        "verbalizers: {sport: sport, business: business}\n"
    )
    # As it would ship: without its optimizer, with a card.
    ship(run, store, folder / "learned")
    lesser = json.loads((run / "checkpoint" / "config.json").read_text())
    lesser["run"]["regularizer"]["enabled"] = False
    (folder / "lesser" / "checkpoint").mkdir(parents=True)
    (folder / "lesser" / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    (folder / "lesser" / "checkpoint" / "config.json").write_text(json.dumps({**lesser, "checksums": {}}))
    with pytest.raises(UserError, match="without a regularizer"):
        ship(folder / "lesser", store, folder / "nothing")
    assert not (folder / "nothing").exists()
    card = (folder / "learned" / "CARD.md").read_text()
    assert "4 meta-steps" in card
    # The settings that suit the embedded backbone came without being asked for.
    assert [name for name in TASK_TYPES if f"| {name} |" in card] == ["nsp", "scsp"]
    said = supmer(
        "adapt", "--task", task, "--checkpoint", folder / "learned", "--shots", 8, "--steps", 4, "--pattern", 1,
        "--out", adapted,
    )  # fmt: skip
    record = json.loads((adapted / "adapted.json").read_text())
    assert record["config"]["loss"] == "answers" and record["pattern"] == 1
    assert "test accuracy" in said.stdout

    # Without a checkpoint from the one that ships, with --plain from none.
    for name, options, regularized in (("shipped", (), True), ("plain", ("--plain",), False)):
        # In this process, which has what another would import for seconds.
        with pytest.raises(SystemExit) as ended:
            main([*map(str, ("adapt", "--task", task, "--shots", 4, "--steps", 1, "--out", folder / name)), *options])
        assert ended.value.code == 0
        record = json.loads((folder / name / "adapted.json").read_text())
        assert record["regularized"] == regularized and record["config"]["rate"] == 0.02

    headlines = ["Striker scores twice in cup final", "Bank raises profit forecast", "Coach quits after defeat"]
    with (folder / "rows.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["id", "headline"], *enumerate(headlines)])
    supmer("predict", "--adapted", adapted, "--input", folder / "rows.csv", "--output", folder / "out.csv")
    with (folder / "out.csv").open() as stream:
        labelled_rows = list(csv.DictReader(stream))
    assert [row["headline"] for row in labelled_rows] == headlines
    for row in labelled_rows:
        assert row["predicted_label"] in ("sport", "business") and 0.5 <= float(row["probability"]) <= 1
