"""What a comparison is called on disk, was made of, must not delete, and keeps when a cell fails: without a cluster."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import ray
import yaml
from ray.exceptions import RayTaskError

from supmer_ray import embedded
from supmer_ray.cluster import Resources
from supmer_ray.config import EvaluateConfig
from supmer_ray.errors import UserError
from supmer_ray.evaluate import _note, evaluate
from supmer_ray.fewshot.method import Method, load_method
from supmer_ray.fewshot.plan import DESCRIPTION, Plan, require_same, task_name
from supmer_ray.fewshot.suite import Curve, Suite, load_curve
from supmer_ray.files import Place, require_new_place
from supmer_ray.origins import require_sources
from supmer_ray.reading import build


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


@pytest.fixture
def own_task(tmp_path):
    """A function that writes a task of four rows, with changes, and its path."""

    def write(rows="text,label\na,0\nb,1\nc,0\nd,1\n", **changes):
        header, *lines = rows.splitlines(keepends=True)
        (tmp_path / "train.csv").write_text(rows)
        (tmp_path / "test.csv").write_text(header + "".join(f"tested {line}" for line in lines))
        values = {
            "name": "own",
            "data": {"files": {"train": "train.csv", "test": "test.csv"}},
            "fields": ["text"],
            "patterns": ["{text} {mask}"],
            "verbalizers": {"0": "bad", "1": "good"},
        }
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(values | changes, sort_keys=False))
        return str(tmp_path / "own.yaml")

    return write


@pytest.mark.parametrize(
    "changes",
    [
        {"patterns": ["{text} is {mask}"]},
        {"verbalizers": {"0": "bad", "1": "great"}},
        {"verbalizers": {"1": "good", "0": "bad"}},
        {"rows": "text,label\na,0\nb,1\nc,0\ne,1\n"},
        {"rows": "text,label\nb,1\na,0\nc,0\nd,1\n"},
    ],
    ids=["pattern", "word", "order of labels", "row", "order of rows"],
)
def test_a_task_that_changed_is_not_resumed(own_task, tmp_path, changes):
    plan = make_plan(own_task())
    started = plan.description(plan.read_tasks())
    (tmp_path / DESCRIPTION).write_text(json.dumps(started))
    require_same(tmp_path, plan.description(plan.read_tasks()))
    own_task(**changes)
    with pytest.raises(UserError, match=r"was started with another 'tasks'"):
        evaluate(plan, tmp_path, resume=True)


def test_what_says_nothing_or_contradicts_itself_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no method; name at least one"):
        make_plan(methods=())
    with pytest.raises(ValueError, match="'bbc-topic' is listed twice"):
        make_plan({"train": "bbc-topic", "test": ["bbc-topic", "bbc-topic"]})
    with pytest.raises(UserError, match="--resume goes on with what the output holds and --overwrite deletes it"):
        evaluate(make_plan(), tmp_path, resume=True, overwrite=True)
    with pytest.raises(UserError, match="--resume goes on"):
        require_new_place(Place("s3://bucket/runs/first"), resume=True, overwrite=True)


def test_overwriting_spares_the_inputs(tmp_path):
    out = tmp_path / "out"
    (out / "stores" / "store").mkdir(parents=True)
    (out / DESCRIPTION).write_text("{}")
    (tmp_path / "link").symlink_to(out / "stores")
    inside = {
        "store": {"store": Place.of(tmp_path / "link" / "store")},
        "data folder": {"data": out},
        "checkpoint for 'supmer'": {"checkpoints": {"supmer": out / "runs" / "supmer" / "checkpoint"}},
    }
    for what, given in inside.items():
        plan = replace(make_plan(methods=["supmer"]), **given)
        with pytest.raises(UserError, match=rf"The {what} .* lies within the output .*out, which --overwrite would"):
            evaluate(plan, out, overwrite=True)
    assert (out / "stores" / "store").is_dir()


@pytest.mark.parametrize("spelt", ["{out}/kept.jsonl::body", "{out}/*.jsonl", "file://{out}/kept.jsonl", "~/out"])
def test_overwriting_spares_the_sources(own_task, tmp_path, monkeypatch, spelt):
    monkeypatch.setenv("HOME", str(tmp_path))
    out = tmp_path / "out"
    out.mkdir()
    (out / DESCRIPTION).write_text("{}")
    source = spelt.format(out=out)
    curve = Curve(name="corpora", key="prepare.sources", values=(["bbc"], [source]))
    for plan in (
        make_plan(own_task(), prepare={"sources": ["bbc", source]}),
        make_plan(own_task(), prepare={"sources": ["bbc"]}, curve=curve),
    ):
        with pytest.raises(UserError, match=r"The source .* lies within the output .*out, which --overwrite would"):
            evaluate(plan, out, overwrite=True)
    assert (out / DESCRIPTION).is_file()


def test_overwriting_spares_the_backbone(own_task, tmp_path):
    out = tmp_path / "out"
    (out / "model").mkdir(parents=True)
    (out / DESCRIPTION).write_text("{}")
    with pytest.raises(UserError, match=r"The backbone .*model lies within the output"):
        evaluate(make_plan(own_task(), backbone=str(out / "model")), out, overwrite=True)


def test_the_note_says_the_shots_that_were_used():
    plain = _note(make_plan("bbc-topic", adapt={"shots": 4}), {})
    assert plain.startswith("K = 4 examples a class to train on and as many for the dev split, 200 steps; ")
    curve = Curve(name="shots", key="adapt.shots", values=(2, 8))
    assert "K = 2 or 8 examples" in _note(make_plan("bbc-topic", curve=curve), {})
    few = {"train": "cb", "max_shots": 8}
    lowered = _note(make_plan("rte", few), {})
    assert "K = 8 or 16 examples a class to train on and as many for the dev split (cb: at most 8), " in lowered
    assert "K = 8 examples a class to train on and as many for the dev split, " in _note(make_plan(few), {})


@pytest.mark.parametrize(
    ("methods", "changes", "sentence"),
    [
        (["zero-shot"], {"baseline": "zero-shott"}, r"baseline 'zero-shott' is none of the methods; did you mean"),
        (["zero-shot"], {"prepare": {"sources": ["bbc"], "backbone": "t5-base"}}, r"prepare\.backbone is 't5-base'"),
    ],
)
def test_settings_that_contradict_are_refused(own_task, tmp_path, methods, changes, sentence):
    plan = make_plan(own_task(), methods=methods, adapt={"shots": 1}, **changes)
    with pytest.raises(UserError, match=sentence):
        evaluate(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("task", "changes", "sentence"),
    [
        ({"verbalizers": {"0": "newspaper", "1": "newspaper"}}, {}, r"'newspaper' \(label '1'\) .*same token"),
        ({"patterns": ["{text} {mask}" + " so" * 60]}, {"adapt": {"shots": 1, "max_length": 40}}, "leaves no room"),
        ({}, {"backbone": "{tmp}/empty"}, r"Cannot load the backbone '.*empty'"),
        ({}, {"prepare": {"sources": ["bbcc"]}}, r"catalog source 'bbcc'; did you mean 'bbc'"),
    ],
    ids=["words", "pattern", "backbone", "source"],
)
def test_what_a_cell_or_a_store_would_refuse_is_refused_before_any_work(own_task, tmp_path, task, changes, sentence):
    (tmp_path / "empty").mkdir()
    changes = {"adapt": {"shots": 1}} | changes
    if "backbone" in changes:
        changes["backbone"] = changes["backbone"].format(tmp=tmp_path)
    plan = make_plan(own_task(**task), methods=["supmer", "zero-shot"], **{"prepare": {"sources": ["bbc"]}} | changes)
    with pytest.raises(UserError, match=sentence):
        evaluate(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_would_do_nothing_is_refused(own_task, tmp_path):
    (tmp_path / "data").mkdir()
    plan = make_plan(own_task(), adapt={"shots": 1})
    with pytest.raises(UserError, match=r"^None of the tasks has files in a published layout; leave --data out\.$"):
        evaluate(replace(plan, data=tmp_path / "data"), tmp_path / "out")
    both = replace(make_plan(own_task(), adapt={"shots": 1}, prepare={"sources": ["bbc"]}), store=Place.of(tmp_path))
    with pytest.raises(UserError, match=r"leave --store or prepare\.sources out"):
        both.check(both.read_tasks())
    with pytest.raises(ValueError, match="'max_test' is the same for all methods that are compared"):
        Method(name="own", learns="prompt", adapt={"max_test": 100})


def test_an_output_may_be_a_link(own_task, tmp_path, run_cell_by):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    run_cell_by(outcome)
    plan = make_plan(own_task(), adapt={"shots": 1})
    evaluate(plan, tmp_path / "out")
    evaluate(plan, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "results.parquet").is_file()


def test_an_evaluation_that_is_refused_before_any_work_leaves_nothing(own_task, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise UserError("Too few CPUs.")

    monkeypatch.setattr("supmer_ray.evaluate.connect", refuse)
    plan, out = make_plan(own_task(), adapt={"shots": 1}), tmp_path / "out"
    with pytest.raises(UserError, match="Too few CPUs"):
        evaluate(plan, out)
    assert not out.exists()
    out.mkdir()
    (out / DESCRIPTION).write_text(json.dumps(plan.description(plan.read_tasks())))
    with pytest.raises(UserError, match="Too few CPUs"):
        evaluate(plan, out, resume=True)
    assert (out / DESCRIPTION).is_file()


def test_a_checkpoint_is_of_the_method_that_it_is_given_for(own_task, tmp_path):
    ten = {"prompt": {"length": 10}}
    plan = make_plan(own_task(), methods=["supmer", "no-psi"], adapt={"shots": 1}, run=ten)
    plan = replace(plan, checkpoints={"supmer": embedded.LEARNED, "no-psi": embedded.LEARNED})
    sentence = (
        r"with regularizer\.enabled: True, and method 'no-psi' stands for regularizer\.enabled: False; name the one"
    )
    with pytest.raises(UserError, match=sentence):
        evaluate(plan, tmp_path / "out")


def test_a_method_of_the_users_own_may_set_one_entry_of_the_mixture(own_task, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("{name: mine, learns: prompt, meta: {tasks.mixture.sck: 5}}")
    plan = make_plan(own_task(), methods=[str(mine)], adapt={"shots": 1}, run={"prompt": {"length": 10}})
    with pytest.raises(UserError, match=r"meta-trained with tasks\.mixture\.sck: None, and method 'mine' stands for"):
        evaluate(replace(plan, checkpoints={"mine": embedded.LEARNED}), tmp_path / "out")


def test_tasks_have_the_names_of_their_files(own_task, monkeypatch):
    file = Path(own_task())
    monkeypatch.chdir(file.parent)
    assert {task_name(task) for task in (str(file), "own.yaml", "./own.yaml")} == {"own"}
    assert task_name("bbc-topic") == "bbc-topic"


def test_the_weights_that_ship_are_part_of_what_is_described(own_task, monkeypatch):
    plan = make_plan(own_task(), adapt={"shots": 1})
    rows = plan.read_tasks()
    described = plan.description(rows)["backbone"]
    monkeypatch.setattr("supmer_ray.fewshot.plan.sha256", lambda file: "other")
    assert described and described != plan.description(rows)["backbone"]


def test_a_checkpoint_of_one_method_passes_for_no_other(own_task, tmp_path, monkeypatch):
    """Whatever it was trained on: the mixture is the user's as well."""
    names = ["supmer", "ppt", "metapt", "no-psi", "no-gate", "no-mixup", "no-curriculum", "second-order", "three-steps"]
    names.append("two-sided")
    base = make_plan(own_task(), methods=names, adapt={"shots": 1})
    made = {name: SimpleNamespace(config=load_method(name).run_config(base.config.run)) for name in names}
    monkeypatch.setattr("supmer_ray.fewshot.plan.describe_checkpoint", lambda place: made[Path(str(place)).name])
    [point] = base.points()
    for name in names:
        given = replace(base, checkpoints=dict.fromkeys(names, tmp_path / name))
        for method in base.methods:
            if method.name == name:
                given._check_origin(point, method)
                continue
            with pytest.raises(UserError, match="was meta-trained with"):
                given._check_origin(point, method)


