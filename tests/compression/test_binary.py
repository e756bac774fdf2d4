"""``compress`` with ``BinaryConfig``: what is converted, its report, training, and files of both forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from basisconv_kernels import (
    ArchitectureError,
    BinaryConfig,
    BinaryConv2d,
    compress,
    filter_scale,
    finetune,
    fold_batchnorm,
    freeze_bits,
    load,
    read_recipe,
    save,
)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding="same", bias=False), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 24, 3, stride=2, padding=1, groups=2), nn.ReLU(), nn.Conv2d(24, 24, 3, groups=24),
        nn.Conv2d(24, 12, 3, padding=1, padding_mode="reflect"), nn.Conv2d(12, 9, 1), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )  # fmt: skip


IMAGE = torch.randn(2, 3, 10, 12, generator=torch.Generator().manual_seed(0))


def small(**settings):
    torch.manual_seed(0)
    return compress(network(), BinaryConfig(**settings), example_inputs=IMAGE)


def test_what_is_converted_and_why_the_rest_is_not():
    torch.manual_seed(0)
    dense = network()
    model, report = small()
    assert [type(model[i]) for i in (0, 3, 6, 8, 9, 10)] == [nn.Conv2d, *[BinaryConv2d] * 2, *[nn.Conv2d] * 3]
    reasons = [layer.reason for layer in report.layers]
    assert reasons[0] == "the first convolution stays dense (keep_first)"
    assert reasons[1:3] == ["", ""]
    assert "one channel a filter" in reasons[3]
    assert "padding_mode='reflect'" in reasons[4]
    assert reasons[5] == "the last layer stays dense (keep_last)"
    weight = dense[3].weight.detach()
    assert torch.equal(model[3].weight, weight)
    error = (weight - filter_scale(weight)[:, None, None, None] * weight.sign()).norm() / weight.norm()
    assert report.layers[1].relative_error == pytest.approx(float(error))
    assert report.layers[1].parameters_after == 24 * 9 + 24
    assert report.layers[2].parameters_after == 24 * 9 + 24 + 24
    assert report.layers[1].macs_after == report.layers[1].macs_before == 10 * 12 * 24 * 16 * 9


def test_the_batchnorm_in_front_starts_with_the_statistics_of_the_inputs():
    torch.manual_seed(0)
    dense = network().eval()
    model, _ = small()
    with torch.no_grad():
        maps = dense[:3](IMAGE)
    norm = model[3].input_norm
    torch.testing.assert_close(norm.running_mean, maps.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, maps.var((0, 2, 3), correction=0))
    assert model(IMAGE).shape == (2, 9)


def test_behind_a_relu_and_without_a_batchnorm_in_front_layers_stay_dense():
    model, report = small(input_norm=False)
    assert isinstance(model[3], nn.Conv2d)
    assert "its input is never negative" in report.layers[1].reason
    signed = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 6 * 8, 2))
    model, _ = compress(signed, BinaryConfig(input_norm=False), example_inputs=IMAGE)
    assert isinstance(model[1], BinaryConv2d)
    assert model[1].input_norm is None


def test_everything_is_converted_on_demand():
    model, _ = small(keep_first=False, keep_last=False, scaling="learned", filters_per_scale=4)
    assert isinstance(model[0], BinaryConv2d)
    assert isinstance(model[10], BinaryConv2d)
    assert model[3].scale.shape == (6,)
    assert torch.equal(model[3].scale, filter_scale(model[3].weight, torch.arange(24) // 4))


@pytest.mark.parametrize(
    "settings", [{}, {"scaling": "learned", "filters_per_scale": 5}, {"input_scale": True}, {"scaling": None}], ids=str
)
def test_training_and_files_of_both_forms(settings, tmp_path):
    model, _ = small(**settings)
    before = model[3].weight.detach().clone()
    finetune(model, [(IMAGE, torch.tensor([1, 5]))] * 3, epochs=1, progress=False)
    assert not torch.equal(before, model[3].weight)
    model.eval()
    with torch.no_grad():
        expected = model(IMAGE)
        save(model, tmp_path / "latents.safetensors")
        again = load(tmp_path / "latents.safetensors", network().eval())
        assert torch.equal(again(IMAGE), expected)
        assert again[3].weight.requires_grad
        assert torch.equal(freeze_bits(model)(IMAGE), expected)
        save(model, tmp_path / "bits.safetensors")
        again = load(tmp_path / "bits.safetensors", network().eval())
        assert torch.equal(again(IMAGE), expected)
    recipe = read_recipe(tmp_path / "bits.safetensors")
    entry = next(layer for layer in recipe["layers"] if layer["names"] == ["3"])
    assert (entry["kind"], entry["frozen"], entry["scaling"]) == ("binary_conv2d", True, model[3].scaling)
    assert recipe["tensors"]["3.words"] == {"dtype": "int32", "shape": [24, 1, 3, 3, 1]}
    other = network()
    other[3] = nn.Conv2d(16, 24, 3, padding=0, bias=False)
    with pytest.raises(ArchitectureError, match="padding is"):
        load(tmp_path / "bits.safetensors", other)


def test_the_payload_is_a_bit_a_weight(tmp_path):
    """C = K = 256, 3×3: the words on disk are 73,728 bytes, and nothing else but the header."""
    layer = BinaryConv2d(256, 256, 3, scaling=None).freeze()
    save(nn.Sequential(layer), tmp_path / "one.safetensors")
    content = (tmp_path / "one.safetensors").read_bytes()
    assert len(content) - 8 - int.from_bytes(content[:8], "little") == layer.payload_bytes == 256 * 256 * 9 // 8


def test_batchnorms_fold_into_the_dense_convolutions_beside():
    model, _ = small()
    folded, report = fold_batchnorm(model, IMAGE)
    assert [chain.name for chain in report.chains] == ["0"]
    assert report.left_alone == ()
    assert isinstance(folded.get_submodule("3"), BinaryConv2d)


def test_resnet18(torchvision_models, randomize, tmp_path):
    torch.manual_seed(0)
    dense = randomize(torchvision_models.resnet18(num_classes=10)).eval()
    image = torch.randn(1, 3, 64, 64)
    model, report = compress(dense, BinaryConfig(), example_inputs=image)
    assert len(report.replaced) == 19
    assert report.layers[0].reason == "the first convolution stays dense (keep_first)"
    with torch.no_grad():
        expected = model(image)
        assert torch.equal(freeze_bits(model)(image), expected)
        save(model, tmp_path / "resnet18.safetensors")
        again = load(tmp_path / "resnet18.safetensors", torchvision_models.resnet18(num_classes=10).eval())
        assert torch.equal(again(image), expected)
    assert (tmp_path / "resnet18.safetensors").stat().st_size < 4 * report.network_parameters_before / 20


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        ({"scaling": "max"}, ValueError, "scaling must be"),
        ({"filters_per_scale": 0}, ValueError, "filters_per_scale must be at least 1"),
        ({"filters_per_scale": 1.5}, TypeError, "filters_per_scale must be an int"),
        ({"filters_per_scale": 2, "scaling": None}, ValueError, "filters_per_scale shares scales"),
        ({"estimator": "step"}, ValueError, "estimator must be one of"),
    ],
)
def test_bad_settings_are_refused_by_name(bad, error, text):
    with pytest.raises(error, match=f"BinaryConfig: {text}"):
        BinaryConfig(**bad)


def test_bad_weights_change_nothing():
    dense = network()
    nn.init.constant_(dense[6].weight, torch.nan)
    with pytest.raises(ValueError, match=r"'6' has NaN"):
        compress(dense, BinaryConfig(), example_inputs=IMAGE, inplace=True)
    assert isinstance(dense[3], nn.Conv2d)
