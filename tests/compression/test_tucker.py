"""``compress`` with a ``TuckerConfig``: exact at full rank, honest costs, every rule, folding, files, pipelines."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from basisconv_kernels import testing
from basisconv_kernels.compression import tucker
from basisconv_kernels.compression.config import BasisConfig
from basisconv_kernels.compression.files import load, read_recipe, save
from basisconv_kernels.compression.finetune import trainable_parameters
from basisconv_kernels.compression.fold import fold_batchnorm
from basisconv_kernels.compression.model import compress, network_parameters, to_plain
from basisconv_kernels.compression.tucker_config import TuckerConfig
from basisconv_kernels.core.errors import ArchitectureError
from basisconv_kernels.layers.basis_conv2d import BasisConv2d
from basisconv_kernels.layers.tucker_conv2d import TuckerConv2d

FULL = TuckerConfig(fraction=1.0, keep_dense="never", merge=False)
HALF = TuckerConfig(fraction=0.5, keep_dense="never")


class Net(nn.Module):
    """Strided, dilated, reflecting, 1×1 and grouped convolutions, BatchNorm, a residual and a ReLU6."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 5, padding=2, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.wide = nn.Conv2d(24, 40, 3, stride=2, padding=1)
        self.dilated = nn.Conv2d(40, 40, 3, padding=2, dilation=2, bias=False)
        self.norm2 = nn.BatchNorm2d(40)
        self.mirror = nn.Conv2d(40, 32, 3, padding=1, padding_mode="reflect")
        self.pointwise = nn.Conv2d(32, 36, 1)
        self.grouped = nn.Conv2d(36, 24, 3, groups=3)
        self.act = nn.ReLU6()

    def forward(self, x):
        x = self.wide(torch.relu(self.norm(self.stem(x))))
        x = torch.relu(self.norm2(self.dilated(x)) + x)
        return self.act(self.grouped(self.pointwise(self.mirror(x)))).mean((2, 3))


@pytest.fixture
def net(randomize):
    torch.manual_seed(0)
    return randomize(Net().double().eval())


@pytest.fixture
def image():
    return torch.randn(2, 3, 15, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def make_low_rank(conv):
    """Filters of Tucker ranks 4 and 6, and a little noise."""
    low = TuckerConv2d(40, 40, 3, rank_in=4, rank_out=6, dtype=torch.float64).to_conv().weight
    conv.weight.copy_(low + 0.02 * low.std() * torch.randn_like(low))


def kinds(model):
    return {name: type(m).__name__ for name, m in model.named_modules() if isinstance(m, (TuckerConv2d, BasisConv2d))}


def test_full_ranks_give_the_same_network(net, image):
    small, report = compress(net, FULL, example_inputs=image)
    made = kinds(small)
    assert {name for name, kind in made.items() if kind == "TuckerConv2d"} == {"stem", "wide", "dilated", "mirror"}
    assert {name for name, kind in made.items() if kind == "BasisConv2d"} == {"pointwise", "grouped"}
    testing.check_same_network(small(image), net(image))
    assert all(row.energy_kept > 1 - 1e-12 and row.relative_error < 1e-6 for row in report.layers)
    for collapse in (False, True):
        plain = to_plain(small, collapse=collapse)
        assert not kinds(plain)
        testing.check_same_network(plain(image), net(image))


LONG = [pytest.param(name, marks=pytest.mark.full) for name in ("resnet18", "densenet121", "mobilenet_v2")]


@pytest.mark.parametrize("name", ["googlenet", *LONG])
def test_third_party_networks_at_full_rank(name, torchvision_models, randomize):
    kwargs = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    torch.manual_seed(0)
    model = randomize(getattr(torchvision_models, name)(**kwargs)).eval()
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    only = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.weight.numel() < 40_000][:6]
    small, report = compress(model, FULL, example_inputs=image, only=only)
    assert len(report.replaced) == len(only)
    assert "TuckerConv2d" in kinds(small).values()
    with torch.no_grad():
        testing.check_same_network(small(image), model(image))
        folded, _ = fold_batchnorm(small, image)
        testing.check_same_network(folded(image), model(image))


def test_costs_in_the_report_are_those_of_the_layers(net, image):
    small, report = compress(net, HALF, example_inputs=image)
    assert report.network_parameters_after == network_parameters(small)
    own = {name: sum(p.numel() for p in small.get_submodule(name).parameters()) for name in kinds(small)}
    assert {row.name: row.parameters_after for row in report.replaced} == own
    plain = to_plain(small)
    modules = {m: n for n, m in plain.named_modules() if isinstance(m, nn.Conv2d)}
    counted: dict[str, int] = {}

    def count(module, args, output):
        name = modules[module].split(".")[0]
        counted[name] = counted.get(name, 0) + output.shape[2] * output.shape[3] * module.weight.numel()

    for module in modules:
        module.register_forward_hook(count)
    plain(image)
    # The layer pads a reflecting convolution before its first 1×1, which runs on the border too.
    reflected = small.mirror
    extra = ((8 + 2) * (9 + 2) - 8 * 9) * reflected.in_channels * getattr(reflected, "rank_in", 0)
    expected = {row.name: row.macs_after for row in report.replaced}
    assert counted == {**expected, "mirror": expected["mirror"] - extra}


