"""The inference form computes what the network computes, with every convolution packed and fused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from basisconv_kernels import BasisConfig, compress, fold_batchnorm, testing, to_plain
from basisconv_kernels.demo.inference import PackedConv2d, channels_last, inference_form, packing_available
from basisconv_kernels.demo.networks import CifarResNet, SmallVGG
from basisconv_kernels.layers.basis_conv2d import BasisConv2d

needs_packing = pytest.mark.skipif(not packing_available(), reason="this PyTorch has no oneDNN")


def _trained_norms(network: nn.Module) -> nn.Module:
    """BatchNorms that do something."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias.data, module.running_mean):
                tensor.uniform_(-0.5, 0.5, generator=generator)
    return network.eval()


def _count(network: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in network.modules())


@pytest.mark.parametrize(("make", "channels"), [(lambda: SmallVGG(1, (8, 12, 16)), 1), (lambda: CifarResNet(8), 3)])
@pytest.mark.parametrize("form", ["dense", "two_step", "fused"])
def test_same_results(make, channels, form):
    images = channels_last(torch.randn(3, channels, 16, 16, generator=torch.Generator().manual_seed(1)))
    network = _trained_norms(make())
    if form != "dense":
        network, _ = compress(network, BasisConfig(fraction=0.5, keep_dense="never"), example_inputs=images)
    expected = network(images)
    folded, _ = fold_batchnorm(network, images)
    made = inference_form(to_plain(folded) if form == "two_step" else folded, images)
    testing.check_same_network(made(images), expected)
    other = channels_last(torch.randn(5, channels, 16, 16))  # another batch size than it was packed for
    testing.check_same_network(made(other), network(other))
    assert _count(made, BasisConv2d) == (_count(network, BasisConv2d) if form == "fused" else 0)


@needs_packing
@pytest.mark.parametrize("make", [lambda: SmallVGG(1, (8, 12, 16)), lambda: CifarResNet(8)], ids=["vgg", "resnet"])
def test_no_convolution_and_no_relu_stays_outside(make):
    network = _trained_norms(make())
    channels = next(m for m in network.modules() if isinstance(m, nn.Conv2d)).in_channels
    images = channels_last(torch.randn(2, channels, 16, 16))
    made = inference_form(fold_batchnorm(network, images)[0], images)
    assert _count(made, PackedConv2d) == _count(network, nn.Conv2d)
    assert _count(made, nn.Conv2d) == 0
    called = [str(node.target) for node in made.graph.nodes if node.op != "call_module"]
    assert not any("relu" in name or "add" in name for name in called)
    modules = [made.get_submodule(str(node.target)) for node in made.graph.nodes if node.op == "call_module"]
    assert not any(isinstance(module, nn.ReLU) for module in modules)


@needs_packing
def test_maps_stay_channels_last_even_after_one_channel():
    images = channels_last(torch.randn(2, 1, 16, 16))
    assert images.stride()[1] == 1
    network = _trained_norms(SmallVGG(1, (8, 12)))
    made = inference_form(fold_batchnorm(network, images)[0], images)
    first = next(module for module in made.modules() if isinstance(module, PackedConv2d))
    assert first(images).is_contiguous(memory_format=torch.channels_last)


def test_a_wrong_packing_is_noticed(monkeypatch):
    if not packing_available():
        pytest.skip("this PyTorch has no oneDNN")
    images = channels_last(torch.randn(2, 3, 8, 8))
    forward = PackedConv2d.forward
    monkeypatch.setattr(PackedConv2d, "forward", lambda self, *arguments: forward(self, *arguments) + 1)
    with pytest.raises(RuntimeError, match="changed the results"):
        inference_form(nn.Sequential(nn.Conv2d(3, 4, 3)), images)


def test_without_packing_the_network_stays_plain(monkeypatch):
    monkeypatch.setattr("basisconv_kernels.demo.inference.packing_available", lambda: False)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    images = channels_last(torch.randn(2, 3, 8, 8))
    made = inference_form(network, images)
    assert _count(made, nn.Conv2d) == 1
    torch.testing.assert_close(made(images), network(images))
