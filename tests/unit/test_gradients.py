"""The gradients of the meta-step are those of the plain float32 step with the library's forward, in each precision."""

import copy

import numpy as np
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from supmer_ray.benchmark.baseline import SequentialStep
from supmer_ray.benchmark.workload import Lengths, task_batch
from supmer_ray.meta.step import MetaStep
from supmer_ray.model.backbone import Backbone
from supmer_ray.model.regularizer import Regularizer

PROMPT, LONGEST = 20, 48
KINDS = {
    "t5": {},
    "t5 v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=list(KINDS))
def model(request):
    torch.manual_seed(0)
    shape = {"vocab_size": 32128, "d_model": 256, "d_kv": 32, "d_ff": 512, "num_layers": 3, "num_heads": 8}
    config = T5Config(**shape, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, **request.param)
    return T5ForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def work():
    return task_batch(2, 8, 8, Lengths("some", np.arange(12, LONGEST)), seed=0)


def backbone_of(model, dtype):
    found = Backbone(copy.deepcopy(model).to(dtype), None, "random")
    found.pad = 0
    return found


def flat(prompt, regularizer):
    """The gradient of θ, and that of φ as one vector, in float64."""
    return prompt.double(), torch.cat([part.double().flatten() for part in regularizer])


def gradients(backbone, work, dtype, *, plain):
    """(∇θ, ∇φ) of the plain step, or of ours."""
    torch.manual_seed(1)
    regularizer = Regularizer(backbone.d_model, rank=64).to(dtype)
    prompt = torch.randn(PROMPT, backbone.d_model, generator=torch.Generator().manual_seed(2)).to(dtype)
    if plain:
        return flat(*SequentialStep(backbone, regularizer, LONGEST)(prompt, 0.1, *work))
    found = MetaStep(backbone, regularizer, token_budget=600)(prompt, torch.full((1,), 0.1, dtype=dtype), *work)
    return flat(found.prompt, found.regularizer)


def differences(found, wanted):
    return [float((own - other).norm() / other.norm()) for own, other in zip(found, wanted, strict=True)]


def test_float32_is_within_2e_6_of_the_plain_library_step(model, work):
    """And its θ is as close to float64 as that of the plain step: what is left is rounding, on both sides.

    Against float64, φ is left out: where rounding flips a relu of ψ, both float32 steps are off, mostly alike.
    """
    exact = gradients(backbone_of(model, torch.float64), work, torch.float64, plain=True)
    plain = gradients(backbone_of(model, torch.float32), work, torch.float32, plain=True)
    ours = gradients(backbone_of(model, torch.float32), work, torch.float32, plain=False)
    prompt, regularizer = differences(ours, plain)
    # Where a relu of ψ stands at its kink, rounding decides, and not alike on all processors: it moves φ by 2.4e-4.
    assert prompt < 2e-6 and regularizer < 1e-3
    assert differences(ours, exact)[0] < 2e-6
    assert differences(plain, exact)[0] < 2e-6


def test_bfloat16_is_within_1e_2_of_float32_on_the_same_weights(model, work):
    """φ is further off: a gradient that is off by a hundredth flips relus of ψ."""
    half = backbone_of(model, torch.bfloat16)
    rounded = backbone_of(half.model, torch.float32)
    wanted = gradients(rounded, work, torch.float32, plain=True)
    prompt, regularizer = differences(gradients(half, work, torch.float32, plain=False), wanted)
    assert prompt < 1e-2
    assert regularizer < 1e-1
