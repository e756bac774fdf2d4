"""``compress`` with a ``PruneConfig``: the pruned network is the one whose layers read zeros, through every graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from basisconv_kernels import testing
from basisconv_kernels.compression.model import compress, network_parameters
from basisconv_kernels.compression.prune_config import PruneConfig
from basisconv_kernels.compression.tucker_config import TuckerConfig
from basisconv_kernels.layers.tucker_conv2d import TuckerConv2d

from .zeroing import zeroed

THIRD = PruneConfig(fraction=0.34)


class Everything(nn.Module):
    """Residual, concatenation, depthwise and grouped convolutions, a gate, PReLU, a shared module, flatten."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.shared = nn.Conv2d(12, 12, 3, padding=1, bias=False)
        self.slopes = nn.PReLU(12)
        self.depthwise = nn.Conv2d(12, 24, 3, padding=1, groups=12)
        self.left = nn.Conv2d(24, 7, 1)
        self.right = nn.Conv2d(24, 9, 3, padding=1)
        self.grouped = nn.Conv2d(16, 18, 3, groups=2)
        self.squeeze = nn.Conv2d(18, 5, 1)
        self.excite = nn.Conv2d(5, 18, 1)
        self.last = nn.Conv2d(18, 10, 3)
        self.hidden = nn.Linear(10 * 2 * 3, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = self.slopes(x + self.shared(torch.relu(self.shared(x))))
        x = self.depthwise(x)
        x = torch.cat([self.left(x), torch.relu(self.right(x))], 1)
        x = self.grouped(nn.functional.max_pool2d(x, 2))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(nn.functional.adaptive_avg_pool2d(x, 1)))))
        x = self.last(x * gate)
        return self.head(torch.relu(self.hidden(x.view(x.size(0), -1))))


@pytest.fixture
def net(randomize):
    torch.manual_seed(0)
    return randomize(Everything().double().eval())


