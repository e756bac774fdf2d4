"""``BinaryConv2d``: the layer against the op, scales, training, freezing, states."""

from __future__ import annotations

import copy
import doctest
import importlib

import pytest
import torch
from torch import nn

from basisconv_kernels import BinaryConv2d, PackedTensor, binary_conv2d, bitpack, filter_scale, magnitude_map, unpack
from basisconv_kernels.core.errors import BackendUnavailable

X = torch.randn(2, 6, 9, 8, generator=torch.Generator().manual_seed(0))


def layer(**settings):
    torch.manual_seed(1)
    return BinaryConv2d(6, 10, 3, padding=1, **settings)


@pytest.mark.parametrize("scaling", [None, "mean", "learned"])
@pytest.mark.parametrize("group", [None, torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2, 0])])
def test_the_layer_is_the_op(scaling, group):
    if scaling is None and group is not None:
        pytest.skip("groups of scales need scales")
    made = layer(scaling=scaling, scale_group=group, bias=True, activation="relu", stride=(1, 2))
    nn.init.normal_(made.bias)
    scale = None if scaling is None else filter_scale(made.weight, group)
    expected = binary_conv2d(
        X, made.weight, scale, made.bias, scale_group=group, padding=1, stride=(1, 2), activation="relu"
    )
    assert torch.equal(made(X), expected)
    with torch.no_grad():  # with remembered packed weights, twice
        assert torch.equal(made(X), expected)
        assert torch.equal(made(X), expected)


def test_magnitudes_of_the_input_scale_each_pixel():
    made = layer(input_scale=True)
    plain = layer()
    expected = plain(X) * magnitude_map(X, 3, padding=1)
    torch.testing.assert_close(made(X), expected)
    with pytest.raises(TypeError, match=r"^BinaryConv2d: input_scale needs the magnitudes of a real input"):
        made(bitpack(X))


def test_remembered_weights_follow_every_edit():
    made = layer().eval()
    with torch.no_grad():
        before = made(X)
        made.weight.neg_()
        after = made(X)
        assert torch.equal(after, binary_conv2d(X, made.weight, filter_scale(made.weight), padding=1))
        assert not torch.equal(before, after)
        made.load_state_dict(layer().state_dict())
        assert torch.equal(made(X), before)
        assert torch.equal(copy.deepcopy(made)(X), before)


def test_a_step_of_training_and_clipping():
    made = layer(bias=True, scaling="learned", estimator="approx_sign")
    optimiser = torch.optim.SGD(made.parameters(), lr=1e4)
    first = made(X).square().mean()
    first.backward()
    assert all(p.grad.abs().sum() > 0 for p in made.parameters())
    optimiser.step()
    assert made.weight.abs().max() > 1
    assert made.clip_weights() is made
    assert made.weight.abs().max() == 1
    assert not torch.equal(made(X).square().mean(), first)


