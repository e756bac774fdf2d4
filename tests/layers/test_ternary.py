"""``TernaryConv2d`` and ``TernaryLinear``: rules and their gradients, both forms, files, tracing, edge cases."""

from __future__ import annotations

import copy
import doctest
import importlib
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from basisconv_kernels import load, save
from basisconv_kernels.core.errors import ArchitectureError, FileFormatError
from basisconv_kernels.layers import ternary_weights
from basisconv_kernels.layers.ternary_conv2d import TernaryConv2d
from basisconv_kernels.layers.ternary_linear import TernaryLinear
from basisconv_kernels.testing import check_same_layer, tolerances

rules = pytest.mark.parametrize("rule", ternary_weights.RULES)
F64 = torch.float64


def conv(**changes):
    torch.manual_seed(0)
    arguments = {"in_channels": 6, "out_channels": 8, "kernel_size": 3, "padding": 1, "groups": 2, "dtype": F64}
    return nn.Conv2d(**{**arguments, **changes})


def seeded(*shape, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)).to(dtype)


# --- the rules --------------------------------------------------------------------------------------------------------


def direct(weight, mask, scale, negative, rule, threshold):
    """The forward formulas in ordinary operations, with the straight-through parts written as detached corrections."""
    t = ternary_weights.codes(weight.detach(), mask, rule, threshold)
    if rule == "twn":
        alpha = torch.stack(
            [
                w[c != 0].abs().mean() if (c != 0).any() else w.new_zeros(())
                for w, c in zip(weight.detach(), t, strict=True)
            ]
        )
        wq = t * alpha[:, None, None, None]
        return weight + (wq - weight).detach()
    if rule == "layerwise":
        shadow = weight * mask
        return scale[:, None, None, None] * t + shadow - shadow.detach()
    plus, minus = scale[:, None, None, None], negative[:, None, None, None]
    shadow = weight * torch.where(t > 0, plus, torch.where(t < 0, minus, 1.0)).detach()
    return plus * (t > 0) - minus * (t < 0) + shadow - shadow.detach()


@rules
@pytest.mark.parametrize("per_output", [True, False])
def test_gradients_of_the_rules_are_those_of_autograd(rule, per_output):
    """LW2 and BL1: dw, dσ, dWp, and dWn with its minus sign."""
    weight = seeded(5, 4, 3, 3).requires_grad_()
    mask = torch.rand(5, 4, 3, 3, generator=torch.Generator().manual_seed(2)) < 0.5 if rule == "layerwise" else None
    count = 5 if per_output else 1
    scale = None if rule == "twn" else (torch.rand(count, dtype=F64) + 0.5).requires_grad_()
    negative = (torch.rand(count, dtype=F64) + 0.5).requires_grad_() if rule == "ttq" else None
    arguments = (weight, mask, scale, negative, rule, ternary_weights.THRESHOLDS[rule])
    g = seeded(5, 4, 3, 3) + 0.25
    trained = [t for t in (weight, scale, negative) if t is not None]
    ours, theirs = ternary_weights.TernaryWeight.apply(*arguments)[0], direct(*arguments)
    torch.testing.assert_close(ours, theirs, **tolerances.FORMULA)
    for a, b in zip(torch.autograd.grad(ours, trained, g), torch.autograd.grad(theirs, trained, g), strict=True):
        torch.testing.assert_close(a, b, **tolerances.FORMULA)


def test_the_least_squares_scale_beats_its_neighbours():
    """LW1."""
    weight = seeded(6, 4, 3, 3)
    mask = weight.abs() > 0.4
    t = ternary_weights.codes(weight, mask, "layerwise", 0.0)
    sigma = ternary_weights.least_squares_scale(weight, t, per_output=False)
    masked = weight * mask

    def error(scale):
        return (masked - scale * t).square().sum()

    assert error(sigma) < min(error(sigma * 1.01), error(sigma * 0.99))
    torch.testing.assert_close(sigma[0], masked.abs().sum() / mask.sum(), **tolerances.FORMULA)


