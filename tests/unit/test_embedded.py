"""The embedded backbone: it assembles, loads as any encoder-decoder does, and its training resumes exactly."""

import copy
from dataclasses import replace
from functools import partialmethod

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from supmer_ray.config import EvaluateConfig
from supmer_ray.embedded import LEARNED, SETTINGS, WEIGHTS, assemble, resolve, settings_for, words
from supmer_ray.embedded.assemble import load_encoder
from supmer_ray.embedded.pretrain import PretrainConfig, Pretraining, pretrain
from supmer_ray.errors import UserError
from supmer_ray.meta.state import load_checkpoint
from supmer_ray.model.backbone import load_backbone
from supmer_ray.model.prompted import answer_logits, encode_prompted
from supmer_ray.reading import build
from supmer_ray.tasks.batch import Examples
from supmer_ray.tasks.collate import collate
from supmer_ray.tasks.types import ANSWERS

# Half precision takes many times as long where the processor has none.
TINY = PretrainConfig(blocks=2, batches=2, batch=2, prompt=3, limit=25, precision="float32")
"""Of ten documents none tells how something is ("very ⟨mask⟩")."""


@pytest.fixture(scope="module", autouse=True)
def encoder_read_once():
    """Each training has a copy of it."""
    encoder, tokenizer = load_encoder()
    with pytest.MonkeyPatch.context() as patch:
        for module in ("pretrain", "assemble"):
            patch.setattr(f"supmer_ray.embedded.{module}.load_encoder", lambda: (copy.deepcopy(encoder), tokenizer))
        yield


@pytest.fixture(scope="module")
def folder():
    return resolve("embedded")


@pytest.fixture(scope="module")
def pretraining():
    run = Pretraining(TINY)
    run.read_text()
    return run


def test_other_names_are_returned_as_they_are():
    assert resolve("google/flan-t5-base") == "google/flan-t5-base"
    assert settings_for("google/flan-t5-base") == {}


def test_shipped_weights_are_small_and_complete():
    learned = sum(file.stat().st_size for file in LEARNED.iterdir())
    assert WEIGHTS.stat().st_size + learned < 25 * 2**20
    assert not any("word_embeddings" in name for name in load_file(WEIGHTS))


def test_the_prompt_that_ships_was_learned_on_the_backbone_and_by_the_settings_that_ship():
    settings = build(EvaluateConfig, settings_for("embedded"), str(SETTINGS))
    checkpoint = load_checkpoint(LEARNED, load_backbone("embedded"))
    assert checkpoint.prompt.shape == (settings.run.prompt.length, 384)
    assert checkpoint.prompt.isfinite().all()
    assert checkpoint.config.meta == settings.run.meta
    assert checkpoint.config.tasks == settings.run.tasks
    assert "200 meta-steps" in (LEARNED / "CARD.md").read_text(encoding="utf-8")


def test_folder_loads_with_the_auto_classes(folder):
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder, _ = load_encoder()
    weights = model.state_dict()
    rows = encoder.embeddings.word_embeddings.weight
    assert weights["decoder.bert.embeddings.word_embeddings.weight"].equal(rows)
    assert weights["decoder.cls.predictions.decoder.weight"].equal(rows)
    own = load_file(WEIGHTS)
    for name, value in encoder.state_dict().items():
        fetched = not name.startswith(("encoder.layer.3.", "encoder.layer.4.", "encoder.layer.5."))
        assert fetched == (f"encoder.{name}" not in own) == weights[f"encoder.{name}"].equal(value), name
    for name, value in own.items():
        assert weights[name].equal(value.float())
    assert model.config.decoder_start_token_id == tokenizer.cls_token_id
    assert len(tokenizer("word " * 300)["input_ids"]) == 302
    assert len(tokenizer("word")["input_ids"]) == 3


