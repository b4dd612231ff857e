"""Adapting many prompts together gives what each would have become alone; folders and predictions."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import save
from tiny import make_tiny_t5

from supmer_ray.config import AdaptConfig
from supmer_ray.errors import UserError
from supmer_ray.fewshot.adapt import (
    AdaptRun,
    Evaluation,
    _clipped,
    _Pool,
    _regularized,
    adapt,
    run_gradients,
    score,
    training_batches,
    vocabulary_prompt,
)
from supmer_ray.fewshot.adapted import Adapted, AdaptedRecord, load_adapted, predict, save_adapted
from supmer_ray.fewshot.definition import TaskDefinition
from supmer_ray.fewshot.encoding import TaskEncoder
from supmer_ray.fewshot.evaluate import _accuracies, _prompts
from supmer_ray.model.backbone import Backbone, load_backbone
from supmer_ray.model.prompted import encode_prompted, label_losses
from supmer_ray.model.regularizer import IdentityRegularizer, Regularizer
from supmer_ray.tasks.collate import collate

NOUNS = ["film", "story", "day", "rain", "house", "river", "bread", "song", "road", "light"]
LIKED, DISLIKED = ["fine", "sunny", "warm", "sweet", "bright"], ["dull", "bitter", "cold", "grey", "broken"]
P = 4


def rows(count: int, seed: int, kinds: list[list[str]]) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    texts, labels = [], []
    for number in range(count):
        kind = number % len(kinds)
        words = generator.choice(NOUNS, generator.integers(1, 9)).tolist() + generator.choice(kinds[kind], 2).tolist()
        texts.append(" ".join(words))
        labels.append(str(kind))
    return pd.DataFrame({"text": texts, "label": labels})


def definition(words: list[str]) -> TaskDefinition:
    return TaskDefinition.model_validate(
        {
            "name": "mood",
            "data": {"catalog": "mood"},
            "fields": ["text"],
            "patterns": ["{text} it is {mask} ."],
            "verbalizers": {str(number): word for number, word in enumerate(words)},
        }
    )


TWO, THREE = definition(["great", "terrible"]), definition(["great", "terrible", "song road"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    text = " ".join([*NOUNS, *LIKED, *DISLIKED, "it is great terrible ."])
    return make_tiny_t5(tmp_path_factory.mktemp("t5"), [text] * 20)


@pytest.fixture(scope="module")
def backbone(folder) -> Backbone:
    # float64, so that the order in which numbers are added decides nothing.
    return load_backbone(str(folder), dtype=torch.float64)


@pytest.fixture(scope="module")
def runs(backbone) -> list[AdaptRun]:
    """Four runs of two tasks (two and three labels, targets of 3 and 4 tokens) and two regularizers."""
    torch.manual_seed(1)
    regularizers = [IdentityRegularizer().double(), Regularizer(backbone.d_model, rank=8).double()]
    result = []
    for number, (task, kinds) in enumerate([(TWO, [LIKED, DISLIKED]), (THREE, [LIKED, DISLIKED, NOUNS])] * 2):
        encoder = TaskEncoder(backbone, task, max_length=60)
        train, dev = (encoder.split(rows(9, 10 * number + at, kinds)) for at in (0, 1))
        prompt = vocabulary_prompt(backbone, P, seed=number).double()
        result.append(AdaptRun(train, dev, encoder.verbalizer_ids, number, prompt, regularizers[number % 2]))
    return result


CONFIG = AdaptConfig(shots=4, steps=6, batch=4, rate=0.1, evaluate_every=4)


def test_a_run_that_is_no_number_any_more_does_not_spoil_the_others(backbone, runs):
    prompts = torch.stack([run.prompt for run in runs])
    pool = _Pool([run.train.examples for run in runs])
    drawn = [next(training_batches(run, CONFIG.batch)) for run in runs]
    wanted = run_gradients(backbone, prompts.clone().requires_grad_(), pool, drawn, token_budget=None)
    prompts[1] = torch.nan
    found = run_gradients(backbone, prompts.requires_grad_(), pool, drawn, token_budget=None)
    others = [0, 2, 3]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one[others], other[others])
    assert not found[0][1].isfinite().any()


@pytest.mark.parametrize("answers_only", [False, True])
def test_gradient_and_embedding_are_those_of_each_run_alone(backbone, runs, answers_only):
    prompts = torch.nn.Parameter(torch.stack([run.prompt for run in runs]))
    pool = _Pool([run.train.examples for run in runs])
    drawn = [next(training_batches(run, CONFIG.batch)) for run in runs]
    together = run_gradients(backbone, prompts, pool, drawn, token_budget=60, answers_only=answers_only)
    for number, (run, chosen) in enumerate(zip(runs, drawn, strict=True)):
        prompt = run.prompt[None].clone().requires_grad_()
        # One example at a time, no padding: the plainest way to say it.
        losses, states = [], []
        for row in chosen:
            one = collate(backbone, run.train.examples, np.array([row]))
            kept = one.labels[0] != -100
            one = replace(one, decoder_input_ids=one.decoder_input_ids[:, kept], labels=one.labels[:, kept])
            encoded, layout = encode_prompted(backbone, prompt, one)
            if answers_only:
                # Behind the sentinel, the labels' first tokens alone.
                own = backbone.logits(encoded, layout, one.decoder_input_ids)[:, 1, torch.tensor(run.verbalizer_ids)]
                right = torch.tensor([int(run.train.answers[row])])
                losses.append(torch.nn.functional.cross_entropy(own, right))
            else:
                losses.append(label_losses(backbone, encoded, layout, one)[0])
            states.append(encoded.detach())
        (expected,) = torch.autograd.grad(torch.stack(losses).mean(), prompt)
        torch.testing.assert_close(together[0][number], expected[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(together[1][number], torch.cat(states).mean(dim=0), rtol=1e-9, atol=1e-12)


def test_float32_gradients_together_are_within_1e_5_of_alone(folder, runs):
    single = load_backbone(str(folder), dtype=torch.float32)
    prompts = torch.nn.Parameter(torch.stack([run.prompt for run in runs]).float())
    drawn = [next(training_batches(run, CONFIG.batch)) for run in runs]
    together, *_ = run_gradients(single, prompts, _Pool([run.train.examples for run in runs]), drawn, token_budget=512)
    for number, run in enumerate(runs):
        own = torch.nn.Parameter(prompts.detach()[number : number + 1].clone())
        alone, *_ = run_gradients(single, own, _Pool([run.train.examples]), [drawn[number]], token_budget=4096)
        torch.testing.assert_close(together[number], alone[0], rtol=0, atol=1e-5)


def test_together_equals_one_after_the_other(backbone, runs):
    together = adapt(backbone, runs, CONFIG, token_budget=100)
    for run, result in zip(runs, together, strict=True):
        [alone] = adapt(backbone, [run], CONFIG)
        torch.testing.assert_close(result.prompt, alone.prompt, rtol=1e-5, atol=1e-6)
        assert result.best.step == alone.best.step
        assert result.best.accuracy == alone.best.accuracy
        assert [evaluation.step for evaluation in result.evaluations] == [0, 4, 6]


def test_a_step_is_adamw_on_the_regularized_gradient_clipped(backbone, runs, monkeypatch):
    """Written out, one run after the other; the second one's regularizer is no identity."""
    monkeypatch.setattr(Evaluation, "beats", lambda self, other: True)  # the last step's prompt is kept
    config = AdaptConfig(shots=4, steps=4, batch=4, rate=0.1, evaluate_every=4, clip=0.05, weight_decay=0.3)
    for run, result in zip(runs[:2], adapt(backbone, runs[:2], config), strict=True):
        theta = torch.nn.Parameter(run.prompt[None].clone())
        optimizer = torch.optim.AdamW([theta], lr=config.rate, weight_decay=config.weight_decay)
        pool, batches, losses = _Pool([run.train.examples]), training_batches(run, config.batch), []
        for _ in range(config.steps):
            gradient, embedding, loss = run_gradients(backbone, theta, pool, [next(batches)], token_budget=1 << 20)
            losses.append(loss.item())
            update = run.regularizer(gradient, embedding)[0].detach()
            assert update.norm() > config.clip
            theta.grad = update * config.clip / update.norm()
            optimizer.step()
        assert result.losses.tolist() == pytest.approx(losses, rel=1e-4)
        torch.testing.assert_close(result.prompt, theta.detach()[0].float(), rtol=1e-4, atol=1e-5)


