"""Calls of ternary layers that the op alone would take amiss: other channel counts, and gradients in a graph."""

from __future__ import annotations

import pytest
import torch

from basisconv_kernels import TernaryConv2d, TernaryLinear


@pytest.mark.parametrize("backend", [None, "reference"])
def test_other_numbers_of_channels_are_refused(backend):
    """Planes are words of 32 channels: the op would read another number of channels from the same words."""
    layer = TernaryConv2d(8, 4, 3, padding=1, backend=backend).pack()
    for channels in (7, 9):
        with pytest.raises(ValueError, match=rf"in_channels = 8 channels, got \[1, {channels}, 5, 5\]"):
            layer(torch.randn(1, channels, 5, 5))
    linear = TernaryLinear(8, 4, backend=backend).pack()
    with pytest.raises(ValueError, match=r"in_features = 8\], got \[2, 7\]"):
        linear(torch.randn(2, 7))


def test_a_compiled_packed_layer_keeps_the_gradients_of_its_scales(fresh_compiler):
    layer = TernaryConv2d(8, 4, 3, padding=1, rule="ttq").pack()
    x = torch.randn(1, 8, 5, 5)
    layer(x).sum().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    torch.compile(layer, backend="aot_eager")(x).sum().backward()
    assert len(expected) == 3
    for p, gradient in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)
