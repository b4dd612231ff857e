"""Loading frozen models: what they are told apart by, where an answer goes, and what is refused."""

import copy
import json
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceTrainer
from tiny import make_tiny_bart, make_tiny_t5
from transformers import (
    AutoModelForSeq2SeqLM,
    ByT5Tokenizer,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    MBartConfig,
    MBartForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
    RobertaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from supmer_ray.data.embed import _means, mean_pooled
from supmer_ray.data.sentences import tokenizer_of
from supmer_ray.errors import UserError
from supmer_ray.model.backbone import Backbone, _spread, load_backbone, outline
from supmer_ray.model.library import LibraryForward
from supmer_ray.model.packed import Layout
from supmer_ray.model.prompted import Rows, encode_prompted
from supmer_ray.tasks.batch import Examples

TEXTS = ["The quick brown fox jumps over the lazy dog.", "A sentence about markets, music and rain."] * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_t5(tmp_path_factory.mktemp("t5"), TEXTS)


def test_a_t5_answers_at_its_sentinels(folder):
    backbone = load_backbone(str(folder))
    assert backbone.tokenizer.convert_ids_to_tokens([backbone.sentinel, backbone.closing]) == [
        "<extra_id_0>",
        "<extra_id_1>",
    ]
    assert (backbone.prefix, backbone.suffix) == ([], [backbone.tokenizer.eos_token_id])
    assert backbone.max_positions is None
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())


@pytest.mark.parametrize(
    ("family", "pieces"), [("t5", ["<extra_id_0>", "<extra_id_1>"]), ("mt5", ["▁<extra_id_0>", "▁<extra_id_1>"])]
)
def test_a_vocabulary_that_is_a_sentencepiece_model_alone(tmp_path, family, pieces):
    """As T5 v1.1 and mT5 are published: T5's tokenizer adds its sentinels, mT5's pieces hold them."""
    own = [] if family == "t5" else pieces
    with (tmp_path / "spiece.model").open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS),
            model_writer=file,
            vocab_size=60,
            hard_vocab_limit=False,
            user_defined_symbols=own,
            **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2},
        )
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0 if own else 100}
    settings |= {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    config, model = {"t5": (T5Config, T5ForConditionalGeneration), "mt5": (MT5Config, MT5ForConditionalGeneration)}[
        family
    ]
    shape = {"vocab_size": 200, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model(config(**shape, decoder_start_token_id=0)).save_pretrained(tmp_path)
    for load in (load_backbone, outline):
        backbone = load(str(tmp_path))
        assert backbone.tokenizer.convert_ids_to_tokens([backbone.sentinel, backbone.closing]) == pieces
        assert (backbone.pad, backbone.prefix, backbone.suffix) == (0, [], [1])
        [ids] = backbone.tokenize(["The lazy dog jumps."])
        assert backbone.tokenizer.decode(ids) == "The lazy dog jumps."
    # A text that spells one out does not ask for an answer there.
    assert backbone.sentinel not in tokenizer_of(str(tmp_path))(["The lazy <extra_id_0> dog jumps."])[0]


def test_byt5_answers_at_the_bytes_that_it_was_trained_with(tmp_path):
    shape = {"vocab_size": 384, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0)).save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path))
    assert (backbone.sentinel, backbone.closing) == (258, 257)
    assert "<extra_id_0>" in backbone.tokenizer.get_vocab()


