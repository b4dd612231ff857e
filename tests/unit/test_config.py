"""The configuration refuses what cannot be meant, names the key, and says what to write instead."""

import pytest

from supmer_ray.config import (
    TASK_TYPES,
    AdaptConfig,
    DimensionConfig,
    EvaluateConfig,
    PrepareConfig,
    RunConfig,
    SweepConfig,
    TasksConfig,
    load_evaluate_config,
    load_run_config,
)
from supmer_ray.errors import UserError
from supmer_ray.reading import build, override, read_yaml


def test_defaults_are_the_papers():
    config = load_run_config(None)
    assert (config.prompt.length, config.tasks.tasks_per_step, config.tasks.support) == (100, 4, 16)
    assert (config.meta.prompt_rate, config.meta.regularizer_rate, config.meta.inner_rate) == (0.1, 1e-4, None)
    assert (config.meta.curriculum.m, config.meta.curriculum.a, config.meta.curriculum.ema) == (2, 1, 0.5)


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("meta.stpes=3", r"Unknown key 'meta\.stpes' in the command line; did you mean 'steps'\?"),
        ("promt=1", r"Unknown key 'promt' in the command line; did you mean 'prompt'\?"),
        ("meta.curriculum.mm=2", r"Unknown key 'meta\.curriculum\.mm' in the command line; did you mean 'm'\?"),
        ("meta.steps=-1", r"'meta\.steps'.*greater than or equal to 1, not -1"),
        ("meta.steps=many", r"'meta\.steps'.*not 'many'"),
        ("meta.order=third", r"'meta\.order'.*'first' or 'second'"),
        ("meta.inner_rate=-0.1", r"inner_rate -0\.1 must be positive"),
        ("tasks.mixture={nps: 1}", r"unknown task type 'nps'; did you mean"),
        ("tasks.mixture={nsp: 0}", r"every weight is 0"),
        ("tasks.mixture={nsp: -2}", r"weights are 0 or more"),
        ("tasks.mixture={nsp: .nan}", r"a finite number, not nan"),
        ("meta.inner_rate=many", r"Impossible value for 'meta\.inner_rate' in .*, not 'many'"),
        ("seed=20261127120000", r"'seed'.*less than 4294967296, not 20261127120000"),
        ("seed=2026-99-99", r"'2026-99-99' is not a YAML value"),
        ("meta.learn_inner_rates=true", r"learn_inner_rates needs a starting inner_rate"),
        ("workers.count=3", r"workers\.count is 3; the tasks of a step must divide evenly over the workers"),
        ("prompt.length", r"has no '='"),
        ("seed.x.y=1", r"Impossible value for 'seed'"),
        ("meta.steps.x=1", r"Impossible value for 'meta\.steps'"),
        ("meta.steps=yes", r"'steps' is true; write a number"),
        ("meta.inner_rate=[0.1, yes]", r"'inner_rate' holds true; write a number"),
        ("tasks.mixture={nsp: no, scc: 1}", r"'mixture' holds false; write a number"),
        ("meta.order=yes", r"'meta\.order'.*'first' or 'second', not True"),
        ("workers.cpus=.inf", r"'workers\.cpus'.*finite"),
        ("meta={steps: 3, steps: 4}", r"the key 'steps' stands twice"),
        ("meta.inner_rate=1e300", r"inner_rate 1e\+300 must be positive, and 1,000,000 at most"),
        ("meta.prompt_rate=1e300", r"'meta\.prompt_rate'.*less than or equal to 1000000, not 1e\+300"),
        ("meta.regularizer_rate=1e7", r"'meta\.regularizer_rate'.*less than or equal to 1000000"),
        ("meta.inner_rate_rate=1e7", r"'meta\.inner_rate_rate'.*less than or equal to 1000000"),
        (
            "seed=" + "[" * 500 + "]" * 500,
            r"something holds itself, or is nested deeper than 50 levels; write",
        ),
    ],
)
def test_one_sentence_for_each_mistake(assignment, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        load_run_config(None, [assignment])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("schema", "values", "sentence"),
    [
        (PrepareConfig, {"sources": "bbc"}, "value for 'sources' in here: write a list, as in [a, b], not 'bbc'."),
        (PrepareConfig, {"sources": []}, "value for 'sources' in here: write at least 1, not []."),
        (PrepareConfig, {"sources": [3]}, "'sources.0' in here: write a text, in quotes where it is a number, a date"),
        (RunConfig, {"tasks": 3}, "'tasks' in here: write keys with their values, as in {key: value}, not 3."),
        (RunConfig, {"tasks": {"mixture": 3}}, "'tasks.mixture' in here: write keys with their values"),
        (RunConfig, {"meta": {"steps": 0}}, "'meta.steps' in here: it should be greater than or equal to 1, not 0."),
        (DimensionConfig, {"uniform": [1, 2, 3]}, "'uniform' in here: write at most 2, not [1, 2, 3]."),
        (DimensionConfig, {"uniform": [1]}, "Missing value 2 of 'uniform' in here; write it."),
        (EvaluateConfig, {"rate": 3}, "Unknown key 'rate' in here; did you mean 'adapt.rate'?"),
        (EvaluateConfig, {"steps": 3}, "Unknown key 'steps' in here; did you mean 'adapt.steps' or 'run.meta.steps'?"),
        (EvaluateConfig, {"meta": {"steps": 3}}, "Unknown key 'meta' in here; did you mean 'run.meta'?"),
        (RunConfig, {"prompt_rate": 0.1}, "Unknown key 'prompt_rate' in here; did you mean 'meta.prompt_rate'?"),
        (
            SweepConfig,
            {"space": {"meta.loss": {"choice": ["vocabulary", "answers"]}}, "samples": 2},
            "space tries meta.loss, and validation losses of two kinds cannot be compared; judge by a few-shot task",
        ),
        (RunConfig, {"seed": {"promt": 1}}, "value for 'seed' in here: it should be a valid integer"),
        (RunConfig, "hello", "Impossible settings in here: write keys with their values, as in {key: value}, not 'h"),
        (RunConfig, 5, "Impossible settings in here: write keys with their values, as in {key: value}, not 5."),
        (AdaptConfig, {"rate": 1e300}, "'rate' in here: it should be less than or equal to 1000000, not 1e+300."),
        (PrepareConfig, {"sources": ["bbc"], "max_documents": 10**30}, "'max_documents' in here: it should be less"),
    ],
)
def test_what_to_write_is_said_plainly(schema, values, sentence):
    with pytest.raises(UserError) as caught:
        build(schema, values, "here")
    assert sentence in str(caught.value)


