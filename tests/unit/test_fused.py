"""The GPU kernels against plain torch: on a GPU where there is one, else as Triton's interpreter runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import T5Config, T5ForConditionalGeneration

from supmer_ray.model import packed, t5
from supmer_ray.model.packed import SMALL, Layout, attention

pytest.importorskip("triton")

from supmer_ray.model.fused import AddNorm, PackedAttention, reach

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, WIDTH = 2, 16
LAYOUTS = {
    "one": Layout((1,), (1,)),
    "of a decoder": Layout((3, 3, 3), (3, 3, 3)),
    "equal": Layout((20, 20), (20, 20)),
    "different, with padding": Layout((40, 7, 33), (33, 7, 1)),
    "several blocks": Layout((150, 70), (131, 70)),
}


@pytest.fixture(autouse=True)
def nothing_left_empty():
    """What a kernel does not write is not a number."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def relative(found, wanted):
    return float((found.double() - wanted.double()).norm().detach() / wanted.double().norm().detach())


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_attention_of_all_lengths_together_is_that_of_each(name, biased, monkeypatch):
    layout, generator = LAYOUTS[name], torch.Generator().manual_seed(0)
    qkv = torch.randn(layout.positions, 3 * HEADS * WIDTH, generator=generator)
    # As long as a program reads, and shorter: then it is filled up.
    longest = max(layout.widths)
    bias = torch.randn(1, HEADS, *(2 * [max(reach(longest), 32)]), generator=generator) if biased else None
    gradient = torch.randn(layout.positions, HEADS * WIDTH, generator=generator)
    monkeypatch.setattr(packed, "fused_kernels", lambda tensor: False)
    exact = qkv.double().requires_grad_()
    wanted = attention(exact, layout, HEADS, bias=None if bias is None else bias.double(), scale=0.3)
    [wanted_gradient] = torch.autograd.grad(wanted, exact, gradient.double())
    for own_bias in (bias, bias if bias is None else bias[:, :, :longest, :longest]):
        own = qkv.to(DEVICE).requires_grad_()
        found = PackedAttention.apply(own, None if bias is None else own_bias.to(DEVICE), layout, HEADS, 0.3)
        [found_gradient] = torch.autograd.grad(found, own, gradient.to(DEVICE))
        assert relative(found.cpu(), wanted) < 1e-6
        assert relative(found_gradient.cpu(), wanted_gradient) < 1e-6


def test_a_large_bias_in_half_precision_loses_no_more_than_its_own_digits(monkeypatch):
    """The interpreter has no bfloat16, but float16 takes the same way: half factors, scores and sums in float32."""
    layout, generator = LAYOUTS["different, with padding"], torch.Generator().manual_seed(0)
    qkv = torch.randn(layout.positions, 3 * HEADS * WIDTH, generator=generator).half()
    bias = 10 * torch.randn(1, HEADS, 128, 128, generator=generator).half()
    gradient = torch.randn(layout.positions, HEADS * WIDTH, generator=generator).half()
    monkeypatch.setattr(packed, "fused_kernels", lambda tensor: False)
    exact = qkv.double().requires_grad_()
    wanted = attention(exact, layout, HEADS, bias=bias.double(), scale=0.3)
    [wanted_gradient] = torch.autograd.grad(wanted, exact, gradient.double())
    own = qkv.to(DEVICE).requires_grad_()
    found = PackedAttention.apply(own, bias.to(DEVICE), layout, HEADS, 0.3)
    [found_gradient] = torch.autograd.grad(found, own, gradient.to(DEVICE))
    assert relative(found.cpu(), wanted) < 3e-4
    assert relative(found_gradient.cpu(), wanted_gradient) < 6e-4


def test_a_decoder_sees_no_later_position():
    layout, generator = LAYOUTS["of a decoder"], torch.Generator().manual_seed(0)
    qkv = torch.randn(layout.positions, 3 * HEADS * WIDTH, generator=generator, device="cpu").to(DEVICE)
    causal = torch.full((1, HEADS, SMALL, SMALL), -torch.inf, device=DEVICE).triu(1)
    found = PackedAttention.apply(qkv, causal, layout, HEADS, 1.0)
    # The first position sees itself alone, so its output is its own value.
    assert_close(found[::3], qkv[::3, 2 * HEADS * WIDTH :])
    changed = qkv.clone()
    changed[2::3] += 1.0
    again = PackedAttention.apply(changed, causal, layout, HEADS, 1.0)
    assert again[::3].equal(found[::3]) and again[1::3].equal(found[1::3]) and not again[2::3].equal(found[2::3])


