"""The search under a budget: it keeps the budget, loses least, and leaves dense what gains nothing."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from basisconv_kernels.compression import search as module
from basisconv_kernels.compression.config import BasisConfig
from basisconv_kernels.compression.prune_config import PruneConfig
from basisconv_kernels.compression.search import search
from basisconv_kernels.compression.stacked_binary import StackedBinaryConfig
from basisconv_kernels.compression.ternary_config import TernaryConfig
from basisconv_kernels.compression.tucker_config import TuckerConfig
from basisconv_kernels.layers.basis_conv2d import BasisConv2d

IMAGE = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
BASES = [BasisConfig(fraction=f) for f in (0.5, 0.25, 0.1)]


def network() -> nn.Module:
    """Three convolutions, the second of rank 3: it can be truncated for nothing."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 20, 3)
    )
    with torch.no_grad():
        net[2].weight.copy_((torch.randn(24, 3) @ torch.randn(3, 144)).view(24, 16, 3, 3) / 12)
    return net.eval()


@pytest.mark.parametrize("budget", ["macs", "size", "latency"])
def test_the_budget_holds_and_the_report_tells_the_result(budget):
    dense = network()
    before = copy.deepcopy(dense.state_dict())
    small, found = search(
        dense, example_inputs=IMAGE, candidates=BASES, **{budget: 0.8 if budget == "latency" else 0.5}
    )
    assert found.spent <= found.limit
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    chosen = {option.layer: option.way for option in found.options if option.chosen}
    assert set(chosen) == {"0", "2", "4"}
    for name, way in chosen.items():
        assert isinstance(small.get_submodule(name), BasisConv2d) == (way != "dense")
    report = found.report
    assert (report.macs_after < report.macs_before) == any(way != "dense" for way in chosen.values())
    if budget == "macs":
        assert report.macs_after == found.spent
        assert report.macs_before == found.dense
    if budget == "size":
        assert report.bytes_after == found.spent
    assert "→" in found.to_table()
    assert found.to_dict()["options"][0]["way"] == "dense"


def test_it_loses_least_of_all_choices():
    """Against every combination; the hull leaves at most the last step unspent, so the best on the hull it is."""
    dense = network()
    _, found = search(dense, example_inputs=IMAGE, candidates=BASES, macs=0.5)
    by_layer = {name: [o for o in found.options if o.layer == name] for name in ("0", "2", "4")}
    everything = [
        (sum(o.macs for o in many), sum(o.loss for o in many)) for many in itertools.product(*by_layer.values())
    ]
    mine = sum(o.loss for o in found.options if o.chosen)
    # No combination that costs no more than ours loses less.
    assert mine == pytest.approx(min(loss for cost, loss in everything if cost <= found.spent))
    assert next(o for o in found.options if o.layer == "2" and o.chosen).way != "dense"


def test_measured_time_keeps_a_layer_dense(monkeypatch):
    """A layer that is slower in every converted form stays, though its MACs would fall."""
    real = module.side_by_side

    def slow_second(modules, examples):
        times = [1.0] * len(modules)
        conv = modules[0]
        assert len(real(modules, examples)) == len(modules)
        return [1.0, *[2.0 if conv.out_channels == 24 else 0.25] * (len(times) - 1)]

    monkeypatch.setattr(module, "side_by_side", slow_second)
    small, found = search(network(), example_inputs=IMAGE, candidates=BASES, latency=0.7)
    assert type(small[2]) is nn.Conv2d
    rows = {row.name: row for row in found.report.layers}
    assert rows["2"].reason == "no candidate costs less, as measured"
    with pytest.raises(ValueError, match=r"cheapest options of all layers take 1\.5"):
        search(network(), example_inputs=IMAGE, candidates=BASES, latency=0.3)


def test_sensitivity_is_measured_one_layer_at_a_time():
    dense, seen = network(), []

    def evaluate(model):
        converted = [name for name, m in model.named_modules() if isinstance(m, BasisConv2d)]
        seen.append(converted)
        return 0.9 - 0.2 * ("4" in converted) - 0.01 * ("0" in converted)

    _, found = search(dense, example_inputs=IMAGE, candidates=BASES, macs=0.6, evaluate=evaluate)
    assert seen[0] == []
    assert all(len(names) == 1 for names in seen[1:-1])
    losses = {(o.layer, round(o.loss, 6)) for o in found.options if o.way != "dense"}
    assert losses == {("0", 0.01), ("2", 0.0), ("4", 0.2)}
    assert found.report.accuracy_before == 0.9
    assert found.report.accuracy_after == 0.9 - 0.2 * ("4" in seen[-1]) - 0.01 * ("0" in seen[-1])
    assert "4" not in seen[-1]  # the budget can be met without it


def test_methods_compete():
    mixed = [BasisConfig(fraction=0.25), TuckerConfig(fraction=0.3), StackedBinaryConfig(splits=2, bank=0.5)]
    small, found = search(network(), example_inputs=IMAGE, candidates=mixed, size=0.3)
    assert found.spent <= found.limit
    assert {o.way for o in found.options} >= {"dense", *map(str, mixed)}
    assert small(IMAGE).shape == network()(IMAGE).shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one budget of latency, size, macs must be given, got none"),
        ({"macs": 0.5, "size": 0.5}, "got size and macs"),
        ({"macs": 0.0}, "macs must lie in 0..1, above 0"),
        ({"macs": 0.5, "candidates": []}, "candidates is empty"),
        ({"macs": 0.5, "candidates": [PruneConfig(fraction=0.5)]}, "changes the layers around"),
        ({"macs": 0.001}, "cheapest options of all layers take"),
        (
            {"macs": 0.5, "candidates": [TernaryConfig(loader=[1], evaluate=lambda m: 0.0)]},
            "trains the network; run it before the search",
        ),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=f"search: .*{message}"):
        search(network(), example_inputs=IMAGE, **arguments)