def test_the_output_mode_alone_where_it_costs_no_more(net, image):
    ranks = {"stem": (3, 12), "wide": (12, 20)}
    merged, apart = (compress(net, TuckerConfig(ranks=ranks, merge=m), example_inputs=image)[0] for m in (True, False))
    assert kinds(merged) == {"stem": "BasisConv2d", "wide": "TuckerConv2d"}
    assert kinds(apart) == {"stem": "TuckerConv2d", "wide": "TuckerConv2d"}
    assert merged.stem.basis_channels == apart.stem.rank_out == 12
    assert merged.stem.trains_basis


def test_dense_layers_stay_where_nothing_is_gained(net, image):
    small, report = compress(net, TuckerConfig(fraction=1.0), example_inputs=image)
    assert not kinds(small)
    assert all("dense costs no more MACs or parameters" in row.reason for row in report.layers)
    _, report = compress(net, TuckerConfig(fraction=0.3), example_inputs=image)
    for row in report.replaced:
        assert row.macs_after < row.macs_before
        assert row.parameters_after < row.parameters_before


@pytest.mark.parametrize("energy", [0.5, 0.9])
def test_the_energy_rule_keeps_what_it_promises(net, image, energy):
    make_low_rank(net.dilated)
    _, report = compress(net, TuckerConfig(energy=energy, keep_dense="never"), example_inputs=image)
    assert len(report.replaced) == 6
    for row in report.replaced:
        assert row.energy_kept >= energy - 1e-12
        assert row.relative_error <= (1 - energy) ** 0.5 + 1e-9
    assert next(row for row in report.layers if row.name == "dilated").rank_in is not None


def test_ranks_by_evbmf_and_by_name(net, image):
    make_low_rank(net.dilated)
    _, report = compress(net, TuckerConfig(evbmf=0.0, keep_dense="never"), example_inputs=image)
    row = next(row for row in report.layers if row.name == "dilated")
    assert (row.rank_in, row.basis_channels) == (4, 6)
    config = TuckerConfig(ranks={"wide": (5, 9), "dilated": (7, 11)})
    _, report = compress(net, config, example_inputs=image)
    assert {row.name: (row.rank_in, row.basis_channels) for row in report.replaced} == {
        "wide": (5, 9),
        "dilated": (7, 11),
    }
    assert next(row for row in report.layers if row.name == "stem").reason == "not named in ranks"
    assert "5·9" in report.to_table()
    config = TuckerConfig(ranks=(5, 9), multiple_of=4)
    _, report = compress(net, config, example_inputs=image, only=["wide"])
    assert (report.replaced[0].rank_in, report.replaced[0].basis_channels) == (8, 12)
    with pytest.raises(ValueError, match="ranks names 'nowhere'"):
        compress(net, TuckerConfig(ranks={"nowhere": (1, 1)}), example_inputs=image)


@pytest.mark.parametrize("rule", ["macs", "parameters"])
def test_budgets_hold_and_are_used(net, image, rule):
    kept = []
    for share in (0.35, 0.6):
        _, report = compress(net, TuckerConfig(**{rule: share}), example_inputs=image)
        before, after = getattr(report, f"{rule}_before"), getattr(report, f"{rule}_after")
        assert after <= share * before
        assert after > 0.8 * share * before
        kept.append(sum(row.energy_kept or 1 for row in report.layers))
    assert kept[0] < kept[1]
    with pytest.raises(ValueError, match="is less than their least"):
        compress(net, TuckerConfig(**{rule: 1e-4}), example_inputs=image)


def test_measured_rules(net, image, monkeypatch):
    times = {nn.Conv2d: 3.0, TuckerConv2d: 2.0, BasisConv2d: 4.0}
    monkeypatch.setattr(tucker, "measure_ms", lambda made, input: [times[type(m)] for m in made])
    small, report = compress(net, TuckerConfig(fraction=0.3, measure=True), example_inputs=image)
    assert "BasisConv2d" not in kinds(small).values()
    assert {row.reason.split(" with")[0] for row in report.layers if row.dense_ms == 3 and not row.replaced} == {
        "measured: no faster"
    }
    monkeypatch.setattr(tucker, "measure_ms", lambda made, input: [10.0, *range(1, len(made))])
    _, report = compress(net, TuckerConfig(latency=0.4), example_inputs=image)
    assert sum(row.basis_ms or row.dense_ms for row in report.layers) <= 0.4 * 10 * len(report.layers)
    assert any(row.replaced for row in report.layers)


