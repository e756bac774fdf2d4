"""Ten third-party networks, every method: a layer is converted, or refused by name; nothing is silently wrong.

What the networks must equal stands in ``bench.audit``, which also runs from the command line, on more of them.
"""

from __future__ import annotations

import pytest
from torch import nn

from bench.audit import checks, methods, networks

SIDE = 64
IMAGE = networks.images(SIDE)
SHORT = "squeezenet1_1"
LONG = (
    "resnet18", "alexnet", "googlenet", "densenet121", "mobilenet_v2", "shufflenet_v2_x1_0", "regnet_y_400mf",
    "timm/convnext_atto", "timm/resnest14d",
)  # fmt: skip
STEPS = "ternary, layer-wise"  # it trains once a layer

each = pytest.mark.parametrize("name", [SHORT, *(pytest.param(name, marks=pytest.mark.full) for name in LONG)])
by_method = pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[pytest.mark.full] if m == STEPS else []) for m in methods.CONFIGS]
)


def build(name: str) -> nn.Module:
    try:
        return networks.build(name, SIDE)
    except networks.Unavailable as reason:
        pytest.skip(str(reason))


@each
def test_full_rank_is_the_dense_network(name):
    row = checks.full_rank(build(name), IMAGE)
    assert row["changed"] > 0


@each
def test_a_quarter_has_the_bytes_of_the_formula(name, tmp_path):
    row = checks.quarter(build(name), build(name), IMAGE, tmp_path / "small")
    assert row["bytes"] < row["dense"]


@each
@by_method
def test_converts_or_refuses_by_name(name, method, tmp_path):
    if method == STEPS and name not in (SHORT, "resnet18"):
        pytest.skip("trains once for each of many layers")
    row = methods.check(method, build(name), build(name), IMAGE, tmp_path / "small")
    assert row["changed"] or method == "stacked, signs"  # whose inputs are never negative behind ReLUs