@rules
def test_weights_of_zero_give_finite_layers(rule):
    """BL2 and LW5: the output is the bias, in training and afterwards."""
    dense = conv(groups=1)
    with torch.no_grad():
        dense.weight.zero_()
    mask = torch.zeros_like(dense.weight, dtype=torch.bool) if rule == "layerwise" else None
    layer = TernaryConv2d.from_conv(dense, rule=rule, mask=mask)
    x = seeded(2, 6, 5, 5)
    expected = dense.bias[:, None, None].expand(2, 8, 5, 5)
    assert torch.equal(layer(x), expected)
    layer(x).sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in layer.parameters())
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), expected)
        assert torch.equal(layer.pack()(x), expected)
    assert layer.density == 0


def test_a_filter_below_the_threshold_is_empty_in_twn_and_its_scale_zero():
    dense = conv(groups=1)
    with torch.no_grad():
        dense.weight[3] = 0.5  # all of one size: none is above 0.75 of the mean with threshold 1
    layer = TernaryConv2d.from_conv(dense, rule="twn", threshold=1.0)
    assert not layer.ternary()[3].any()
    assert layer.scales()[0][3] == 0


def test_sigma_never_turns_the_signs_around():
    layer = TernaryConv2d.from_conv(conv(), rule="layerwise")
    with torch.no_grad():
        layer.scale.fill_(-3.0)
    assert (layer.scales()[0] > 0).all()
    assert (layer.dense_weight()[layer.ternary() > 0] > 0).all()


def test_the_rules_of_twn_and_ttq_are_the_published_ones():
    weight = seeded(4, 3, 3, 3)
    twn = ternary_weights.codes(weight, None, "twn", 0.75)
    for w, c in zip(weight, twn, strict=True):
        assert torch.equal(c != 0, w.abs() > 0.75 * w.abs().mean())
        assert torch.equal(c[c != 0], w.sign()[c != 0])
    ttq = ternary_weights.codes(weight, None, "ttq", 0.05)
    assert torch.equal(ttq != 0, weight.abs() > 0.05 * weight.abs().max())
    zero = ternary_weights.codes(torch.zeros(1, 2), torch.ones(1, 2), "layerwise", 0.0)
    assert zero.tolist() == [[1.0, 1.0]]  # sign(0) = +1


# --- the layers -------------------------------------------------------------------------------------------------------

GEOMETRIES = {
    "plain": {},
    "no bias": {"bias": False},
    "stride and dilation": {"stride": (2, 1), "dilation": (1, 2)},
    "same": {"padding": "same", "kernel_size": 2},
    "reflect": {"padding_mode": "reflect", "padding": (2, 1)},
    "circular": {"padding_mode": "circular"},
}


@rules
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_training_evaluation_and_packed_form_compute_the_same(rule, geometry):
    dense = conv(**GEOMETRIES[geometry])
    layer = TernaryConv2d.from_conv(dense, rule=rule)
    x = seeded(2, 6, 7, 8)
    trained = layer(x)
    weight = layer.dense_weight().detach()
    with torch.no_grad():
        dense.weight.copy_(weight)
        check_same_layer(trained.detach(), dense(x))
        evaluated = layer.eval()(x)
        check_same_layer(evaluated, trained.detach())
        assert torch.equal(copy.deepcopy(layer).pack()(x), evaluated)
        check_same_layer(layer.to_plain()(x), evaluated)
        torch.testing.assert_close(layer.to_conv().weight, weight, **tolerances.FORMULA)
        assert torch.equal(layer(x[0]), layer(x[:1])[0])


@rules
def test_a_linear_layer_is_the_linear_of_its_weight(rule):
    torch.manual_seed(1)
    dense = nn.Linear(70, 9, dtype=F64)
    layer = TernaryLinear.from_linear(dense, rule=rule)
    x = seeded(4, 3, 70)
    expected = F.linear(x, layer.dense_weight(), dense.bias)
    assert torch.equal(layer(x), expected)
    with torch.no_grad():
        check_same_layer(layer.eval()(x), expected.detach())
        packed = copy.deepcopy(layer).pack()
        check_same_layer(packed(x), expected.detach())
        check_same_layer(layer.to_plain()(x), expected.detach())
        assert packed(x[:0]).shape == (0, 3, 9)


