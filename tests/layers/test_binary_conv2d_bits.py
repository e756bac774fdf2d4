"""``BinaryConv2d`` between bits: a BatchNorm in front, and everything behind as one comparison a channel."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from basisconv_kernels import BinaryConv2d, PackedTensor, Threshold, bitpack, unpack


def norm_of(channels, seed, dtype=torch.float32):
    """A BatchNorm in eval mode with weights of both signs, and zero."""
    generator = torch.Generator().manual_seed(seed)
    norm = nn.BatchNorm2d(channels).eval()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.normal_(generator=generator)
        norm.running_var.uniform_(0.2, 3, generator=generator)
        norm.weight[::5] = 0
        norm.bias[:2] = 0
    return norm.to(dtype)


def steps_of(kind, channels):
    """What follows the layer."""
    first, second = norm_of(channels, 3), norm_of(channels, 4)
    return {
        "norm": [first],
        "norm, relu, norm": [first, F.relu, second],
        "relu6, norm": [F.relu6, second],
        "nothing": [],
    }[kind]


@pytest.mark.parametrize("then", ["norm", "norm, relu, norm", "relu6, norm", "nothing"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_every_sum_has_the_sign_of_the_modules_themselves(then, activation):
    """All sums a 3×3 layer of 7 channels can have, scales of both signs and zero, biases."""
    torch.manual_seed(0)
    K, most = 60, 7 * 9
    layer = BinaryConv2d(7, K, 3, scaling="learned", bias=True, activation=activation)
    with torch.no_grad():
        layer.scale.normal_()
        layer.scale[::7] = 0
        layer.bias.normal_()
        layer.bias[::3] = 0
    sums = torch.arange(-most, most + 1).expand(K, -1)
    values = sums.float() * layer.scale.detach()[:, None] + layer.bias.detach()[:, None]
    values = (F.relu(values) if activation else values)[None, :, :, None]
    steps = steps_of(then, K)
    for step in steps:
        values = step(values)
    layer.pack_output(*steps)
    found = Threshold(layer.threshold_value, layer.threshold_flip).bits(sums[None, :, :, None])
    assert torch.equal(found, values >= 0)
    constant = activation == "relu" and then == "nothing"  # no number behind a ReLU is negative
    assert found.all() == constant
    assert found.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_batchnorm_in_front_becomes_a_threshold(dtype, layout):
    torch.manual_seed(0)
    layer = BinaryConv2d(35, 12, 3, padding=1, input_norm=True).to(dtype).eval()
    layer.input_norm = norm_of(35, 5, dtype)
    x = torch.randn(2, 35, 6, 5).to(dtype).contiguous(memory_format=layout)
    x[0, :, 0, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0]).repeat(7).to(dtype)
    with torch.no_grad():
        expected = layer(x)
        signs = torch.where(layer.input_norm(x) >= 0, 1.0, -1.0)
        frozen = copy.deepcopy(layer).freeze()
        assert torch.equal(frozen(x), expected)
        assert frozen(x).stride() == expected.stride()
    at = Threshold(frozen.input_threshold_value, frozen.input_threshold_flip)
    # Infinite numbers times a weight of zero are NaN in the BatchNorm; the threshold has a bit for them.
    finite = x.isfinite() | (layer.input_norm.weight != 0)[:, None, None]
    assert torch.equal(unpack(bitpack(x, threshold=at))[finite], signs[finite])
    assert set(frozen.state_dict()) == {"words", "scale", "input_threshold_value", "input_threshold_flip"}
    again = BinaryConv2d(35, 12, 3, padding=1, input_norm=True).to(dtype)
    again.load_state_dict(frozen.state_dict())
    assert torch.equal(again(x), expected)


def test_training_through_the_batchnorm_in_front():
    torch.manual_seed(0)
    layer = BinaryConv2d(6, 8, 3, input_norm=True)
    layer(torch.rand(4, 6, 7, 7)).square().mean().backward()
    assert layer.input_norm.weight.grad.abs().sum() > 0
    assert layer.weight.grad.abs().sum() > 0
    assert layer.input_norm.num_batches_tracked == 1


def test_a_layer_that_gives_bits_keeps_no_scales():
    torch.manual_seed(0)
    layer = BinaryConv2d(6, 40, 3, bias=True, scale_group=torch.arange(40) // 4).eval()
    x = torch.randn(2, 6, 7, 7)
    expected = bitpack(norm_of(40, 1)(layer(x))).words
    layer.pack_output(norm_of(40, 1))
    layer.freeze()
    assert isinstance(layer(x), PackedTensor)
    assert torch.equal(layer(x).words, expected)
    assert set(layer.state_dict()) == {"words", "threshold_value", "threshold_flip"}
    with pytest.raises(ValueError, match=r"^BinaryConv2d: output must be 'packed' or 'int32'"):
        layer(x, output="float")
    with pytest.raises(ValueError, match=r"^BinaryConv2d: the layer gives bits already"):
        layer.pack_output()
    again = BinaryConv2d(6, 40, 3, bias=True)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x).words, expected)


def test_magnitudes_need_the_batchnorm_itself():
    torch.manual_seed(0)
    layer = BinaryConv2d(6, 8, 3, input_norm=True, input_scale=True).eval()
    x = torch.randn(2, 6, 7, 7)
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(layer.freeze()(x), expected)
        again = BinaryConv2d(6, 8, 3, input_norm=True, input_scale=True).eval()
        again.load_state_dict(layer.state_dict())
        assert torch.equal(again(x), expected)
    with pytest.raises(ValueError, match=r"^BinaryConv2d: freeze\(norm\) folds a sign, which input_scale"):
        layer.pack_output()


def test_bits_do_not_pass_a_batchnorm():
    bits = bitpack(torch.randn(1, 6, 5, 5))
    layer = BinaryConv2d(6, 8, 3, input_norm=True)
    with pytest.raises(TypeError, match=r"^BinaryConv2d: input_norm needs a real input, got a PackedTensor"):
        layer(bits)
    assert layer.take_bits(contiguous=True)(bits).is_contiguous()
    with pytest.raises(ValueError, match=r"^BinaryConv2d.to_plain: the layer takes the signs of its input"):
        layer.to_plain()


def test_a_frozen_layer_goes_to_other_memory_formats_and_devices():
    layer = BinaryConv2d(40, 8, 3).freeze()
    x = torch.randn(1, 40, 5, 5)
    expected, shape = layer(x), layer.words.shape
    assert torch.equal(layer.to(memory_format=torch.channels_last)(x), expected)
    assert layer.words.shape == shape
    assert layer.to("meta").words.shape == shape
