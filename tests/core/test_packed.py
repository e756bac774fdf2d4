"""The format of packed bits: what is refused, the padding bits, and thresholds against the formula that they fold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from basisconv_kernels import PackedTensor, Threshold
from basisconv_kernels.core.packed import INT32, pack_planes, unpack_planes, words_for
from basisconv_kernels.testing import naive_binary_conv2d as naive


@pytest.mark.parametrize("channels", [1, 2, 31, 32, 33, 63, 64, 65, 130])
def test_words_are_those_of_the_text_and_come_back(channels):
    bits = torch.randint(2, (2, 3, channels, 2, 3), generator=torch.Generator().manual_seed(channels)).bool()
    words = pack_planes(bits)
    assert words.shape == (2, 3, 2, 3, words_for(channels))
    assert (words.long() & 0xFFFFFFFF).tolist() == naive.words(bits)
    assert torch.equal(unpack_planes(words, channels).bool(), bits)


def packed(channels=37, planes=1):
    bits = torch.ones(2, planes, channels, 3, 4, dtype=torch.bool)
    return PackedTensor(pack_planes(bits), channels, planes, "sign" if planes == 1 else "unsigned")


REFUSED = {
    "version": ({"version": 2}, ValueError, r"version must be 1, .* got 2"),
    "word size": ({"word_bits": 64}, ValueError, r"word_bits must be 32, .* got 64"),
    "bit order": ({"bit_order": "highest_first"}, ValueError, r"bit_order must be 'lowest_first', .* got"),
    "encoding": ({"encoding": "ternary"}, ValueError, r"encoding must be 'sign' or 'unsigned', got 'ternary'"),
    "signs of two bits": ({"planes": 2}, ValueError, r"encoding 'sign' has 1 planes, got 2"),
    "five bits": ({"planes": 5, "encoding": "unsigned"}, ValueError, r"encoding 'unsigned' has 1 to 4 planes, got 5"),
    "planes": ({"planes": 2, "encoding": "unsigned"}, ValueError, r"words must be \[N, 2, H, W, 2\] .* got \[2, 1,"),
    "channels": ({"channels": 70}, ValueError, r"words must be \[N, 1, H, W, 3\] for 1 planes of 70 channels"),
    "no channel": ({"channels": 0}, ValueError, r"channels must be at least 1, got 0"),
    "word type": ({"words": torch.zeros(2, 1, 3, 4, 2).long()}, TypeError, r"must be int32, got torch.int64"),
    "no tensor": ({"words": [1]}, TypeError, r"words must be a Tensor, got list"),
    "gaps": ({"words": torch.zeros(2, 1, 3, 4, 4, dtype=torch.int32)[..., ::2]}, ValueError, r"words must be dense"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_the_format_is_refused(change, error, text):
    with pytest.raises(error, match=f"^PackedTensor: .*{text}"):
        replace(packed(), **change)


@pytest.mark.parametrize("channels", [1, 31, 32, 33, 64])
def test_padding_bits(channels):
    good = packed(channels)
    assert good.check_padding() is good
    for bit in range(channels % 32, 32) if channels % 32 else ():
        words = good.words.clone()
        words[1, 0, 2, 3, -1] |= -(2**31) if bit == 31 else 1 << bit
        with pytest.raises(ValueError, match=r"must be zero, but the last word at \[n=1, plane=0, y=2, x=3\]"):
            replace(good, words=words).check_padding()


def test_shape_and_device_are_those_of_what_was_packed():
    assert packed(37).shape == (2, 37, 3, 4)
    assert packed(37).to("meta").device.type == "meta"


# --- thresholds -------------------------------------------------------------------------------------------------------


def norm(count, seed):
    """A BatchNorm with γ, α of both signs and zero, γ = α = 0 among them, and a few far from the sums."""
    g = torch.Generator().manual_seed(seed)

    def random(scale):
        values = torch.randn(count, generator=g) * scale
        return torch.where(torch.randint(5, (count,), generator=g) == 0, 0.0, values)

    return {
        "norm_weight": random(1), "norm_bias": random(1), "running_mean": random(20),
        "running_var": torch.rand(count, generator=g) * 9, "eps": 1e-5, "scale": random(0.5), "bias": random(3),
    }  # fmt: skip


def formula(v, n):
    wide = {name: value.double() for name, value in n.items() if name != "eps"}
    value = wide["scale"] * v.double() + wide["bias"] - wide["running_mean"]
    return value / (wide["running_var"] + n["eps"]).sqrt() * wide["norm_weight"] + wide["norm_bias"] >= 0


def test_folding_agrees_with_batchnorm_then_sign_at_every_sum():
    n = norm(500, 1)
    threshold = Threshold.fold(**n)
    assert threshold.flip.any()
    assert not threshold.flip.all()
    v = torch.arange(-600, 601, dtype=torch.int32)[:, None, None, None].expand(-1, 500, 1, 1)
    assert torch.equal(threshold.bits(v), formula(v[..., 0, 0], n)[..., None, None])
    # One step to either side of each threshold, wherever it lies.
    inside = ((threshold.value > INT32.min + 1) & (threshold.value < INT32.max)).nonzero().flatten()
    for step in (-1, 0, 1):
        near = threshold.value + step
        assert torch.equal(threshold.bits(near[:, None, None])[inside, 0, 0], formula(near, n)[inside])


def test_folding_real_values_agrees_at_every_float_around_the_threshold():
    n = norm(500, 2)
    threshold = Threshold.fold(**n, dtype=torch.float32)
    finite = threshold.value.isfinite().nonzero().flatten()
    assert len(finite) > 100
    for towards in (-torch.inf, torch.inf):
        near = threshold.value.clone()
        for _ in range(3):
            assert torch.equal(threshold.bits(near[:, None, None])[finite, 0, 0], formula(near, n)[finite])
            near = near.nextafter(torch.tensor(towards))
    for number in (0.0, -0.0, 1e30, -1e30, 7.5):
        v = torch.full((500,), number)
        assert torch.equal(threshold.bits(v[:, None, None])[:, 0, 0], formula(v, n))
    assert not threshold.bits(torch.full((500, 1, 1), torch.nan)).any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
@pytest.mark.parametrize(("beta", "bit"), [(0.5, True), (0.0, True), (-0.5, False)])
@pytest.mark.parametrize("zero", ["norm_weight", "scale"])
def test_a_zero_factor_makes_a_constant_bit(zero, beta, bit, dtype):
    n = {"norm_weight": 2.0, "norm_bias": beta, "running_mean": 0.0, "running_var": 1.0, "scale": 3.0, "bias": 0.0}
    n = {name: torch.tensor([0.0 if name == zero else value]) for name, value in n.items()}
    threshold = Threshold.fold(**n, eps=0.0, dtype=dtype)
    for v in (-(2**31) + 1, -7, 0, 7, 2**31 - 1):
        assert threshold.bits(torch.tensor(v).to(dtype).reshape(1, 1, 1)).item() is bit


def test_a_missing_factor_is_one_and_a_missing_term_zero():
    mean, var = torch.tensor([2.5]), torch.tensor([4.0])
    assert Threshold.fold(None, None, mean, var, 0.0).value.item() == 3


@pytest.mark.parametrize(
    ("value", "flip", "error", "text"),
    [
        (torch.zeros(3), torch.zeros(3), TypeError, "flip must be bool"),
        (
            torch.zeros(3).double(),
            torch.zeros(3).bool(),
            TypeError,
            "value must be int32 or float32, got torch.float64",
        ),
        (torch.zeros(3), torch.zeros(4).bool(), ValueError, r"must both be \[C\], got \[3\] and \[4\]"),
        (torch.zeros(3, 1), torch.zeros(3, 1).bool(), ValueError, r"must both be \[C\]"),
        ([1], torch.zeros(3).bool(), TypeError, "value must be a Tensor"),
        (torch.zeros(3), torch.zeros(3).bool().to("meta"), ValueError, "on one device, got cpu and meta"),
    ],
)
def test_thresholds_that_do_not_fit_are_refused(value, flip, error, text):
    with pytest.raises(error, match=f"^Threshold: .*{text}"):
        Threshold(value, flip)