def test_the_best_step_counts_step_0_and_the_prompt_is_that_steps(backbone, runs):
    results = adapt(backbone, runs, CONFIG)
    for run, result in zip(runs, results, strict=True):
        best = max(result.evaluations, key=lambda evaluation: (evaluation.accuracy, -evaluation.loss))
        assert result.best == best
        [probabilities] = score(backbone, result.prompt.double()[None], [run.dev.examples], [run.verbalizer_ids])
        assert (probabilities.argmax(axis=1) == run.dev.answers).mean() == pytest.approx(best.accuracy)
        if best.step == 0:
            torch.testing.assert_close(result.prompt, run.prompt.float())


def test_the_test_split_is_scored_with_the_prompt_that_was_chosen(backbone, runs):
    """Where the test split is the dev split, it is known what must come out."""
    config = CONFIG.model_copy(update={"loss": "answers", "rate": 0.3, "steps": 16, "evaluate_every": 2})
    results = adapt(backbone, runs, config)
    for run, result in zip(runs, results, strict=True):
        [learned] = _prompts(backbone, [run], [run.dev], config, None, None)
        assert learned.accuracies == [learned.best.accuracy] == [result.best.accuracy]
    assert any(result.evaluations[-1].accuracy < result.best.accuracy for result in results)


def test_training_lowers_the_loss_of_what_it_trains_on(backbone, runs):
    for result in adapt(backbone, runs[:2], AdaptConfig(steps=20, batch=9, rate=0.05, evaluate_every=20)):
        assert len(result.losses) == 20
        assert result.losses[-1] < result.losses[0]


