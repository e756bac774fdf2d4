"""Lists of steps and mappings of name patterns: who gets which configuration, and what the joint report says."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from basisconv_kernels.compression import methods
from basisconv_kernels.compression.config import BasisConfig
from basisconv_kernels.compression.methods import Method, method_of, register_method
from basisconv_kernels.compression.model import compress
from basisconv_kernels.layers.basis_conv2d import BasisConv2d

HALF, QUARTER = BasisConfig(fraction=0.5, keep_dense="never"), BasisConfig(fraction=0.25, keep_dense="never")


def basis_channels(model: nn.Module) -> dict[str, int]:
    return {name: m.basis_channels for name, m in model.named_modules() if isinstance(m, BasisConv2d)}


def test_the_first_pattern_that_matches_counts(mixed, image):
    config = {"stem": None, "s*": QUARTER, "*": HALF}
    small, report = compress(mixed, config, example_inputs=image)
    alone, _ = compress(mixed, HALF, example_inputs=image, skip=["stem", "shared"])
    assert basis_channels(small) == {"shared": 3, **basis_channels(alone)}
    rows = {row.name: row for row in report.layers}
    assert list(rows) == [row.name for row in report.steps[0].layers]
    assert rows["stem"].reason == "no pattern names it"
    assert (rows["shared"].basis_channels, rows["pointwise"].basis_channels) == (3, 10)
    assert rows["odd"].reason.startswith("is a OddConv")
    assert report.network_parameters_after < report.network_parameters_before


def test_a_further_name_of_a_shared_layer_is_matched_too(mixed, image):
    small, _ = compress(mixed, {"again": QUARTER}, example_inputs=image)
    assert small.shared is small.again
    assert basis_channels(small) == {"shared": 3}


def test_equal_configurations_share_their_budget(mixed, image):
    names = ["stem", "grouped", "pointwise"]
    _, report = compress(mixed, dict.fromkeys(names, BasisConfig(macs=0.95)), example_inputs=image)
    _, expected = compress(mixed, BasisConfig(macs=0.95), example_inputs=image, only=names)
    assert report.steps == ()
    assert report.macs_after == expected.macs_after <= 0.95 * report.macs_before


def test_a_list_is_a_pipeline(mixed, image):
    """The second step sees only what the first one left."""
    small, report = compress(mixed, [{"stem": QUARTER}, HALF], example_inputs=image)
    assert small.stem.basis_channels == 3
    assert small.pointwise.basis_channels == 10
    assert [row.name for row in report.steps[0].layers if row.replaced] == ["stem"]
    assert "stem" not in {row.name for row in report.steps[1].layers}
    assert {row.name for row in report.layers} == {row.name for row in report.steps[0].layers}
    first, second = report.steps
    assert report.macs_before == first.macs_before
    stem = next(row for row in report.layers if row.name == "stem")
    assert report.macs_after == second.macs_after + stem.macs_after
    assert report.network_parameters_before == first.network_parameters_before
    assert report.network_parameters_after == second.network_parameters_after
    assert report.to_dict()["steps"][1]["rule"] == str(HALF)
    assert report.rule == f"{QUARTER} | {HALF}"
    assert "stem" in report.to_table()


def test_one_step_in_a_list_is_that_step(mixed, image):
    small, report = compress(mixed, [HALF], example_inputs=image)
    alone, expected = compress(mixed, HALF, example_inputs=image)
    assert report == expected
    assert basis_channels(small) == basis_channels(alone)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ([], ValueError, "the list of steps is empty"),
        ({"nowhere*": HALF}, ValueError, r"pattern 'nowhere\*' is the first to match no convolution"),
        ({"*": HALF, "stem": QUARTER}, ValueError, "pattern 'stem' is the first to match no convolution"),
        ({"*": None}, ValueError, "every pattern stands for None"),
        ("energy", TypeError, "config must be a .*BasisConfig.*, got str"),
        ([HALF, 0.5], TypeError, "config must be a .*BasisConfig.*, got float"),
        ({"stem": 0.5}, TypeError, "config must be a .*BasisConfig.*, got float"),
        ([HALF, BasisConfig(energy={"nowhere": 0.5})], ValueError, "energy names 'nowhere'"),
    ],
    ids=str,
)
def test_errors_come_before_the_first_step(mixed, image, config, error, message):
    before = dict(mixed.named_modules())
    with pytest.raises(error, match=message):
        compress(mixed, config, example_inputs=image, inplace=True)
    assert dict(mixed.named_modules()) == before


@dataclass(frozen=True)
class Silence:
    """A method of a test: the layers become Identity."""


def test_a_method_of_ones_own(image, monkeypatch):
    def convert(target, config, task):
        for name in [n for n, m in target.named_children() if isinstance(m, nn.Conv2d) and n in task.named]:
            setattr(target, name, nn.Identity())
        return target, ()

    monkeypatch.setattr(methods, "_methods", dict(methods._methods))
    register_method(Method(Silence, convert))
    with pytest.raises(ValueError, match="Silence is taken"):
        register_method(Method(Silence, convert))
    assert method_of(Silence()).convert is convert
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3)).double()
    silent, _ = compress(net, {"0": Silence()}, example_inputs=image)
    assert isinstance(silent[0], nn.Identity)
    assert torch.equal(silent(image), net[1](image))
