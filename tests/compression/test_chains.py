"""``pack_activations``: bits from layer to layer, equal bit for bit to what the trained network gives."""

from __future__ import annotations

import copy
import doctest
import importlib

import pytest
import torch
from torch import Tensor, nn

from basisconv_kernels import (
    BinaryConfig,
    BinaryConv2d,
    PackedMaxPool2d,
    PackedTensor,
    bitpack,
    compress,
    fold_batchnorm,
    load,
    pack_activations,
    save,
)
from basisconv_kernels.demo.networks import SmallVGG

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def shaken(model: nn.Module, seed: int) -> nn.Module:
    """BatchNorms of weights of both signs and zero, as training may leave them; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.normal_(generator=generator)
                module.weight[::7] = 0
                module.running_var.uniform_(0.2, 3, generator=generator)
    return model.eval()


def vgg(layout, seed=0, **settings):
    torch.manual_seed(seed)
    dense = SmallVGG(widths=(12, 40, 33, 64, 48, 10))
    model, _ = compress(dense, BinaryConfig(**settings), example_inputs=torch.randn(2, 1, 28, 28))
    return shaken(model, seed).to(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_a_vgg_gives_the_same_numbers_from_bits_alone(layout, seed):
    """Five binary layers, two of the four links with a max-pool, BatchNorms on both sides of it."""
    model = vgg(layout, seed, scaling="learned" if seed == 1 else "mean")
    images = torch.randn(17, 1, 28, 28, generator=torch.Generator().manual_seed(seed)).contiguous(memory_format=layout)
    before = copy.deepcopy(model.state_dict())
    packed, report = pack_activations(model, images[:2])
    assert [chain.name for chain in report.chains] == [f"features.{i}" for i in (3, 7, 10, 14)]
    assert report.chains[0].absorbed == ("features.4", "features.5", "features.6")
    assert report.left_alone == ()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    seen: dict[str, type] = {}
    for name, module in packed.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, type(o)))
    with torch.no_grad():
        assert torch.equal(packed(images), model(images))
    assert [n for n, kind in seen.items() if kind is PackedTensor] == [f"features.{i}" for i in (3, 6, 7, 10, 13, 14)]
    norms = [name for name, module in packed.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms == ["features.1", "features.18"]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_files_and_folding_beside(layout, tmp_path):
    model = vgg(layout)
    images = torch.randn(3, 1, 28, 28).contiguous(memory_format=layout)
    packed, _ = pack_activations(model, images)
    save(packed, tmp_path / "packed.safetensors")
    fresh = SmallVGG(widths=(12, 40, 33, 64, 48, 10)).to(memory_format=layout).eval()
    again = load(tmp_path / "packed.safetensors", fresh)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
        folded, report = fold_batchnorm(packed, images)
        assert [chain.name for chain in report.chains] == ["features.0"]
        assert torch.equal(folded(images).argmax(1), model(images).argmax(1))
    assert isinstance(folded.get_submodule("features.6"), PackedMaxPool2d)


def test_inside_the_blocks_of_a_resnet18(torchvision_models):
    torch.manual_seed(0)
    dense = torchvision_models.resnet18(num_classes=10)
    image = torch.randn(2, 3, 64, 64)
    model, _ = compress(dense, BinaryConfig(), example_inputs=image)
    shaken(model, 1)
    packed, report = pack_activations(model, image[:1])
    assert [chain.name for chain in report.chains] == [f"layer{i}.{j}.conv1" for i in range(1, 5) for j in range(2)]
    with torch.no_grad():
        assert torch.equal(packed(image), model(image))


class Odd(nn.Module):
    """Links that are no chains."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (BinaryConv2d(8, 8, 3, padding=1) for _ in range(4))
        self.norm, self.pool = nn.BatchNorm2d(8), pool

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x))
        x = self.b(x) + x  # read twice
        x = self.d(self.pool(self.c(x)))
        return self.d(torch.tanh(x))


def test_what_is_no_chain_stays_real_with_its_reason():
    torch.manual_seed(0)
    image = torch.randn(1, 8, 9, 9)
    model = shaken(Odd(nn.MaxPool2d(2)), 0)
    packed, report = pack_activations(model, image)
    assert report.chains == ()
    assert report.left_alone == (("c", "d is called more than once"),)
    assert torch.equal(packed(image), model(image))
    assert all(layer.frozen for layer in (packed.a, packed.b, packed.c, packed.d))
    chain = nn.Sequential(BinaryConv2d(8, 8, 3), nn.MaxPool2d(2, ceil_mode=True), BinaryConv2d(8, 8, 1))
    assert pack_activations(chain, image)[1].left_alone == (("0", "1 pools with ceil_mode=True"),)
    scaled = nn.Sequential(BinaryConv2d(8, 8, 3), BinaryConv2d(8, 8, 1, input_scale=True))
    assert pack_activations(scaled, image)[1].left_alone == (("0", "input_scale needs real activations"),)


def test_packed_inputs_and_overlapping_pools():
    torch.manual_seed(0)
    net = nn.Sequential(
        BinaryConv2d(8, 70, 3, padding=1, bias=True, activation="relu6"), nn.MaxPool2d(3, 2, 1), nn.BatchNorm2d(70),
        nn.MaxPool2d(2, 1), nn.ReLU(), BinaryConv2d(70, 9, 3, padding=1, padding_value=-1, input_norm=True),
    )  # fmt: skip
    shaken(net, 3)
    bits = bitpack(torch.randn(2, 8, 12, 11))
    packed, report = pack_activations(net, bits)
    assert report.chains[0].absorbed == ("1", "2", "3", "4")
    with torch.no_grad():
        assert torch.equal(packed(bits), net(bits))


class Untraceable(nn.Module):
    """A branch that depends on the numbers, around a part without."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(BinaryConv2d(8, 8, 3), nn.BatchNorm2d(8), BinaryConv2d(8, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.sum() > 0 else self.body(-x)


def test_the_parts_of_a_network_that_cannot_be_traced():
    torch.manual_seed(0)
    model = shaken(Untraceable(), 0)
    image = torch.randn(1, 8, 9, 9)
    packed, report = pack_activations(model, image)
    assert [chain.name for chain in report.chains] == ["body.0"]
    assert report.left_alone[0][1].startswith("cannot be traced as a whole")
    assert torch.equal(packed(image), model(image))


def test_a_result_that_differs_is_given_up(monkeypatch):
    """A planted fault: unions in the place of intersections."""
    torch.manual_seed(0)
    net = nn.Sequential(
        BinaryConv2d(8, 32, 3), nn.MaxPool2d(2), BinaryConv2d(32, 4, 3, input_norm=True)
    )  # fmt: skip
    shaken(net, 0)
    image = torch.randn(1, 8, 12, 12)
    made = PackedMaxPool2d.from_pool
    monkeypatch.setattr(PackedMaxPool2d, "from_pool", lambda pool, falling: made(pool, torch.zeros_like(falling)))
    packed, report = pack_activations(net, image)
    assert report.chains == ()
    assert report.left_alone == (("", "the packed network gives other results; nothing was packed"),)
    assert torch.equal(packed(image), net(image))


def test_its_example_runs():
    assert doctest.testmod(importlib.import_module("basisconv_kernels.compression.chains")).failed == 0