def test_it_names_words_under_a_prompt(folder):
    """The likeliest topic word of plain headlines is the right one, with and without vocabulary rows before them."""
    backbone = load_backbone("embedded")
    topics = ["business", "music", "government", "football", "computer"]
    texts = [
        "Shares fall as oil price rises topic : [MASK] .",
        "Singer wins award for best album topic : [MASK] .",
        "Ministers debate new law in parliament topic : [MASK] .",
        "United beat Arsenal in cup final topic : [MASK] .",
        "Virus attacks Windows users online topic : [MASK] .",
    ]
    inputs = [[*backbone.prefix, *ids, *backbone.suffix] for ids in backbone.tokenize(texts)]
    examples = Examples.of(inputs, [[backbone.closing]] * len(texts))
    rows = collate(backbone, examples, np.arange(len(texts)))
    choices = torch.tensor([ids[0] for ids in backbone.tokenize(topics)])
    for length in (0, 10):
        prompt = backbone.random_rows(length, 5000, torch.Generator().manual_seed(0))
        states, layout = encode_prompted(backbone, prompt[None], rows)
        best = answer_logits(backbone, states, layout)[:, choices].argmax(1)
        assert (best == torch.arange(len(texts))).sum() >= 4


def test_examples_ask_for_whole_words_of_the_text(pretraining):
    generator = np.random.default_rng(0)
    vocabulary = pretraining.backbone.tokenizer.convert_ids_to_tokens(range(30522))
    for kind in words.WORD_SHARE:
        for _ in range(20):
            example = pretraining.words["train"].draw(kind, generator)
            assert example.body.count(pretraining.backbone.sentinel) == 1
            assert example.shares.sum() == pytest.approx(1)
            assert 1 <= len(example.words) <= words.ANSWERS
            assert all(vocabulary[word].isalpha() for word in example.words)


def test_too_little_text_is_told(pretraining, monkeypatch):
    monkeypatch.setattr(words.WordExamples, "_tail", lambda *_: None)
    with pytest.raises(UserError, match=r"^The text has no words of the kind 'manner' to ask for; read more documents"):
        pretraining.words["train"].draw("manner", np.random.default_rng(0))


def test_a_prompt_tells_of_the_classes_that_are_asked_for(pretraining):
    generator = np.random.default_rng(1)
    shown = 0
    for _ in range(40):
        example = pretraining.words["train"].draw("class", generator)
        assert example.prompt.count(int(example.words[0])) >= 1
        vectors = [-1 - token for token in example.prompt if token < 0]
        assert sorted(vectors) == list(range(len(example.vectors)))
        shown += bool(vectors)
    assert 10 < shown < 40


def test_held_out_documents_are_apart(pretraining):
    train, held_out = (pretraining.words[split].corpus for split in ("train", "held out"))
    sentences = {held_out.row_tokens(row).tobytes() for row in range(len(held_out))}
    shared = sum(train.row_tokens(row).tobytes() in sentences for row in range(len(train)))
    assert shared < 0.02 * len(sentences)  # stock phrases; a document in both would share far more


def test_task_batches_balance_their_answers(pretraining):
    for kind, answers in ANSWERS.items():
        batch = pretraining.task_batch(kind, "train", np.random.default_rng(0))
        said = [pretraining.formats.words[answer] for answer in answers]
        counts = [(batch.answers == word).sum().item() for word in said]
        assert sum(counts) == len(batch.answers)
        assert min(counts) > 0


def test_training_resumes_exactly(pretraining, tmp_path, monkeypatch):
    monkeypatch.setattr("supmer_ray.embedded.pretrain.TASK_BATCH", dict.fromkeys(ANSWERS, (2, 4)))
    whole = pretraining
    for block in range(2):
        if block == 1:
            whole.save(tmp_path / "checkpoint.safetensors")
        whole.train_block(whole.block(block))
    resumed = Pretraining(TINY)
    resumed.resume(tmp_path / "checkpoint.safetensors")
    resumed.words, resumed.stores = whole.words, whole.stores
    resumed.train_block(resumed.block(1))
    for name, value in whole.parameters.items():
        assert value.equal(resumed.parameters[name]), name
    with pytest.raises(UserError, match="other settings"):
        Pretraining(replace(TINY, seed=1)).resume(tmp_path / "checkpoint.safetensors")


