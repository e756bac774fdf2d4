"""``BasisConv2d``: construction, the call against plain PyTorch, the BatchNorm inside, frozen and trained bases."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from basisconv_kernels import testing
from basisconv_kernels.layers import bases
from basisconv_kernels.layers.basis_conv2d import BasisConv2d
from basisconv_kernels.layers.folding import expand_compact

LAYERS = {
    "plain": ((5, 7, 3, 4), {}),
    "asymmetric": ((5, 7, 3, 4), {"padding": (1, 0, 2, 3), "stride": 2}),
    "relu": ((6, 10, (3, 2), 5), {"padding": 1, "activation": "relu"}),
    "relu6_no_bias": ((6, 10, 3, 5), {"padding": 1, "activation": "relu6", "bias": False}),
    "grouped": ((6, 9, 3, 6), {"groups": 3, "padding": 1}),
    "grouped_mixing": ((6, 10, 3, 9), {"groups": 3, "padding": 1, "compact": False}),
    "circular": ((4, 6, 3, 5), {"padding": 1, "padding_mode": "circular"}),
    "reflect_asymmetric": ((4, 6, 3, 5), {"padding": (1, 2, 0, 1), "padding_mode": "reflect"}),
    "same": ((4, 6, (2, 5), 5), {"padding": "same"}),
}


def make(name: str, **more: object) -> BasisConv2d:
    args, settings = LAYERS[name]
    return BasisConv2d(
        *args, **{"dtype": torch.float64, **settings, **more}, generator=torch.Generator().manual_seed(3)
    )


def fill_norm(layer: BasisConv2d, seed: int = 5) -> BasisConv2d:
    """Running statistics and affine parameters that are far from the identity; one γ negative, one zero."""
    generator = torch.Generator().manual_seed(seed)
    norm = layer.basis_norm
    with torch.no_grad():
        norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator))
        norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
        norm.weight.copy_(torch.randn(norm.num_features, generator=generator))
        norm.weight[0], norm.weight[-1] = -1.5, 0.0
        norm.bias.copy_(torch.randn(norm.num_features, generator=generator))
        if layer.bias is not None:
            layer.bias.copy_(torch.randn(layer.out_channels, generator=generator))
    return layer


def two_convolutions(layer, input, residual=None):
    """The formula of the class docstring in separate PyTorch operations, the padding written out."""
    top, bottom, left, right = layer.pad_amounts
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    maps = F.pad(input, (left, right, top, bottom), mode=mode)
    maps = F.conv2d(maps, layer.basis_weight, None, layer.stride, 0, layer.dilation, layer.groups)
    if layer.basis_norm is not None:
        maps = layer.basis_norm(maps)
    mixing = layer.coefficients
    if mixing.shape[1] != layer.basis_channels:
        mixing = expand_compact(mixing, layer.groups)
    out = F.conv2d(maps, mixing[:, :, None, None], layer.bias)
    out = out if residual is None else out + residual
    return {None: lambda x: x, "relu": F.relu, "relu6": F.relu6}[layer.activation](out)


# --- the call ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_call_is_the_formula(name, norm, training, image, close):
    layer = make(name, basis_norm=norm).train(training)
    if norm:
        fill_norm(layer)
    x = image(layer)
    other = two_convolutions(layer, x)
    residual = torch.randn_like(other)
    close(layer(x), other)
    close(layer(x, residual), two_convolutions(layer, x, residual))
    with torch.no_grad():
        close(layer(x, residual), two_convolutions(layer, x, residual))


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_the_formula(name, image, close):
    layer = fill_norm(make(name, basis_norm=True, train_basis=True)).eval()
    wanted = [*layer.parameters()]
    x = image(layer).requires_grad_()
    upstream = torch.randn_like(two_convolutions(layer, x))
    expected = torch.autograd.grad(two_convolutions(layer, x), [x, *wanted], upstream)
    for got, want in zip(torch.autograd.grad(layer(x), [x, *wanted], upstream), expected, strict=True):
        close(got, want)


def test_compact_coefficients_are_the_block_diagonal_ones(image, close):
    compact = make("grouped")
    full = make("grouped", compact=False)
    assert compact.coefficients.shape == (9, 2)
    assert full.coefficients.shape == (9, 6)
    full.load_state_dict(compact.state_dict() | {"coefficients": expand_compact(compact.coefficients, 3)})
    x = image(compact)
    close(compact(x), full(x))


def test_an_input_without_a_batch(image, close):
    layer = make("relu")
    x = image(layer, N=1)
    residual = torch.randn_like(layer(x))
    close(layer(x[0]), layer(x)[0])
    close(layer(x[0], residual[0]), layer(x, residual)[0])


@pytest.mark.parametrize("name", LAYERS)
def test_an_empty_batch(name, image):
    layer = make(name)
    assert layer(image(layer, N=0)).shape == (0, *layer(image(layer)).shape[1:])


def test_memory_formats_and_views(image, close):
    for name in ("plain", "grouped", "circular"):
        layer = make(name)
        x = image(layer)
        last = x.to(memory_format=torch.channels_last)
        with torch.no_grad():
            assert layer(last).is_contiguous(memory_format=torch.channels_last)
            close(layer(last), layer(x))
            close(layer(x.expand(2, *x.shape)[1][:, :, ::2]), layer(x[:, :, ::2].contiguous()))


def test_autocast_gives_the_autocast_dtype(image):
    layer = make("relu", dtype=torch.float32, basis_norm=True)
    x = image(layer)
    for mode in (False, True):
        layer.train(mode)
        exact = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = layer(x)
        assert rounded.dtype == torch.bfloat16
        testing.check_same_layer(rounded, exact)


# --- the BatchNorm between the stages ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_folding_changes_nothing_in_eval_mode(name, image, close):
    layer = fill_norm(make(name, basis_norm=True)).eval()
    x = image(layer)
    expected = two_convolutions(layer, x)
    basis = layer.basis_weight.clone()
    assert layer.fold() is layer
    assert layer.basis_norm is None
    assert torch.equal(layer.basis_weight, basis)
    close(layer(x), expected)


def test_a_norm_folds_into_the_basis_as_well(image, close):
    """F' = diag(g)·F with the same bias: the other of the two ways, borders included."""
    layer = fill_norm(make("plain", basis_norm=True, padding=2)).eval()
    x = image(layer)
    norm, expected = layer.basis_norm, two_convolutions(layer, x)
    g = norm.weight / (norm.running_var + norm.eps).sqrt()
    e = norm.bias - norm.running_mean * g
    maps = F.conv2d(x, layer.basis_weight * g[:, None, None, None], padding=2)
    bias = layer.bias + layer.coefficients @ e
    close(F.conv2d(maps, layer.coefficients[:, :, None, None], bias), expected)
    close(layer.to_conv()(x), expected)