def test_a_task_that_was_given_more_patterns_is_resumed(own_task, tmp_path):
    """Those that are not used are none of the evaluation's."""
    plan = make_plan(own_task(), adapt={"shots": 1}, pattern=1)
    (tmp_path / DESCRIPTION).write_text(json.dumps(plan.description(plan.read_tasks())))
    for patterns in (
        ["{text} {mask}"],
        ["{text} {mask}", "{text} {mask}"],
        ["so {mask} {text}", "{text} {mask}", "{mask} {text}"],
    ):
        own_task(patterns=patterns)
        require_same(tmp_path, plan.description(plan.read_tasks()))
    own_task(patterns=["{text} {mask}", "{mask} {text}"])
    with pytest.raises(UserError, match="was started with another 'tasks'"):
        require_same(tmp_path, plan.description(plan.read_tasks()))


def test_a_probe_wants_as_many_texts_in_both_tasks(own_task, tmp_path):
    one = own_task()
    folder = tmp_path / "other"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.csv").write_text("title,text,label\na,b,0\nc,d,1\ne,f,0\ng,h,1\n")
    values = yaml.safe_load((tmp_path / "own.yaml").read_text())
    values |= {"name": "two", "fields": ["title", "text"]}
    (folder / "two.yaml").write_text(yaml.safe_dump(values))
    transfer = {"train": one, "test": [str(folder / "two.yaml")]}
    with pytest.raises(UserError, match=r"'own' has 1 texts a row and 'two' has 2.*leave 'linear-probe' out"):
        evaluate(make_plan(transfer, methods=["linear-probe"], adapt={"shots": 1}), tmp_path / "out")


