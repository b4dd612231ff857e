"""Methods as settings of one code path: what each learns, what it leaves alone, and what is refused."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import make_tiny_t5

from supmer_ray.config import AdaptConfig, RunConfig
from supmer_ray.errors import UserError
from supmer_ray.fewshot import builtin
from supmer_ray.fewshot.adapt import AdaptRun, adapt, score, vocabulary_prompt
from supmer_ray.fewshot.definition import TaskDefinition, TaskRows, load_definition, require_same_labels
from supmer_ray.fewshot.encoding import TaskEncoder
from supmer_ray.fewshot.evaluate import adapt_task, evaluate_method
from supmer_ray.fewshot.finetune import finetune
from supmer_ray.fewshot.method import Method, load_method
from supmer_ray.fewshot.probe import features
from supmer_ray.fewshot.sampling import draw
from supmer_ray.fewshot.suite import load_curve, load_suite
from supmer_ray.meta.state import Checkpoint, make_regularizer
from supmer_ray.model.backbone import load_backbone
from supmer_ray.model.prompted import micro_batches
from supmer_ray.model.regularizer import IdentityRegularizer, Regularizer

NOUNS = ["film", "story", "day", "rain", "house", "river", "bread", "song", "road", "light"]
KINDS = [["fine", "sunny", "warm", "sweet", "bright"], ["dull", "bitter", "cold", "grey", "broken"]]
CONFIG = AdaptConfig(shots=4, steps=6, batch=4, evaluate_every=3)


def definition(name="mood", **changes):
    values = {
        "name": name, "data": {"catalog": "mood"}, "fields": ["text"], "patterns": ["{text} it is {mask} ."],
        "verbalizers": {"good": "great", "bad": "terrible"},
    }  # fmt: skip
    return TaskDefinition.model_validate(values | changes)


def rows(count, seed):
    generator = np.random.default_rng(seed)
    texts = [" ".join([*generator.choice(NOUNS, 4), *generator.choice(KINDS[n % 2], 3)]) for n in range(count)]
    return pd.DataFrame({"text": texts, "label": ["good" if n % 2 == 0 else "bad" for n in range(count)]})


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    text = " ".join([*NOUNS, *KINDS[0], *KINDS[1], "it is great terrible ."])
    return load_backbone(str(make_tiny_t5(tmp_path_factory.mktemp("t5"), [text] * 20)))


@pytest.fixture(scope="module")
def mood():
    return TaskRows(definition(), {"train": rows(40, 0), "test": rows(30, 1)})


@pytest.fixture(scope="module")
def other():
    return TaskRows(definition("weather"), {"train": rows(40, 2), "test": rows(20, 3)})


def outcomes(backbone, method, source, targets, **options):
    return evaluate_method(backbone, method, source, targets, [0, 1], CONFIG, prompt_length=5, **options)


def test_a_prompt_learns_what_it_learns_alone(backbone, mood, other):
    found = outcomes(backbone, load_method("prompt-tuning"), mood, [mood, other])
    assert [(one.seed, one.test) for one in found] == [(0, "mood"), (0, "weather"), (1, "mood"), (1, "weather")]
    encoder = TaskEncoder(backbone, mood.definition, max_length=CONFIG.max_length)
    for seed in (0, 1):
        drawn = draw(mood.definition, mood.frames, 4, seed)
        train, dev = encoder.split(drawn.train), encoder.split(drawn.dev)
        prompt = vocabulary_prompt(backbone, 5, seed)
        run = AdaptRun(train, dev, encoder.verbalizer_ids, seed, prompt, IdentityRegularizer())
        [alone] = adapt(backbone, [run], CONFIG)
        for one, target in zip(found[2 * seed : 2 * seed + 2], (mood, other), strict=True):
            split = encoder.split(target.frames["test"])
            [probabilities] = score(backbone, alone.prompt[None], [split.examples], [encoder.verbalizer_ids])
            assert one.test_accuracy == pytest.approx((probabilities.argmax(axis=1) == split.answers).mean())
            assert (one.dev_accuracy, one.best_step) == (alone.best.accuracy, alone.best.step)
            assert one.trained_parameters == 5 * 32 and one.shots == 4 and one.seconds > 0


def test_a_prompt_starts_from_the_vocabulary_rows_that_were_asked_for(backbone, mood, monkeypatch):
    started = []

    def watched(backbone, runs, *arguments, **options):
        started.extend(run.prompt for run in runs)
        return adapt(backbone, runs, *arguments, **options)

    monkeypatch.setattr("supmer_ray.fewshot.evaluate.adapt", watched)
    outcomes(backbone, load_method("prompt-tuning"), mood, [mood], vocabulary_rows=1)
    assert len(started) == 2
    for prompt in started:
        assert torch.equal(prompt, backbone.embedding.weight[[0] * 5])


@pytest.mark.parametrize("enabled", [True, False])
def test_a_record_says_whether_psi_was_applied(backbone, mood, tmp_path, enabled):
    config = RunConfig.model_validate({"regularizer": {"enabled": enabled}})
    start = Checkpoint(vocabulary_prompt(backbone, 3, 7), make_regularizer(config, 32), config, {})
    adapt_task(backbone, mood, start, 0, CONFIG, tmp_path / "out", prompt_length=3)
    assert json.loads((tmp_path / "out" / "adapted.json").read_text())["regularized"] == enabled


def test_a_checkpoint_gives_prompt_and_regularizer(backbone, mood, monkeypatch):
    started = []

    def watched(backbone, runs, *given, **options):
        started.extend(runs)
        return adapt(backbone, runs, *given, **options)

    monkeypatch.setattr("supmer_ray.fewshot.evaluate.adapt", watched)
    torch.manual_seed(0)
    prompt, psi = vocabulary_prompt(backbone, 3, 7), Regularizer(32)
    start = Checkpoint(prompt, psi, RunConfig(), {})
    found = outcomes(backbone, load_method("supmer"), mood, [mood], checkpoint=start)
    assert len(started) == 2
    assert all(torch.equal(run.prompt, prompt) and run.regularizer is psi for run in started)
    encoder = TaskEncoder(backbone, mood.definition, max_length=CONFIG.max_length)
    drawn = draw(mood.definition, mood.frames, 4, 1)
    train, dev = encoder.split(drawn.train), encoder.split(drawn.dev)
    [alone] = adapt(backbone, [AdaptRun(train, dev, encoder.verbalizer_ids, 1, prompt, psi)], CONFIG)
    assert (found[1].dev_accuracy, found[1].best_step) == (alone.best.accuracy, alone.best.step)
    assert found[0].trained_parameters == 3 * 32


def test_zero_shot_changes_nothing_and_knows_no_seed(backbone, mood, other):
    found = outcomes(backbone, load_method("zero-shot"), mood, [mood, other])
    encoder = TaskEncoder(backbone, mood.definition, max_length=100)
    for number, target in enumerate((mood, other)):
        split = encoder.split(target.frames["test"])
        [probabilities] = score(backbone, torch.zeros(1, 0, 32), [split.examples], [encoder.verbalizer_ids])
        accuracy = (probabilities.argmax(axis=1) == split.answers).mean()
        assert [one.test_accuracy for one in found[number::2]] == pytest.approx([accuracy] * 2)
    assert {(one.trained_parameters, one.best_step) for one in found} == {(0, 0)}


def test_full_fine_tuning_tunes_a_copy(backbone, mood):
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    method = load_method("ft").model_copy(update={"adapt": {"rate": 0.003, "steps": 40, "evaluate_every": 40}})
    found = evaluate_method(backbone, method, mood, [mood], [0, 1], method.adapt_config(CONFIG))
    for name, value in backbone.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(weight.requires_grad for weight in backbone.model.parameters())
    assert found[0].trained_parameters == sum(weight.numel() for weight in backbone.model.parameters())
    encoder = TaskEncoder(backbone, mood.definition, max_length=100)
    drawn = draw(mood.definition, mood.frames, 4, 0)
    train = encoder.split(drawn.train)
    run = AdaptRun(train, train, encoder.verbalizer_ids, 0, torch.zeros(0, 32), IdentityRegularizer())
    tuned, best = finetune(backbone, run, method.adapt_config(CONFIG))
    assert best.step == 40 and best.accuracy == 1
    probabilities = [
        score(model, torch.zeros(1, 0, 32), [train.examples], [encoder.verbalizer_ids])[0]
        for model in (backbone, tuned)
    ]
    right = [values[np.arange(len(train)), train.answers].mean() for values in probabilities]
    assert right[1] > 0.9 > right[0]


def test_full_fine_tuning_is_the_same_in_micro_batches_of_any_size(backbone, mood):
    """Every example counts alike, in whichever it stands."""
    texts = ["film " * (1 + number % 5) + KINDS[number % 2][number % 5] for number in range(8)]
    frame = pd.DataFrame({"text": texts, "label": ["good", "bad"] * 4})
    encoder = TaskEncoder(backbone, mood.definition, max_length=100)
    split = encoder.split(frame)
    budget = 3 * int(split.examples.lengths.max())
    parts = micro_batches(split.examples.lengths, 0, budget)
    assert len(parts[0]) == 3 and len({len(part) for part in parts}) > 1
    run = AdaptRun(split, split, encoder.verbalizer_ids, 0, torch.zeros(0, 32), IdentityRegularizer())
    # Fewer steps are no better than none with some of the vocabularies that a tokenizer's training may come to.
    config = AdaptConfig(shots=4, steps=9, batch=8, rate=0.003, evaluate_every=9)
    (_, whole), (_, parted) = (finetune(backbone, run, config, token_budget=most) for most in (1 << 20, budget))
    assert whole.step == parted.step == 9
    # AdamW makes whole steps of elements of which rounding decides the sign: with some vocabularies a few parts in 10⁴.
    assert parted.loss == pytest.approx(whole.loss, rel=2e-3)


def test_a_probe_draws_a_line_between_the_words(backbone, mood):
    many = TaskRows(mood.definition, {"train": rows(200, 4), "test": rows(100, 5)})
    config = AdaptConfig(shots=50)
    found = evaluate_method(backbone, load_method("linear-probe"), many, [many], [0, 1], config)
    assert min(one.test_accuracy for one in found) > 0.8
    assert found[0].trained_parameters == 32 + 1


def test_several_fields_are_compared_with_the_first(backbone):
    task = definition(fields=["text", "more"], patterns=["{text} {more} {mask}"])
    frame = pd.DataFrame({"text": ["film day", "rain"], "more": ["film day", "road song"], "label": ["good", "bad"]})
    states = features(backbone, task, frame, max_length=20)
    assert states.shape == (2, 4 * 32)
    np.testing.assert_allclose(states[0, 64:96], 0, atol=1e-6)
    assert (states[1, 64:96] > 0).any()


def test_other_labels_are_refused(backbone, mood):
    three = TaskRows(definition("three", verbalizers={"bad": "terrible", "good": "great"}), mood.frames)
    with pytest.raises(UserError, match=r"Task 'three' has the labels bad, good, but 'mood'.* has good, bad"):
        outcomes(backbone, load_method("zero-shot"), mood, [three])


def test_every_builtin_method_fits_the_schema():
    names = builtin.names("methods")
    assert {"ft", "prompt-tuning", "ppt", "metapt", "supmer", "zero-shot", "linear-probe"} <= set(names)
    configs = {}
    for name in names:
        method = load_method(name)
        assert method.name == name and method.description
        method.adapt_config(AdaptConfig())
        if method.meta is not None:
            configs[name] = method.run_config(RunConfig())
    assert len({config.model_dump_json() for config in configs.values()}) == len(configs), "two methods are the same"
    assert configs["supmer"] == RunConfig()
    assert configs["only-mc"].tasks.types == ["nss", "scss"]
    assert not configs["no-psi"].regularizer.enabled and not configs["no-gate"].regularizer.gate
    assert load_method("ppt").meta == load_method("metapt").meta | {
        "meta.inner_steps": 0,
        "meta.learn_inner_rates": False,
    }


def test_a_method_that_makes_no_sense_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no method 'supmr'; .* did you mean 'supmer'"):
        load_method("supmr")
    file = tmp_path / "own.yaml"
    file.write_text("name: own\nlearns: weights\nmeta: {}\n")
    with pytest.raises(UserError, match=r"meta-training makes a prompt, but the method learns weights"):
        load_method(file)
    method = Method(name="own", learns="prompt", meta={"meta.stpes": 3})
    with pytest.raises(UserError, match=r"Unknown key 'meta.stpes' in method 'own'; did you mean 'steps'"):
        method.run_config(RunConfig())


def test_a_truth_is_no_number_in_a_suite(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("name: own\ntasks: [{train: bbc-topic, max_shots: yes}]\n")
    with pytest.raises(UserError, match=r"'tasks\.0' in .*own\.yaml: 'max_shots' is true; write a number\."):
        load_suite(file)


@pytest.mark.parametrize("name", builtin.names("suites"))
def test_every_suite_names_tasks_that_go_together(name):
    suite = load_suite(name)
    assert suite.name == name
    for entry in suite.tasks:
        for target in entry.targets:
            require_same_labels(load_definition(entry.train), load_definition(target))
    if name == "paper":
        assert len(suite.tasks) == 13


def test_a_suite_of_domains_tests_inside_and_on_every_other():
    targets = {entry.train: entry.targets for entry in load_suite("domains").tasks}
    sentiment = {f"{name}-sentiment" for name in ("film", "product", "news", "tweet")}
    for name, tested in targets.items():
        assert tested[0] == name
        assert set(tested) == sentiment if name in sentiment else len(tested) == 2
    assert sentiment <= set(targets)


def test_what_is_asked_in_another_way_is_no_target():
    letters, pairs = load_definition("next-paragraph-letters"), load_definition("next-paragraph")
    for source, target in ((letters, pairs), (pairs, letters)):
        with pytest.raises(
            UserError, match=r"is asked (candidate by candidate|at once), but 'next-paragraph.*same way"
        ):
            require_same_labels(source, target)


def test_every_curve_names_a_setting():
    for name in builtin.names("curves"):
        curve = load_curve(name)
        assert curve.name == name and len(curve.values) > 1
    with pytest.raises(UserError, match=r"no curve 'shot'; .* did you mean 'shots'"):
        load_curve("shot")
