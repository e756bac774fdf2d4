"""What the layer tests share: a comparison up to rounding, convolutions of every kind, a look at repeated calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from basisconv_kernels import testing
from basisconv_kernels.layers import packing

# Every size differs; each line is a way in which a conversion could lose something of the convolution.
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"args": (5, 7, 3)},
    "padded": {"args": (5, 7, 3), "padding": 1},
    "no_bias": {"args": (5, 7, 3), "padding": 1, "bias": False},
    "strided": {"args": (6, 10, (3, 5)), "stride": (2, 3), "padding": (2, 1)},
    "dilated": {"args": (4, 9, 3), "dilation": (2, 3), "padding": (1, 4)},
    "even_kernel": {"args": (3, 8, (2, 4)), "padding": (1, 0)},
    "pointwise": {"args": (10, 14, 1)},
    "pointwise_strided": {"args": (10, 6, 1), "stride": 2},
    "more_filters_than_taps": {"args": (3, 40, 3), "padding": 1},
    "grouped": {"args": (6, 9, 3), "padding": 1, "groups": 3},
    "grouped_strided": {"args": (8, 20, 3), "stride": 2, "padding": 1, "groups": 4},
    "depthwise": {"args": (6, 6, 3), "padding": 1, "groups": 6},
    "depthwise_multiplied": {"args": (4, 12, 5), "padding": 2, "groups": 4},
    "same": {"args": (4, 6, (2, 5)), "padding": "same"},
    "same_dilated": {"args": (4, 6, (4, 3)), "padding": "same", "dilation": (1, 2)},
    "valid": {"args": (4, 6, 3), "padding": "valid"},
    "reflect": {"args": (4, 6, 3), "padding": (2, 1), "padding_mode": "reflect"},
    "replicate_strided": {"args": (4, 6, 3), "padding": 2, "padding_mode": "replicate", "stride": 2},
    "circular_grouped": {"args": (4, 6, 3), "padding": 1, "padding_mode": "circular", "groups": 2},
    "reflect_same": {"args": (4, 6, (2, 3)), "padding": "same", "padding_mode": "reflect"},
}


def make_conv(name: str, dtype: torch.dtype = torch.float64) -> nn.Conv2d:
    """The convolution of this name with seeded weights."""
    torch.manual_seed(sum(map(ord, name)))
    settings = dict(CONVOLUTIONS[name])
    return nn.Conv2d(*settings.pop("args"), **settings, dtype=dtype)


@pytest.fixture(params=CONVOLUTIONS)
def conv(request: pytest.FixtureRequest) -> nn.Conv2d:
    """Each convolution, in float64."""
    return make_conv(request.param)


@pytest.fixture
def convolution() -> Callable[..., nn.Conv2d]:
    """``make_conv``: a convolution by name."""
    return make_conv


@pytest.fixture
def image() -> Callable[..., Tensor]:
    """An input for a layer, N = 2, with sides of their own."""

    def make(layer: nn.Module, N: int = 2, H: int = 11, W: int = 13, seed: int = 0) -> Tensor:
        weight = layer.weight if isinstance(layer, nn.Conv2d) else layer.coefficients
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(N, layer.in_channels, H, W, generator=generator, dtype=weight.dtype)

    return make


@pytest.fixture
def close() -> Callable[[Tensor, Tensor], None]:
    """Assert that two results of a layer are equal up to rounding, and of one dtype."""

    def check(got: Tensor, expected: Tensor) -> None:
        assert got.dtype == expected.dtype
        testing.check_same_layer(got, expected)

    return check


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Results of layers' calls that went the short way, None for those that did not."""
    seen: list[Any] = []
    repeat = packing.eager.repeat

    def watched(*arguments: Any) -> Any:
        seen.append(repeat(*arguments))
        return seen[-1]

    monkeypatch.setattr(packing.eager, "repeat", watched)
    return seen


@pytest.fixture
def no_gradients() -> Any:
    with torch.no_grad():
        yield
