"""Layers that the code of a network reads, or whose class it looks at, beside calling them: they stay as they are."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from basisconv_kernels.compression.binary import BinaryConfig
from basisconv_kernels.compression.config import BasisConfig
from basisconv_kernels.compression.model import compress
from basisconv_kernels.compression.outside_reads import outside_reads
from basisconv_kernels.compression.prune_config import PruneConfig
from basisconv_kernels.compression.stacked_binary import StackedBinaryConfig
from basisconv_kernels.compression.ternary import train_layerwise
from basisconv_kernels.compression.ternary_config import TernaryConfig
from basisconv_kernels.compression.tucker_config import TuckerConfig
from basisconv_kernels.layers.basis_conv2d import BasisConv2d
from basisconv_kernels.layers.ternary_linear import TernaryLinear

QUARTER = BasisConfig(fraction=0.25)
METHODS = (
    QUARTER,
    TuckerConfig(ranks=(4, 6)),
    BinaryConfig(keep_first=False, keep_last=False),
    StackedBinaryConfig(splits=2, bank=4, keep_first=False),
    TernaryConfig(method="twn"),
    TernaryConfig(method="ttq"),
)
WEIGHT = "code outside it reads its weight"


class Reader(nn.Module):
    """Two convolutions; ``read(first, x)`` says what is made of x before the first is called."""

    def __init__(self, read):
        super().__init__()
        self.first = nn.Conv2d(8, 24, 3, padding=1)
        self.second = nn.Conv2d(24, 32, 3, padding=1)
        self.read = read

    def forward(self, x):
        return self.second(self.first(self.read(self.first, x)))


def moved(conv, x):
    return x.to(conv.weight.device, conv.weight.dtype)


def used(conv, x):
    return x + F.conv2d(x, conv.weight[:8], padding=1)


@pytest.fixture
def image():
    return torch.randn(2, 8, 10, 10, generator=torch.Generator().manual_seed(0))


def reader(read):
    torch.manual_seed(0)
    return Reader(read).eval()


def reasons(report):
    return {row.name: row.reason for row in report.layers if not row.replaced}


@pytest.mark.parametrize("config", METHODS, ids=str)
@pytest.mark.parametrize("read", [moved, used])
def test_a_layer_whose_weight_is_read_stays_dense(read, config, image):
    model, report = compress(reader(read), config, example_inputs=image)
    assert reasons(report) == {"first": WEIGHT}
    assert type(model.first) is nn.Conv2d
    assert type(model.second) is not nn.Conv2d
    assert model(image).shape == (2, 32, 10, 10)


def test_nothing_is_pruned_of_a_weight_that_is_read(image):
    dense = reader(used)
    model, report = compress(dense, PruneConfig(fraction=0.5), example_inputs=image)
    assert reasons(report)["first"] == WEIGHT
    assert model.first.weight.shape == dense.first.weight.shape
    model(image)


def test_what_every_layer_has_may_be_read(image):
    def geometry(conv, x):
        assert (conv.stride, conv.dilation, conv.kernel_size, conv.groups) == ((1, 1), (1, 1), (3, 3), 1)
        assert (conv.in_channels, conv.out_channels, conv.padding_mode) == (8, 24, "zeros")
        assert next(conv.parameters()).dtype is x.dtype
        assert not hasattr(conv, "gamma")
        return x if conv.bias is None else x + conv.bias.sum()

    for config in METHODS:
        model, report = compress(reader(geometry), config, example_inputs=image)
        assert not reasons(report), config
        model(image)


def test_reasons_name_what_is_read(image):
    def read(conv, x):
        return conv._conv_forward(x, conv.weight, None)[:, :8] * (not conv.transposed)

    _, report = compress(reader(read), QUARTER, example_inputs=image)
    assert reasons(report) == {"first": "code outside it reads its _conv_forward and weight and transposed"}


def looks_at_the_class(conv, x):
    if not isinstance(conv, nn.Conv2d):
        raise TypeError("a convolution is wanted")
    return x


def takes_by_name(conv, x):
    return x * conv.state_dict()["weight"].mean()


@pytest.mark.parametrize(
    ("read", "error"), [(looks_at_the_class, "a convolution is wanted"), (takes_by_name, "'weight'")]
)
def test_a_network_that_takes_no_other_module(read, error, image):
    model, report = compress(reader(read), QUARTER, example_inputs=image)
    assert reasons(report) == {"first": f"the network does not run with another module in its place: {error}"}
    assert isinstance(model.second, BasisConv2d)
    model(image)


def test_a_parametrised_weight_that_is_read(image):
    model = reader(moved)
    parametrizations.weight_norm(model.first)
    changed, report = compress(model, QUARTER, example_inputs=image)
    assert reasons(report) == {"first": WEIGHT}
    changed(image)


def test_a_read_of_a_shared_layer_counts_under_its_first_name(image):
    model = nn.ModuleDict({"plain": nn.Conv2d(8, 24, 3), "reader": reader(moved)})
    model["plain"] = model["reader"].first
    model.forward = lambda x: model["reader"](x) + model["plain"](x).mean()
    assert outside_reads(model, image) == {"plain": WEIGHT}


def test_the_network_is_as_it_was(image):
    model = reader(moved).train()
    model.second.eval()
    before = {name: id(module) for name, module in model.named_modules()}
    result = copy.deepcopy(model)(image)
    assert outside_reads(model, image) == {"first": WEIGHT}
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert model.training
    assert not model.second.training
    assert torch.equal(model(image), result)


def test_inputs_that_the_network_does_not_take(image):
    assert outside_reads(reader(moved), image[:, :7]) == {}
    with pytest.raises(ValueError, match="does not run on example_inputs"):
        compress(reader(moved), QUARTER, example_inputs=image[:, :7])


def test_pytorchs_own_encoder_layer_reads_its_linear_layers():
    """In eval mode its forward takes their weights and calls neither, so ternary ones would have no effect."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), nn.Linear(32, 8)).eval()
    tokens = torch.randn(2, 5, 32)
    model, _ = compress(nn.Sequential(net), TernaryConfig(method="twn"), example_inputs=tokens)
    layers = {name: type(module) for name, module in model.named_modules()}
    assert (layers["0.0.linear1"], layers["0.0.linear2"], layers["0.1"]) == (nn.Linear, nn.Linear, TernaryLinear)


