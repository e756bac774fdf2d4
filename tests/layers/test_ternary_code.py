"""Ternary weights as bytes: decoding undoes encoding, sizes are those of the formulas, damage is refused (LW3)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from basisconv_kernels.layers import ternary_code as encoding

kinds = pytest.mark.parametrize("kind", encoding.KINDS)


def drawn(seed, count, density):
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    return (signs * (torch.rand(count, generator=generator) < density)).to(torch.int8)


@kinds
@settings(max_examples=100)
@given(st.integers(0, 2**31), st.integers(0, 700), st.sampled_from([0.0, 0.005, 0.02, 0.1, 0.25, 0.5, 1.0]))
def test_decoding_undoes_encoding(kind, seed, count, density):
    weight = drawn(seed, count, density)
    encoded = encoding.encode_as(kind, weight)
    assert torch.equal(encoding.decode(encoded), weight)
    assert encoded.bits == 8 * encoded.data.numel()


@settings(max_examples=80)
@given(st.lists(st.tuples(st.integers(0, 64), st.booleans()), max_size=9), st.integers(0, 40))
def test_every_length_of_a_gap(gaps, behind):
    """Around 15, 30, 45 and 60 the number of escapes changes."""
    numbers = []
    for zeros, negative in gaps:
        numbers += [0] * zeros + [-1 if negative else 1]
    weight = torch.tensor(numbers + [0] * behind, dtype=torch.int8)
    encoded = encoding.encode_as("gaps", weight)
    assert torch.equal(encoding.decode(encoded), weight)
    four_bit = sum(zeros // 15 + 1 for zeros, _ in gaps)
    assert encoded.data.numel() == (four_bit + 1) // 2 + (len(gaps) + 7) // 8


def test_the_bytes_are_those_of_the_description():
    weight = torch.zeros(40, dtype=torch.int8)
    weight[2], weight[18], weight[39] = 1, -1, 1
    gaps = encoding.encode_as("gaps", weight)
    assert gaps.data.tolist() == [2 | 15 << 4, 0 | 15 << 4, 5 | 15 << 4, 0b010]  # 2; 15 + 0; 15 + 5; filling; signs
    planes = encoding.encode_as("planes", weight)
    assert planes.data.tolist() == [0b100, 0, 0b100, 0, 0b10000000, 0b010]


@kinds
@pytest.mark.parametrize("density", [0.02, 0.05, 0.1, 0.2, 0.5, 1.0])
def test_sizes_are_those_of_the_formula(kind, density):
    """Of 2^18 weights: within four deviations of the count of weights, plus the filling."""
    count = 2**18
    bits = encoding.encode_as(kind, drawn(7, count, density)).bits
    expected = encoding.expected_bits(kind, count, density)
    scatter = 4 * (count * density * (1 - density)) ** 0.5 * (expected / (count * density))
    assert abs(bits - expected) <= scatter + 16


@pytest.mark.parametrize(("density", "kind"), [(0.02, "gaps"), (0.2, "gaps"), (0.3, "planes"), (0.9, "planes")])
def test_the_smaller_form_is_chosen(density, kind):
    weight = drawn(3, 20_000, density)
    chosen = encoding.encode(weight.reshape(10, 20, 10, 10).float())
    assert chosen.kind == kind
    assert chosen.bits == min(encoding.encode_as(k, weight).bits for k in encoding.KINDS)


def test_equal_weights_of_all_gives_the_published_like_ratios():
    """Bits an fp32 weight over bits of the form, at the densities of the design: escapes are counted."""
    ratios = {0.5: 12.8, 0.2: 31.1, 0.1: 53.0, 0.05: 75.7}
    for density, ratio in ratios.items():
        assert round(32 / encoding.expected_bits("gaps", 1, density), 1) == ratio
    assert round(32 / encoding.expected_bits("planes", 1, 0.1), 1) == 29.1


DAMAGE = {
    "more weights stated": lambda e: replace(e, nonzero=e.nonzero + 1),
    "fewer weights stated": lambda e: replace(e, nonzero=e.nonzero - 9),
    "shorter tensor": lambda e: replace(e, weights=e.weights - 120),
    "cut": lambda e: replace(e, data=e.data[:-5]),
    "other type": lambda e: replace(e, data=e.data.short()),
    "filling of signs": lambda e: replace(e, data=torch.cat([e.data[:-1], e.data[-1:] | 128])),
    "other kind": lambda e: replace(e, kind="codes"),
}


@kinds
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused(kind, damage):
    weight = drawn(11, 1000, 0.2)
    encoded = encoding.encode_as(kind, weight)
    assert encoded.nonzero % 8, "the last byte has filling"
    with pytest.raises(ValueError, match="decode: "):
        encoding.decode(DAMAGE[damage](encoded))


@kinds
@settings(max_examples=100)
@given(st.binary(max_size=40), st.integers(0, 80), st.integers(0, 80))
def test_any_bytes_decode_to_their_own_encoding_or_are_refused(kind, data, weights, nonzero):
    stated = encoding.Encoded(kind, weights, nonzero, torch.tensor(list(data), dtype=torch.uint8))
    try:
        weight = encoding.decode(stated)
    except ValueError:
        return
    again = encoding.encode_as(kind, weight)
    assert (again.nonzero, again.data.tolist()) == (nonzero, list(data))


def test_other_values_are_refused():
    with pytest.raises(ValueError, match=r"-1, 0 and \+1"):
        encoding.encode(torch.tensor([0.5]))
