"""Spectral fine-tuning of whole networks: basis, coefficients and the BatchNorms between them, or random bases."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from basisconv_kernels.compression.basis import orthogonality_loss
from basisconv_kernels.compression.config import BasisConfig
from basisconv_kernels.compression.files import load, save
from basisconv_kernels.compression.finetune import finetune
from basisconv_kernels.compression.model import compress
from basisconv_kernels.demo import data
from basisconv_kernels.demo.networks import SmallVGG
from basisconv_kernels.layers.basis_conv2d import BasisConv2d

WIDTHS = (8, 16)
IMAGES = data.fashion_mnist()
EXAMPLE = torch.randn(2, 1, 28, 28)


def batches(count: int = 512) -> data.Batches:
    """Images that a few steps suffice to learn something from."""
    part = data.Split(IMAGES.train.images[:count], IMAGES.train.labels[:count])
    return data.Batches(IMAGES, part, 32, train=True)


def converted(**settings) -> nn.Module:
    torch.manual_seed(0)
    config = BasisConfig(fraction=0.5, keep_dense="never", **settings)
    return compress(SmallVGG(1, WIDTHS), config, example_inputs=EXAMPLE)[0]


def layers_of(model: nn.Module) -> list[BasisConv2d]:
    return [module for module in model.modules() if isinstance(module, BasisConv2d)]


def test_basis_coefficients_and_norms_train_together_and_the_bases_stay_orthogonal():
    finished = {}
    for weight in (0.0, 3.0):
        model = converted(train_basis=True, basis_norm=True)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        history = finetune(model, batches(), epochs=2, lr=0.05, orthogonality=weight, seed=0, progress=False)
        assert history[-1].loss < history[0].loss
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        for name, layer in model.named_modules():
            if isinstance(layer, BasisConv2d):
                parts = ("basis_weight", "coefficients", "basis_norm.weight", "basis_norm.bias")
                assert {f"{name}.{part}" for part in parts} <= moved
        finished[weight] = float(orthogonality_loss(model).detach())
    assert finished[3.0] < 0.2 * finished[0.0]


@pytest.mark.parametrize("basis", ["random_orthogonal", "dct"])
def test_a_network_of_drawn_bases_learns_from_scratch_and_keeps_them(basis, tmp_path):
    model = converted(basis=basis)
    for layer in layers_of(model):
        rows = layer.basis_weight.flatten(1)
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), rtol=0, atol=1e-5)
        assert not layer.trains_basis
    again = converted(basis=basis)
    assert all(
        torch.equal(a.coefficients, b.coefficients) for a, b in zip(*map(layers_of, (model, again)), strict=True)
    )
    drawn = [layer.basis_weight.clone() for layer in layers_of(model)]
    history = finetune(model, batches(), epochs=8, lr=0.1, seed=0, progress=False)
    assert history[-1].accuracy > 0.4  # of ten classes
    assert all(torch.equal(a, b.basis_weight) for a, b in zip(drawn, layers_of(model), strict=True))
    save(model, tmp_path / "drawn")
    other = load(tmp_path / "drawn", SmallVGG(1, WIDTHS))
    assert [layer.basis for layer in layers_of(other)] == [basis] * 2
    with torch.no_grad():
        assert torch.equal(other.eval()(EXAMPLE), model.eval()(EXAMPLE))


def test_drawn_bases_hold_nothing_of_the_weights():
    dense = SmallVGG(1, WIDTHS)
    config = BasisConfig(fraction=0.5, keep_dense="never", basis="random_orthogonal")
    made = []
    for factor in (1.0, 7.0):
        with torch.no_grad():
            dense.features[3].weight.mul_(factor)
        torch.manual_seed(1)
        small, report = compress(dense, config, example_inputs=EXAMPLE)
        made.append(layers_of(small)[1])
        assert all(row.relative_error is None and row.energy_kept is None for row in report.layers)
    assert torch.equal(made[0].basis_weight, made[1].basis_weight)
    assert torch.equal(made[0].coefficients, made[1].coefficients)


def test_an_unknown_basis_is_refused():
    with pytest.raises(ValueError, match="basis must be one of eigen, random_orthogonal, dct, got 'fourier'"):
        BasisConfig(fraction=0.5, basis="fourier")