@pytest.fixture
def image():
    return torch.randn(2, 3, 12, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("fraction", [0.1, 0.34, 0.75, 0.99])
def test_the_pruned_network_is_the_zeroed_one(net, image, fraction):
    config = PruneConfig(fraction=fraction)
    small, report = compress(net, config, example_inputs=image)
    testing.check_same_network(small(image), zeroed(net, image, config)(image))
    pruned = {row.name: row.channels_after for row in report.layers if row.verdict == "pruned"}
    assert {"stem", "shared", "depthwise", "left", "right", "grouped", "squeeze", "excite", "last"} >= set(pruned)
    if fraction > 0.3:
        assert len(pruned) == 9
    for name, (K, C) in pruned.items():
        conv = small.get_submodule(name)
        assert (conv.out_channels, conv.in_channels) == (K, C)
        assert conv.weight.shape == (K, C // conv.groups, *conv.kernel_size)
    assert small.stem.out_channels == small.norm.num_features == small.slopes.num_parameters == small.shared.in_channels
    assert small.depthwise.groups == small.depthwise.in_channels == small.depthwise.out_channels // 2
    assert small.grouped.in_channels == small.left.out_channels + small.right.out_channels
    assert small.grouped.out_channels % 2 == small.grouped.in_channels % 2 == 0
    assert small.hidden.in_features == 6 * small.last.out_channels
    assert small.head.out_features == 4
    assert small.hidden.out_features == 8
    assert min(c.out_channels for c in small.modules() if isinstance(c, nn.Conv2d)) >= 1
    assert report.network_parameters_after == network_parameters(small) < network_parameters(net)
    assert net.stem.out_channels == 12


@pytest.mark.parametrize("name", ["googlenet", "resnet18", "densenet121"])
def test_third_party_networks(name, torchvision_models, randomize):
    kwargs = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    torch.manual_seed(0)
    model = randomize(getattr(torchvision_models, name)(**kwargs)).double().eval()
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    small, report = compress(model, THIRD, example_inputs=image)
    with torch.no_grad():
        testing.check_same_network(small(image), zeroed(model, image, THIRD)(image))
    assert all(row.verdict == "pruned" for row in report.layers)
    assert report.macs_after < 0.5 * report.macs_before
    assert report.network_parameters_after == sum(p.numel() for p in small.parameters())
    small.train()(torch.randn(2, 3, 64, 64).double()).sum().backward()


class Unfollowed(nn.Module):
    """A channel shuffle, a GroupNorm, and a gate that is a parameter of the network."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.groups = nn.GroupNorm(2, 8)
        self.third = nn.Conv2d(8, 6, 1)
        self.scale = nn.Parameter(torch.randn(1, 6, 1, 1))
        self.fourth = nn.Conv2d(6, 10, 1)
        self.fifth = nn.Conv2d(10, 5, 1)

    def forward(self, x):
        x = self.first(x)
        n, c, h, w = x.size()
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        x = self.third(self.groups(self.second(x))) * self.scale
        return self.fifth(torch.relu(self.fourth(x)))


def test_what_cannot_be_followed_stays_and_says_so(image, randomize):
    torch.manual_seed(0)
    net = Unfollowed().double().eval()
    small, report = compress(net, THIRD, example_inputs=image)
    rows = {row.name: row for row in report.layers}
    assert [name for name, row in rows.items() if row.verdict == "pruned"] == ["fourth", "fifth"]
    assert rows["first"].reason == "read by view, through which channels cannot be followed"
    assert rows["second"].reason == "read by GroupNorm, through which channels cannot be followed"
    assert rows["third"].reason == "given by scale"
    assert rows["fifth"].reason == "an output of the network"
    assert (small.fourth.out_channels, small.fifth.out_channels) == (7, 5)
    testing.check_same_network(small(image), zeroed(net, image, THIRD)(image))


def test_layers_that_are_left_out_keep_their_filters(net, image):
    small, report = compress(net, THIRD, example_inputs=image, skip=["squeeze", "shared"])
    assert small.squeeze.out_channels == 5
    assert small.stem.out_channels == 12  # the same channels as those of shared
    assert small.right.out_channels < 9
    assert next(row for row in report.layers if row.name == "shared").reason == "in skip"
    small, _ = compress(net, {"last": THIRD}, example_inputs=image)
    assert (small.squeeze.out_channels, small.right.out_channels, small.last.out_channels) == (5, 9, 7)
    net.last.register_forward_hook(lambda *_: None)
    small, report = compress(net, THIRD, example_inputs=image)
    assert small.last.out_channels == 10
    assert next(row for row in report.layers if row.name == "last").reason.startswith("carries hooks")


@pytest.mark.parametrize("rule", ["macs", "parameters"])
def test_budgets_hold_and_remove_no_more_than_they_must(net, image, rule):
    for share in (0.3, 0.7):
        _, report = compress(net, PruneConfig(**{rule: share}), example_inputs=image)
        before, after = getattr(report, f"{rule}_before"), getattr(report, f"{rule}_after")
        assert 0.6 * share * before < after <= share * before
    with pytest.raises(ValueError, match="remain when all channels go that may"):
        compress(net, PruneConfig(**{rule: 1e-3}), example_inputs=image)


def test_the_filters_of_least_weight_go_first(image):
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([5.0, 1, 4, 2, 6, 3]).reshape(-1, 1, 1, 1).expand(6, 3, 3, 3))
    small, _ = compress(net, PruneConfig(fraction=0.5), example_inputs=image)
    assert small[0].weight[:, 0, 0, 0].tolist() == [5, 4, 6]
    assert torch.equal(small[2].weight, net[2].weight[:, [0, 2, 4]])
    small, _ = compress(net, PruneConfig(fraction=0.5, multiple_of=4), example_inputs=image)
    assert small[0].out_channels == 4
    small, _ = compress(net, PruneConfig(fraction=0.9, min_channels=2), example_inputs=image)
    assert small[0].out_channels == 2


def test_taylor_scores_are_gradient_times_activation(image):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).double()
    for p in net.parameters():
        p.requires_grad_(False)
    config = PruneConfig(criterion="taylor", fraction=0.5, loss=lambda model, batch: model(batch).square().mean())
    small, _ = compress(net, config, example_inputs=image, calibration=[image, 2 * image])
    expected = torch.zeros(6, dtype=torch.float64)
    for batch in (image, 2 * image):
        z = net[0](batch).requires_grad_()
        (slope,) = torch.autograd.grad(net[2](torch.relu(z)).square().mean(), z)
        expected += (slope * z).mean((2, 3)).abs().sum(0)
    kept = sorted(expected.argsort(descending=True)[:3].tolist())
    assert torch.equal(small[0].weight, net[0].weight[kept])
    assert not any(p.requires_grad for p in small.parameters())
    with pytest.raises(TypeError, match="must give one number"):
        compress(net, PruneConfig(criterion="taylor", fraction=0.5, loss=lambda m, b: m(b)), example_inputs=image)


DUPLICATE = PruneConfig(criterion="duplicate", threshold=0.999)


class Repeating(nn.Module):
    """Filters that repeat, behind a BatchNorm, through activation, pools, concatenation and flattening."""

    def __init__(self, activation):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.act = activation
        self.second = nn.Conv2d(6, 5, 3)
        self.other = nn.Conv2d(6, 4, 3)
        self.head = nn.Linear(9 * 3 * 4, 3)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.act(self.norm(self.first(x))), 2)
        x = torch.cat([torch.relu(self.second(x)), nn.functional.leaky_relu(self.other(x))], 1)
        return self.head(nn.functional.avg_pool2d(x, 1).flatten(1))


@torch.no_grad()
def repeating(activation):
    torch.manual_seed(0)
    net = Repeating(activation).double().eval()
    norm = net.norm
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 1.5)
    for later, earlier, factor in ((3, 1, 2.0), (5, 1, 0.5)):
        # After the BatchNorm channel ``later`` is ``factor`` times channel ``earlier``, by other numbers all along.
        net.first.weight[later] = 3 * net.first.weight[earlier]
        norm.running_mean[later] = 3 * norm.running_mean[earlier]
        spread = (norm.running_var + norm.eps).sqrt()
        norm.weight[later] = factor / 3 * norm.weight[earlier] * spread[later] / spread[earlier]
        norm.bias[later] = factor * norm.bias[earlier]
    net.other.weight[2], net.other.bias[2] = 4 * net.other.weight[0], 4 * net.other.bias[0]
    return net


def test_merging_duplicate_filters_loses_nothing(image):
    net = repeating(nn.ReLU())
    small, report = compress(net, DUPLICATE, example_inputs=image)
    assert (small.first.out_channels, small.second.out_channels, small.other.out_channels) == (4, 5, 3)
    testing.check_same_network(small(image), net(image))
    assert {row.name for row in report.layers if row.verdict == "pruned"} == {"first", "second", "other"}


def test_behind_a_bent_activation_duplicates_go_without_merging(image):
    net = repeating(nn.Sigmoid())
    small, _ = compress(net, DUPLICATE, example_inputs=image)
    assert small.first.out_channels == 4
    assert torch.equal(small.second.weight, net.second.weight[:, [0, 1, 2, 4]])


def test_filters_that_differ_stay(image):
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)).double()
    _, report = compress(net, DUPLICATE, example_inputs=image)
    assert [row.verdict for row in report.layers] == ["kept", "kept"]


def test_pruning_then_tucker(net, image):
    steps = [PruneConfig(fraction=0.25), TuckerConfig(fraction=0.5, keep_dense="never", merge=False)]
    small, report = compress(net, steps, example_inputs=image)
    pruned, _ = compress(net, steps[0], example_inputs=image)
    tucker, _ = compress(pruned, steps[1], example_inputs=image)
    testing.check_same_network(small(image), tucker(image))
    assert isinstance(small.last, TuckerConv2d)
    row = next(row for row in report.layers if row.name == "last")
    assert (row.K, row.C, row.channels_after, row.basis_channels) == (10, 18, (8, pruned.last.in_channels), 4)
    assert report.macs_before == report.steps[0].macs_before
    assert report.macs_after == report.steps[1].macs_after
    assert "18→10 3×3: " in report.to_table()


def test_networks_that_cannot_be_traced_are_refused(image):
    class Branching(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    net = Branching(nn.Conv2d(3, 3, 1)).double()
    with pytest.raises(ValueError, match=r"torch\.fx cannot trace this network"):
        compress(net, THIRD, example_inputs=image)
    with pytest.raises(ValueError, match="by position"):
        compress(nn.Sequential(nn.Conv2d(3, 3, 1)).double(), THIRD, example_inputs={"input": image})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one rule must be given of fraction, macs, parameters, threshold, got none"),
        ({"fraction": 0.5, "macs": 0.5}, "got fraction and macs"),
        ({"fraction": 1.0}, "fraction must lie in 0..1"),
        ({"macs": 0}, "macs must be a number above 0"),
        ({"criterion": "random", "fraction": 0.5}, "criterion must be one of l1, taylor, duplicate"),
        ({"criterion": "duplicate", "fraction": 0.5}, "threshold is the rule of criterion='duplicate'"),
        ({"threshold": 0.5}, "threshold is the rule of criterion='duplicate'"),
        ({"criterion": "taylor", "fraction": 0.5}, "criterion='taylor', and no other, needs loss"),
        ({"fraction": 0.5, "min_channels": 0}, "min_channels must be an int of at least 1"),
    ],
    ids=str,
)
def test_bad_configurations(arguments, message):
    with pytest.raises(ValueError, match=f"PruneConfig: .*{message}|PruneConfig: {message}"):
        PruneConfig(**arguments)
    assert str(THIRD) == "Prune: l1, fraction=0.34"
