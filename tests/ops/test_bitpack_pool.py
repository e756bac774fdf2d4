"""Max-pooling on packed signs against max-pooling of numbers, in channels whose sign rises and whose sign falls."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch

from basisconv_kernels import PackedMaxPool2d, bitpack, packed_max_pool2d, unpack

WINDOWS = {
    "2x2": (2, None, 0, 1),
    "3x3, overlapping, padded": (3, 2, 1, 1),
    "asymmetric, dilated": ((2, 3), (1, 2), (1, 0), (2, 1)),
    "one pixel": (1, 2, 0, 1),
}


@pytest.mark.parametrize("channels", [1, 31, 32, 70])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_signs_of_the_maximum(channels, window):
    kernel, stride, padding, dilation = window
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(2, channels, 9, 8, generator=generator)
    factor = torch.where(torch.rand(channels, generator=generator) < 0.5, 1.0, -1.0)[:, None, None]
    shift = torch.randn(channels, generator=generator)[:, None, None]
    pooled = torch.nn.functional.max_pool2d(x, kernel, stride, padding, dilation)
    expected = factor * pooled + shift >= 0
    falling = factor[:, 0, 0] < 0
    settings = {"stride": stride, "padding": padding, "dilation": dilation}
    found = packed_max_pool2d(bitpack(factor * x + shift), kernel, **settings, falling=falling)
    assert torch.equal(unpack(found) > 0, expected)
    found.check_padding()
    layer = PackedMaxPool2d(channels, kernel, **settings, falling=falling)
    assert torch.equal(layer(bitpack(factor * x + shift)).words, found.words)


SIGNS = bitpack(torch.ones(1, 40, 4, 4))
REFUSED = {
    "numbers": (lambda: packed_max_pool2d(torch.ones(1, 4, 4, 4), 2), TypeError, "packed must be a PackedTensor"),
    "codes": (lambda: packed_max_pool2d(bitpack(torch.ones(1, 4, 4, 4), bits=2), 2), ValueError, "must hold signs"),
    "padding": (lambda: packed_max_pool2d(SIGNS, 2, padding=2), ValueError, "at most half of kernel_size"),
    "falling": (lambda: packed_max_pool2d(SIGNS, 2, falling=torch.ones(3)), ValueError, r"falling must be bool \[40\]"),
    "empty": (lambda: packed_max_pool2d(SIGNS, 5), ValueError, "packed_max_pool2d"),
}


@pytest.mark.parametrize(("call", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_refusals(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("name", ["ops.bitpack_pool", "layers.packed_max_pool2d"])
def test_examples_run(name):
    assert doctest.testmod(importlib.import_module(f"basisconv_kernels.{name}")).failed == 0