def test_selection_prefers_accuracy_then_loss_and_never_a_loss_that_is_no_number():
    first = Evaluation(0, 0.5, 1.0)
    assert Evaluation(5, 0.6, 9.0).beats(first)
    assert Evaluation(5, 0.5, 0.9).beats(first)
    assert not Evaluation(5, 0.5, 1.0).beats(first)
    assert not Evaluation(5, 0.4, 0.1).beats(first)
    assert not Evaluation(5, 0.9, float("nan")).beats(first)
    assert not Evaluation(5, 0.5, float("nan")).beats(first)


def test_every_epoch_uses_every_example_once(runs):
    stream = training_batches(runs[0], 4)
    epochs = [np.concatenate([next(stream) for _ in range(3)]) for _ in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(9))
    assert epochs[0].tolist() != epochs[1].tolist()


def test_seeds_have_an_order_and_a_prompt_of_their_own(backbone, runs):
    one, other, again = (next(training_batches(replace(runs[0], seed=seed), 9)).tolist() for seed in (0, 1, 0))
    assert one == again != other
    one, other, again = (vocabulary_prompt(backbone, P, seed) for seed in (0, 1, 0))
    assert torch.equal(one, again) and not torch.equal(one, other)


def choices(count: int, seed: int) -> pd.DataFrame:
    """Which of two words was liked."""
    generator = np.random.default_rng(seed)
    liked, disliked, nouns = (generator.choice(words, count) for words in (LIKED, DISLIKED, NOUNS))
    first = np.arange(count) % 2 == 0
    return pd.DataFrame(
        {
            "noun": nouns,
            "a": np.where(first, liked, disliked),
            "b": np.where(first, disliked, liked),
            "label": np.where(first, "A", "B"),
        }
    )


