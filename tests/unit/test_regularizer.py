"""ψ keeps row norms, its gate lies between the raw and the transformed gradient, and a fresh one does little harm."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from supmer_ray.model.regularizer import IdentityRegularizer, Regularizer


@given(
    st.integers(1, 3), st.integers(1, 6), st.integers(2, 24), st.integers(1, 24), st.integers(1, 3), st.integers(0, 99)
)
def test_the_transform_never_makes_a_row_longer(tasks, rows, width, rank, layers, seed):
    torch.manual_seed(seed)
    psi = Regularizer(width, min(rank, width), layers).double()
    gradient = torch.randn(tasks, rows, width, dtype=torch.float64)
    assert (psi.transform(gradient).norm(dim=-1) <= gradient.norm(dim=-1) + 1e-7).all()


@given(st.floats(1e-4, 1e4), st.integers(0, 99))
def test_the_transform_keeps_the_norm_of_every_row(scale, seed):
    torch.manual_seed(seed)
    gradient = scale * torch.randn(2, 5, 32, dtype=torch.float64)
    norms = Regularizer(32).double().transform(gradient).norm(dim=-1)
    torch.testing.assert_close(norms, gradient.norm(dim=-1), rtol=1e-3, atol=0)


def test_the_gate_mixes_raw_and_transformed():
    torch.manual_seed(0)
    psi = Regularizer(16)
    gradient, embedding = torch.randn(3, 5, 16), torch.randn(3, 16)
    for bias, expected in ((50.0, gradient), (-50.0, psi.transform(gradient))):
        torch.nn.init.zeros_(psi.gate_out.weight)
        torch.nn.init.constant_(psi.gate_out.bias, bias)
        torch.testing.assert_close(psi(gradient, embedding)[0], expected)


def test_a_fresh_psi_keeps_the_signs_of_the_gradient():
    torch.manual_seed(0)
    psi = Regularizer(64)
    gradient = torch.randn(2, 10, 64)
    update, _ = psi(gradient, torch.randn(2, 64))
    assert torch.cosine_similarity(gradient.flatten(), update.flatten(), dim=0) > 0.8
    assert (torch.sign(update) == torch.sign(gradient)).float().mean() > 0.9


def test_the_papers_transform_is_never_negative_and_a_two_sided_one_turns_with_the_gradient():
    torch.manual_seed(0)
    gradient, embedding = torch.randn(2, 10, 64), torch.randn(2, 64)
    assert (Regularizer(64).transform(gradient) >= 0).all()
    psi = Regularizer(64, two_sided=True)
    torch.nn.init.normal_(psi.bias[0])
    torch.testing.assert_close(psi(-gradient, embedding)[0], -psi(gradient, embedding)[0])


def test_a_fresh_two_sided_psi_passes_all_of_the_gradient_on():
    torch.manual_seed(0)
    gradient = torch.randn(2, 10, 64)
    update = Regularizer(64, two_sided=True).transform(gradient)
    assert torch.cosine_similarity(gradient.flatten(), update.flatten(), dim=0) > 0.98


def test_the_rank_is_bounded_by_the_width():
    assert Regularizer(8).rank == 8
    assert Regularizer(4096).rank == 1920


def test_identity():
    gradient = torch.randn(2, 3, 4)
    update, gate = IdentityRegularizer()(gradient, torch.randn(2, 4))
    assert update is gradient and gate.tolist() == [1, 1]


def test_without_a_gate_nothing_of_the_raw_gradient_is_kept():
    psi = Regularizer(16, gated=False)
    gradient, embedding = torch.randn(3, 5, 16), torch.randn(3, 16)
    update, gate = psi(gradient, embedding)
    assert torch.equal(update, psi.transform(gradient)) and gate.tolist() == [0, 0, 0]
    assert not any("gate" in name for name, _ in psi.named_parameters())
