"""The audit of whole networks: a right one passes every check, a planted fault does not, and the page has the rows."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from basisconv_kernels import testing
from basisconv_kernels.compression import model as compression
from basisconv_kernels.layers.basis_conv2d import BasisConv2d
from bench.audit import __main__ as command
from bench.audit import checks, methods, networks, page

IMAGE = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    """A residual with a depthwise convolution in it, a grouped one behind it, and a flattened head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16))
        self.grouped = nn.Conv2d(16, 24, 3, stride=2, groups=2)
        self.head = nn.Linear(24 * 5 * 5, 7)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.pointwise(torch.relu(self.depthwise(x)))
        return self.head(self.grouped(x).flatten(1))


def build() -> nn.Module:
    torch.manual_seed(0)
    return networks.enliven(Small(), 12)


def test_a_right_network_passes(tmp_path):
    row = checks.full_rank(build(), IMAGE)
    assert row["changed"] == row["convolutions"] == 4
    assert 0 < row["torch.float32"]["off"] < row["torch.bfloat16"]["off"]
    assert 0 < row["torch.bfloat16"]["layer"] <= 1
    row = checks.quarter(build(), build(), IMAGE, tmp_path / "it")
    assert row["bytes"] == row["header"] + row["formula"] + row["buffers"] == (tmp_path / "it").stat().st_size


@pytest.mark.parametrize("method", methods.CONFIGS)
def test_a_right_network_passes_every_method(method, tmp_path):
    row = methods.check(method, build(), build(), IMAGE, tmp_path / "it")
    assert row["changed"] + sum(row["kept"].values()) == row["convolutions"] == 4
    assert row["changed"] or method == "stacked, signs"


def disturbed(monkeypatch, module, disturb):
    """Let ``compress`` give a network that was disturbed behind its back."""

    def compress(*arguments, **settings):
        small, report = compression.compress(*arguments, **settings)
        with torch.no_grad():
            disturb(small)
        return small, report

    monkeypatch.setattr(module, "compress", compress)


def test_a_wrong_coefficient_is_found(monkeypatch):
    disturbed(monkeypatch, checks, lambda small: small.pointwise[0].coefficients[3].mul_(1.1))
    with pytest.raises(testing.Mismatch, match="network"):
        checks.full_rank(build(), IMAGE)


def test_a_kernel_that_rounds_too_often_is_found(monkeypatch):
    right = BasisConv2d.forward
    monkeypatch.setattr(BasisConv2d, "forward", lambda self, x: (right(self, x) * 64).to(torch.bfloat16).to(x) / 64)
    with pytest.raises(testing.Mismatch, match="of what rule 1 allows"):
        checks.full_rank(build(), IMAGE)


def test_a_larger_file_is_found(monkeypatch, tmp_path):
    disturbed(monkeypatch, checks, lambda small: small.register_buffer("more", torch.zeros(1)))
    fresh = build()
    fresh.register_buffer("more", torch.zeros(1))
    with pytest.raises(AssertionError, match="bytes where the formula gives"):
        checks.quarter(build(), fresh, IMAGE, tmp_path / "it")


FAULTS = {
    "tucker": lambda small: small.stem[0].u_out.mul_(1.01),
    "prune, L1": lambda small: small.grouped.weight.copy_(small.grouped.weight.flip(0)),
    "ternary, TWN": lambda small: small.stem[0].weight[2].mul_(1.01),
    "ternary, TTQ": lambda small: small.stem[0].weight.neg_(),
    "stacked": lambda small: small.pointwise[0].bias.add_(0.1),
    "binary": lambda small: small.pointwise[0].weight[0].neg_(),
}


@pytest.mark.parametrize("method", FAULTS)
def test_a_fault_of_a_method_is_found(method, monkeypatch, tmp_path):
    disturbed(monkeypatch, methods, FAULTS[method])
    with pytest.raises(AssertionError):
        methods.check(method, build(), build(), IMAGE, tmp_path / "it")


def test_columns_of_another_network_are_found():
    small, _ = compression.compress(build(), methods.CONFIGS["prune, L1"], example_inputs=IMAGE)
    torch.nn.init.normal_(small.grouped.weight)
    with pytest.raises(AssertionError, match="grouped: column 0 of the pruned weight is none of the dense one"):
        checks.without_what_went(build(), small)


def test_what_is_not_installed_is_skipped_with_the_reason(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    rows = tmp_path / "rows.jsonl"
    done = CliRunner().invoke(command.app, ["run", "resnet18", "--part", "basis", "--output", str(rows)])
    assert done.exit_code == 0, done.output
    found = page.read(rows)
    assert [row["status"] for row in found] == ["skipped", "skipped"]
    assert "pip install torchvision" in found[0]["note"]
    assert "quarter resnet18: skipped, torchvision cannot be imported" in page.text(found)


def test_a_failure_is_a_row_and_an_exit_code(monkeypatch, tmp_path):
    monkeypatch.setattr(networks, "build", lambda name, size: build())
    monkeypatch.setattr(command, "SMALL", 12)
    disturbed(monkeypatch, methods, FAULTS["binary"])
    rows = tmp_path / "rows.jsonl"
    options = [
        "run",
        "resnet18",
        "--part",
        "methods",
        "--method",
        "binary",
        "--method",
        "stacked",
        "--output",
        str(rows),
    ]
    assert CliRunner().invoke(command.app, options).exit_code == 1
    assert [row["status"] for row in page.read(rows)] == ["failed", "failed"]


def test_unknown_names_are_refused():
    done = CliRunner().invoke(command.app, ["run", "resnet19"])
    assert done.exit_code == 2
    assert "resnet19" in done.output


def test_the_page_is_that_of_the_rows():
    rows = page.read(page.ROWS)
    assert not any(row["status"] == "failed" for row in rows)
    made = page.PAGE.read_text(encoding="utf-8").partition(page.START)[2].partition(page.END)[0]
    assert made.strip() == page.text(rows).strip()