def test_a_norm_behind_the_layer_folds_too(image, close):
    for name in ("asymmetric", "relu6_no_bias", "grouped", "grouped_mixing"):
        layer = fill_norm(make(name, basis_norm=True, activation=None)).eval()
        x = image(layer)
        norm = nn.BatchNorm2d(layer.out_channels, dtype=torch.float64)
        norm(layer(x))
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        norm.eval()
        expected = norm(two_convolutions(layer, x))
        close(layer.fold(norm)(x), expected)
        close(layer(x, expected), 2 * expected)


def test_folding_refuses_what_it_cannot_fold():
    norm = nn.BatchNorm2d(10)
    with pytest.raises(ValueError, match=r"BasisConv2d.fold: the layer's relu stands before norm"):
        make("relu").fold(norm)
    with pytest.raises(ValueError, match=r"norm must have out_channels = 7 channels, got 10"):
        make("plain").fold(norm)
    with pytest.raises(ValueError, match=r"no running statistics"):
        make("plain").fold(nn.BatchNorm2d(7, track_running_stats=False))
    with pytest.raises(ValueError, match=r"fold: ReLU has no running statistics"):
        make("plain").fold(nn.ReLU())


@pytest.mark.parametrize("name", LAYERS)
def test_a_calibrated_norm_is_the_identity_of_eval_mode(name, image, close):
    layer = make(name).eval()
    x = image(layer)
    expected = layer(x)
    batches = [image(layer, seed=1), image(layer, N=5, seed=2), image(layer, N=0)]
    assert layer.calibrate_basis_norm(iter(batches)) is layer
    assert not layer.basis_norm.training
    close(layer(x), expected)
    maps = torch.cat([layer.basis_maps(batch) for batch in batches]).detach()
    close(layer.basis_norm.running_mean, maps.mean((0, 2, 3)))
    close(layer.basis_norm.running_var, maps.var((0, 2, 3), unbiased=False))


