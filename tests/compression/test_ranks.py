"""Rules for Q: the published numbers, ends and clamps, budgets against brute force, sensitivity, latency."""

from __future__ import annotations

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from basisconv_kernels.compression import ranks
from basisconv_kernels.compression.config import FRACTIONS, BasisConfig, Sensitivity
from basisconv_kernels.compression.model import compress
from basisconv_kernels.compression.ranks import Option
from basisconv_kernels.layers.decompose import FilterSpectrum, channels_for_energy
from basisconv_kernels.testing import tolerances

PUBLISHED_ENERGY = 0.63


def spectrum(values: list[list[float]], K: int, taps: int) -> FilterSpectrum:
    """A spectrum by its singular values alone."""
    s = torch.tensor(values, dtype=torch.float64)
    G, M = s.shape
    zeros = torch.zeros
    return FilterSpectrum(s, zeros(G, M, taps), zeros(G, K // G, M), (taps, 1, 1), 1e-12)


def layer(name: str, values: list[float], K: int, taps: int, pixels: int = 1, **more: int) -> ranks.Rankable:
    return ranks.rankable(name, K, spectrum([values], K, taps), pixels, **more)


# --- the published ResNet-56 ------------------------------------------------------------------------------------------


def flops(spectra, filters):
    """2 FLOP a multiply-accumulate, convolutions only: no linear layer, bias, BatchNorm or activation."""
    dense = basis = 0
    for row, Q in zip(spectra, filters, strict=True):
        taps = row["C"] * row["R"] * row["S"]
        dense += 2 * row["pixels"] * row["K"] * taps
        basis += 2 * row["pixels"] * Q * (taps + row["K"])
    return dense, basis


def test_the_energy_rule_gives_the_published_counts(spectra):
    filters = [channels_for_energy(torch.tensor(row["s"], dtype=torch.float64), PUBLISHED_ENERGY) for row in spectra]
    assert sum(filters) == 654
    assert sum(row["K"] for row in spectra) == 2032
    dense, basis = flops(spectra, filters)
    assert f"{dense / 1e6:.2f} → {basis / 1e6:.2f} MFLOP" == "250.97 → 90.08 MFLOP"
    assert f"{100 * (basis / dense - 1):.2f} %" == "-64.11 %"


@pytest.mark.data
def test_the_converter_gives_the_published_counts(resnet56, spectra):
    config = BasisConfig(energy=PUBLISHED_ENERGY, keep_dense="never")
    model, report = compress(resnet56, config, example_inputs=torch.zeros(1, 3, 32, 32))
    assert (report.filters_after, report.filters_before) == (654, 2032)
    assert (report.flops_before, report.flops_after) == (250_970_112, 90_077_184)
    assert f"{report.network_parameters_before / 1e6:.2f} M → {report.network_parameters_after / 1e6:.2f} M" == (
        "0.85 M → 0.31 M"
    )
    for row, made in zip(spectra, report.layers, strict=True):
        assert row["name"] == made.name
        assert row["pixels"] * row["K"] * row["C"] * row["R"] * row["S"] == made.macs_before
        kept = sum(value**2 for value in row["s"][: made.basis_channels]) / sum(value**2 for value in row["s"])
        assert made.energy_kept == pytest.approx(kept, abs=1e-6)
        weight = resnet56.get_submodule(made.name).weight.detach().double().flatten(1)
        layer = model.get_submodule(made.name)
        product = layer.coefficients.detach().double() @ layer.basis_weight.double().flatten(1)
        dropped = torch.linalg.svdvals(weight)[made.basis_channels :].square().sum()
        torch.testing.assert_close((weight - product).square().sum(), dropped, **tolerances.FORMULA)
    assert not any(type(module) is torch.nn.Conv2d for module in model.modules())


# --- rules for one layer ----------------------------------------------------------------------------------------------


def test_fractions_round_up_and_forgive_binary_noise():
    assert [ranks.by_fraction(20, 1, f) for f in (0.55, 0.05, 0.049, 0.001, 1.0)] == [11, 1, 1, 1, 20]
    assert [ranks.by_fraction(20, 4, f) for f in (0.5, 0.55, 0.05)] == [3, 3, 1]
    assert [math.ceil(64 * f) for f in (0.95, 0.5, 0.05)] == [ranks.by_fraction(64, 1, f) for f in (0.95, 0.5, 0.05)]


def test_a_wish_is_settled_within_the_rank_and_below_break_even_by_rounding():
    facts = layer("a", [5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 1e-30], 8, 7)
    assert facts.spectrum.cap == 6
    assert [facts.settle(q) for q in (0, 1, 4, 6, 7, 99)] == [1, 1, 4, 6, 6, 6]
    at_least = layer("a", [5.0, 4.0, 3.0, 2.0, 1.0, 0.5], 8, 7, min_channels=3)
    assert [at_least.settle(q) for q in (1, 3, 4)] == [3, 3, 4]
    # Q* = 8·7/(7 + 8) = 3.73: 2 may not become 4, but what lies above anyway is rounded up
    fours = layer("a", [5.0, 4.0, 3.0, 2.0, 1.0, 0.5], 8, 7, multiple_of=4)
    assert [fours.settle(q) for q in (1, 3, 4, 5)] == [1, 3, 4, 6]
    wide = layer("a", [1.0] * 64, 64, 576, multiple_of=8)
    assert [wide.settle(q) for q in (1, 8, 9, 50, 63)] == [8, 8, 16, 56, 64]
    assert layer("a", [1.0] * 5, 5, 90, min_channels=12).settle(1) == 5


def test_groups_count_as_one_step():
    grouped = ranks.rankable("g", 12, spectrum([[3.0, 2.0, 1.0]] * 4, 12, 9), 10, min_channels=5, multiple_of=6)
    assert (grouped.least, grouped.step) == (2, 3)
    assert grouped.macs == 10 * (4 * 9 + 12)
    assert grouped.parameters == 4 * 9 + 12


# --- budgets ----------------------------------------------------------------------------------------------------------


@st.composite
def problems(draw):
    layers = []
    for index in range(draw(st.integers(1, 3))):
        size = draw(st.integers(1, 4))
        values = sorted(draw(st.lists(st.floats(0.1, 4.0), min_size=size, max_size=size)), reverse=True)
        layers.append(layer(str(index), values, draw(st.integers(size, 6)), draw(st.integers(size, 9)), 3))
    return layers, draw(st.floats(0.0, 1.2)), draw(st.sampled_from(["macs", "parameters"]))


def gain_and_cost(layers, chosen, cost):
    gain = sum(lay.spectrum.kept_energy(q) for lay, q in zip(layers, chosen, strict=True))
    return gain, sum(getattr(lay, cost) * q for lay, q in zip(layers, chosen, strict=True))


@hypothesis.given(problems())
def test_a_budget_is_kept_and_nothing_better_costs_no_more(problem):
    layers, share, cost = problem
    least = sum(getattr(lay, cost) for lay in layers)
    most = sum(getattr(lay, cost) * lay.spectrum.cap for lay in layers)
    budget = least + share * (most - least)
    chosen = ranks.by_budget(layers, budget, cost)
    filters = [chosen[lay.name] for lay in layers]
    gain, spent = gain_and_cost(layers, filters, cost)
    assert spent <= budget * (1 + 1e-12)
    left = budget - spent
    assert all(
        q == lay.spectrum.cap or getattr(lay, cost) > left - 1e-9 for lay, q in zip(layers, filters, strict=True)
    )
    # Up to the first step that did not fit, the greedy choice is the best for its own spend.
    prices = {getattr(lay, cost) for lay in layers}
    if share >= 1 or len(prices) == 1:
        for other in itertools.product(*(range(1, lay.spectrum.cap + 1) for lay in layers)):
            rival, price = gain_and_cost(layers, other, cost)
            assert price > spent or rival <= gain + 1e-9


def test_greedy_prefixes_are_optimal_whatever_the_prices():
    torch.manual_seed(0)
    for _ in range(60):
        layers = []
        for index in range(3):
            values = (torch.rand(3) + 0.1).sort(descending=True).values.tolist()
            layers.append(layer(str(index), values, 3 + index, 4 + 3 * index, 1 + 2 * index))
        steps = []
        for lay in layers:
            energies = lay.spectrum.energies / lay.spectrum.energies.sum()
            steps += [(float(energies[q]) / lay.macs, lay.macs, lay.name) for q in range(1, 3)]
        steps.sort(reverse=True)
        budget = float(sum(lay.macs for lay in layers))
        for _, price, _ in steps:
            budget += price
            chosen = ranks.by_budget(layers, budget, "macs")
            gain, spent = gain_and_cost(layers, chosen.values(), "macs")
            assert spent == budget
            for other in itertools.product(range(1, 4), repeat=3):
                rival, price_of_rival = gain_and_cost(layers, other, "macs")
                assert price_of_rival > spent or rival <= gain + 1e-9


def test_a_budget_below_the_least_is_refused():
    layers = [layer("a", [2.0, 1.0], 4, 9), layer("b", [2.0, 1.0], 4, 9)]
    with pytest.raises(ValueError, match=r"a budget of 25 macs .* is less than their least, 26"):
        ranks.by_budget(layers, 25, "macs")
    assert ranks.by_budget(layers, 26, "macs") == {"a": 1, "b": 1}


def test_a_budget_steps_in_multiples_and_ends_at_the_rank():
    only = layer("a", [1.0] * 10, 10, 30, multiple_of=4, min_channels=2)
    found = [ranks.by_budget([only], budget * only.macs, "macs")["a"] for budget in (2, 3, 4, 7, 8, 9, 10, 99)]
    assert found == [2, 2, 4, 4, 8, 8, 10, 10]
    zero = layer("z", [0.0, 0.0], 4, 9)
    assert ranks.by_budget([zero], 1e9, "parameters") == {"z": 1}


# --- sensitivity ------------------------------------------------------------------------------------------------------


def by_sensitivity(passing: set[int], K: int = 20, cap: int = 20, min_channels: int = 1):
    asked = []

    def passes(per_group: int) -> bool:
        asked.append(per_group)
        return per_group in passing

    facts = layer("a", [1.0] * cap, K, max(cap, K) + 5)
    return ranks.by_sensitivity(facts, FRACTIONS, min_channels, passes), asked


def test_sensitivity_takes_the_least_fraction_that_passes_as_all_larger_do():
    assert by_sensitivity(set(range(8, 21)))[0] == 8
    assert by_sensitivity(set(range(8, 21)) | {2, 3})[0] == 8  # a lucky truncation below a failed one does not count
    assert by_sensitivity(set(range(21)))[0] == 1
    assert by_sensitivity(set(range(21)), min_channels=4)[0] == 4
    assert by_sensitivity(set()) == (20, [19])


def test_sensitivity_asks_once_a_truncation_and_never_at_the_rank():
    chosen, asked = by_sensitivity(set(range(9)), K=40, cap=8)
    assert asked == [6, 4, 2]
    assert chosen == 2
    assert by_sensitivity(set(), K=40, cap=8) == (8, [6])
    assert by_sensitivity(set(), K=40, cap=8, min_channels=12)[0] == 8


# --- latency ----------------------------------------------------------------------------------------------------------


def test_latency_takes_the_steps_with_most_energy_a_millisecond():
    options = {
        "a": [Option(10.0, 1.0, None), Option(4.0, 0.8, 8), Option(6.0, 0.81, 16), Option(2.0, 0.3, 4)],
        "b": [Option(2.0, 1.0, None), Option(3.0, 0.9, 8), Option(1.0, 0.5, 4)],
    }
    assert ranks.by_latency(options, 1.0) == {"a": None, "b": None}
    assert ranks.by_latency(options, 0.5) == {"a": 8, "b": None}  # 6 of 12 ms
    assert ranks.by_latency(options, 0.34) == {"a": 4, "b": None}
    assert ranks.by_latency(options, 0.25) == {"a": 4, "b": 4}
    assert ranks.by_latency(options, 1.0, keep_dense=False) == {"a": 16, "b": 8}
    with pytest.raises(
        ValueError, match=r"latency=0.2 asks for 2.400 ms .* fastest options take 3.000 ms of 12.000 ms"
    ):
        ranks.by_latency(options, 0.2)
    assert ranks.by_latency({}, 0.5) == {}


@hypothesis.given(st.lists(st.tuples(st.floats(0.1, 9), st.floats(0, 1)), min_size=1, max_size=6), st.floats(0.0, 1.0))
def test_latency_never_takes_longer_than_asked(measured, share):
    options = {
        name: [Option(5.0, 1.0, None), *(Option(ms, e, q) for q, (ms, e) in enumerate(measured, 1))] for name in "ab"
    }
    fastest = 2 * min(5.0, *(ms for ms, _ in measured))
    if share * 10 < fastest:
        with pytest.raises(ValueError, match="fastest options take"):
            ranks.by_latency(options, share)
        return
    chosen = ranks.by_latency(options, share)
    taken = sum(next(o.ms for o in options[name] if o.per_group == q) for name, q in chosen.items())
    assert taken <= share * 10 + 1e-9


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ValueError, "exactly one rule for Q must be given of energy, fraction, .* got none"),
        ({"energy": 0.5, "macs": 0.5}, ValueError, "got energy and macs"),
        ({"energy": 1.5}, ValueError, "energy must lie in 0..1, got 1.5"),
        ({"energy": {"a": float("nan")}}, ValueError, "energy must lie in 0..1, got nan"),
        ({"fraction": 0.0}, ValueError, "fraction must lie in 0..1, above 0, got 0.0"),
        ({"latency": 2.0}, ValueError, "latency must lie in 0..1"),
        ({"basis_channels": 0}, ValueError, "basis_channels must be at least 1, got 0"),
        ({"basis_channels": {"a": 2.5}}, TypeError, "basis_channels must be an int, got 2.5"),
        ({"macs": -1}, ValueError, "macs must be a number above 0, got -1"),
        ({"parameters": float("inf")}, ValueError, "parameters must be a number above 0, got inf"),
        ({"sensitivity": 0.9}, TypeError, "sensitivity must be a Sensitivity, got float"),
        ({"energy": 0.5, "keep_dense": "sometimes"}, ValueError, "keep_dense must be 'auto' or 'never'"),
        ({"energy": 0.5, "min_channels": 0}, ValueError, "min_channels must be at least 1"),
        ({"energy": 0.5, "multiple_of": 8.0}, TypeError, "multiple_of must be an int"),
    ],
)
def test_errors_of_the_configuration(settings, error, message):
    with pytest.raises(error, match=message):
        BasisConfig(**settings)


def test_errors_of_the_sensitivity_rule():
    with pytest.raises(TypeError, match="evaluate must be a function"):
        Sensitivity(0.9, 0.5)
    with pytest.raises(ValueError, match=r"fractions must lie in 0\.\.1"):
        Sensitivity(len, 0.5, fractions=[0.5, 1.2])
    assert Sensitivity(len, 0.5, fractions=[0.1, 0.9]).fractions == (0.9, 0.1)
    assert FRACTIONS[0] == 0.95
    assert FRACTIONS[-1] == 0.05
    assert len(FRACTIONS) == 19


def test_the_configuration_keeps_its_own_copies():
    wishes, fractions = {"a": 4}, [0.5, 0.25]
    config = BasisConfig(basis_channels=wishes)
    rule = Sensitivity(len, 0.5, fractions=fractions)
    wishes["a"], wishes["b"] = 9, 9
    fractions.clear()
    assert config.basis_channels == {"a": 4}
    assert rule.fractions == (0.5, 0.25)
    assert str(config) == "basis_channels={'a': 4}"
    assert "object at" not in str(BasisConfig(sensitivity=Sensitivity(lambda model: 1.0, 0.5)))
