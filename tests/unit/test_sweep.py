"""Search spaces: mistakes are one sentence, mixtures are uniform on the simplex, what fits is computed."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from ray.tune.schedulers import PopulationBasedTraining

from supmer_ray.cluster import Resources
from supmer_ray.config import PAPER_TASK_TYPES, SweepConfig, load_sweep_config
from supmer_ray.errors import UserError
from supmer_ray.reading import build
from supmer_ray.sweep.picture import draw_sweep, importance, places
from supmer_ray.sweep.space import Within, run_config, settings_of, space
from supmer_ray.sweep.trial import Objective, TrialHost, make_objective
from supmer_ray.tune import TPE_AT_ONCE, Population, _searcher, concurrency, trials_table

CONFIGS = Path(__file__).parents[2] / "tune_configs"
SMALL = {"space": {"meta.prompt_rate": {"uniform": [0.1, 0.2]}}, "samples": 2, "search": "random"}


def sweep(**update):
    return build(SweepConfig, {**SMALL, **update}, "sweep.yaml")


@pytest.mark.parametrize("name", ["inner_rates", "task_mixture", "joint", "embedded", "smoke", "population"])
def test_every_shipped_space_gives_configurations_that_can_run(name):
    config = load_sweep_config(CONFIGS / f"{name}.yaml")
    generator = np.random.default_rng(0)
    for _ in range(20):
        drawn = {key: domain.sample(random_state=generator) for key, domain in space(config).items()}
        run_config(config, settings_of(config, drawn))


@pytest.mark.parametrize(
    ("update", "sentence"),
    [
        ({"space": {"meta.prompt_rte": {"uniform": [0.1, 0.2]}}}, r"unknown setting 'meta\.prompt_rte'.*'prompt_rate'"),
        ({"space": {"mta.prompt_rate": {"uniform": [0.1, 0.2]}}}, r"unknown setting 'mta\.prompt_rate'"),
        ({"space": {"meta.prompt_rate": {"unform": [0.1, 0.2]}}}, r"did you mean 'uniform'"),
        ({"space": {"meta.prompt_rate": {"uniform": [0.2, 0.1]}}}, r"0\.2 must be below the second, 0\.1"),
        ({"space": {"meta.prompt_rate": {"loguniform": [0, 0.1]}}}, r"needs a positive number"),
        (
            {"space": {"meta.prompt_rate": {"uniform": [-1, 0.1]}}},
            r"tries meta\.prompt_rate = -1.*greater than 0",
        ),
        ({"space": {"meta.prompt_rate": {"uniform": [0.1, 1], "choice": [1, 2]}}}, r"uniform and choice"),
        ({"space": {"meta.prompt_rate": {}}}, r"exactly one of"),
        ({"space": {"prompt.length": {"choice": [0, 5]}}}, r"space tries prompt\.length = 0"),
        ({"space": {"prompt.length": {"uniform": [10, 50]}}}, r"space tries prompt\.length = 22\.7.*integer"),
        ({"space": {"prompt.length": {"int": [True, 5]}}}, r"'int' holds true; write a number"),
        ({"space": {"meta.steps": {"int": [1, 5]}}}, r"'meta\.steps' is not searched"),
        (
            {"space": {"meta.curriculum": {"choice": [{"enabled": False}, {"m": 4.0}]}}},
            r"'meta\.curriculum' is a section; search its keys, as in 'meta\.curriculum\.enabled'",
        ),
        ({"space": {"workers.count": {"int": [1, 2]}}}, r"'workers\.count' is not searched; only prompt"),
        ({"space": {"tasks.mixture": {"uniform": [0, 1]}}}, r"tasks\.mixture takes simplex or choice"),
        ({"space": {"tasks.mixture": {"simplex": ["nsp", "nps"]}}}, r"unknown task type 'nps'"),
        ({"space": {"meta.clip": {"simplex": ["nsp", "nss"]}}}, r"simplex is for tasks\.mixture"),
        ({"space": {"meta.clip": {"uniform": [1, 2], "each_inner_step": True}}}, r"each_inner_step is for meta\.inner"),
        ({"base": {"meta": {"stpes": 3}}}, r"Unknown key 'base\.meta\.stpes' in sweep\.yaml; did you mean 'steps'"),
        ({"smaples": 3}, r"did you mean 'samples'"),
        ({"search": "pbt"}, r"needs a section pbt"),
        ({"pbt": {"every_steps": 100}}, r"write search: pbt"),
        ({"asha": {"grace_steps": 30}}, r"asha\.grace_steps is 30, but trials report every 100 steps"),
        ({"asha": {"grace_steps": 3000}}, r"more than the 2000 steps"),
        (
            {"search": "pbt", "pbt": {"every_steps": 100}, "space": {"prompt.length": {"int": [1, 2]}}},
            r"which 'prompt\.length' cannot bear",
        ),
        (
            {"search": "pbt", "pbt": {"every_steps": 100}, "base": {"workers": {"count": 2}}},
            r"one worker each; set base\.workers\.count: 1",
        ),
        ({"search": "pbt", "pbt": {"every_steps": 100}, "asha": {"grace_steps": 100}}, r"leave asha out"),
        ({"search": "pbt", "pbt": {"every_steps": 100}, "concurrency": 1}, r"whole population.*leave concurrency out"),
    ],
)
def test_one_sentence_for_each_mistake(update, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        sweep(**update)
    assert "\n" not in str(caught.value)


def test_a_few_shot_task_that_the_backbone_cannot_use_is_refused_before_the_first_trial(tmp_path):
    values = {
        "name": "own",
        "data": {"files": {"train": "rows.csv", "test": "test.csv"}},
        "fields": ["text"],
        "patterns": ["{text} {mask}"],
        "verbalizers": {"0": "awesome", "1": "awesomely"},  # the second begins as the first
    }
    (tmp_path / "rows.csv").write_text("text,label\na,0\nb,1\nc,0\nd,1\n")
    (tmp_path / "test.csv").write_text("text,label\ne,0\nf,1\n")
    task = tmp_path / "own.yaml"
    task.write_text(yaml.safe_dump(values))
    config = sweep(objective={"task": str(task), "adapt": {"shots": 1}})
    with pytest.raises(UserError, match="begin with the same token"):
        make_objective(config, "embedded")
    task.write_text(yaml.safe_dump({**values, "verbalizers": {"0": "bad", "1": "good"}}))
    assert {place.name for place in make_objective(config, "embedded").files()} == {"own.yaml", "rows.csv", "test.csv"}
    searched = {"prompt.length": {"int": [10, 510]}}
    with pytest.raises(UserError, match="leaves no room"):
        make_objective(config.model_copy(update={"space": sweep(space=searched).space}), "embedded")


def test_inner_steps_and_their_learned_rate_are_searched_together():
    base = {"meta": {"learn_inner_rates": True, "inner_rate": 0.1}}
    space = {"meta.inner_steps": {"int": [1, 3]}, "meta.inner_rate": {"loguniform": [0.01, 1.0]}}
    assert sweep(base=base, space=space).samples == 2


def test_mixtures_are_uniform_on_the_simplex():
    config = load_sweep_config(CONFIGS / "task_mixture.yaml")
    generator = np.random.default_rng(0)
    domains = space(config)
    assert len(domains) == 5
    drawn = [
        settings_of(config, {key: domain.sample(random_state=generator) for key, domain in domains.items()})
        for _ in range(4000)
    ]
    weights = np.array([[entry["tasks.mixture"][name] for name in PAPER_TASK_TYPES] for entry in drawn])
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    # One weight of a uniform draw from the 5-simplex is Beta(1, 4): P(w < t) = 1 - (1 - t)^4.
    for column in weights.T:
        for threshold in (0.05, 0.2, 0.5):
            expected = 1 - (1 - threshold) ** 4
            deviation = np.sqrt(expected * (1 - expected) / len(drawn))
            assert abs((column < threshold).mean() - expected) < 4 * deviation


def test_rates_of_each_inner_step_follow_the_number_of_steps():
    config = sweep(
        space={
            "meta.inner_steps": {"int": [1, 3]},
            "meta.inner_rate": {"loguniform": [0.01, 1], "each_inner_step": True},
            "prompt.length": {"choice": [5, 7]},
        }
    )
    assert set(space(config)) == {"meta.inner_steps", *(f"meta.inner_rate.{i}" for i in range(3)), "prompt.length"}
    sample = {"meta.inner_steps": 2, "prompt.length": 1, **{f"meta.inner_rate.{i}": 0.1 * (i + 1) for i in range(3)}}
    run = run_config(config, settings_of(config, sample))
    assert (run.meta.inner_steps, run.meta.inner_rate, run.prompt.length) == (2, (0.1, 0.2), 7)


def test_a_choice_of_mixtures():
    config = sweep(space={"tasks.mixture": {"choice": [{"nsp": 1}, {"scc": 1, "nss": 2}]}})
    assert run_config(config, settings_of(config, {"tasks.mixture": 1})).tasks.types == ["nss", "scc"]


def test_tpe_draws_mixtures_where_the_loss_is_low():
    """Trials that lean on one task type are the better: the model comes to propose such."""
    config = load_sweep_config(CONFIGS / "task_mixture.yaml").model_copy(update={"search": "tpe", "seed": 3})
    searcher = _searcher(config, 1)
    assert searcher.set_search_properties("objective", "min", space(config))
    weights = []
    for number in range(40):
        weights.append(settings_of(config, searcher.suggest(str(number)))["tasks.mixture"]["scsp"])
        searcher.on_trial_complete(str(number), {"objective": 1 - weights[-1]})
    assert np.mean(weights[20:]) > 2 * np.mean(weights[:10])


def test_as_many_trials_as_fit():
    two_cores = Resources((2,))
    assert concurrency(sweep(), two_cores) == 1
    # A trial of one worker and its builder take 1.5 CPUs of one node.
    many = sweep(samples=20)
    assert concurrency(many, Resources((8, 4, 2))) == 5 + 2 + 1
    assert concurrency(many, Resources((8, 4, 2), (0, 2, 0))) == 2
    assert concurrency(sweep(), Resources((8, 4, 2))) == 2, "more than there are samples would take threads from them"
    pair = sweep(base={"workers": {"count": 2}})
    assert concurrency(pair, Resources((4, 4))) == 2
    assert concurrency(sweep(concurrency=2), Resources((8,))) == 2
    with pytest.raises(UserError, match="concurrency is 2 but 1 of these trials fit"):
        concurrency(sweep(concurrency=2), two_cores)
    with pytest.raises(UserError, match=r"^2 workers of 1\.5 CPUs .* hold 1 of such; lower workers\.count to 1"):
        concurrency(pair, two_cores)
    with pytest.raises(UserError, match=r"^2 workers of 1\.5 CPUs fill .* \(1 of 3 CPUs\), .* needs 0\.01 more;"):
        concurrency(pair, Resources((3,)))
    # The driver may come to lie where the second worker would: there is no room for both beside it anywhere else.
    with pytest.raises(UserError, match=r"^2 workers of 4 CPUs fill .* \(2 of 4 CPUs, 1 of 2 CPUs\)"):
        concurrency(sweep(base={"workers": {"count": 2, "cpus": 3.5}}), Resources((4, 4, 2)))
    with pytest.raises(UserError, match=r"\(2 of 1 CPUs\) hold 0 of such; lower workers\.cpus or workers\.builders"):
        concurrency(sweep(), Resources((1, 1)))
    # An autoscaler brings the nodes of as many as the sweep asks for.
    assert concurrency(sweep(concurrency=4), Resources((0,), grows=True)) == 4
    # And as many as may learn from each other, where it names no number; trials that wait are what makes it grow.
    assert concurrency(sweep(), Resources((0,), grows=True)) == sweep().samples
    assert concurrency(sweep(samples=40), Resources((0,), grows=True)) == 40
    learning = sweep(samples=40, search="tpe")
    assert concurrency(learning, Resources((0,), grows=True)) == TPE_AT_ONCE
    assert concurrency(learning, Resources((32,), grows=True)) > TPE_AT_ONCE


def test_a_population_exchanges_nothing_at_the_last_step(monkeypatch):
    """There, a trial that takes turns would be given another's weights, and settings that nobody trains with."""
    monkeypatch.setattr(PopulationBasedTraining, "on_trial_result", lambda self, *given: "exchanged")
    space = {"rate": [0.1, 0.2]}
    population = Population(
        4, time_attr="step", metric="x", mode="min", perturbation_interval=1, hyperparam_mutations=space
    )
    assert population.on_trial_result(None, None, {"step": 3, "x": 1.0}) == "exchanged"
    assert population.on_trial_result(None, None, {"step": 4, "x": 1.0}) == "CONTINUE"


