"""Methods as settings of one code path: what each learns, what it leaves alone, and what is refused."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import make_tiny_bart, make_tiny_t5

from supmer_ray.config import AdaptConfig, RunConfig
from supmer_ray.errors import UserError
from supmer_ray.fewshot import builtin, sampling
from supmer_ray.fewshot.adapt import AdaptRun, Evaluation, adapt, score, vocabulary_prompt
from supmer_ray.fewshot.definition import TaskDefinition, TaskRows, load_definition, require_same_labels
from supmer_ray.fewshot.encoding import TaskEncoder
from supmer_ray.fewshot.evaluate import adapt_task, evaluate_method
from supmer_ray.fewshot.finetune import finetune
from supmer_ray.fewshot.method import Method, load_method
from supmer_ray.fewshot.probe import features, probe
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


def test_zero_shot_tells_each_seeds_dev_accuracy(backbone, mood):
    """It may answer all alike: right for half of the balanced dev split, for all or none of these test rows."""
    task = TaskRows(mood.definition, mood.frames | {"test": mood.frames["test"].query("label == 'good'")})
    encoder = TaskEncoder(backbone, task.definition, max_length=100)
    for seed, one in enumerate(outcomes(backbone, load_method("zero-shot"), task, [task])):
        dev = encoder.split(draw(task.definition, task.frames, 4, seed).dev)
        [probabilities] = score(backbone, torch.zeros(1, 0, 32), [dev.examples], [encoder.verbalizer_ids])
        assert one.dev_accuracy == (probabilities.argmax(axis=1) == dev.answers).mean() != one.test_accuracy


def test_of_many_test_rows_the_same_few_are_scored(backbone, mood, tmp_path):
    config = CONFIG.model_copy(update={"max_test": 7})
    few = TaskRows(mood.definition, mood.frames | {"test": sampling.test_rows(mood.frames, 7)})
    reached = {}
    for name in ("zero-shot", "linear-probe", "prompt-tuning"):
        found, wanted = (
            evaluate_method(backbone, load_method(name), task, [task], [0, 1], settings, prompt_length=5)
            for task, settings in ((mood, config), (few, CONFIG))
        )
        reached[name] = [one.test_accuracy for one in found]
        assert reached[name] == [one.test_accuracy for one in wanted]
    assert 0 < reached["zero-shot"][0] < 1, "of all 30 rows no such share of 7 can be right"
    record = adapt_task(backbone, mood, None, 0, config, tmp_path / "out", prompt_length=5)
    assert 0 < record.test_accuracy < 1 and record.test_accuracy == reached["prompt-tuning"][0]


def test_long_rows_are_cut_to_the_positions_of_the_backbone(tmp_path):
    text = " ".join([*NOUNS, *KINDS[0], *KINDS[1], "it is great terrible ."])
    bart = load_backbone(str(make_tiny_bart(tmp_path / "bart", [text, text[::-1]] * 20)))
    long = {split: rows(8, seed).assign(text=" ".join(NOUNS * 10)) for seed, split in enumerate(("train", "test"))}
    task = TaskRows(definition(), long)
    config = CONFIG.model_copy(update={"shots": 1, "steps": 1})
    assert bart.max_positions < config.max_length
    for name in ("zero-shot", "linear-probe", "prompt-tuning"):
        [one] = evaluate_method(bart, load_method(name), task, [task], [0], config, prompt_length=5)
        assert one.test_accuracy == 0.5, "all rows have the same text"
    assert adapt_task(bart, task, None, 0, config, tmp_path / "out", prompt_length=5).test_accuracy == 0.5


def test_full_fine_tuning_tunes_a_copy(backbone, mood):
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    method = load_method("ft").model_copy(update={"adapt": {"rate": 0.003, "steps": 40, "evaluate_every": 40}})
    drawn = draw(mood.definition, mood.frames, 4, 0)
    # Tested on what it was trained on, so that it is known what must come out.
    task = TaskRows(mood.definition, mood.frames | {"test": drawn.train})
    found = evaluate_method(backbone, method, task, [task], [0, 1], method.adapt_config(CONFIG))
    assert found[0].best_step == 40 and found[0].test_accuracy == 1
    assert outcomes(backbone, load_method("zero-shot"), task, [task])[0].test_accuracy < 1
    for name, value in backbone.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(weight.requires_grad for weight in backbone.model.parameters())
    assert found[0].trained_parameters == sum(weight.numel() for weight in backbone.model.parameters())
    encoder = TaskEncoder(backbone, mood.definition, max_length=100)
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


def test_full_fine_tuning_is_the_same_in_micro_batches_of_any_size(backbone, mood, monkeypatch):
    """Every example counts alike, in whichever it stands."""
    monkeypatch.setattr(Evaluation, "beats", lambda self, other: True)  # the last step's weights are kept
    texts = ["film " * (1 + number % 5) + KINDS[number % 2][number % 5] for number in range(8)]
    frame = pd.DataFrame({"text": texts, "label": ["good", "bad"] * 4})
    encoder = TaskEncoder(backbone, mood.definition, max_length=100)
    split = encoder.split(frame)
    budget = 3 * int(split.examples.lengths.max())
    parts = micro_batches(split.examples.lengths, 0, budget)
    assert len(parts[0]) == 3 and len({len(part) for part in parts}) > 1
    run = AdaptRun(split, split, encoder.verbalizer_ids, 0, torch.zeros(0, 32), IdentityRegularizer())
    config = AdaptConfig(shots=4, steps=9, batch=8, rate=0.003, evaluate_every=9)
    (_, whole), (_, parted) = (finetune(backbone, run, config, token_budget=most) for most in (1 << 20, budget))
    assert whole.step == parted.step == 9
    # AdamW makes whole steps of elements of which rounding decides the sign: with some vocabularies a few parts in 10⁴.
    assert parted.loss == pytest.approx(whole.loss, rel=2e-3)


def test_full_fine_tuning_decays_every_weight(backbone, mood, monkeypatch):
    monkeypatch.setattr(Evaluation, "beats", lambda self, other: True)  # the last step's weights are kept
    encoder = TaskEncoder(backbone, mood.definition, max_length=100)
    split = encoder.split(rows(8, 0))
    run = AdaptRun(split, split, encoder.verbalizer_ids, 0, torch.zeros(0, 32), IdentityRegularizer())
    plain, decayed = (
        dict(finetune(backbone, run, AdaptConfig(steps=1, rate=0.01, weight_decay=decay))[0].model.named_parameters())
        for decay in (0, 0.5)
    )
    for name, before in backbone.model.named_parameters():
        torch.testing.assert_close(plain[name] - decayed[name], 0.01 * 0.5 * before, rtol=1e-3, atol=1e-6, msg=name)


def test_a_probe_draws_a_line_between_the_words(backbone, mood):
    many = TaskRows(mood.definition, {"train": rows(200, 4), "test": rows(100, 5)})
    config = AdaptConfig(shots=50)
    found = evaluate_method(backbone, load_method("linear-probe"), many, [many], [0, 1], config)
    assert min(one.test_accuracy for one in found) > 0.8
    assert found[0].trained_parameters == 32 + 1


def test_a_probe_is_chosen_on_the_dev_split(backbone, mood):
    task, found = mood.definition, outcomes(backbone, load_method("linear-probe"), mood, [mood])
    for seed in (0, 1):
        drawn, given = draw(task, mood.frames, 4, seed), []
        for frame in (drawn.train, drawn.dev):
            states = features(backbone, task, frame, max_length=CONFIG.max_length)
            given += [states, frame["label"].map(task.labels.index).to_numpy()]
        assert found[seed].dev_accuracy == probe(*given)[1].accuracy


def test_the_dev_split_chooses_how_strictly_a_probe_is_kept_small():
    """The least where it agrees with the training rows, the most where it says the opposite."""
    states, answers = np.random.default_rng(0).normal(size=(40, 3)), np.arange(40) % 2
    states[:, 0] += 6 * answers
    for dev_answers, strength in ((answers, 10.0), (1 - answers, 0.001)):
        classifier, _ = probe(states, answers, states, dev_answers)
        assert classifier.get_params()["logisticregression__C"] == strength


def test_several_fields_are_compared_with_the_first(backbone):
    task = definition(fields=["text", "more"], patterns=["{text} {more} {mask}"])
    frame = pd.DataFrame({"text": ["film day", "rain"], "more": ["film day", "road song"], "label": ["good", "bad"]})
    states = features(backbone, task, frame, max_length=20)
    assert states.shape == (2, 4 * 32)
    np.testing.assert_allclose(states[0, 64:96], 0, atol=1e-6)
    assert (states[1, 64:96] > 0).any()
    np.testing.assert_allclose(states[:, 96:], states[:, :32] * states[:, 32:64])


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