def test_packed_scales_and_bias_still_train():
    layer = TernaryConv2d.from_conv(conv(), rule="ttq").pack()
    x = seeded(2, 6, 5, 5).requires_grad_()
    layer(x).square().sum().backward()
    assert {n for n, p in layer.named_parameters() if p.grad is not None} == {"scale", "negative_scale", "bias"}
    assert x.grad is not None


@rules
@pytest.mark.parametrize("bias", [True, False])
def test_a_batchnorm_behind_folds_into_the_scales(rule, bias):
    """With factors of both signs; the weights stay ternary."""
    layer = TernaryConv2d.from_conv(conv(bias=bias), rule=rule)
    norm = nn.BatchNorm2d(8, dtype=F64).eval()
    with torch.no_grad():
        norm.weight.copy_(seeded(8))
        norm.bias.copy_(seeded(8))
        norm.running_mean.copy_(seeded(8))
        norm.running_var.uniform_(0.5, 2.0)
        assert (norm.weight < 0).any()
        x = seeded(2, 6, 5, 5)
        with pytest.raises(ValueError, match="must be packed"):
            layer.fold(norm)
        expected = norm(layer.eval().pack()(x))
        check_same_layer(layer.fold(norm)(x), expected)
        check_same_layer(layer.to_plain()(x), expected)


def test_edits_of_the_weight_are_noticed():
    layer = TernaryConv2d.from_conv(conv(), rule="layerwise").eval()
    x = seeded(1, 6, 5, 5)
    with torch.no_grad():
        before = layer(x)
        layer.weight.neg_()
        assert not torch.equal(layer(x), before)
        layer.weight.neg_()
        assert torch.equal(layer(x), before)
        layer.scale.mul_(2)
        check_same_layer(layer(x) - layer.bias[:, None, None], 2 * (before - layer.bias[:, None, None]))


def test_training_moves_the_shadow_and_the_scale():
    layer = TernaryConv2d.from_conv(conv(groups=1), rule="layerwise", mask=conv(groups=1).weight.abs() > 0.05)
    kept, sigma = layer.weight.detach().clone(), layer.scale.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(seeded(4, 6, 5, 5)).square().sum().backward()
    optimizer.step()
    moved = layer.weight.detach() != kept
    assert moved[layer.mask].any()
    assert not moved[~layer.mask].any()
    assert not torch.equal(layer.scale, sigma)


@pytest.mark.parametrize("packed", [True, False])
def test_compiled_and_exported(packed, fresh_compiler):
    layer = TernaryConv2d.from_conv(conv(dtype=torch.float32), rule="twn").eval()
    layer = layer.pack() if packed else layer
    x = seeded(2, 6, 5, 5, dtype=torch.float32)
    with torch.no_grad():
        expected = layer(x)
        check_same_layer(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
        check_same_layer(torch.export.export(layer, (x,)).module()(x), expected)


def test_moving_and_copying():
    layer = TernaryConv2d.from_conv(conv(), rule="ttq").pack()
    x = seeded(1, 6, 5, 5)
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(copy.deepcopy(layer)(x), expected)
        narrow = copy.deepcopy(layer).float()
        assert narrow.weight_code.dtype == torch.uint8
        assert narrow.planes.dtype == torch.int32
        check_same_layer(narrow(x.float()), expected)
    again = copy.deepcopy(layer)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), expected)


# --- files ------------------------------------------------------------------------------------------------------------


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 40, 3, padding=1), nn.ReLU(), nn.Conv2d(40, 8, 3), nn.Flatten(), nn.Linear(128, 5)
    )


def ternary_network(rule, packed):
    net = network()
    masks = (
        {i: net[i].weight.abs() > net[i].weight.abs().quantile(0.9) for i in (0, 2, 4)} if rule == "layerwise" else {}
    )
    for i in (0, 2):
        net[i] = TernaryConv2d.from_conv(net[i], rule=rule, mask=masks.get(i))
    net[4] = TernaryLinear.from_linear(net[4], rule=rule, mask=masks.get(4))
    if packed:
        for i in (0, 2, 4):
            net[i].pack()
    return net.eval()


