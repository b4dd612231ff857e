"""The packed forwards give the library's numbers: states, logits and gradients, in every layout and precision."""

import copy
import os
import shutil

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    EncoderDecoderModel,
    MT5Config,
    MT5ForConditionalGeneration,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
)
from transformers import T5ForConditionalGeneration as T5

from supmer_ray.model.backbone import forward_of
from supmer_ray.model.bert import BertForward
from supmer_ray.model.library import LibraryForward
from supmer_ray.model.packed import Layout
from supmer_ray.model.t5 import T5Forward, _RootMeanSquare

D = 64


T5_SHAPE = {"vocab_size": 150, "d_model": D, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_heads": 4}


def t5(**settings):
    return T5(T5Config(**T5_SHAPE, dropout_rate=0.0, decoder_start_token_id=0, **settings))


def mt5():
    return MT5ForConditionalGeneration(MT5Config(**T5_SHAPE, dropout_rate=0.0, decoder_start_token_id=0))


def bert():
    shape = {"vocab_size": 150, "hidden_size": D, "num_attention_heads": 4, "intermediate_size": 96}
    encoder = BertModel(BertConfig(**shape, num_hidden_layers=3, max_position_embeddings=64))
    decoder = BertLMHeadModel(BertConfig(**shape, num_hidden_layers=2, is_decoder=True, add_cross_attention=True))
    return EncoderDecoderModel(encoder=encoder, decoder=decoder)


MODELS = {
    "t5": t5,
    "t5 v1.1": lambda: t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mt5": mt5,
    "bert": bert,
}

LAYOUTS = {
    "equal": Layout((9, 9, 9), (9, 9, 9)),
    "different": Layout((17, 9, 9, 4), (17, 9, 9, 4)),
    "with padding": Layout((17, 17, 9, 9), (17, 5, 9, 6)),
    "one rectangle": Layout((16, 16, 16), (16, 3, 11)),
}


def make(name):
    torch.manual_seed(0)
    return MODELS[name]().eval().requires_grad_(False)


def run(forward, embeddings, layout):
    """States, logits and the gradient of a loss that reads both, towards the embeddings."""
    x = embeddings.clone().requires_grad_()
    states = forward.encode(x, layout)
    ids = torch.tensor([[0, 5, 7]]).expand(len(layout), 3)
    logits = forward.decode(states, layout, ids)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = logits.log_softmax(-1)[..., 3].sum() + states.to(logits.dtype).square().mean()
    (gradient,) = torch.autograd.grad(loss, x)
    return states.detach(), logits.detach(), gradient


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_packed_is_the_library(name, layout):
    model = make(name).double()
    assert isinstance(forward_of(model), BertForward if name == "bert" else T5Forward)
    embeddings = torch.randn(layout.positions, D, dtype=torch.float64)
    expected = run(LibraryForward(copy.deepcopy(model)), embeddings, layout)
    for found, wanted in zip(run(forward_of(model), embeddings, layout), expected, strict=True):
        assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_a_mixture_of_experts_computes_each_example_as_it_does_alone():
    torch.manual_seed(0)
    shape = T5_SHAPE | {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 2}
    config = SwitchTransformersConfig(**shape, expert_capacity=64, dropout_rate=0.0, router_jitter_noise=0.0)
    model = SwitchTransformersForConditionalGeneration(config).eval().requires_grad_(False).double()
    layout, forward = LAYOUTS["different"], forward_of(model)
    assert isinstance(forward, LibraryForward)
    embeddings = torch.randn(layout.positions, D, dtype=torch.float64)
    ids = torch.tensor([[0, 5, 7]])
    logits = forward.decode(forward.encode(embeddings, layout), layout, ids.expand(len(layout), 3))
    for own, found in zip(embeddings.split(list(layout.widths)), logits, strict=True):
        encoded = model.get_encoder()(inputs_embeds=own[None])
        wanted = model(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=False).logits[0]
        assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("library", [False, True], ids=["ours", "library"])
def test_logits_from_a_position_on_are_those_of_all(name, library):
    model, layout = make(name).double(), LAYOUTS["different"]
    forward = LibraryForward(model) if library else forward_of(model)
    states = forward.encode(torch.randn(layout.positions, D, dtype=torch.float64), layout)
    ids = torch.tensor([[0, 5, 7]]).expand(len(layout), 3)
    whole = forward.decode(states, layout, ids)
    assert_close(forward.decode(states, layout, ids, 1), whole[:, 1:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_float32_is_within_1e_5_of_the_library(name):
    model, layout = make(name), LAYOUTS["with padding"]
    embeddings = torch.randn(layout.positions, D)
    expected = run(LibraryForward(copy.deepcopy(model).double()), embeddings.double(), layout)
    for found, wanted in zip(run(forward_of(model), embeddings, layout), expected, strict=True):
        assert (found - wanted).norm() / wanted.norm() < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_close_to_float32_on_the_same_weights(name):
    """What rounding the factors of products to eight bits costs: more in the gradient, where it flips relus too."""
    model, layout = make(name).bfloat16(), LAYOUTS["different"]
    embeddings = torch.randn(layout.positions, D)
    expected = run(LibraryForward(copy.deepcopy(model).float()), embeddings, layout)
    found = run(forward_of(model), embeddings, layout)
    assert found[0].dtype == torch.float32
    for own, wanted, allowed in zip(found, expected, (2e-2, 2e-2, 1e-1), strict=True):
        assert (own - wanted).norm() / wanted.norm() < allowed


def test_activations_computed_again_give_the_same_gradient():
    model, layout = make("t5"), LAYOUTS["different"]
    embeddings = torch.randn(layout.positions, D)
    forward = T5Forward(model)
    *_, expected = run(forward, embeddings, layout)
    forward.checkpointing = True
    *_, found = run(forward, embeddings, layout)
    assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="torch compiles for a CPU with a C++ compiler"
)
def test_a_compiled_norm_is_the_same_norm():
    x, weight = torch.randn(37, D), torch.rand(D)
    found = []
    for compiled in (False, True):
        at = x.clone().requires_grad_()
        out = _RootMeanSquare.apply(at, weight, 1e-6, compiled)
        [gradient] = torch.autograd.grad(out.square().sum(), at, create_graph=True)
        [second] = torch.autograd.grad(gradient.square().sum(), at)  # what second-order meta-learning asks for
        found.append((out.detach(), gradient.detach(), second))
    for own, wanted in zip(*found, strict=True):
        assert_close(own, wanted, rtol=1e-5, atol=1e-5)


def test_the_norm_has_a_second_derivative():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.rand(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: _RootMeanSquare.apply(x, weight, 1e-6, False), x)
    assert torch.autograd.gradgradcheck(lambda x: _RootMeanSquare.apply(x, weight, 1e-6, False), x)
