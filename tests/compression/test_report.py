"""The report of ``compress``: counts against independent ones, and its forms."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from basisconv_kernels.compression.config import BasisConfig
from basisconv_kernels.compression.model import compress, to_plain

QUARTER = BasisConfig(fraction=0.25)


def counted_flops(model, input):
    """Independent of every formula here: PyTorch's own counter at each convolution that runs."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input)
    found = counter.get_flop_counts()["Global"]
    return sum(count for op, count in found.items() if "convolution" in str(op))


def test_macs_and_parameters_are_an_independent_count(mixed, image):
    model, report = compress(mixed, QUARTER, example_inputs=image)
    assert report.flops_before == 2 * report.macs_before == counted_flops(mixed, image[:1])
    assert report.flops_after == 2 * report.macs_after == counted_flops(to_plain(model), image[:1])
    convs = [m for m in mixed.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    assert report.parameters_before == sum(p.numel() for m in convs for p in m.parameters())
    assert report.network_parameters_before == sum(p.numel() for p in mixed.parameters())
    assert report.network_parameters_after == sum(p.numel() for p in to_plain(model).parameters())
    saved = report.network_parameters_before - report.network_parameters_after
    assert saved == report.parameters_before - report.parameters_after


def test_the_report_as_data_and_as_tables(mixed, image, monkeypatch):
    _, report = compress(mixed, QUARTER, example_inputs=image)
    data = json.loads(report.to_json())
    assert data == json.loads(json.dumps(report.to_dict()))
    assert data["rule"] == "fraction=0.25"
    assert [row["name"] for row in data["layers"]] == [layer.name for layer in report.layers]
    assert data["totals"]["flops_before"] == 2 * data["totals"]["macs_before"]
    row = next(row for row in data["layers"] if row["name"] == "stem")
    assert row["energy_kept"] == pytest.approx(1 - row["relative_error"] ** 2)
    drawn = report.to_table()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    plain = report.to_table()
    for text in (drawn, plain):
        for layer in report.layers:
            assert layer.name in text
        assert "4 of 8 convolutions replaced" in text
        assert "1 MAC" not in text
    assert "\x1b" not in drawn
    assert plain.splitlines()[0].split() == [
        "layer", "C→K", "R×S", "Q", "Q*", "energy", "error", "MACs", "parameters", "ms", "verdict",
    ]  # fmt: skip