def test_a_norm_without_statistics_stays_two_stages(image, close):
    layer = make("plain", basis_norm=True)
    layer.basis_norm = nn.BatchNorm2d(4, track_running_stats=False, dtype=torch.float64)
    layer.eval()
    close(layer(image(layer)), two_convolutions(layer, image(layer)))


# --- initial values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", ["random_orthogonal", "dct", "learned"])
@pytest.mark.parametrize("groups", [1, 2])
def test_initial_bases_have_orthonormal_rows_per_group(basis, groups, close):
    layer = BasisConv2d(6, 8, (2, 3), 10, groups=groups, basis=basis, dtype=torch.float64)
    rows = layer.basis_weight.detach().reshape(groups, 10 // groups, -1)
    close(rows @ rows.mT, torch.eye(10 // groups, dtype=torch.float64).expand(groups, -1, -1))
    assert layer.trains_basis is (basis == "learned")


def test_the_cosine_basis_is_complete_and_starts_with_the_mean(close):
    whole = bases.dct(12, (2, 2, 3), torch.float64)
    close(whole @ whole.mT, torch.eye(12, dtype=torch.float64))
    close(whole[0], torch.full((12,), 12**-0.5, dtype=torch.float64))


def test_coefficients_keep_the_variance(close):
    layer = BasisConv2d(8, 4096, 3, 64, generator=torch.Generator().manual_seed(0))
    spread = layer.coefficients.std().item()
    assert math.isclose(spread, math.sqrt(2 / 64), rel_tol=0.01)
    assert not layer.bias.any()


def test_more_filters_than_taps_are_refused_or_unit_vectors():
    with pytest.raises(ValueError, match=r"needs Q/groups <= \(C/groups\)·R·S = 18 orthonormal filters, got 20"):
        BasisConv2d(2, 40, 3, 20)
    with pytest.raises(ValueError, match=r"use basis='learned'"):
        BasisConv2d(4, 40, 3, 40, groups=2, basis="dct")
    rows = BasisConv2d(2, 40, 3, 20, basis="learned").basis_weight.flatten(1)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(20))


def test_a_generator_decides_all_values_whatever_the_dtype():
    first, second = make("grouped", dtype=torch.float32), make("grouped", dtype=torch.bfloat16)
    for name, value in first.state_dict().items():
        assert torch.equal(value.bfloat16(), second.state_dict()[name]), name
    state = torch.get_rng_state()
    make("plain")
    assert torch.equal(state, torch.get_rng_state())


def test_reset_parameters_draws_anew():
    layer = make("plain", basis_norm=True)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.reset_parameters(torch.Generator().manual_seed(3))
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    layer.reset_parameters()
    assert not torch.equal(before["basis_weight"], layer.basis_weight)


def test_the_meta_device():
    layer = BasisConv2d(3, 8, 3, 4, device="meta", basis_norm=True)
    assert all(value.is_meta for value in layer.state_dict().values())
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer(torch.randn(1, 3, 5, 5)).isfinite().all()


# --- frozen and trained -----------------------------------------------------------------------------------------------


def test_a_frozen_basis_is_out_of_reach_of_the_optimiser(image):
    layer = make("plain", basis_norm=True)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    assert "basis_weight" not in dict(layer.named_parameters())
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, weight_decay=0.5)
    layer(image(layer)).square().mean().backward()
    optimizer.step()
    after = layer.state_dict()
    assert torch.equal(before["basis_weight"], after["basis_weight"])
    for name in ("coefficients", "bias", "basis_norm.weight"):
        assert not torch.equal(before[name], after[name]), name


def test_freezing_and_training_turn_one_into_the_other(image):
    layer = make("plain")
    keys, values = set(layer.state_dict()), layer.basis_weight.clone()
    assert layer.train_basis() is layer
    assert layer.trains_basis
    layer(image(layer)).sum().backward()
    assert layer.basis_weight.grad is not None
    assert layer.freeze_basis() is layer
    assert not layer.trains_basis
    assert isinstance(layer.basis_weight, torch.Tensor)
    assert set(layer.state_dict()) == keys == {"basis_weight", "coefficients", "bias"}
    assert torch.equal(layer.basis_weight, values)
    assert layer.freeze_basis().train_basis().train_basis().trains_basis


def test_state_moves_between_frozen_and_trained_layers():
    frozen, trained = make("plain"), make("plain", train_basis=True)
    trained.reset_parameters()
    for assign in (False, True):
        frozen.load_state_dict(trained.state_dict(), assign=assign)
        assert not frozen.trains_basis
        assert torch.equal(frozen.basis_weight, trained.basis_weight)
    frozen.load_state_dict(trained.state_dict(keep_vars=True), assign=True)
    assert not frozen.trains_basis
    trained.load_state_dict(make("plain").state_dict(), assign=True)
    assert trained.trains_basis


# --- errors and text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "settings", "error", "message"),
    [
        ((4, 8, 3, 0), {}, ValueError, "BasisConv2d: basis_channels must be at least 1, got 0"),
        ((4, 8, 3, 2.0), {}, TypeError, "BasisConv2d: basis_channels must be an int, got 2.0"),
        ((4, 8, 3, 3), {"groups": 2}, ValueError, "BasisConv2d: basis_channels must be divisible by groups = 2, got 3"),
        ((5, 8, 3, 4), {"groups": 2}, ValueError, "BasisConv2d: in_channels must be divisible by groups = 2, got 5"),
        ((4, 7, 3, 4), {"groups": 2}, ValueError, "or mix all groups with compact=False"),
        ((4, 8, 0, 4), {}, ValueError, "BasisConv2d: kernel_size must be at least 1, got 0"),
        ((4, 8, 3, 4), {"padding": "same", "stride": 2}, ValueError, "padding='same' needs stride 1"),
        ((4, 8, 3, 4), {"padding_mode": "mirror"}, ValueError, "padding_mode must be one of zeros, reflect"),
        ((4, 8, 3, 4), {"basis": "fourier"}, ValueError, "basis must be one of random_orthogonal, dct, learned"),
        ((4, 8, 3, 4), {"activation": "gelu"}, ValueError, "activation must be None, 'relu' or 'relu6'"),
    ],
)
def test_errors_name_the_argument_and_the_way_out(args, settings, error, message):
    with pytest.raises(error) as caught:
        BasisConv2d(*args, **settings)
    assert message in str(caught.value)


def test_the_layer_says_what_it_is():
    assert repr(make("plain")) == (
        "BasisConv2d(5, 7, kernel_size=(3, 3), basis_channels=4, stride=(1, 1), frozen basis)"
    )
    text = repr(make("grouped", basis_norm=True, bias=False, activation="relu", train_basis=True))
    for part in ("padding=(1, 1)", "groups=3, compact=True", "bias=False", "activation='relu'", "trained basis"):
        assert part in text
