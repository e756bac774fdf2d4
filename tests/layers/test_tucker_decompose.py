"""Tucker-2 of filters: exactness, error formulas, HOOI, ranks by energy and by EVBMF."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from basisconv_kernels.layers.tucker_decompose import evbmf_rank, rebuild, tucker_spectrum
from basisconv_kernels.testing import naive_tucker_conv2d as naive
from basisconv_kernels.testing import tolerances

close = tolerances.FORMULA
SHAPES = [(13, 7, 3, 3), (6, 11, 2, 5), (40, 3, 3, 3), (5, 9, 1, 1)]


def filters(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def share(weight, factors):
    return float((weight - rebuild(*factors)).square().sum() / weight.square().sum())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_full_rank_gives_the_filters(shape):
    W = filters(*shape)
    spectrum = tucker_spectrum(W)
    K, C, R, S = shape
    assert spectrum.caps == (min(C, K * R * S), min(K, C * R * S))
    factors = spectrum.truncate(*spectrum.caps)
    torch.testing.assert_close(rebuild(*factors), W, **close)
    torch.testing.assert_close(naive.dense_weight(*factors), W, **close)


@pytest.mark.parametrize("ranks", [(3, 4), (1, 1), (7, 5), (2, 13), (5, 5)], ids=str)
def test_the_error_is_what_the_core_lacks_and_hooi_never_raises_it(ranks):
    W = filters(13, 7, 3, 3)
    spectrum = tucker_spectrum(W)
    total = W.square().sum()
    errors = []
    for rounds in (0, 1, 2, 20):
        factors = spectrum.truncate(*ranks, rounds=rounds)
        for u in (factors.u_in, factors.u_out):
            torch.testing.assert_close(u.mT @ u, torch.eye(u.shape[1], dtype=torch.float64), **close)
        errors.append(share(W, factors))
        assert math.isclose(errors[-1], 1 - float(factors.core.square().sum() / total), abs_tol=close["atol"])
        assert math.isclose(spectrum.relative_error(factors) ** 2, errors[-1], abs_tol=close["atol"])
    assert math.isclose(errors[0], 1 - spectrum.kept_energy(*ranks), abs_tol=close["atol"])
    assert all(later <= earlier + close["atol"] for earlier, later in itertools.pairwise(errors))
    tails = [float(values[rank:].square().sum() / total)
             for values, rank in ((spectrum.in_values, ranks[0]), (spectrum.out_values, ranks[1]))]  # fmt: skip
    assert max(tails) - close["atol"] <= errors[-1]
    assert errors[0] <= sum(tails) + close["atol"]
    assert errors[0] <= 2 * errors[-1] + close["atol"]


def test_filters_of_low_rank_are_found_and_kept_exactly():
    W = rebuild(filters(9, 3), filters(4, 3, 3, 3, seed=1), filters(12, 4, seed=2))
    spectrum = tucker_spectrum(W)
    assert spectrum.caps == (3, 4)
    assert share(W, spectrum.truncate(3, 4)) < close["atol"]
    assert spectrum.within_caps(9, 12) == (3, 4)
    assert spectrum.evbmf_ranks() == (3, 4)


def test_one_rank_limits_the_other():
    spectrum = tucker_spectrum(filters(13, 7, 1, 3))
    assert spectrum.within_caps(1, 13) == (1, 3)
    assert spectrum.within_caps(7, 1) == (3, 1)
    assert spectrum.within_caps(99, 99) == (7, 13)


@pytest.mark.parametrize("energy", [0.0, 0.3, 0.7, 0.95, 1.0])
def test_the_energy_rule_takes_the_cheapest_ranks_that_keep_enough(energy):
    W = filters(12, 8, 3, 3)
    spectrum = tucker_spectrum(W)
    found = spectrum.ranks_for_energy(energy, reads=2.0)
    work = {
        (i, o): 8 * 2.0 * i + o * (i * 9 + 12)
        for i in range(1, 9)
        for o in range(1, 13)
        if spectrum.kept_energy(i, o) >= min(energy, 1 - 1e-12)
    }
    assert work[found] == min(work.values())
    assert share(W, spectrum.truncate(*found)) <= 1 - energy + close["atol"]
    with pytest.raises(ValueError, match=r"energy must lie in 0\.\.1"):
        spectrum.ranks_for_energy(1.5)


def test_a_layer_of_zeros():
    spectrum = tucker_spectrum(torch.zeros(5, 4, 3, 3))
    assert spectrum.caps == (1, 1)
    assert spectrum.ranks_for_energy(0.9) == spectrum.evbmf_ranks() == (1, 1)
    factors = spectrum.truncate(1, 1)
    assert spectrum.relative_error(factors) == 0
    assert not rebuild(*factors).any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_refused(value):
    W = filters(5, 4, 3, 3)
    W[1, 2, 0, 1] = value
    with pytest.raises(ValueError, match="here: weight holds NaN or infinite values"):
        tucker_spectrum(W, name="here")


def planted(rank, rows=60, columns=400, noise=0.1, seed=0):
    signal = (
        filters(rows, max(rank, 1), seed=seed) @ filters(max(rank, 1), columns, seed=seed + 1) / max(rank, 1) ** 0.5
    )
    return (signal if rank else 0) + noise * filters(rows, columns, seed=seed + 2)


@pytest.mark.parametrize("rank", [0, 8, 10, 20, 40])
def test_evbmf_finds_planted_ranks(rank):
    matrix = planted(rank)
    assert evbmf_rank(matrix) == evbmf_rank(matrix.mT) == rank
    assert evbmf_rank(1e3 * matrix) == rank


def test_evbmf_leaves_out_rows_and_columns_of_zeros():
    matrix = planted(8)
    padded = torch.zeros(150, 500, dtype=torch.float64)
    padded[40:100, 30:430] = matrix
    assert evbmf_rank(padded) == 8
    assert evbmf_rank(torch.zeros(4, 9)) == evbmf_rank(torch.zeros(0, 9)) == 0
    assert evbmf_rank(torch.ones(1, 9)) == 1


def test_evbmf_of_filters_and_its_weakening():
    noisy = rebuild(filters(40, 6), filters(9, 6, 3, 3, seed=1), filters(50, 9, seed=2))
    noisy = noisy + 0.05 * noisy.std() * filters(50, 40, 3, 3, seed=3)
    spectrum = tucker_spectrum(noisy)
    assert spectrum.evbmf_ranks() == (6, 9)
    assert spectrum.evbmf_ranks(0.5) == (6 + 17, 9 + 20)
    assert spectrum.evbmf_ranks(1.0) == (40, 50)


def test_a_wider_dtype_of_the_same_numbers_gives_the_same():
    W = filters(13, 7, 3, 3).float()
    first, second = (tucker_spectrum(w).truncate(3, 4) for w in (W, W.double()))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
