"""``fold_batchnorm`` and networks of other packages: the same results, fewer modules, and the rest left alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from basisconv_kernels.compression.config import BasisConfig
from basisconv_kernels.compression.fold import fold_batchnorm
from basisconv_kernels.compression.model import compress, to_plain
from basisconv_kernels.demo.networks import CifarResNet, SmallVGG
from basisconv_kernels.layers.basis_conv2d import BasisConv2d

HALF = BasisConfig(fraction=0.5, keep_dense="never")


class Chain(nn.Module):
    """conv → norm → something of the caller's."""

    def __init__(self, end, K: int = 6) -> None:
        super().__init__()
        self.conv, self.norm, self.relu, self.relu6 = (
            nn.Conv2d(4, K, 3, padding=1),
            nn.BatchNorm2d(K),
            nn.ReLU(),
            nn.ReLU6(),
        )
        self.other, self.end = nn.Conv2d(4, K, 1), end

    def forward(self, x):
        return self.end(self, x)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 4, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def folded(end, x, randomize, close, K=6):
    """The folded basis network, its report and its BasisConv2d layers; checked against the network itself."""
    torch.manual_seed(0)
    net = randomize(Chain(end, K).double())
    net, _ = compress(net, HALF, example_inputs=x)
    before = copy.deepcopy(net.state_dict())
    model, report = fold_batchnorm(net, x)
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not model.training
    close(model(x), net.eval()(x))
    close(to_plain(model)(x), net(x))
    return model, {chain.name: chain.absorbed for chain in report.chains}


@pytest.mark.parametrize(
    ("end", "absorbed", "activation"),
    [
        (lambda m, x: m.norm(m.conv(x)), ("norm",), None),
        (lambda m, x: m.relu(m.norm(m.conv(x))), ("norm", "relu"), "relu"),
        (lambda m, x: m.relu6(m.norm(m.conv(x))), ("norm", "relu6"), "relu6"),
        (lambda m, x: F.relu(m.norm(m.conv(x)), inplace=True), ("norm", "relu"), "relu"),
        (lambda m, x: torch.relu(m.conv(x)), ("relu",), "relu"),
        (lambda m, x: m.norm(m.conv(x)).relu_(), ("norm", "relu_"), "relu"),
        (lambda m, x: F.relu6(m.norm(m.conv(x))), ("norm", "relu6"), "relu6"),
        (lambda m, x: m.relu(m.norm(m.conv(x)) + m.other(x)), ("norm", "add", "relu"), "relu"),
        (lambda m, x: m.relu(m.other(x) + m.norm(m.conv(x))), ("norm",), None),
    ],
    ids=[
        "norm",
        "relu",
        "relu6",
        "functional",
        "no_norm",
        "method",
        "functional6",
        "residual",
        "residual_of_the_other",
    ],
)
def test_chains_become_one_layer(end, absorbed, activation, x, randomize, close):
    model, chains = folded(end, x, randomize, close)
    assert chains["conv"] == absorbed
    assert model.conv.activation == activation
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


KEPT = {
    "the map is read twice": lambda m, x: m.norm(m.conv(x)) + m.conv(x).mean(),
    "the norm's result is read twice": lambda m, x: (lambda y: m.relu(y) + y)(m.norm(m.conv(x))),
    "an activation in front of the norm": lambda m, x: m.norm(m.relu(m.conv(x))),
    "one layer called twice": lambda m, x: m.norm(m.conv(x)) + m.conv(2 * x),
    "a residual that is broadcast": lambda m, x: m.relu(m.norm(m.conv(x)) + x.mean((2, 3), keepdim=True)[:, :1]),
    "a constant is added": lambda m, x: m.relu(m.norm(m.conv(x)) + 1.5),
    "a multiple is added": lambda m, x: m.relu(torch.add(m.norm(m.conv(x)), m.other(x), alpha=2)),
    "itself is added": lambda m, x: (lambda y: m.relu(y + y))(m.norm(m.conv(x))),
    "the input is overwritten in between": lambda m, x: overwriting(m, x * 1),
    "the sum is read by others": lambda m, x: shared_sum(m, x),
}


def overwriting(m, x):
    y = m.conv(x)
    x.mul_(0.5)
    return m.relu(y + x.mean(1, keepdim=True).expand_as(y))


def shared_sum(m, x):
    other = m.other(x)
    y = m.norm(m.conv(x))
    other += y
    return m.relu(other) + other


@pytest.mark.parametrize("name", KEPT)
def test_what_cannot_be_folded_stays_right(name, x, randomize, close):
    folded(KEPT[name], x, randomize, close)


def test_plain_convolutions_take_their_norm(x, randomize, close):
    net = randomize(Chain(lambda m, x: m.relu(m.norm(m.conv(x)))).double()).eval()
    model, report = fold_batchnorm(net, x)
    assert [(chain.name, chain.absorbed) for chain in report.chains] == [("conv", ("norm",))]
    assert isinstance(model.relu, nn.ReLU)
    close(model(x), net(x))


def test_norms_inside_the_layers_are_folded_too(x, randomize, close):
    net = randomize(Chain(lambda m, x: m.relu(m.norm(m.conv(x)))).double())
    net, _ = compress(net, BasisConfig(fraction=0.5, keep_dense="never", basis_norm=True), example_inputs=x)
    net(x)
    model, _ = fold_batchnorm(net, x)
    assert isinstance(model.conv, BasisConv2d)
    assert model.conv.basis_norm is None
    close(model(x), net.eval()(x))