def test_what_a_population_changed_stays_within_the_space():
    searched = {
        "meta.prompt_rate": {"uniform": [0.1, 0.2]},
        "meta.inner_rate": {"loguniform": [0.01, 1], "each_inner_step": True},
        "meta.clip": {"choice": [1, 5]},
    }
    within = Within(sweep(space=searched))
    found = within({"meta.prompt_rate": 0.24, "meta.inner_rate.0": 0.008, "meta.clip": 1})
    assert found == {"meta.prompt_rate": 0.2, "meta.inner_rate.0": 0.01, "meta.clip": 1}
    assert within({"meta.prompt_rate": 0.15, "meta.inner_rate.0": 0.5, "meta.clip": 0})["meta.prompt_rate"] == 0.15


def test_a_table_says_how_each_trial_ended():
    told = [
        ({"trial_id": "a", "step": 2000, "objective": 1.5, "validation_loss": 1.5}, None),
        ({"trial_id": "b", "step": 100, "objective": 2.5, "validation_loss": 2.5}, None),
        ({"trial_id": "c", "step": 0, "objective": 1000.0, "reached": 7, "refused": "Lower the rate."}, None),
        (None, ValueError("broken\ninside")),
    ]
    results = [
        SimpleNamespace(metrics=metrics, error=error, checkpoint=None, config={"meta.prompt_rate": 0.15})
        for metrics, error in told
    ]
    table = trials_table(sweep(samples=4), results)
    assert table["state"].tolist() == ["finished", "stopped", "refused", "failed"]
    assert table["step"].tolist() == [2000, 100, 7, 0]
    assert table["sentence"].tolist()[2:] == ["Lower the rate.", "broken"] and table["sentence"][:2].isna().all()
    assert (table["meta.prompt_rate"] == 0.15).all()