def test_rates_must_fit_the_inner_steps():
    with pytest.raises(UserError, match="lists 3 rates but inner_steps is 2"):
        load_run_config(None, ["meta.inner_steps=2", "meta.inner_rate=[0.1, 0.2, 0.3]"])
    assert load_run_config(None, ["meta.inner_steps=2", "meta.inner_rate=[0.1, 0.2]"]).meta.inner_rate == (0.1, 0.2)
    # As PPT is made of a configuration that lists them.
    assert load_run_config(None, ["meta.inner_steps=0", "meta.inner_rate=[0.1, 0.2]"]).meta.inner_rate == (0.1, 0.2)


def test_a_file_and_overrides(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("meta:\n  steps: 7\n  curriculum:\n    enabled: false\nseed: 4\n")
    config = load_run_config(file, ["meta.steps=9", "tasks.mixture={nsp: 2, scc: 1}"])
    assert (config.meta.steps, config.meta.curriculum.enabled, config.seed) == (9, False, 4)
    assert config.tasks.mixture == {"nsp": 2.0, "scc": 1.0}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- a\n- b\n", "holds a list"),
        ("a: [1\n", "not valid YAML near line"),
        ("meta:\n  steps: 0\n", "run.yaml"),
        ("meta: &own [*own]\n", r"^In .*run\.yaml something holds itself, or is nested deeper than 50 levels; write"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, sentence):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=sentence):
        load_run_config(file)
    with pytest.raises(UserError, match=r"Cannot read .*nothing\.yaml"):
        read_yaml(tmp_path / "nothing.yaml")