CHOICE = TaskDefinition.model_validate(
    {
        "name": "choice",
        "data": {"catalog": "choice"},
        "fields": ["noun"],
        "candidates": {"A": "a", "B": "b"},
        "patterns": ["{noun} {candidate} it is {mask} ."],
        "verbalizers": {"wrong": "terrible", "right": "great"},
    }
)


def test_a_choice_is_learned_candidate_by_candidate_beside_other_tasks(backbone, runs):
    encoder = TaskEncoder(backbone, CHOICE, max_length=60)
    train, dev, test = (encoder.split(choices(size, seed)) for seed, size in enumerate((16, 16, 40)))
    prompt = vocabulary_prompt(backbone, P, seed=0).double()
    run = AdaptRun(train, dev, encoder.verbalizer_ids, 0, prompt, IdentityRegularizer())
    epoch = [numbers for numbers, _ in zip(training_batches(run, 8), range(2), strict=False)]
    assert [len(numbers) for numbers in epoch] == [16, 16]  # of 8 rows each
    assert sorted(np.concatenate(epoch)) == list(range(32))
    config = AdaptConfig(steps=120, batch=16, rate=0.1, evaluate_every=20, loss="answers")
    result, _ = adapt(backbone, [run, runs[0]], config)
    [alone] = adapt(backbone, [run], config)
    prompts = torch.stack([result.prompt, alone.prompt]).double()
    [[tested], [tested_alone]] = _accuracies(backbone, prompts, [run, run], [test], None)
    assert tested == tested_alone
    assert result.losses[-1] < result.losses[0] and min(result.best.accuracy, tested) > 0.7


def test_each_run_is_clipped_for_itself():
    gradients = torch.stack([torch.full((2, 3), 0.01), torch.full((2, 3), 7.0)])
    clipped = _clipped(gradients, 1.0)
    torch.testing.assert_close(clipped[0], gradients[0])
    assert clipped[1].norm().item() == pytest.approx(1.0, abs=1e-6)


def test_each_run_meets_its_own_regularizer(runs):
    gradients, embeddings = torch.randn(4, P, 32, dtype=torch.float64), torch.randn(4, 32, dtype=torch.float64)
    result = _regularized(runs, gradients, embeddings)
    torch.testing.assert_close(result[0::2], gradients[0::2])
    expected, _ = runs[1].regularizer(gradients[1::2], embeddings[1::2])
    torch.testing.assert_close(result[1::2], expected.detach())


def test_scores_are_probabilities_in_row_order(backbone, runs):
    prompts = torch.stack([run.prompt for run in runs])
    batched = score(
        backbone, prompts, [run.dev.examples for run in runs], [run.verbalizer_ids for run in runs], token_budget=200
    )
    for number, (run, probabilities) in enumerate(zip(runs, batched, strict=True)):
        assert probabilities.shape == (9, len(run.verbalizer_ids))
        np.testing.assert_allclose(probabilities.sum(axis=1), 1)
        [alone] = score(
            backbone, prompts[number : number + 1], [run.dev.examples], [run.verbalizer_ids], token_budget=1
        )
        np.testing.assert_allclose(probabilities, alone, atol=1e-9)


