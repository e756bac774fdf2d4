"""``BasisConv2d`` from ordinary convolutions and back: exact at full rank, truncated with the spectrum's error."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from basisconv_kernels import testing
from basisconv_kernels.layers.basis_conv2d import BasisConv2d
from basisconv_kernels.layers.decompose import decompose
from basisconv_kernels.layers.folding import expand_compact
from basisconv_kernels.testing import tolerances

OTHER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# --- from_conv --------------------------------------------------------------------------------------------------------


def test_full_rank_is_the_dense_convolution(conv, image, close):
    layer = BasisConv2d.from_conv(conv)
    x = image(conv)
    close(layer(x), conv(x))
    assert (layer.bias is None) == (conv.bias is None)
    assert layer.padding_mode == conv.padding_mode
    assert layer.groups == conv.groups
    assert layer.basis_channels <= min(conv.out_channels, conv.groups * conv.weight[0].numel())


def test_a_conversion_survives_the_way_back(conv, image, close):
    layer = BasisConv2d.from_conv(conv)
    x = image(conv)
    back = layer.to_conv()
    assert type(back) is nn.Conv2d
    for name in (
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
        "in_channels",
        "out_channels",
        "kernel_size",
    ):
        assert getattr(back, name) == getattr(conv, name), name
    close(back.weight, conv.weight)
    close(back(x), conv(x))
    for collapse in (False, True):
        plain = layer.to_plain(collapse=collapse)
        assert not any(isinstance(module, BasisConv2d) for module in plain.modules())
        close(plain(x), conv(x))


@pytest.mark.parametrize("correlated", [False, True], ids=["", "data_aware"])
def test_rows_are_unit_and_signs_canonical(conv, correlated, close):
    sigma = None
    if correlated:
        taps = conv.weight[0].numel()
        root = torch.randn(taps, taps, dtype=torch.float64)
        sigma = root @ root.T
    layer = BasisConv2d.from_conv(conv, input_correlation=sigma)
    rows = layer.basis_weight.flatten(1)
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
    per_group = rows.reshape(conv.groups, -1, rows.shape[1])
    gram = per_group @ per_group.mT
    close(gram.diagonal(dim1=1, dim2=2), torch.ones(gram.shape[:2], dtype=torch.float64))
    if not correlated:
        close(gram, torch.eye(gram.shape[1], dtype=torch.float64).expand_as(gram))


def test_the_error_is_the_tail_of_the_spectrum(conv):
    full = BasisConv2d.from_conv(conv)
    spectrum = decompose(conv.weight, conv.groups)
    weight = conv.weight.detach()
    for per_group in range(1, full.basis_channels // conv.groups + 1):
        layer = BasisConv2d.from_conv(conv, basis_channels=per_group * conv.groups)
        error = (layer.to_conv().weight - weight).square().sum()
        tail = spectrum.singular_values[:, per_group:].square().sum()
        torch.testing.assert_close(error, tail, **tolerances.FORMULA)
        kept = 1 - spectrum.kept_energy(per_group)
        share = error / weight.square().sum()
        torch.testing.assert_close(share, torch.tensor(kept, dtype=torch.float64), **tolerances.FORMULA)
        assert spectrum.relative_error(per_group) ** 2 == pytest.approx(
            max(kept, 0), rel=0, abs=tolerances.FORMULA["atol"]
        )


def test_groups_are_decomposed_one_by_one(convolution, image):
    """One decomposition over all filters would mix channels of different groups: an error of the size of the signal."""
    conv = convolution("grouped")
    with torch.no_grad():
        conv.weight[3:6] *= 100
    layer = BasisConv2d.from_conv(conv, basis_channels=6)
    assert layer.coefficients.shape == (9, 2)
    for group in range(3):
        alone = nn.Conv2d(2, 3, 3, dtype=torch.float64)
        alone.weight.data = conv.weight.detach()[3 * group : 3 * group + 3].clone()
        part = BasisConv2d.from_conv(alone, basis_channels=2)
        torch.testing.assert_close(layer.basis_weight[2 * group : 2 * group + 2], part.basis_weight)
        torch.testing.assert_close(layer.coefficients[3 * group : 3 * group + 3], part.coefficients)


def test_energy_picks_the_least_number_of_filters(convolution):
    conv = convolution("more_filters_than_taps")
    for energy in (0.0, 0.3, 0.63, 0.9, 0.999, 1.0):
        layer = BasisConv2d.from_conv(conv, energy=energy)
        squares = torch.linalg.svdvals(conv.weight.detach().flatten(1)).square()
        kept = squares[: layer.basis_channels].sum() / squares.sum()
        assert kept >= energy - 1e-12
        fewer = squares[: layer.basis_channels - 1].sum() / squares.sum()
        assert layer.basis_channels == 1 or fewer < energy


def test_the_data_aware_basis_loses_least_output_energy(image, close):
    torch.manual_seed(1)
    conv = nn.Conv2d(4, 12, 3, padding=1, dtype=torch.float64)
    mix = torch.randn(4, 4, dtype=torch.float64)
    x = F.avg_pool2d(torch.randn(8, 4, 14, 12, dtype=torch.float64), 3, 1, 1)
    x = torch.einsum("nchw,dc->ndhw", x, mix)
    patches = F.unfold(x, 3, padding=1).transpose(0, 1).flatten(1)
    sigma = patches @ patches.T / patches.shape[1]
    spectrum = decompose(conv.weight, 1, sigma)
    for Q in (2, 5, 9):
        aware = BasisConv2d.from_conv(conv, basis_channels=Q, input_correlation=sigma)
        blind = BasisConv2d.from_conv(conv, basis_channels=Q)
        lost = (aware(x) - conv(x)).square().sum(1).mean()
        close(lost, spectrum.singular_values[0, Q:].square().sum())
        assert lost < (blind(x) - conv(x)).square().sum(1).mean()
    grouped = nn.Conv2d(4, 6, 3, groups=2, dtype=torch.float64)
    per_group = torch.stack([sigma[:18, :18], sigma[18:, 18:]])
    layer = BasisConv2d.from_conv(grouped, input_correlation=per_group)
    close(layer(x), grouped(x))


@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
def test_dtype_device_and_flags_are_kept(dtype, convolution, image):
    conv = convolution("padded", dtype).eval()
    conv.weight.requires_grad_(False)
    layer = BasisConv2d.from_conv(conv, train_basis=True)
    assert {value.dtype for value in layer.state_dict().values()} == {dtype}
    assert not layer.training
    assert layer.basis_weight.requires_grad
    assert not layer.coefficients.requires_grad
    assert layer.bias.requires_grad
    exact = copy.deepcopy(conv).double()(image(conv).double())
    testing.check_same_layer(layer(image(conv)), exact)


def test_the_activation_is_applied_last(convolution, image, close):
    conv = convolution("padded")
    layer = BasisConv2d.from_conv(conv, activation="relu")
    close(layer(image(conv)), F.relu(conv(image(conv))))
    with pytest.raises(ValueError, match=r"BasisConv2d.to_conv: a Conv2d cannot hold activation='relu'"):
        layer.to_conv()
    for collapse in (False, True):
        close(layer.to_plain(collapse=collapse)(image(conv)), F.relu(conv(image(conv))))


def test_the_source_and_the_random_numbers_are_left_alone(convolution):
    conv = convolution("grouped")
    before = copy.deepcopy(conv.state_dict())
    state = torch.get_rng_state()
    layer = BasisConv2d.from_conv(conv, basis_channels=3)
    with torch.no_grad():
        layer.bias.zero_()
    layer.to_conv(), layer.to_plain()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in conv.state_dict().items())


# --- edge cases -------------------------------------------------------------------------------------------------------


def test_an_all_zero_convolution_gives_its_bias(convolution, image):
    for name in ("padded", "grouped"):
        conv = convolution(name)
        nn.init.zeros_(conv.weight)
        for settings in ({}, {"energy": 1.0}, {"energy": 0.0}):
            layer = BasisConv2d.from_conv(conv, **settings)
            assert layer.basis_channels == conv.groups
            assert not layer.coefficients.any()
            assert torch.equal(layer(image(conv)), conv(image(conv)))


def test_a_zero_group_gets_zero_columns(convolution, image, close):
    conv = convolution("grouped")
    with torch.no_grad():
        conv.weight[3:6] = 0
        conv.weight[6:9] = conv.weight[6:7]
    layer = BasisConv2d.from_conv(conv)
    assert layer.basis_channels == 9
    assert not layer.coefficients[3:6].any()
    assert not layer.coefficients[6:9, 1:].any()
    close(layer(image(conv)), conv(image(conv)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_numerical_rank_caps_the_basis(dtype):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 20, 3, dtype=dtype)
    with torch.no_grad():
        conv.weight.copy_((torch.randn(20, 4, dtype=dtype) @ torch.randn(4, 54, dtype=dtype)).reshape(20, 6, 3, 3))
    assert BasisConv2d.from_conv(conv).basis_channels == 4
    assert BasisConv2d.from_conv(conv, energy=1.0).basis_channels == 4


def test_a_wish_above_the_rank_is_lowered_with_a_warning(convolution):
    conv = convolution("more_filters_than_taps")
    with pytest.warns(
        UserWarning, match=r"basis_channels = 39 exceeds the rank of the filters; lowered to 27"
    ) as caught:
        assert BasisConv2d.from_conv(conv, basis_channels=39).basis_channels == 27
    assert caught[0].filename == __file__


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(bad, convolution):
    conv = convolution("padded")
    with torch.no_grad():
        conv.weight[2, 1, 0, 0] = bad
    with pytest.raises(ValueError, match=r"BasisConv2d.from_conv: weight holds NaN or infinite values"):
        BasisConv2d.from_conv(conv)


def test_errors_of_from_conv(convolution):
    conv = convolution("grouped")

    class Odd(nn.Conv2d):
        pass

    with pytest.raises(TypeError, match=r"conv is a Odd, a subclass of Conv2d whose forward may differ"):
        BasisConv2d.from_conv(Odd(3, 4, 3))
    with pytest.raises(TypeError, match=r"conv is a transposed convolution"):
        BasisConv2d.from_conv(nn.ConvTranspose2d(3, 4, 3))
    with pytest.raises(TypeError, match=r"conv is a Linear, not a Conv2d"):
        BasisConv2d.from_conv(nn.Linear(3, 4))
    with pytest.raises(TypeError, match=r"has no values \(meta device\)"):
        BasisConv2d.from_conv(nn.Conv2d(3, 4, 3, device="meta"))
    with pytest.raises(ValueError, match=r"give basis_channels or energy, not both"):
        BasisConv2d.from_conv(conv, basis_channels=3, energy=0.5)
    with pytest.raises(ValueError, match=r"BasisConv2d.from_conv: energy must lie in 0\.\.1, got 2\.0"):
        BasisConv2d.from_conv(conv, energy=2.0)
    for wish in (0, -3, 4):
        with pytest.raises(ValueError, match=rf"at least 1 and divisible by groups = 3, got {wish}"):
            BasisConv2d.from_conv(conv, basis_channels=wish)
    with pytest.raises(ValueError, match=r"energy must lie in 0..1, got 1.5"):
        BasisConv2d.from_conv(conv, energy=1.5)
    with pytest.raises(ValueError, match=r"input_correlation must be \[D, D\] or \[groups, D, D\] with D = .* = 18"):
        BasisConv2d.from_conv(conv, input_correlation=torch.eye(17))
    with pytest.raises(ValueError, match=r"symmetric and positive semi-definite"):
        BasisConv2d.from_conv(conv, input_correlation=-torch.eye(18))


def test_parametrised_weights_are_applied_first(convolution, image, close):
    for wrap in (parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.spectral_norm, prune_half):
        conv = convolution("padded")
        wrap(conv)
        x = image(conv)
        conv(x)
        before = {name: value.clone() for name, value in conv.state_dict().items()}
        layer = BasisConv2d.from_conv(conv)
        assert layer.training
        assert all(torch.equal(value, before[name]) for name, value in conv.state_dict().items())
        close(layer.eval()(x), conv.eval()(x))


def prune_half(conv: nn.Conv2d) -> None:
    prune.l1_unstructured(conv, "weight", 0.5)
    prune.random_unstructured(conv, "bias", 0.5)


# --- from_pair --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("basis_bias", "bias"), [(False, True), (True, True), (True, False), (False, False)])
@pytest.mark.parametrize(("groups", "mixing_groups"), [(1, 1), (2, 2), (2, 1), (4, 2), (1, 2)])
def test_a_pair_of_convolutions_becomes_one_layer(basis_bias, bias, groups, mixing_groups, image, close):
    torch.manual_seed(2)
    first = nn.Conv2d(8, 12, 3, 2, 1, groups=groups, bias=basis_bias, padding_mode="reflect", dtype=torch.float64)
    second = nn.Conv2d(12, 16, 1, groups=mixing_groups, bias=bias, dtype=torch.float64)
    layer = BasisConv2d.from_pair(first, second)
    assert layer.trains_basis
    close(layer(image(first)), second(first(image(first))))
    norm = nn.BatchNorm2d(12, dtype=torch.float64)
    norm(first(image(first)))
    layer = BasisConv2d.from_pair(first.requires_grad_(False), second, basis_norm=norm, activation="relu6")
    assert not layer.trains_basis
    close(layer(image(first)), F.relu6(second(norm(first(image(first))))))
    close(layer.eval()(image(first)), F.relu6(second(norm.eval()(first(image(first))))))


def test_a_pair_that_is_none_is_refused():
    first = nn.Conv2d(4, 6, 3)
    for second, message in (
        (nn.Conv2d(6, 8, 3), "recombination_conv must be 1×1 with stride 1"),
        (nn.Conv2d(6, 8, 1, stride=2), "recombination_conv must be 1×1 with stride 1"),
        (nn.Conv2d(6, 8, 1, padding=1), "recombination_conv must have no padding"),
        (nn.Conv2d(5, 8, 1), "must take the 6 channels that basis_conv gives, it takes 5"),
    ):
        with pytest.raises(ValueError, match=message):
            BasisConv2d.from_pair(first, second)
    with pytest.raises(ValueError, match="basis_norm must be a BatchNorm2d over the 6 basis maps"):
        BasisConv2d.from_pair(first, nn.Conv2d(6, 8, 1), basis_norm=nn.BatchNorm2d(5))
    with pytest.raises(TypeError, match="recombination_conv is a Linear"):
        BasisConv2d.from_pair(first, nn.Linear(6, 8))


# --- to ordinary modules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_asymmetric_padding_becomes_a_module(mode, image, close):
    layer = BasisConv2d(4, 6, 3, 5, padding=(0, 1, 2, 1), padding_mode=mode, dtype=torch.float64, basis_norm=True)
    layer(image(layer))
    with pytest.raises(ValueError, match=r"Conv2d has no asymmetric padding \(0, 1, 2, 1\); use to_plain"):
        layer.to_conv()
    close(layer.to_plain()(image(layer)), layer(image(layer)))
    layer.eval()
    for collapse in (False, True):
        close(layer.to_plain(collapse=collapse)(image(layer)), layer(image(layer)))


def test_plain_modules_keep_flags_names_and_nothing_shared(image):
    layer = BasisConv2d(4, 6, 3, 5, basis_norm=True, activation="relu6").train()
    layer.basis_norm.eval()
    plain = layer.to_plain()
    assert [name for name, _ in plain.named_children()] == ["basis", "basis_norm", "recombination", "activation"]
    assert plain.training
    assert not plain.basis_norm.training
    assert not layer.basis_norm.training
    assert not plain.basis.weight.requires_grad
    assert plain.recombination.weight.requires_grad
    mine = {tensor.data_ptr() for tensor in layer.state_dict().values()}
    assert not mine & {tensor.data_ptr() for tensor in plain.state_dict().values()}


def test_mixing_over_groups_collapses_to_one_group(image, close):
    layer = BasisConv2d(6, 10, 3, 9, groups=3, compact=False, dtype=torch.float64)
    conv = layer.to_conv()
    assert conv.groups == 1
    assert conv.weight.shape == (10, 6, 3, 3)
    close(conv(image(layer)), layer(image(layer)))


def test_expanding_compact_coefficients():
    expanded = expand_compact(torch.arange(1.0, 9.0).reshape(4, 2), 2)
    assert expanded.tolist() == [[1, 2, 0, 0], [3, 4, 0, 0], [0, 0, 5, 6], [0, 0, 7, 8]]


# --- copies and files -------------------------------------------------------------------------------------------------


def test_copies_and_files_hold_the_state_alone(convolution, image, close):
    layer = BasisConv2d.from_conv(convolution("grouped"), basis_channels=6).calibrate_basis_norm([])
    layer.eval()
    x = image(layer)
    with torch.no_grad():
        expected = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(layer), loaded):
        assert other.state_dict().keys() == layer.state_dict().keys()
        with torch.no_grad():
            assert torch.equal(other(x), expected)
            other.coefficients.zero_()
            assert torch.equal(layer(x), expected)
    assert set(layer.state_dict()) == {"basis_weight", "coefficients", "bias"} | {
        f"basis_norm.{name}" for name in layer.basis_norm.state_dict()
    }