def test_layerwise_training_leaves_them_too():
    torch.manual_seed(0)
    net = nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), nn.Flatten(), nn.Linear(160, 3))
    tokens, targets = torch.randn(8, 5, 32), torch.randint(3, (8,))
    config = TernaryConfig(loader=[(tokens, targets)], evaluate=lambda model: float(model(tokens).isfinite().all()))
    model, report = train_layerwise(net, config)
    assert {row.name: row.reason for row in report.layers} == {
        "0.self_attn.out_proj": "is a NonDynamicallyQuantizableLinear, a subclass of Linear whose forward may differ",
        "0.linear1": WEIGHT,
        "0.linear2": WEIGHT,
        "2": "",
    }
    assert type(model[2]) is TernaryLinear
    assert type(model[0].linear1) is nn.Linear


def test_a_result_that_does_not_run_is_no_result(image):
    """What no stand-in shows: code that knows the class of the replacement."""

    def read(conv, x):
        if isinstance(conv, BasisConv2d):
            raise AssertionError("not this one")
        return x

    with pytest.raises(RuntimeError, match="does not run on example_inputs: not this one"):
        compress(reader(read), QUARTER, example_inputs=image)


def test_edgenext(timm):
    """Its positional encoding asks a convolution's weight for its device."""
    torch.manual_seed(0)
    net = timm.create_model("edgenext_xx_small", num_classes=10).eval()
    image = torch.randn(1, 3, 64, 64)
    model, report = compress(net, QUARTER, example_inputs=image)
    assert [row.name for row in report.layers if row.reason == WEIGHT] == [
        "stages.1.blocks.1.pos_embd.token_projection"
    ]
    assert len(report.replaced) == 4
    assert model(image).shape == (1, 10)