@pytest.fixture(scope="module")
def adapted(folder, tmp_path_factory) -> Path:
    backbone = load_backbone(str(folder))
    encoder = TaskEncoder(backbone, TWO, max_length=60)
    train, dev = (encoder.split(rows(8, seed, [LIKED, DISLIKED])) for seed in (0, 1))
    prompt = vocabulary_prompt(backbone, P, seed=0)
    run = AdaptRun(train, dev, encoder.verbalizer_ids, 0, prompt, IdentityRegularizer())
    [result] = adapt(backbone, [run], CONFIG)
    record = AdaptedRecord(
        definition=TWO,
        backbone=str(folder),
        backbone_fingerprint=backbone.fingerprint,
        tokenizer_fingerprint=backbone.tokenizer_fingerprint,
        config=CONFIG,
        seed=0,
        regularized=False,
        best_step=result.best.step,
        dev_accuracy=result.best.accuracy,
    )
    place = tmp_path_factory.mktemp("adapted") / "mood"
    kept = Adapted(result.prompt.numpy(), record)
    save_adapted(kept, place)
    with pytest.raises(UserError, match=r"already holds a run"):
        save_adapted(kept, place)
    save_adapted(kept, place, overwrite=True)
    loaded = load_adapted(place)
    np.testing.assert_array_equal(loaded.prompt, result.prompt)
    assert loaded.record.definition == TWO and loaded.record.config == CONFIG
    assert sorted(file.name for file in place.iterdir()) == ["adapted.json", "prompt.safetensors"]
    assert [file.name for file in place.parent.iterdir()] == ["mood"]
    return place


def test_what_may_not_be_read_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "adapted.json").write_text("{}")

    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(
        UserError, match=r"^Cannot read .*adapted\.json \(Permission denied\); check its permissions\.$"
    ):
        load_adapted(tmp_path)
    monkeypatch.setattr(Path, "is_file", refuse)  # of a folder that may not be entered
    with pytest.raises(UserError, match=r"^Cannot read .*adapted\.json \(Permission denied\)"):
        load_adapted(tmp_path)


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_predict_keeps_rows_and_order(adapted, tmp_path, ending):
    table = pd.DataFrame(
        {"id": ["007", "NA", "1"], "text": ["fine film", "", 'grey, "broken" road\nsong'], "n": [1, 2, 3]}
    )
    source, target = tmp_path / f"rows{ending}", tmp_path / "out" / f"labels{ending}"
    if ending == ".csv":
        table.to_csv(source, index=False)
    elif ending == ".jsonl":
        table.to_json(source, orient="records", lines=True)
    else:
        table.to_parquet(source)
    returned = predict(adapted, source, target)
    read = {".csv": pd.read_csv, ".jsonl": lambda file, **how: pd.read_json(file, lines=True, **how)}.get(ending)
    written = (
        read(target, dtype={"id": str}, **({"keep_default_na": False} if ending == ".csv" else {}))
        if read
        else pd.read_parquet(target)
    )
    assert list(written.columns) == ["id", "text", "n", "predicted_label", "probability"]
    assert written["id"].tolist() == ["007", "NA", "1"] and written["text"].tolist() == table["text"].tolist()
    assert written["n"].tolist() == [1, 2, 3]
    assert set(written["predicted_label"].astype(str)) <= {"0", "1"}
    assert written["probability"].between(0.5, 1).all()
    assert written["probability"].tolist() == pytest.approx(returned["probability"].tolist())
    assert [file.name for file in target.parent.iterdir()] == [target.name]
    with pytest.raises(UserError, match=r"exists; choose another name, or add --overwrite"):
        predict(adapted, source, target)
    with pytest.raises(UserError, match=r"is the input as well; name another file"):
        predict(adapted, source, source, overwrite=True)
    predict(adapted, source, target, overwrite=True)