@pytest.mark.parametrize("size", [24, 32])
@pytest.mark.parametrize("used", ["both", "norm", "sum"])
def test_a_residual_with_its_norm(size, used):
    generator = torch.Generator().manual_seed(0)
    x, delta, of_total, of_normed = (torch.randn(5, size, generator=generator) for _ in range(4))
    weight = torch.rand(size, generator=generator)
    keep = {"both": (1.0, 1.0), "norm": (0.0, 1.0), "sum": (1.0, 0.0)}[used]

    def run(x, delta, weight, function):
        x, delta = x.requires_grad_(), delta.requires_grad_()
        found = function(x, delta, weight)
        chosen = [one for one, share in zip(found, keep, strict=True) if share]
        above = [one for one, share in zip((of_total, of_normed), keep, strict=True) if share]
        gradients = torch.autograd.grad(chosen, [x, delta], [one.to(x) for one in above])
        return [*(one.detach().cpu() for one in found), *(one.cpu() for one in gradients)]

    def plain(x, delta, weight):
        total = x + delta
        return total, torch.nn.functional.rms_norm(total, (size,), weight, 1e-6)

    wanted = run(x.double(), delta.double(), weight.double(), plain)
    own = (one.clone().to(DEVICE) for one in (x, delta, weight))
    found = run(*own, lambda *arguments: AddNorm.apply(*arguments, 1e-6))
    for one, other in zip(found, wanted, strict=True):
        assert relative(one, other) < 1e-6


@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_whole_t5_is_the_same_with_the_kernels(feed_forward, checkpointing, monkeypatch):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=60, d_model=32, d_kv=WIDTH, num_heads=HEADS, d_ff=48, num_layers=2, dropout_rate=0.0,
        feed_forward_proj=feed_forward, decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    layout = LAYOUTS["different, with padding"]
    embeddings, ids = torch.randn(layout.positions, 32), torch.randint(60, (3, 3))
    above = torch.randn(layout.positions, 32), torch.randn(3, 2, 60)

    def run(own_model, embeddings):
        forward = t5.T5Forward(own_model)
        forward.checkpointing = checkpointing
        embeddings = embeddings.requires_grad_()
        states = forward.encode(embeddings, layout)
        logits = forward.decode(states, layout, ids.to(states.device), first=1)
        [gradient] = torch.autograd.grad([states, logits], embeddings, [one.to(states) for one in above])
        return [one.detach().cpu() for one in (states, logits, gradient)]

    monkeypatch.setattr(packed, "fused_kernels", lambda tensor: False)
    monkeypatch.setattr(t5, "fused_kernels", lambda tensor: False)
    wanted = run(model, embeddings.clone())
    calls = []
    monkeypatch.setattr(packed, "fused_kernels", lambda tensor: not calls.append(1))
    monkeypatch.setattr(t5, "fused_kernels", lambda tensor: True)
    found = run(model.to(DEVICE), embeddings.clone().to(DEVICE))
    assert len(calls) >= 4, "both layers of the encoder and of the decoder took them"
    for one, other, allowed in zip(found, wanted, (1e-5, 1e-5, 1e-4), strict=True):
        assert relative(one, other) < allowed


def test_heads_of_other_widths_are_left_to_torch(monkeypatch):
    layout = LAYOUTS["different, with padding"]
    qkv = torch.randn(layout.positions, 3 * 2 * 24)
    wanted = attention(qkv, layout, 2, bias=None, scale=0.2)
    monkeypatch.setattr(packed, "fused_kernels", lambda tensor: True)
    assert attention(qkv, layout, 2, bias=None, scale=0.2).equal(wanted)


def test_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    gpus = ["80:64:bfloat16", "86:128:bfloat16", "90:32:float32"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tests/compile_kernels.py"), *gpus]
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # What a program may have of it on the GPUs that have least, those of 86 and 89.
    memory = dict(line.split() for line in done.stdout.splitlines())
    assert list(memory) == gpus
    assert all(0 < int(most) <= 99 * 1024 for most in memory.values()), memory


def test_kernels_are_for_gpus_where_fused_ones_are_wanted():
    assert not packed.fused_kernels(torch.zeros(1))
    if DEVICE == "cuda":
        assert packed.fused_kernels(torch.zeros(1, device=DEVICE))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            assert not packed.fused_kernels(torch.zeros(1, device=DEVICE))