def test_what_the_decoder_reads_first_stands_in_either_file_or_is_asked_for(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    files = [tmp_path / name for name in ("config.json", "generation_config.json")]
    values = [json.loads(file.read_text()) for file in files]
    assert load_backbone(str(tmp_path)).start == 0
    files[0].write_text(json.dumps({**values[0], "decoder_start_token_id": None}))
    files[1].write_text(json.dumps({**values[1], "decoder_start_token_id": 7}))
    assert [load(str(tmp_path)).start for load in (load_backbone, outline)] == [7, 7]
    files[1].unlink()
    for load in (load_backbone, outline):
        with pytest.raises(UserError, match=r"does not say what its decoder reads first; write decoder_start_token_id"):
            load(str(tmp_path))


def test_a_backbone_with_nothing_to_put_an_answer_at_is_refused(tmp_path):
    folder = make_tiny_bart(tmp_path, TEXTS)
    assert load_backbone(str(folder)).sentinel is not None
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["mask_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=rf"^The tokenizer of '{folder}' has neither <extra_id_0> nor a mask token"):
        load_backbone(str(folder))


def test_a_backbone_that_has_embedded_sentences_still_gives_gradients(folder):
    backbone = load_backbone(str(folder))
    inputs = [np.array(backbone.tokenizer(text)["input_ids"]) for text in TEXTS[:2]]
    vectors = mean_pooled(backbone, Examples.of(inputs, [[backbone.closing]] * 2), 100)
    for ids, vector in zip(inputs, vectors, strict=True):
        states = backbone.encode(backbone.embed(torch.tensor(ids)), Layout((len(ids),), (len(ids),)))
        np.testing.assert_allclose(states.mean(dim=0), vector, atol=1e-6)
    x = backbone.embed(torch.tensor(inputs[0])).requires_grad_()
    backbone.encode(x, Layout((len(x),), (len(x),))).sum().backward()
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("scaled_by", ["encoder", "embedding"])
def test_embeddings_are_as_long_as_the_encoder_reads_them(scaled_by):
    """Pegasus' encoder scales what it has looked up, mBART's embedding does: both as well where a prompt begins."""
    config, model = {
        "encoder": (PegasusConfig, PegasusForConditionalGeneration),
        "embedding": (MBartConfig, MBartForConditionalGeneration),
    }[scaled_by]
    small = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    torch.manual_seed(0)
    small |= {"vocab_size": 50, "d_model": 16, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    made = model(config(**small, scale_embedding=True, decoder_start_token_id=0))
    backbone = Backbone(made, None, "scaled")
    ids = torch.tensor([5, 6, 7, 8])
    wanted = made.get_encoder()(input_ids=ids[None]).last_hidden_state[0]
    torch.testing.assert_close(backbone.encode(backbone.embed(ids), Layout((4,), (4,))), wanted)
    rows = backbone.random_rows(3, 50, torch.Generator().manual_seed(0))
    same = torch.randint(50, (3,), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rows, backbone.embed(same).detach())
    assert rows.norm(dim=1).median() > 2 * made.get_input_embeddings().weight.norm(dim=1).median()


@pytest.mark.parametrize("keys", [(5, 5, 5), (5, 2, 4)])
def test_a_mean_over_examples_of_one_width_leaves_padding_out(keys):
    states, layout = torch.randn(15, 8), Layout((5, 5, 5), keys)
    wanted = torch.stack([own[:key].mean(dim=0) for own, key in zip(states.split(5), keys, strict=True)])
    torch.testing.assert_close(_means(states, layout), wanted)


def test_the_fingerprint_knows_the_weights_and_not_the_precision(folder, tmp_path):
    fingerprints = {load_backbone(str(folder), dtype=dtype).fingerprint for dtype in (torch.float32, torch.bfloat16)}
    assert len(fingerprints) == 1
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 0.5
    model.save_pretrained(tmp_path)
    load_backbone(str(folder)).tokenizer.save_pretrained(tmp_path)
    assert load_backbone(str(tmp_path)).fingerprint not in fingerprints


def test_the_fingerprint_looks_at_the_same_values_on_every_processor():
    """What torch finds with fused multiply-add; without it, it finds others."""
    sums = {300: 38_145, 384 * 384: 18_874_115, 30522 * 384: 1_500_217_159, 32128 * 768: 3_158_310_880}
    assert {size: int(_spread(size).sum()) for size in sums} == sums
    assert _spread(1).tolist() == [0] and _spread(3).tolist() == [0, 1, 2]
    assert _spread(32128 * 768)[-1] == 32128 * 768 - 1


def test_a_large_embedding_has_a_fingerprint(folder):
    """Of T5-base's size: 24,674,303, its last place, is no float32."""
    backbone = load_backbone(str(folder))
    backbone.model.shared.weight = torch.nn.Parameter(torch.zeros(32128, 768))
    assert len(backbone.fingerprint) == 64


def test_each_example_stands_behind_its_own_prompt(folder):
    backbone = load_backbone(str(folder))
    prompts = torch.randn(2, 3, backbone.d_model, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(2, 1, dtype=torch.long)

    def states(task):
        layout = Layout((3,) * len(task), (3,) * len(task))
        ids = torch.tensor([7, 8, 9] * len(task))
        rows = Rows(ids, layout, labels, labels, labels[:, :0], torch.tensor(task))
        return encode_prompted(backbone, prompts, rows)[0].view(len(task), 6, -1)

    both = states([1, 0])
    torch.testing.assert_close(both[:1], states([1]))
    torch.testing.assert_close(both[1:], states([0]))
    assert (both[0] - both[1]).abs().max() > 1e-3


def test_what_cannot_be_loaded_is_one_sentence(tmp_path, monkeypatch, caplog):
    """Without a hub it is told at once, not after the ten attempts that transformers makes."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    for name in (str(tmp_path), "nobody/no-such-model", "no such name"):
        with pytest.raises(UserError, match="Cannot load the backbone") as caught:
            load_backbone(name)
        assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 60 and not caplog.records


@pytest.mark.parametrize("damage", ["cut", "empty", "other shapes"])
def test_damaged_weights_are_one_sentence(folder, tmp_path, damage):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    if damage == "other shapes":
        config.write_text(json.dumps({**json.loads(config.read_text()), "d_model": 64}))
    else:
        weights.write_bytes(weights.read_bytes()[: 400 if damage == "cut" else 0])
    with pytest.raises(UserError, match=f"Cannot load the backbone '{tmp_path}'") as caught:
        load_backbone(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", {"num_layers": "six"}),
        ("config.json", {"d_model": None}),
        ("config.json", []),
        ("tokenizer.json", []),
        ("tokenizer.json", {"model": None}),
    ],
)
@pytest.mark.parametrize("load", [load_backbone, outline])
def test_a_damaged_file_of_a_backbone_is_one_sentence(folder, tmp_path, name, content, load):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if isinstance(content, dict):
        content = {**json.loads((tmp_path / name).read_text()), **content}
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"Cannot load the backbone '{tmp_path}'") as caught:
        load(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_positions_are_counted_from_behind_the_padding_where_an_encoder_does():
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"intermediate_size": 16, "max_position_embeddings": 66, "pad_token_id": 1}
    decoder = RobertaConfig(**shape, is_decoder=True, add_cross_attention=True)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(RobertaConfig(**shape), decoder)
    config.decoder_start_token_id = 0
    roberta = Backbone(EncoderDecoderModel(config=config), None, "roberta")
    assert roberta.max_positions == 64
    for length in (64, 65):
        with pytest.raises(RuntimeError, match="out of bounds") if length > 64 else nullcontext():
            roberta.encode(torch.randn(length, 16), Layout((length,), (length,)))


@pytest.mark.parametrize("load", [load_backbone, outline])
def test_code_of_a_model_is_never_run_whatever_is_answered(folder, tmp_path, monkeypatch, load):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForSeq2SeqLM": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what a user might answer
    with pytest.raises(UserError, match="Cannot load the backbone"):
        load(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_pickle_is_never_read(folder, tmp_path):
    """Weights in PyTorch's pickle format are refused, though they lie where they would be looked for."""
    for file in folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(AutoModelForSeq2SeqLM.from_pretrained(folder).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_backbone(str(tmp_path))


def test_a_micro_batch_on_a_gpu_takes_half_of_its_memory_and_less_where_scores_are_kept(folder, monkeypatch):
    backbone = load_backbone(str(folder))
    assert load_backbone(str(folder), gpu_share=0.5).gpu_share == 0.5 and backbone.gpu_share == 1
    encoder = backbone.model.get_encoder()
    outputs = sum(part.out_features for part in encoder.modules() if isinstance(part, torch.nn.Linear))

    def budget(memory, forward=backbone.forward, gpu_share=1.0):
        monkeypatch.setattr(Backbone, "device", torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
        own = copy.copy(backbone)
        own.forward, own.gpu_share = forward, gpu_share
        return own.token_budget

    assert backbone.token_budget == 4096
    backbone.__dict__.pop("token_budget")
    assert budget(2 * 20_000 * 1.5 * 4 * outputs) == 20_000
    assert budget(2 * 20_000 * 1.5 * 4 * outputs, gpu_share=0.5) == 10_000
    assert budget(2**50) == 65536 and budget(2**20) == 4096
    assert budget(2**50, LibraryForward(backbone.model)) == 16384


@pytest.mark.parametrize("setting", ["checkpoint_activations", "compile_norms"])
def test_what_only_t5_can_is_refused_elsewhere(folder, tmp_path, monkeypatch, setting):
    monkeypatch.setenv("CXX", sys.executable)  # there, and not called
    getattr(load_backbone(str(folder)), setting)()
    bart = load_backbone(str(make_tiny_bart(tmp_path, TEXTS)))
    with pytest.raises(UserError, match=rf"workers.{setting} works with T5 models, and .* is none; set it to false"):
        getattr(bart, setting)()


def test_norms_are_not_compiled_without_a_compiler(folder, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"needs the C\+\+ compiler no-such-compiler, which is not on the PATH"):
        load_backbone(str(folder)).compile_norms()