def test_a_file_in_another_encoding_is_told_as_such(tmp_path):
    (tmp_path / "run.yaml").write_bytes("meta: {steps: 3}  # café".encode("latin-1"))
    with pytest.raises(UserError, match=r"run\.yaml is not UTF-8 text; save it as UTF-8\.$"):
        load_run_config(tmp_path / "run.yaml")


def test_a_source_is_named_once():
    with pytest.raises(UserError, match=r"sources 1 and 3 are the same; name it once"):
        build(PrepareConfig, {"sources": ["bbc", "reuters", "bbc"]}, "the test")


def test_what_of_a_mixture_is_searched():
    with pytest.raises(UserError, match=r"the mixture is searched as a whole; write tasks\.mixture: \{simplex: "):
        build(SweepConfig, {"samples": 2, "space": {"tasks.mixture.nsp": {"uniform": [0, 1]}}}, "the test")


def test_overrides_leave_the_original_alone():
    values = {"meta": {"steps": 1}}
    assert override(values, ["meta.steps=2"]) == {"meta": {"steps": 2}}
    assert values == {"meta": {"steps": 1}}


def test_a_configuration_survives_json():
    config = load_run_config(None, ["meta.inner_steps=2", "meta.inner_rate=[0.1, 0.2]"])
    assert build(RunConfig, config.model_dump(mode="json"), "here") == config
    assert AdaptConfig().shots == 16


def test_yaml_is_read_as_people_write_it(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("meta: {prompt_rate: 1e-4, regularizer_rate: 2E-3}\nworkers: {gpu: no}\n")
    config = load_run_config(file)
    assert (config.meta.prompt_rate, config.meta.regularizer_rate, config.workers.gpu) == (1e-4, 2e-3, False)
    space = {"meta.prompt_rate": override({}, ["choice=[1e-4, 0.001]"])}
    sweep = build(SweepConfig, {"space": space, "samples": 1}, "the test")
    assert sweep.space["meta.prompt_rate"].choice == (1e-4, 1e-3)
    file.write_text("a: &base {x: 1, y: 2}\nb: {<<: *base, y: 3}\n")
    assert read_yaml(file)["b"] == {"x": 1, "y": 3}
    file.write_text("meta:\n  steps: 300\nmeta:\n  order: first\n")
    with pytest.raises(UserError, match=rf"In {file} the key 'meta' stands twice"):
        load_run_config(file)


def test_one_weight_is_set_among_the_others():
    assert load_run_config(None, ["tasks.mixture.nsp=2"]).tasks.mixture == {**TasksConfig().mixture, "nsp": 2.0}
    alone = load_run_config(None, ["tasks.mixture.sck=1"], {"tasks": {"mixture": {"nsp": 1}}})
    assert alone.tasks.mixture == {"nsp": 1.0, "sck": 1.0}
    # In a comparison as in a run, and among what is left of a section that was set before.
    assignments = ["run.tasks={support: 4}", "run.tasks.mixture.sck=1"]
    tasks = load_evaluate_config(None, assignments, {"backbone": "some/name"}).run.tasks
    assert (tasks.mixture, tasks.support) == (dict.fromkeys(TASK_TYPES, 1.0), 4)
    with pytest.raises(UserError, match="'mixture' is a value, not a section"):
        load_run_config(None, ["tasks.mixture.nsp=1"], {"tasks": {"mixture": 3}})
    with pytest.raises(UserError, match="'tasks' is a value, not a section"):
        load_run_config(None, ["tasks.mixture.nsp=1"], {"tasks": 3})