class Untraceable(nn.Module):
    """Control flow on values, around parts that can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.second = nn.ModuleList([nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6))])

    def forward(self, x):
        y = self.first(x)
        return self.second[0](y) if y.sum() > -1 else y


def test_parts_of_an_untraceable_network_are_folded(x, randomize, close):
    net = randomize(Untraceable().double()).eval()
    net, _ = compress(net, HALF, example_inputs=x)
    model, report = fold_batchnorm(net, x)
    assert type(model) is Untraceable
    assert [chain.name for chain in report.chains] == ["first.0", "second.0.0"]
    assert report.left_alone[0][0] == ""
    assert "cannot be traced as a whole" in report.left_alone[0][1]
    assert model.first.get_submodule("0").activation == "relu"
    close(model(x), net(x))


def test_a_folding_that_changes_results_is_given_up(x, randomize):
    """A network that looks at its own modules: not what a graph can show."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

        def forward(self, x):
            return self.norm(self.conv(x)) + (0.0 if isinstance(x, fx.Proxy) else 1.0)

    net = randomize(Odd().double()).eval()
    model, report = fold_batchnorm(net, x)
    assert type(model).__name__ == "Odd"
    assert report.chains == ()
    assert report.left_alone == (("", "the folded network gives other results, so nothing was folded"),)
    torch.testing.assert_close(model(x), net(x))


def test_the_networks_of_the_demo_fold_completely(randomize, close):
    for net, size in ((SmallVGG(3, (8, 12, 16)), 20), (CifarResNet(8), 32)):
        image = torch.randn(2, 3, size, size, dtype=torch.float64)
        net, _ = compress(randomize(net.double().eval()), HALF, example_inputs=image)
        model, report = fold_batchnorm(net, image)
        kinds = {type(module) for module in model.modules()}
        assert not kinds & {nn.BatchNorm2d, nn.ReLU}
        layers = [module for module in model.modules() if isinstance(module, BasisConv2d)]
        assert len(report.chains) == len(layers)
        assert all(layer.activation == "relu" for layer in layers)
        close(model(image), net(image))
        close(to_plain(model)(image), net(image))
        close(pickle.loads(pickle.dumps(model))(image), net(image))
        again, nothing = fold_batchnorm(model, image)
        assert nothing.chains == ()
        close(again(image), net(image))


def test_a_folded_network_compiles_and_exports(randomize, fresh_compiler):
    image = torch.randn(2, 3, 32, 32)
    net, _ = compress(randomize(CifarResNet(8).eval()), HALF, example_inputs=image)
    model, _ = fold_batchnorm(net, image)
    with torch.no_grad():
        expected = model(image)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(image), expected)
        torch.testing.assert_close(torch.export.export(model, (image,)).module()(image), expected)


# --- networks of other packages ---------------------------------------------------------------------------------------

TORCHVISION = [
    pytest.param("resnet18", 64, {}, id="resnet18"),
    pytest.param("alexnet", 64, {}, id="alexnet"),
    pytest.param("googlenet", 64, {"aux_logits": False, "init_weights": False}, id="googlenet", marks=pytest.mark.full),
    pytest.param("densenet121", 64, {}, id="densenet121", marks=pytest.mark.full),
    pytest.param("resnet50", 64, {}, id="resnet50", marks=pytest.mark.full),
    pytest.param("vgg16", 32, {}, id="vgg16", marks=pytest.mark.full),
]


@pytest.mark.parametrize(("name", "size", "settings"), TORCHVISION)
def test_torchvision_networks_at_full_rank(name, size, settings, torchvision_models, randomize, close):
    net = getattr(torchvision_models, name)(weights=None, num_classes=10, **settings)
    assert check_full_rank(randomize(net.double().eval()), size, close).chains


@pytest.mark.full
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100"])
def test_timm_networks_at_full_rank(name, timm, randomize, close):
    net = timm.create_model(name, pretrained=False, num_classes=10)
    folds = check_full_rank(randomize(net.double().eval()), 64, close)
    if name == "resnet18":
        assert len(folds.chains) == 20
    else:  # its BatchNorms are of timm's own making
        assert not folds.chains
        assert len(folds.left_alone) == 52


def check_full_rank(net, size, close):
    image = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model, report = compress(net, BasisConfig(fraction=1.0, keep_dense="never"), example_inputs=image)
    with torch.no_grad():
        expected = net(image)
        assert len(report.replaced) == sum(type(m) is nn.Conv2d for m in net.modules())
        assert expected.std() > 0.01  # the signal got through
        close(model(image), expected)
        fast, folds = fold_batchnorm(model, image)
        close(fast(image), expected)
        close(to_plain(fast)(image), expected)
    return folds


@pytest.mark.parametrize(("name", "size", "settings"), TORCHVISION)
def test_parameter_counts_at_a_quarter_are_the_formula(name, size, settings, torchvision_models):
    net = getattr(torchvision_models, name)(weights=None, num_classes=10, **settings)
    expected = sum(p.numel() for p in net.parameters())
    for conv in (m for m in net.modules() if isinstance(m, nn.Conv2d)):
        K, C, R, S = conv.weight.shape
        Q = min(-(-K // 4), C * R * S)
        expected += Q * C * R * S + K * Q - K * C * R * S
    config = BasisConfig(fraction=0.25, keep_dense="never")
    model, report = compress(net.eval(), config, example_inputs=torch.randn(1, 3, size, size), inplace=True)
    assert report.network_parameters_after == expected
    assert expected == sum(p.numel() for p in to_plain(model).parameters())