def test_predict_refuses_bad_input_and_writes_nothing(adapted, tmp_path):
    target = tmp_path / "out.csv"
    for name, text, message in [
        ("a.csv", "body\nx\n", "has no column 'text'; its columns are: body"),
        ("b.csv", "text\n", "holds no rows"),
        ("c.csv", "text,probability\nx,1\n", "already has a column 'probability'"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message):
            predict(adapted, tmp_path / name, target)
    with pytest.raises(UserError, match=r"no file"):
        predict(adapted, tmp_path / "missing.csv", target)
    with pytest.raises(UserError, match=r"ends in '.txt'"):
        predict(adapted, tmp_path / "a.csv", tmp_path / "out.txt")
    assert not target.exists()


def test_predict_asks_for_each_candidate_and_counts_rows(adapted, tmp_path):
    """What another prompt learned will do: here only labels, counts and what is left out matter."""
    record = json.loads((adapted / "adapted.json").read_text())
    record["definition"] = CHOICE.model_dump(mode="json")
    folder = tmp_path / "choice"
    folder.mkdir()
    (folder / "adapted.json").write_text(json.dumps(record))
    (folder / "prompt.safetensors").write_bytes((adapted / "prompt.safetensors").read_bytes())
    source, target = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows = [{"noun": "film", "a": "fine", "b": "dull", "x": 1e-12}, {"noun": "road", "a": None, "b": "warm", "x": "1"}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = []
    predict(folder, source, target, progress=lambda _, done, total: counts.append((done, total)))
    assert counts[-1] == (2, 2)
    written = [json.loads(line) for line in target.read_text().splitlines()]
    assert [{key: row[key] for key in rows[0]} for row in written] == rows
    assert written[0]["predicted_label"] in ("A", "B") and 0.5 <= written[0]["probability"] <= 1
    assert (written[1]["predicted_label"], written[1]["probability"]) == ("B", 1.0)
    with pytest.raises(UserError, match=r"Cannot write .*out.parquet .*; write a file that ends in .csv or .jsonl"):
        predict(folder, source, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()
    with pytest.raises(UserError, match=r"A s3://… address was given where a path is needed"):
        predict(folder, source, Path("s3://bucket/out.jsonl"))


def test_another_backbone_or_damage_is_refused(adapted, folder, tmp_path):
    source = tmp_path / "rows.csv"
    source.write_text("text\nfine film\n")
    other = load_backbone(str(make_tiny_t5(tmp_path / "other", ["it is great terrible . fine film"] * 9)))
    with pytest.raises(UserError, match=r"was adapted for the backbone .* other weights or another vocabulary"):
        predict(adapted, source, tmp_path / "out.csv", backbone=other)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    with pytest.raises(UserError, match=r"holds no adapted.json"):
        load_adapted(damaged)
    record = json.loads((adapted / "adapted.json").read_text())
    (damaged / "adapted.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"lacks prompt.safetensors"):
        load_adapted(damaged)
    content = bytearray((adapted / "prompt.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "prompt.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"prompt.safetensors is damaged"):
        load_adapted(damaged)
    for text in ('{"format": 1,', '"hello"', "5", "[" * 100_000):
        (damaged / "adapted.json").write_text(text)
        with pytest.raises(UserError, match=r"adapted.json is damaged; adapt the task again"):
            load_adapted(damaged)
    for pattern, sentence in {
        9: r"pattern 9 is none of the task's 1, which are",
        -1: r"'pattern' in .*equal to 0",
    }.items():
        (damaged / "adapted.json").write_text(json.dumps({**record, "pattern": pattern}))
        with pytest.raises(UserError, match=sentence):
            load_adapted(damaged)


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        (b"nothing", r"prompt\.safetensors holds no prompt; adapt the task again"),
        (save({"other": np.zeros((2, 3), np.float32)}), r"prompt\.safetensors holds no prompt; adapt the task again"),
        (save({"prompt": np.zeros(3, np.float32)}), r"prompt\.safetensors holds no prompt; adapt the task again"),
        (
            save({"prompt": np.zeros((2, 3), np.float32)}),
            r"is 3 numbers wide and the backbone '.*' takes 32; adapt",
        ),
    ],
    ids=["no safetensors", "another name", "one row", "another width"],
)
def test_what_is_no_prompt_is_refused_whatever_its_digest(adapted, tmp_path, prompt, sentence):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    record = json.loads((adapted / "adapted.json").read_text())
    (damaged / "adapted.json").write_text(json.dumps({**record, "prompt_sha256": hashlib.sha256(prompt).hexdigest()}))
    (damaged / "prompt.safetensors").write_bytes(prompt)
    (tmp_path / "rows.csv").write_text("text\nfine film\n")
    with pytest.raises(UserError, match=sentence):
        predict(damaged, tmp_path / "rows.csv", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()
