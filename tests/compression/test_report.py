"""The report of ``compress``: counts against independent ones, and its forms."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from basisconv_kernels.compression.config import BasisConfig
from basisconv_kernels.compression.files import save
from basisconv_kernels.compression.model import compress, to_plain
from basisconv_kernels.compression.prune_config import PruneConfig
from basisconv_kernels.compression.stacked_binary import StackedBinaryConfig, freeze_bits
from basisconv_kernels.compression.ternary_config import TernaryConfig
from basisconv_kernels.compression.tucker_config import TuckerConfig
from basisconv_kernels.layers.ternary import TernaryLayer

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
        "layer", "C→K", "R×S", "method", "Q", "Q*", "energy", "error", "MACs", "parameters", "bytes", "ms", "verdict",
    ]  # fmt: skip


METHODS = {
    "BasisConv2d": BasisConfig(fraction=0.25, keep_dense="never"),
    "TuckerConv2d": TuckerConfig(fraction=0.25, keep_dense="never", merge=False),
    "StackedBinaryConv2d": StackedBinaryConfig(splits=2, bank=0.5),
    "TernaryConv2d": TernaryConfig(method="twn", linear=False),
    "pruned": PruneConfig(fraction=0.5),
}


def plain_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 8, 3, padding=1),
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_method_says_method_bytes_times_and_accuracy(method, tmp_path):
    dense, image = plain_network(), torch.randn(2, 4, 12, 12)
    answers = iter([0.75, 0.5])

    def evaluate(model):
        assert not model.training
        return next(answers)

    small, report = compress(dense, METHODS[method], example_inputs=image, measure=True, evaluate=evaluate)
    assert (report.accuracy_before, report.accuracy_after) == (0.75, 0.5)
    changed = [row for row in report.layers if row.verdict != "kept"]
    assert method in {row.method for row in changed}
    assert all(row.dense_ms > 0 and row.basis_ms > 0 for row in changed)
    # Files hold the same tensors and a recipe; what they grow by from one network to another is the tensors alone.
    small = freeze_bits(small)
    for module in small.modules():
        if isinstance(module, TernaryLayer):
            module.pack()
    assert report.bytes_before == sum(4 * p.numel() for p in dense.parameters())
    assert report.bytes_after == sum(t.numel() * t.element_size() for t in small.state_dict().values())
    if method != "pruned":
        save(small, tmp_path / "small")
        assert (tmp_path / "small").stat().st_size > report.bytes_after
    assert report.bytes_after < report.bytes_before
    assert "accuracy 0.7500 → 0.5000" in report.to_table()
    assert report.to_dict()["accuracy_after"] == 0.5


class Counted(HTMLParser):
    """What is in a page: its tags by kind, its text, and whether every tag is closed."""

    VOID = ("meta", "rect")

    def __init__(self) -> None:
        super().__init__()
        self.open, self.count, self.text, self.attributes = [], {}, "", []

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_report_as_a_page():
    dense, image = plain_network(), torch.randn(2, 4, 12, 12)
    _, report = compress(dense, {"0": METHODS["BasisConv2d"], "2": METHODS["TuckerConv2d"]}, example_inputs=image)
    found = Counted()
    found.feed(report.to_html("A <title> & more"))
    assert found.open == []
    assert found.count["svg"] == 3  # nothing was timed
    assert found.count["rect"] == 3 * 3 * 2
    assert found.count["tr"] == 1 + 3
    assert "A <title> & more" in found.text
    assert report.summary().splitlines()[0] in found.text
    assert all(row.method in found.text for row in report.layers)
    assert [row.method for row in report.layers] == ["BasisConv2d", "TuckerConv2d", ""]
    widths = [float(value) for name, value in found.attributes if name == "width" and "." in value]
    assert max(widths) == pytest.approx(520)
    timed = Counted()
    timed.feed(compress(dense, METHODS["BasisConv2d"], example_inputs=image, measure=True)[1].to_html())
    assert timed.count["svg"] == 4
    assert not any(name == "src" or value.startswith("http") for name, value in timed.attributes if value)