def test_a_mixture_is_told_by_shares_also_of_what_it_does_not_name():
    config = sweep(space={"tasks.mixture": {"choice": [{"nsp": 1, "scsp": 3}, {"sck": 2}]}})
    results = [
        SimpleNamespace(metrics={"step": 1}, error=None, checkpoint=None, config={"tasks.mixture": number})
        for number in (0, 1)
    ]
    table = trials_table(config, results).filter(like="tasks.mixture.")
    assert table.to_dict("list") == {
        "tasks.mixture.nsp": [0.25, 0], "tasks.mixture.scsp": [0.75, 0], "tasks.mixture.sck": [0, 1]
    }  # fmt: skip


def test_every_task_type_weighs_the_same_in_the_objective():
    found = {"nsp": {"loss": 1.0, "accuracy": 0.5}, "scc": {"loss": 4.0, "accuracy": 0.1}}
    objective = Objective(sweep().objective)
    assert objective(None, found)["objective"] == 2.5
    assert objective(None, found)["validation_loss_scc"] == 4.0
    assert objective(None, {"nsp": {"loss": float("nan")}})["objective"] == 1000.0


@pytest.fixture
def trials():
    generator = np.random.default_rng(0)
    rates = 10 ** generator.uniform(-3, 0, 30)
    return pd.DataFrame(
        {
            "state": ["finished", "stopped", "refused"] * 10,
            "rate": rates,
            "length": generator.choice([20, 50], 30),
            "kind": generator.choice(["a", "b"], 30),
            "objective": np.log10(rates) ** 2,
        }
    )


