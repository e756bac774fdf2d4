"""``compress`` with ``StackedBinaryConfig``, training, freezing, and files that hold bits as bits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from basisconv_kernels import (
    ArchitectureError,
    BasisConfig,
    FileFormatError,
    StackedBinaryConfig,
    StackedBinaryConv2d,
    compress,
    finetune,
    freeze_bits,
    load,
    read_recipe,
    save,
    testing,
    to_plain,
)
from basisconv_kernels.layers.stacked_binary_conv2d_fit import fit_stacked


def network():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(24, 9, 1), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )  # fmt: skip


IMAGE = torch.randn(2, 3, 10, 12, generator=torch.Generator().manual_seed(0))
CONFIG = StackedBinaryConfig(splits=4, bank=0.5)


@pytest.fixture
def small():
    torch.manual_seed(0)
    return compress(network(), CONFIG, example_inputs=IMAGE)


def test_layers_are_fitted_and_the_first_stays(small):
    torch.manual_seed(0)
    dense = network()
    model, report = small
    assert [type(model[i]) for i in (0, 3, 6, 8)] == [nn.Conv2d, *[StackedBinaryConv2d] * 3]
    assert report.layers[0].reason == "the first convolution stays dense (keep_first)"
    assert (model[3].bank, model[6].bank, model[8].bank) == (12, 12, 5)
    found = fit_stacked(dense[3].weight, 12, 4)
    assert torch.equal(model[3].filters()[1], found.index)
    assert report.layers[1].relative_error == pytest.approx(found.relative_error(dense[3].weight))
    pixels = 10 * 12
    assert report.layers[1].macs_after == pixels * (12 * 16 * 9 + 24 * 4)
    assert report.layers[1].parameters_after == -(-((12 * 4 * 9 + 7) // 8 + (24 * 4 * 4) // 8) // 4) + 24
    assert model(IMAGE).shape == (2, 9)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (StackedBinaryConfig(splits=5, bank=4), "its 16 channels do not divide into 5 splits"),
        (StackedBinaryConfig(splits=1, bank=10**6), "no fewer than its 3456 float32 weights"),
    ],
)
def test_what_does_not_fit_stays_dense_with_its_reason(config, reason):
    model, report = compress(network(), config, example_inputs=IMAGE)
    assert isinstance(model[3], nn.Conv2d)
    assert reason in report.layers[1].reason


def test_by_name_pattern_and_in_xnor_mode():
    steps = {"8": StackedBinaryConfig(splits=2, bank=4, binarize_input=True), "*": None}
    dense = network()
    dense[7] = nn.Identity()
    model, _ = compress(dense, steps, example_inputs=IMAGE)
    assert model[8].binarize_input
    assert isinstance(model[6], nn.Conv2d)


def test_signs_behind_a_relu_are_refused():
    model, report = compress(
        network(), StackedBinaryConfig(splits=2, bank=8, binarize_input=True), example_inputs=IMAGE
    )
    assert isinstance(model[3], nn.Conv2d)
    assert "its input is never negative" in report.layers[1].reason


def test_fine_tuning_then_bits_in_a_file(small, tmp_path):
    model, _ = small
    before = copy.deepcopy(model)
    loader = [(IMAGE, torch.tensor([1, 5]))] * 3
    finetune(model, loader, epochs=1, progress=False)
    assert not torch.equal(before[3].bank_latent, model[3].bank_latent)
    model.eval()
    with torch.no_grad():
        expected = model(IMAGE)
        assert torch.equal(freeze_bits(model)(IMAGE), expected)
        save(model, tmp_path / "bits.safetensors")
        again = load(tmp_path / "bits.safetensors", network().eval())
        assert torch.equal(again(IMAGE), expected)
        testing.check_same_network(to_plain(again)(IMAGE), expected)
    recipe = read_recipe(tmp_path / "bits.safetensors")
    entry = next(layer for layer in recipe["layers"] if layer["names"] == ["3"])
    assert (entry["kind"], entry["frozen"], entry["bank"]) == ("stacked_binary_conv2d", True, 12)
    assert recipe["tensors"]["3.bank_bits"] == {"dtype": "uint8", "shape": [54]}
    assert recipe["tensors"]["3.index_bits"] == {"dtype": "uint8", "shape": [48]}


def test_latents_survive_a_file_too(small, tmp_path):
    model, _ = small
    save(model, tmp_path / "latents.safetensors")
    again = load(tmp_path / "latents.safetensors", network())
    assert not again[3].frozen
    assert torch.equal(again[3].select_latent, model[3].select_latent)
    assert again[3].bank_latent.requires_grad


def test_the_file_is_as_small_as_the_formula(tmp_path):
    """C = K = 256, 3×3, splits 4, bank 128: the tensors on disk are 10112 bytes and the header."""
    layer = StackedBinaryConv2d(256, 256, 3, bank=128, splits=4, bias=False, scale=False).freeze()
    save(nn.Sequential(layer), tmp_path / "one.safetensors")
    content = (tmp_path / "one.safetensors").read_bytes()
    payload = len(content) - 8 - int.from_bytes(content[:8], "little")
    assert payload == layer.payload_bytes == (128 * 64 * 9 + 256 * 4 * 7) // 8
    assert 4 * 256 * 256 * 9 / payload >= 230


def test_a_file_with_an_index_out_of_range_is_refused(small, tmp_path):
    model, _ = small
    freeze_bits(model)
    model[3].index_bits.fill_(255)  # 15 of a bank of 12
    save(model, tmp_path / "bad.safetensors")
    fresh = network()
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises((ArchitectureError, FileFormatError), match="names filter 15 of a bank of 12"):
        load(tmp_path / "bad.safetensors", fresh)
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())


@pytest.mark.parametrize(
    "bad", [{"splits": 0}, {"bank": 0}, {"bank": 1.5}, {"bank": 0.0}, {"estimator": "step"}, {"rounds": 0}], ids=str
)
def test_bad_settings_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=f"StackedBinaryConfig: {next(iter(bad))} must be"):
        StackedBinaryConfig(**{"splits": 2, "bank": 4, **bad})


def test_bad_weights_change_nothing():
    dense = network()
    nn.init.constant_(dense[6].weight, torch.nan)
    with pytest.raises(ValueError, match=r"'6' has NaN"):
        compress(dense, CONFIG, example_inputs=IMAGE, inplace=True)
    assert isinstance(dense[3], nn.Conv2d)


def test_the_first_convolution_is_told_among_converted_ones_too():
    """A pipeline or a pattern may have converted the layer that the network calls first."""
    dense = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    image = torch.randn(1, 4, 12, 12)
    steps = {"0": BasisConfig(fraction=0.25, keep_dense="never"), "*": StackedBinaryConfig(splits=2, bank=0.5)}
    small, _ = compress(dense, steps, example_inputs=image)
    assert [isinstance(small[i], StackedBinaryConv2d) for i in (0, 2, 4)] == [False, True, True]
    alone, _ = compress(dense, StackedBinaryConfig(splits=2, bank=0.5), example_inputs=image)
    assert [isinstance(alone[i], StackedBinaryConv2d) for i in (0, 2, 4)] == [False, True, True]