def test_overwriting_leaves_the_files_of_a_task_alone(own_task, tmp_path):
    task = own_task()
    (tmp_path / DESCRIPTION).write_text("{}")
    with pytest.raises(UserError, match=r"The file for task 'own' .*own\.yaml lies within the output"):
        evaluate(make_plan(task, adapt={"shots": 1}), tmp_path, overwrite=True)
    assert (tmp_path / "train.csv").is_file()


def test_a_backbone_in_a_folder_is_told_apart_by_its_weights(own_task, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    plan = make_plan(own_task(), backbone=str(folder))
    (folder / "model.safetensors").write_bytes(b"one")
    before = plan.description(plan.read_tasks())
    (folder / "model.safetensors").write_bytes(b"other")
    assert plan.description(plan.read_tasks()) != before


def test_no_key_of_a_curve_s_source_is_shown():
    plan = sources(["s3://KEY:SECRET@bucket/a"], ["s3://KEY:SECRET@bucket/b"])
    assert "SECRET" not in str([point.label for point in plan.points()]) + str([cell.name for cell in plan.cells()])
    assert "SECRET" not in json.dumps(plan.description({}))


@pytest.fixture
def run_cell_by(monkeypatch):
    """A function that has cells run by another one, in threads, as a cluster with one CPU would."""
    pool = ThreadPoolExecutor(8)

    def task(work, *arguments):
        try:
            return work(*arguments)
        except Exception as error:
            raise RayTaskError("cell", "", error, "cell", 1, "here").as_instanceof_cause() from None

    def remote(work):
        run = SimpleNamespace(remote=lambda *given: SimpleNamespace(future=lambda: pool.submit(task, work, *given)))
        return SimpleNamespace(options=lambda **_: run)

    monkeypatch.setattr(ray, "remote", lambda **_: remote)
    monkeypatch.setattr(ray, "put", lambda value: value)
    monkeypatch.setattr("supmer_ray.evaluate.connect", lambda: Resources((1.0,)))
    yield lambda work: monkeypatch.setattr("supmer_ray.evaluate._run_cell", work)
    pool.shutdown()


def outcome(cell, source, seeds, *_):
    """Rows such as a cell gives."""
    row = {"point": "", "method": cell.method.name, "train": source.definition.name, "test": source.definition.name}
    numbers = {"shots": 1, "best_step": 1, "seconds": 1.0, "trained_parameters": 1}
    return [{**row, **numbers, "seed": seed, "dev_accuracy": 0.5, "test_accuracy": 0.5} for seed in range(seeds)]


@pytest.mark.parametrize("error", [UserError("Mend it."), MemoryError("too much")], ids=["refusal", "crash"])
def test_cells_that_run_beside_one_that_fails_are_kept(own_task, tmp_path, run_cell_by, error):
    methods = ["zero-shot", "prompt-tuning", "linear-probe", "ft"]
    plan, out = make_plan(own_task(), methods=methods, adapt={"shots": 1}), tmp_path / "out"
    failed, started, told = threading.Event(), [], []

    def work(cell, *given):
        started.append(cell.method.name)
        if cell.method.name == "prompt-tuning":
            raise error
        failed.wait(10)
        return outcome(cell, *given)

    def tell(title, done, total, unit):
        told.append((done, total, unit))
        if len(started) == 2:
            failed.set()

    run_cell_by(work)
    with pytest.raises(type(error)) as raised:
        evaluate(plan, out, progress=tell)
    assert sorted(started) == sorted(methods[:2])
    assert [file.stem for file in (out / "cells").iterdir()] == ["own--zero-shot"]
    so_far = "1 of 4 cells are done, and --resume goes on with the others."
    if isinstance(error, UserError):
        assert str(raised.value) == f"Mend it. {so_far}"
    else:
        assert raised.value.__notes__ == [f"So ended the cell own--prompt-tuning; {so_far}"]

    before = pd.read_parquet(out / "cells" / "own--zero-shot.parquet")
    run_cell_by(outcome)
    rows = evaluate(plan, out, resume=True, progress=lambda *message: told.append(message[1:]))
    assert list(rows["method"].unique()) == methods and len(before) == plan.seeds
    assert [done for done, *_ in told] == sorted(done for done, *_ in told)
    assert told[0] == (0, 4, "cells") and told[-1] == (4, 4, "cells")


@pytest.mark.parametrize("value", ["2026-01-01", "!!binary aGVsbG8=", "!!set {a, b}"])
def test_a_curve_is_of_values_that_json_has(tmp_path, value):
    file = tmp_path / "own.yaml"
    file.write_text(f"name: own\nkey: adapt.shots\nvalues: [1, {value}]\n")
    with pytest.raises(UserError, match=r"^Impossible value for 'values\.1' in .*own\.yaml: write a number, a text, "):
        load_curve(file)


def test_an_evaluation_does_not_lie_among_its_sources(own_task, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("A text.")
    plan = make_plan(own_task(), methods=["supmer"], adapt={"shots": 1}, prepare={"sources": [str(tmp_path / "text")]})
    with pytest.raises(UserError, match=r"The output .*/text/out lies within the source .*/text, which would be read"):
        require_sources(plan, tmp_path / "text" / "out", anew=False)
    twice = {"sources": [str(tmp_path / "text"), str(tmp_path / "text" / "*.txt")]}
    plan = make_plan(own_task(), methods=["supmer"], adapt={"shots": 1}, prepare=twice)
    with pytest.raises(UserError, match=r"both hold the text of .*/text/a\.txt; name it once"):
        require_sources(plan, tmp_path / "out", anew=False)