@pytest.mark.parametrize("scaling", [None, "mean", "learned"])
@pytest.mark.parametrize("groups", [1, 2])
def test_freezing_changes_nothing_and_keeps_bits_alone(scaling, groups):
    made = layer(scaling=scaling, bias=True, groups=groups)
    expected = made(X)
    state = dict(made.state_dict())
    assert made.freeze() is made
    assert made.freeze() is made
    assert made.frozen
    assert torch.equal(made(X), expected)
    assert list(made.parameters()) == []
    assert set(made.state_dict()) == {"words", "bias"} | ({"scale"} if scaling else set())
    assert torch.equal(unpack(PackedTensor(made.words, 6 // groups)) > 0, state["weight"] >= 0)
    again = layer(scaling=scaling, bias=True, groups=groups)
    nn.init.normal_(again.weight)
    again.load_state_dict(made.state_dict())
    assert again.frozen
    assert torch.equal(again(X), expected)


def test_a_chain_of_frozen_layers_hands_on_bits():
    """BatchNorm and sign between two layers, and the same folded: equal results, bits in between."""
    torch.manual_seed(2)
    first, norm, second = BinaryConv2d(6, 40, 3, padding=1), nn.BatchNorm2d(40), BinaryConv2d(40, 5, 3)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.normal_()
    first, norm, second = first.double(), norm.double().eval(), second.double()
    expected = second(norm(first(X.double())))
    first.freeze(norm)
    bits = first(X.double())
    assert isinstance(bits, PackedTensor)
    second.freeze()
    assert torch.equal(second(bits), second(unpack(bits, torch.float64)))
    torch.testing.assert_close(second(bits).double(), expected.detach())
    assert torch.equal(
        first(X, output="int32"), binary_conv2d(X, PackedTensor(first.words, 6), padding=1, output="int32")
    )
    restored = BinaryConv2d(6, 40, 3, padding=1).double()
    restored.load_state_dict(first.state_dict())
    assert torch.equal(restored(X).words, first(X).words)


def test_damaged_bits_are_refused_at_load():
    state = layer().freeze().state_dict()
    state["words"] = state["words"] | (1 << 20)
    with pytest.raises(ValueError, match=r"^PackedTensor: bits behind channel 5 must be zero"):
        layer().load_state_dict(state)
    state = BinaryConv2d(6, 11, 3).freeze().state_dict()
    with pytest.raises(ValueError, match=r"^BinaryConv2d: words must be \[10, 1, 3, 3, 1\], got \[11, 1, 3, 3, 1\]"):
        layer().load_state_dict(state)


@pytest.mark.parametrize("bits", [1, 3])
def test_packed_inputs(bits):
    codes = torch.randint(2**bits, X.shape)
    values = codes if bits > 1 else 2 * codes - 1
    made = layer()
    found = made(bitpack(values.float(), bits=bits))
    signs = torch.where(made.weight >= 0, 1.0, -1.0)
    sums = torch.nn.functional.conv2d(values.float(), signs, padding=1)
    assert torch.equal(found, sums * filter_scale(made.weight)[:, None, None])


def test_from_conv():
    conv = nn.Conv2d(6, 10, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2)
    made = BinaryConv2d.from_conv(conv, scaling="learned", padding_value=-1)
    expected = binary_conv2d(
        X, conv.weight, filter_scale(conv.weight), conv.bias, stride=(2, 1), padding=(1, 0), dilation=(1, 2),
        groups=2, padding_value=-1,
    )  # fmt: skip
    assert torch.equal(made(X), expected)


REFUSED = {
    "channels": (lambda: BinaryConv2d(6, 9, 3, groups=2), ValueError, r"out_channels must be divisible by groups = 2"),
    "kind": (lambda: BinaryConv2d(6.0, 9, 3), TypeError, r"in_channels must be an int, got 6.0"),
    "none": (lambda: BinaryConv2d(0, 9, 3), ValueError, r"in_channels must be at least 1, got 0"),
    "scaling": (lambda: layer(scaling="max"), ValueError, r"scaling must be None, 'mean' or 'learned', got 'max'"),
    "group without": (lambda: layer(scaling=None, scale_group=torch.zeros(10)), ValueError, r"scale_group needs scal"),
    "group size": (lambda: layer(scale_group=torch.zeros(3)), ValueError, r"scale_group must be \[K\] = \[10\], got"),
    "input scale": (lambda: layer(input_scale=True, groups=2), ValueError, r"needs groups=1, got 2"),
    "padding value": (lambda: layer(padding_value=3), ValueError, r"padding_value must be 0, 1 or -1, got 3"),
    "activation": (lambda: layer(activation="gelu"), ValueError, r"activation must be None, 'relu' or 'relu6'"),
    "estimator": (lambda: layer(estimator="tanh"), ValueError, r"estimator must be of 'identity', 'clip'"),
    "norm size": (lambda: layer().freeze(nn.BatchNorm2d(9)), ValueError, r"norm must have 10 channels, got 9"),
    "norm statistics": (lambda: layer().freeze(nn.BatchNorm2d(10, track_running_stats=False)), ValueError,
                        r"must have running statistics"),
    "norm and relu": (lambda: layer(activation="relu").freeze(nn.BatchNorm2d(10)), ValueError, r"folds a sign"),
    "padding mode": (lambda: BinaryConv2d.from_conv(nn.Conv2d(6, 9, 3, padding_mode="reflect")), ValueError,
                     r"padding_mode must be 'zeros', got 'reflect'"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_arguments_that_do_not_fit_are_refused_by_name(make, error, text):
    with pytest.raises(error, match=f"^BinaryConv2d: .*{text}"):
        make()


def test_the_backend_is_handed_on():
    with pytest.raises(BackendUnavailable, match=r"^binary_conv2d: backend 'tpu'"):
        layer(backend="tpu")(X)


def test_its_arguments_are_shown():
    made = layer(padding_value=1, activation="relu")
    text = "6, 10, kernel_size=(3, 3), padding=(1, 1, 1, 1), padding_value=1, scaling='mean', activation='relu'"
    assert made.extra_repr() == text
    assert made.freeze().extra_repr() == f"{text}, frozen"


def test_the_example_of_the_documentation_runs():
    assert doctest.testmod(importlib.import_module("basisconv_kernels.layers.binary_conv2d")).failed == 0
