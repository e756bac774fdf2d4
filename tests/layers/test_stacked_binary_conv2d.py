"""``StackedBinaryConv2d``: latents and bits, the alternating fit, usage, conversion both ways, training."""

from __future__ import annotations

import copy
import doctest
import importlib
import io

import pytest
import torch
from torch import nn

from basisconv_kernels import StackedBinaryConv2d, stacked_binary_conv2d, testing
from basisconv_kernels.layers import stacked_binary_conv2d_fit as fit
from basisconv_kernels.layers import straight_through
from basisconv_kernels.testing import tolerances

SHAPES = [(24, 12, 3, 3, 8, 2), (10, 6, 1, 1, 3, 3), (16, 8, 2, 3, 100, 2), (9, 5, 3, 3, 1, 5), (12, 4, 3, 3, 12, 1)]


def made(**changes):
    settings = {"bank": 8, "splits": 2, "padding": 1, "generator": torch.Generator().manual_seed(0), **changes}
    return StackedBinaryConv2d(12, 24, 3, **settings)


# --- the fit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_no_round_of_the_fit_raises_the_error(shape, seed):
    """S12, also where scales are negative: the error that is reported is that of what is returned."""
    K, C, R, S, bank, splits = shape
    weight = torch.randn(K, C, R, S, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = fit.fit_stacked(weight, bank, splits, seed=seed)
    errors = torch.tensor(found.errors, dtype=torch.float64)
    assert (errors.diff() <= tolerances.FORMULA["atol"] * errors[0]).all()
    stacked = torch.cat([found.bank[found.index[:, i]] for i in range(splits)], 1) * found.scale[:, None, None, None]
    torch.testing.assert_close((weight - stacked).square().sum(), errors[-1], **tolerances.FORMULA)
    assert found.errors[-1] < weight.square().sum()
    assert torch.equal(found.affinity.argmax(2), found.index)


def test_as_many_filters_as_parts_give_the_signs_and_the_least_squares_scale():
    weight = torch.randn(12, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = fit.fit_stacked(weight, 12, 1)
    torch.testing.assert_close(found.scale, weight.abs().mean((1, 2, 3)), **tolerances.FORMULA)
    assert torch.equal(found.bank[found.index[:, 0]], torch.where(weight >= 0, 1.0, -1.0).double())


def test_a_planted_bank_is_found_again():
    """Weights that are exactly stacked from few filters: the fit leaves no error."""
    generator = torch.Generator().manual_seed(0)
    bank = torch.where(torch.randn(4, 8, 3, 3, generator=generator) >= 0, 1.0, -1.0).double()
    index = torch.randint(4, (64, 2), generator=generator)
    scale = torch.rand(64, generator=generator, dtype=torch.float64) + 0.5
    weight = torch.cat([bank[index[:, i]] for i in range(2)], 1) * scale[:, None, None, None]
    assert min(fit.fit_stacked(weight, 4, 2, seed=seed).relative_error(weight) for seed in range(4)) < 1e-6


def test_zero_weights_fit_with_zero_scales():
    found = fit.fit_stacked(torch.zeros(4, 6, 3, 3), 3, 2)
    assert found.scale.eq(0).all()
    assert found.relative_error(torch.zeros(4, 6, 3, 3)) == 0


# --- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_and_back(shape):
    K, C, R, S, bank, splits = shape
    generator = torch.Generator().manual_seed(0)
    values = torch.where(torch.randn(bank, C // splits, R, S, generator=generator) >= 0, 1.0, -1.0)
    index = torch.randint(bank, (K, splits), generator=generator)
    packed_bank, packed_index = fit.pack_bank(values), fit.pack_index(index, bank)
    assert torch.equal(fit.unpack_bank(packed_bank, tuple(values.shape), torch.float32), values)
    assert torch.equal(fit.unpack_index(packed_index, (K, splits), bank), index)
    assert len(packed_bank) + len(packed_index) == fit.stored_bytes(*values.shape, K, splits)


def test_the_promised_size():
    """C = K = 256, 3×3, splits 4, bank 128: at least 230 times smaller than float32."""
    layer = StackedBinaryConv2d(256, 256, 3, bank=128, splits=4, bias=False, scale=False).freeze()
    held = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    assert held == layer.payload_bytes == 10112
    assert 4 * 256 * 256 * 9 / held >= 230


@pytest.mark.parametrize("changes", [{}, {"groups": 3}, {"bias": False, "scale": False}, {"binarize_input": True},
                                     {"activation": "relu"}, {"padding_mode": "reflect"}, {"padding": (0, 1, 2, 0)},
                                     {"bank": 40}, {"splits": 1, "bank": 24}], ids=str)  # fmt: skip
def test_freezing_keeps_every_bit_of_the_result(changes):
    layer = made(**changes)
    x = torch.randn(2, 12, 7, 9, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = layer(x)
        trained = copy.deepcopy(layer)
        frozen = layer.freeze()
        assert frozen is layer
        assert frozen.frozen
        assert torch.equal(frozen(x), expected)
        assert torch.equal(frozen(x[0]), frozen(x[:1])[0])
    assert torch.equal(trained(x), expected)  # the call that has gradients
    assert not any("latent" in name for name in layer.state_dict())
    again = made(**changes)
    again.load_state_dict(torch.load(_saved(layer.state_dict()), weights_only=True))
    assert torch.equal(again(x), expected)


def _saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def test_a_state_with_an_index_out_of_range_is_refused():
    layer = made(bank=5).freeze()
    state = layer.state_dict()
    state["index_bits"] = torch.full_like(state["index_bits"], 255)
    with pytest.raises(RuntimeError, match="names filter 7 of a bank of 5"):
        made(bank=5).load_state_dict(state)


def test_packed_filters_follow_edits_of_the_latents():
    layer, x = made(), torch.randn(1, 12, 5, 6)
    with torch.no_grad():
        before = layer(x)
        layer.bank_latent.neg_()
        layer.bias.zero_()
        assert torch.equal(layer(x), -before)


# --- training ---------------------------------------------------------------------------------------------------------


def test_latents_get_the_gradients_of_the_op():
    layer = made(dtype=torch.float64)
    with torch.no_grad():
        layer.bank_latent.mul_(2)  # some beyond the clip
    x = torch.randn(2, 12, 7, 9, dtype=torch.float64)
    weights = torch.randn(2, 24, 7, 9, dtype=torch.float64)
    (layer(x) * weights).sum().backward()
    bank = straight_through.sign(layer.bank_latent.detach(), "clip").requires_grad_()
    selection = straight_through.one_hot(layer.select_latent.detach()).requires_grad_()
    out = stacked_binary_conv2d(x, bank, selection, layer.scale, layer.bias, padding=1)
    d_bank, d_selection = torch.autograd.grad((out * weights).sum(), [bank, selection])
    inside = layer.bank_latent.abs() <= 1
    assert 0 < inside.sum() < inside.numel()
    assert torch.equal(layer.bank_latent.grad, d_bank * inside)
    assert torch.equal(layer.select_latent.grad, d_selection)


def test_training_lowers_the_loss_and_moves_bank_and_selections():
    torch.manual_seed(0)
    target = nn.Conv2d(12, 24, 3, padding=1)
    layer = made()
    before = layer.filters()
    x = torch.randn(16, 12, 8, 8)
    with torch.no_grad():
        expected = target(x)
        first = (layer(x) - expected).square().mean()
    optimiser = torch.optim.Adam(layer.parameters(), 0.01)
    for _ in range(60):
        optimiser.zero_grad()
        (layer(x) - expected).square().mean().backward()
        optimiser.step()
    with torch.no_grad():
        last = (layer(x) - expected).square().mean()
    after = layer.filters()
    assert last < first
    assert not torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


def test_a_step_gives_the_same_bits_twice():
    def step():
        layer = made()
        layer(torch.randn(4, 12, 9, 9, generator=torch.Generator().manual_seed(3))).square().sum().backward()
        return [p.grad for p in layer.parameters()]

    assert all(torch.equal(one, other) for one, other in zip(step(), step(), strict=True))


# --- conversion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"padding": 1},
        {"stride": 2, "groups": 2},
        {"padding": 2, "dilation": 2, "bias": False},
        {"padding": 1, "padding_mode": "circular"},
    ],
    ids=str,
)
def test_from_a_convolution_and_back(settings):
    torch.manual_seed(0)
    conv = nn.Conv2d(12, 24, 3, **settings)
    layer = StackedBinaryConv2d.from_conv(conv, bank=10, splits=3)
    found = fit.fit_stacked(conv.weight.detach(), 10, 3)
    assert torch.equal(layer.filters()[0], found.bank)
    assert torch.equal(layer.filters()[1], found.index)
    x = torch.randn(2, 12, 8, 9)
    with torch.no_grad():
        testing.check_same_layer(layer.to_conv()(x), layer(x))
        testing.check_same_layer(layer.freeze().to_plain()(x), layer(x))
    assert layer.to_conv().weight.requires_grad


def test_what_no_convolution_can_be_is_refused():
    with pytest.raises(ValueError, match="signs of its input"):
        made(binarize_input=True).to_plain()
    with pytest.raises(ValueError, match="asymmetric padding"):
        made(padding=(0, 1, 0, 0)).to_conv()
    with pytest.raises(ValueError, match="is a transposed convolution"):
        StackedBinaryConv2d.from_conv(nn.ConvTranspose2d(4, 4, 3), bank=2, splits=2)
    conv = nn.Conv2d(4, 4, 3)
    nn.init.constant_(conv.weight, torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        StackedBinaryConv2d.from_conv(conv, bank=2, splits=2)


def test_usage_counts_selections():
    layer = made(bank=3)
    with torch.no_grad():
        layer.select_latent.zero_()  # ties: the lowest
        layer.select_latent[0, 0, 2] = 1
    usage = layer.usage()
    assert usage.counts == (47, 0, 1)
    assert usage.unused == (1,)
    assert str(usage) == "2 of 3 bank filters used, the most common 47 times of 48"


BAD = {
    "in_channels must be divisible": {"splits": 5},
    "bank must be at least 1": {"bank": 0},
    "out_channels must be divisible": {"groups": 6, "splits": 1, "out_channels": 20},
    "estimator must be": {"estimator": "step"},
    "padding_mode must be": {"padding_mode": "mirror"},
    "activation must be": {"activation": "gelu"},
}


@pytest.mark.parametrize("words", BAD)
def test_bad_arguments_are_refused_by_name(words):
    changes = {"bank": 4, "splits": 2, "out_channels": 24, **BAD[words]}
    with pytest.raises(ValueError, match=words):
        StackedBinaryConv2d(12, changes.pop("out_channels"), 3, **changes)


def test_a_frozen_layer_draws_nothing():
    with pytest.raises(RuntimeError, match="frozen"):
        made().freeze().reset_parameters()


def test_doctests():
    module = importlib.import_module("basisconv_kernels.layers.stacked_binary_conv2d")
    assert doctest.testmod(module).failed == 0