def test_the_setting_that_matters_is_the_important_one(trials):
    found = importance(trials, ["rate", "length", "kind"])
    assert max(found, key=found.get) == "rate" and found["rate"] > 0.8
    assert importance(trials.head(3), ["rate"]) == {}


def test_places_on_an_axis():
    heights, labels = places(pd.Series([0.01, 0.1, 1.0]))
    assert heights == pytest.approx([0, 0.5, 1]) and labels == [(0.0, "0.01"), (1.0, "1")]
    assert places(pd.Series([1, 2, 3]))[0] == pytest.approx([0, 0.5, 1])
    heights, labels = places(pd.Series(["x", "y", "x"]))
    assert heights.tolist() == [0, 1, 0] and labels == [(0.0, "x"), (1.0, "y")]


def test_the_picture_is_drawn(trials, tmp_path):
    draw_sweep(trials, ["rate", "length", "kind"], "loss", "min", tmp_path / "s.png", tmp_path / "s.svg")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "s.svg").read_text()


def test_a_sweep_survives_json():
    config = load_sweep_config(CONFIGS / "joint.yaml")
    assert build(SweepConfig, config.model_dump(mode="json", by_alias=True), "here") == config
    assert yaml.safe_load((CONFIGS / "smoke.yaml").read_text())["samples"] == 2


def test_a_trial_goes_on_from_what_it_was_given_even_if_it_had_been_further(tmp_path, monkeypatch):
    """Population-based training gave it another trial's snapshot of step 100; it came to 200 and was paused."""
    for number, step in {1: 200, 2: 300, 3: 200}.items():
        folder = tmp_path / f"checkpoint_{number:06}"
        folder.mkdir()
        (folder / "progress.json").write_text(json.dumps({"step": step}))

    def found(latest):
        given = SimpleNamespace(path=str(tmp_path / latest)) if latest else None
        monkeypatch.setattr("supmer_ray.sweep.trial.ray_tune.get_checkpoint", lambda: given)
        return [snapshot.path[-1] for snapshot in TrialHost(gpu=False).snapshots()]

    assert found("checkpoint_000003") == ["3", "2", "1"]
    assert found("checkpoint_000002") == ["2", "1"]
    assert found(None) == []