def test_it_trains_in_half_precision(pretraining):
    """As what ships was trained: the same loss, within what eight bits leave of it."""
    half = Pretraining(replace(TINY, precision="bfloat16"))
    batch = pretraining.batch("words", [pretraining.words["train"].draw("matter", np.random.default_rng(0))] * 2,
                              np.random.default_rng(0), plain=True)  # fmt: skip
    whole = Pretraining(TINY)
    for run in (whole, half):
        run.decoder.eval()  # without dropout
    [exact, found] = [run.losses(batch, np.random.default_rng(0))[1].detach() for run in (whole, half)]
    assert found.tolist() != exact.tolist() and torch.allclose(found, exact, rtol=0.05)


@pytest.mark.parametrize(("tuned", "decoder"), [(0, 1), (6, 3)])
def test_a_variant_trains_and_loads_as_a_backbone(pretraining, tmp_path, tuned, decoder):
    variant = Pretraining(replace(TINY, tuned_layers=tuned, decoder_layers=decoder))
    drawn = [pretraining.words["train"].draw("matter", np.random.default_rng(0))] * 2
    variant.train_block([pretraining.batch("words", drawn, np.random.default_rng(0))])
    variant.export(tmp_path / "weights.safetensors")
    assemble.assemble(tmp_path / "weights.safetensors", tmp_path / "model")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert ((tmp_path / "model").stat().st_mode & 0o777, modes) == (0o755, {0o644}), "others may share the cache"
    loaded = load_backbone(str(tmp_path / "model")).model
    assert len(loaded.decoder.bert.encoder.layer) == decoder
    fetched, _ = load_encoder()
    for number, (layer, before) in enumerate(zip(loaded.encoder.encoder.layer, fetched.encoder.layer, strict=True)):
        same = layer.output.dense.weight.equal(before.output.dense.weight)
        assert same == (number < 6 - tuned)


def test_a_training_leaves_weights_card_and_model_and_goes_on(pretraining, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("supmer_ray.embedded.pretrain.TASK_BATCH", dict.fromkeys(ANSWERS, (2, 4)))
    monkeypatch.setattr(Pretraining, "evaluate", partialmethod(Pretraining.evaluate, batches=1))
    own = {"words": pretraining.words, "stores": pretraining.stores}
    monkeypatch.setattr(Pretraining, "read_text", lambda run: vars(run).update(own))
    pretrain(tmp_path, replace(TINY, blocks=1), "the first command")
    pretrain(tmp_path, TINY, "the command")
    assert capsys.readouterr().out.count("block ") == 2, "the first block is not trained again"
    card = (tmp_path / "CARD.md").read_text(encoding="utf-8")
    assert "4 steps of 2 examples" in card and "    the command\n" in card and "Up to block 1, of 2 steps" in card
    load_backbone(str(tmp_path / "model"))
    with pytest.raises(UserError, match="other settings"):
        pretrain(tmp_path, replace(TINY, decoder_layers=3))


def test_layers_that_the_encoder_lacks_are_refused():
    with pytest.raises(UserError, match="has 6 layers"):
        Pretraining(replace(TINY, tuned_layers=7))
    with pytest.raises(UserError, match="not 3 and 0"):
        Pretraining(replace(TINY, decoder_layers=0))


def test_card_stands_beside_the_weights():
    text = WEIGHTS.with_name("CARD.md").read_text(encoding="utf-8")
    assert "pretrain_backbone.py" in text
    for kind in (*words.WORD_SHARE, *ANSWERS):
        assert f"| {kind} |" in text