@rules
@pytest.mark.parametrize("packed", [True, False])
def test_a_file_gives_the_network_back(rule, packed, tmp_path):
    net = ternary_network(rule, packed)
    save(net, tmp_path / "net")
    again = load(tmp_path / "net", network()).eval()
    x = seeded(2, 3, 6, 6, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(x), net(x))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}
    save(again, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "net").read_bytes()
    twice = load(tmp_path / "net", again)
    assert twice is again


def test_a_packed_file_is_as_small_as_the_code(tmp_path):
    net = ternary_network("layerwise", packed=True)
    save(net, tmp_path / "net")
    save(network(), tmp_path / "dense")
    header = 8 + int.from_bytes((tmp_path / "net").read_bytes()[:8], "little")
    biases = 4 * (40 + 8 + 5)
    written = sum(net[i].packed_bits() for i in (0, 2, 4)) // 8
    assert (tmp_path / "net").stat().st_size == header + biases + written
    assert net[2].encoding.kind == "gaps"


def test_files_of_other_forms_and_layers_are_refused(tmp_path):
    save(ternary_network("twn", packed=True), tmp_path / "net")
    other = network()
    other[2] = nn.Conv2d(40, 8, 3, stride=2)
    with pytest.raises(ArchitectureError, match="stride"):
        load(tmp_path / "net", other)
    other = network()
    other[4] = nn.Linear(128, 6)
    with pytest.raises(ArchitectureError, match="out_features"):
        load(tmp_path / "net", other)
    with pytest.raises(ArchitectureError):
        load(tmp_path / "net", ternary_network("twn", packed=False))
    content = bytearray((tmp_path / "net").read_bytes())
    content[-3] ^= 16
    (tmp_path / "net").write_bytes(content)
    with pytest.raises(FileFormatError):
        load(tmp_path / "net", network())


def test_a_code_that_does_not_decode_is_refused_and_nothing_is_changed(tmp_path):
    net = ternary_network("twn", packed=True)
    net[2].weight_code[:20] = 255
    save(net, tmp_path / "net")
    dense = network()
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    with pytest.raises(ArchitectureError, match=r"2\.weight_code: decode"):
        load(tmp_path / "net", dense)
    assert all(torch.equal(v, dense.state_dict()[k]) for k, v in before.items())


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TernaryConv2d(3, 4, 3, rule="binary"), "rule must be one of"),
        (lambda: TernaryConv2d(3, 4, 3, groups=2), "divisible by groups"),
        (lambda: TernaryConv2d(3, 0, 3), "out_channels must be an int"),
        (lambda: TernaryConv2d(3, 4, 3, threshold=-1.0), "threshold must be"),
        (lambda: TernaryConv2d(3, 4, 3, padding_mode="none"), "padding_mode must be"),
        (lambda: TernaryLinear(3, True), "out_features must be an int"),
        (lambda: TernaryConv2d.from_conv(nn.Linear(3, 3)), "is a Linear, not a Conv2d"),
        (lambda: TernaryLinear.from_linear(nn.Conv2d(3, 3, 1)), "is a Conv2d, not a Linear"),
        (lambda: TernaryConv2d.from_conv(conv(), mask=torch.ones(1), rule="layerwise"), "mask must be"),
        (lambda: TernaryConv2d.from_conv(conv(), mask=torch.ones(1), rule="twn"), "mask goes with"),
        (lambda: TernaryConv2d(3, 4, 3, padding=(0, 1, 0, 1)).to_conv(), "asymmetric padding"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize("module", ["ternary_conv2d", "ternary_linear"])
def test_the_examples_of_the_documentation_run(module):
    assert doctest.testmod(importlib.import_module(f"basisconv_kernels.layers.{module}")).failed == 0


def test_a_packed_layer_takes_the_memory_format_of_its_network():
    """Planes have five dimensions, which the module method takes for volumes."""
    torch.manual_seed(0)
    layer = TernaryConv2d.from_conv(torch.nn.Conv2d(3, 8, 3, padding=1), rule="twn").eval().pack()
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        expected = layer(x)
        moved = layer.to(memory_format=torch.channels_last)
        out = moved(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(out, expected)
        assert torch.equal(layer.to("cpu")(x), expected)