def test_hooi_lowers_the_error(net, image):
    errors = []
    for rounds in (0, 10):
        config = TuckerConfig(ranks={"dilated": (9, 12)}, rounds=rounds)
        _, report = compress(net, config, example_inputs=image)
        errors.append(report.replaced[0].relative_error)
    assert errors[1] < errors[0]


def test_norms_residuals_and_activations_fold_into_the_layer(net, image):
    small, _ = compress(net, TuckerConfig(ranks={"wide": (5, 9), "dilated": (7, 11)}), example_inputs=image)
    folded, report = fold_batchnorm(small, image)
    assert [(c.name, c.absorbed) for c in report.chains if c.name == "dilated"] == [
        ("dilated", ("norm2", "add", "relu"))
    ]
    assert folded.dilated.activation == "relu"
    testing.check_same_network(folded(image), small(image))
    testing.check_same_network(to_plain(folded)(image), small(image))


def test_files(net, image, tmp_path):
    small, _ = compress(net, TuckerConfig(fraction=0.3), example_inputs=image)
    folded, _ = fold_batchnorm(small, image)
    for model in (small, folded):
        save(model, tmp_path / "net.safetensors")
        again = load(tmp_path / "net.safetensors", copy.deepcopy(net))
        assert torch.equal(again(image), model(image))
        assert kinds(again) == kinds(small)
    layers = {entry["names"][0]: entry for entry in read_recipe(tmp_path / "net.safetensors")["layers"]}
    assert layers["dilated"]["kind"] == "tucker_conv2d"
    assert layers["dilated"]["rank_in"] == folded.dilated.rank_in
    assert layers["dilated"]["activation"] == "relu"
    other = copy.deepcopy(net)
    other.dilated = nn.Conv2d(40, 40, 3, padding=1, bias=False).double()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ArchitectureError, match=r"'dilated'.*padding is"):
        load(tmp_path / "net.safetensors", other)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())
    ranks = copy.deepcopy(small)
    ranks.dilated = TuckerConv2d(40, 40, 3, rank_in=2, rank_out=3, padding=2, dilation=2, bias=False).double()
    with pytest.raises(ArchitectureError, match="rank_in is"):
        load(tmp_path / "net.safetensors", ranks)


def test_pipelines_and_patterns_mix_methods(net, image):
    steps = [{"stem": BasisConfig(fraction=0.25)}, TuckerConfig(fraction=0.3)]
    small, report = compress(net, steps, example_inputs=image)
    assert kinds(small)["stem"] == "BasisConv2d"
    assert kinds(small)["dilated"] == "TuckerConv2d"
    assert report.network_parameters_after == network_parameters(small)
    assert next(row for row in report.layers if row.name == "stem").basis_channels == 6


def test_what_is_trained(net, image):
    small, _ = compress(net, TuckerConfig(ranks={"wide": (5, 9)}), example_inputs=image)
    last = trainable_parameters(small, "coefficients_and_norm")
    assert any(p is small.wide.u_out for p in last)
    assert not any(p is small.wide.core for p in last)
    assert any(p is small.wide.core for p in trainable_parameters(small))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one rule .* got none"),
        ({"energy": 0.5, "evbmf": 0.0}, "exactly one rule .* got energy and evbmf"),
        ({"energy": 1.5}, "energy must lie in 0..1, got 1.5"),
        ({"fraction": 0}, "fraction must lie in 0..1, above 0, got 0"),
        ({"ranks": (0, 3)}, "ranks must be two ints of at least 1"),
        ({"ranks": {"a": 3}}, "ranks must be two ints of at least 1"),
        ({"macs": -1}, "macs must be a number above 0"),
        ({"evbmf": True}, "evbmf must lie in 0..1, got True"),
        ({"energy": 0.5, "keep_dense": "always"}, "keep_dense must be 'auto' or 'never'"),
        ({"energy": 0.5, "rounds": -1}, "rounds must be an int of at least 0"),
        ({"energy": 0.5, "multiple_of": 2.0}, "multiple_of must be an int of at least 1"),
    ],
    ids=str,
)
def test_bad_configurations(arguments, message):
    with pytest.raises(ValueError, match=f"TuckerConfig: {message}"):
        TuckerConfig(**arguments)


def test_a_configuration_keeps_a_copy_and_says_what_it_is():
    ranks = {"a": (1, 2)}
    config = TuckerConfig(ranks=ranks)
    ranks["b"] = (3, 4)
    assert config.named_layers() == ("a",)
    assert str(TuckerConfig(energy=0.5, merge=False)) == "Tucker: energy=0.5, merge=False"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TuckerConfig(evbmf=0.0).rule == "evbmf"
