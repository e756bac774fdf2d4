"""Decomposition of filters and the orthogonality loss."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from basisconv_kernels.compression import basis as module
from basisconv_kernels.compression.basis import FORMS, PatchCorrelation, orthogonality_loss
from basisconv_kernels.layers.basis_conv2d import BasisConv2d
from basisconv_kernels.layers.decompose import break_even, channels_for_energy, decompose, kept_energy, pays
from basisconv_kernels.testing import tolerances


def weight(K: int, C: int, R: int, S: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(K, C, R, S, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- decomposition ----------------------------------------------------------------------------------------------------


@hypothesis.given(*(st.integers(1, most) for most in (3, 5, 4, 3, 3)))
def test_the_spectrum_is_exact_for_every_shape(groups, K, C, R, S):
    w = weight(groups * K, C, R, S)
    spectrum = decompose(w, groups)
    assert spectrum.singular_values.shape == (groups, min(K, C * R * S))
    assert (spectrum.singular_values.diff() <= 0).all()
    torch.testing.assert_close((spectrum.mixing @ spectrum.rows).reshape(w.shape), w, **tolerances.FORMULA)
    torch.testing.assert_close(spectrum.energies.sum(), w.square().sum(), **tolerances.FORMULA)
    for per_group in range(1, spectrum.cap + 1):
        basis, coefficients = spectrum.truncate(per_group)
        assert basis.shape == (groups * per_group, C, R, S)
        assert coefficients.shape == (groups * K, per_group)


def test_signs_do_not_depend_on_rounding():
    """Rows with two entries of one magnitude, as edge filters have: the first decides, whatever the last bit says."""
    edge = torch.tensor([[-1.0, 0.0, 1.0]]).repeat(3, 1)[None, None]
    for noise in (0.0, 1e-12, -1e-12):
        row = decompose((edge + noise * torch.arange(9).reshape(3, 3)).double()).rows[0, 0]
        assert row[0] > 0
        assert row[2] < 0
    first = decompose(weight(6, 2, 3, 3))
    second = decompose(-weight(6, 2, 3, 3))
    torch.testing.assert_close(first.rows, second.rows, **tolerances.FORMULA)
    torch.testing.assert_close(first.mixing, -second.mixing, **tolerances.FORMULA)


def test_energy_rule_at_its_ends():
    s = torch.tensor([3.0, 2.0, 1.0, 1e-200], dtype=torch.float64)
    assert [channels_for_energy(s, t) for t in (0.0, 0.5, 9 / 14, 0.65, 13 / 14, 0.93, 1.0)] == [1, 1, 1, 2, 2, 3, 3]
    assert channels_for_energy(torch.zeros(4), 1.0) == 1
    assert kept_energy(torch.zeros(2, 3)).tolist() == [1, 1, 1]
    rounded = torch.full((10,), 0.1, dtype=torch.float64)  # the ratios of these may end below 1
    assert channels_for_energy(rounded, 1.0) <= 10
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"energy must lie in 0\.\.1"):
            channels_for_energy(s, bad)


def test_energy_is_pooled_over_groups():
    values = torch.tensor([[4.0, 0.0], [3.0, 3.0]])
    torch.testing.assert_close(kept_energy(values), torch.tensor([25 / 34, 1.0], dtype=torch.float64))


def test_break_even():
    assert break_even(64, 9 * 64) == pytest.approx(0.9 * 64)
    assert break_even(64, 64) == 32
    assert break_even(64, 27) == pytest.approx(18.99, abs=0.01)
    assert not pays(26, 64, 27)
    for K, taps, groups in ((64, 27, 1), (32, 12, 4), (9, 9, 3), (5, 7, 1)):
        for per_group in range(1, K // groups + 1):
            Q = per_group * groups
            assert (break_even(K, taps, groups) - 1e-9 > Q) is pays(Q, K, taps, groups)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_patch_correlation_is_the_mean_over_patches(mode):
    conv = nn.Conv2d(4, 6, (2, 3), (2, 1), (1, 2), (1, 2), groups=2, padding_mode=mode, dtype=torch.float64)
    x = torch.randn(3, 4, 7, 9, dtype=torch.float64)
    gathered = PatchCorrelation(conv)
    with pytest.raises(ValueError, match="no input was taken in"):
        _ = gathered.value
    gathered.add(x[:2])
    gathered.add(x[2])
    # Σ p·pᵀ through the convolution itself: the energy of its output is Σ_k w_k·Σ·w_kᵀ.
    out = conv(x) - conv.bias[:, None, None]
    rows = conv.weight.detach().reshape(2, 3, -1)
    expected = out.square().mean((0, 2, 3)).reshape(2, 3)
    got = torch.einsum("gkd,gde,gke->gk", rows, gathered.value, rows)
    torch.testing.assert_close(got, expected, **tolerances.FORMULA)


# --- orthogonality loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [1, 3])
def test_gradients_are_the_formulas(form, groups):
    basis = weight(12, 2, 3, 3).requires_grad_()
    orthogonality_loss(basis, groups, form).backward()
    Q = 12 // groups
    rows = basis.detach().reshape(groups, Q, -1)
    lengths = rows.norm(dim=2, keepdim=True)
    if form == "cosine":
        unit = rows / lengths
        M = unit @ unit.mT * (1 - torch.eye(Q, dtype=torch.float64))
        loss = M.square().sum((1, 2)) / (Q * (Q - 1))
        d_unit = 4 / (Q * (Q - 1)) * M @ unit
        gradient = (d_unit - (d_unit * unit).sum(2, keepdim=True) * unit) / lengths
    else:
        excess = rows @ rows.mT - torch.eye(Q, dtype=torch.float64)
        loss = excess.square().sum((1, 2)) / Q**2
        gradient = 4 / Q**2 * excess @ rows
    torch.testing.assert_close(orthogonality_loss(basis, groups, form), loss.mean(), **tolerances.FORMULA)
    torch.testing.assert_close(basis.grad, (gradient / groups).reshape(basis.shape), **tolerances.FORMULA)
    assert basis.grad.abs().max() > 0
    torch.autograd.gradcheck(lambda b: orthogonality_loss(b, groups, form), basis)


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_is_zero_for_orthonormal_rows_and_one_filter(form):
    q, _ = torch.linalg.qr(weight(18, 18, 1, 1)[:, :, 0, 0])
    assert orthogonality_loss(q[:7], form=form) < 1e-25
    unit = F.normalize(weight(3, 2, 3, 3).flatten(1), dim=1)
    assert orthogonality_loss(unit, groups=3, form=form) < 1e-25


def test_the_cosine_form_is_blind_to_lengths_and_finite_at_zero():
    basis = weight(6, 2, 3, 3)
    scaled = basis * torch.rand(6, 1, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(orthogonality_loss(basis), orthogonality_loss(scaled), **tolerances.FORMULA)
    with_zero = torch.cat([basis, torch.zeros(1, 2, 3, 3)]).requires_grad_()
    orthogonality_loss(with_zero).backward()
    assert with_zero.grad.isfinite().all()


def test_the_least_value_for_more_filters_than_taps():
    """A tight frame reaches (Q − D)/(D·(Q − 1))."""
    angles = torch.arange(5, dtype=torch.float64) * torch.pi / 5
    frame = torch.stack([angles.cos(), angles.sin()], 1)
    assert float(orthogonality_loss(frame)) == pytest.approx((5 - 2) / (2 * 4))


def test_a_module_sums_over_its_trained_bases():
    trained = BasisConv2d(4, 8, 3, 6, groups=2, train_basis=True, dtype=torch.float64)
    nn.init.normal_(trained.basis_weight)
    frozen = BasisConv2d(4, 8, 3, 5)
    net = nn.Sequential(trained, nn.ReLU(), frozen, nn.Sequential(trained))
    expected = orthogonality_loss(trained.basis_weight, 2)
    loss = orthogonality_loss(net)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert trained.basis_weight.grad.abs().max() > 0
    with pytest.raises(ValueError, match="no BasisConv2d of this module trains its basis"):
        orthogonality_loss(frozen)


def test_a_module_takes_bases_of_one_row_length_together(monkeypatch):
    monkeypatch.setattr(module, "ROWS_TOGETHER", 12)  # so that one of the products is full
    sizes = [(4, 5), (4, 7), (4, 6), (2, 3), (2, 1)]
    layers = [BasisConv2d(C, 8, 3, Q, train_basis=True, dtype=torch.float64) for C, Q in sizes]
    layers.append(BasisConv2d(4, 8, 3, 6, groups=2, train_basis=True, dtype=torch.float64))
    layers.append(BasisConv2d(4, 8, 3, 4, train_basis=True, dtype=torch.float64))
    for layer in layers:
        nn.init.normal_(layer.basis_weight)
    with torch.no_grad():
        layers[1].basis_weight[2] = 0
    net = nn.ModuleList(layers)
    layers[-1].to(memory_format=torch.channels_last)
    assert [len(bases) for bases in module._batches(layers)] == [2, 2, 2]
    alone = sum(orthogonality_loss(layer.basis_weight, layer.groups) for layer in layers)
    parameters = [layer.basis_weight for layer in layers]
    expected = torch.autograd.grad(alone, parameters)
    loss = orthogonality_loss(net)
    torch.testing.assert_close(loss, alone, **tolerances.FORMULA)
    for got, wanted in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        torch.testing.assert_close(got, wanted, **tolerances.FORMULA)


def test_half_precision_bases_lose_no_accuracy():
    basis = weight(6, 2, 3, 3).bfloat16()
    torch.testing.assert_close(orthogonality_loss(basis), orthogonality_loss(basis.float()))


def test_errors_of_the_loss():
    with pytest.raises(ValueError, match="form must be one of cosine, frobenius, got 'l1'"):
        orthogonality_loss(weight(4, 1, 3, 3), form="l1")
    with pytest.raises(ValueError, match="Q divisible by groups = 3"):
        orthogonality_loss(weight(4, 1, 3, 3), groups=3)
