"""``TuckerConv2d``: conversions that lose nothing, packed weights that are renewed, folding, state and errors."""

from __future__ import annotations

import copy
import doctest
import io

import pytest
import torch
from torch import nn

from basisconv_kernels import testing
from basisconv_kernels.layers import tucker_conv2d as module
from basisconv_kernels.layers.basis_conv2d import BasisConv2d
from basisconv_kernels.layers.tucker_conv2d import TuckerConv2d
from basisconv_kernels.testing import tolerances

CONVOLUTIONS = {
    "plain": {"args": (5, 7, 3)},
    "no_bias": {"args": (5, 7, 3), "padding": 1, "bias": False},
    "strided": {"args": (6, 10, (3, 5)), "stride": (2, 3), "padding": (2, 1)},
    "dilated": {"args": (4, 9, 3), "dilation": (2, 3), "padding": (1, 4)},
    "even_kernel": {"args": (3, 8, (2, 4)), "padding": (1, 0)},
    "pointwise": {"args": (10, 6, 1), "stride": 2},
    "more_filters_than_taps": {"args": (3, 40, 3), "padding": 1},
    "same": {"args": (4, 6, (2, 5)), "padding": "same"},
    "reflect": {"args": (4, 6, 3), "padding": 1, "padding_mode": "reflect"},
    "circular_strided": {"args": (4, 6, 3), "padding": 2, "padding_mode": "circular", "stride": 2},
}
every = pytest.mark.parametrize("name", CONVOLUTIONS)


def make(name, dtype=torch.float64):
    settings = dict(CONVOLUTIONS[name])
    torch.manual_seed(0)
    return nn.Conv2d(*settings.pop("args"), **settings, dtype=dtype)


def image(layer, n=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, layer.in_channels, 9, 11, generator=generator, dtype=torch.float64).to(dtype)


def close(a, b):
    torch.testing.assert_close(a, b, **tolerances.FORMULA)


@every
def test_full_ranks_are_the_convolution(name):
    conv = make(name)
    layer = TuckerConv2d.from_conv(conv)
    x = image(conv)
    close(layer(x), conv(x))
    close(layer(x[0]), conv(x[0]))
    close(layer.to_conv()(x), conv(x))
    close(layer.to_conv().weight, conv.weight)


@every
def test_every_form_of_a_truncated_layer_is_the_same(name):
    layer = TuckerConv2d.from_conv(make(name), ranks=(2, 3), activation="relu")
    x = image(layer)
    expected = layer(x)
    assert layer.rank_in <= 2
    for form in (layer.to_plain(), layer.to_plain(collapse=True), layer.to_basis(), copy.deepcopy(layer)):
        close(form(x), expected)
    plain = layer.to_plain()
    again = TuckerConv2d.from_chain(plain.reduce, plain.core, plain.expand, activation="relu")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), layer.parameters(), strict=True))
    with pytest.raises(ValueError, match="a Conv2d cannot hold activation='relu'"):
        layer.to_conv()


@pytest.mark.parametrize("mode", module.PADDING_MODES)
def test_asymmetric_padding_becomes_a_module(mode):
    layer = TuckerConv2d(4, 6, 3, rank_in=2, rank_out=3, padding=(0, 1, 2, 1), padding_mode=mode, dtype=torch.float64)
    x = image(layer)
    for form in (layer.to_plain(), layer.to_plain(collapse=True), layer.to_basis()):
        close(form(x), layer(x))
    with pytest.raises(ValueError, match=r"Conv2d has no asymmetric padding \(0, 1, 2, 1\)"):
        layer.to_conv()


def test_rules_for_the_ranks():
    conv = nn.Conv2d(16, 24, 3, dtype=torch.float64)
    with torch.no_grad():
        low = TuckerConv2d(16, 24, 3, rank_in=3, rank_out=5, dtype=torch.float64).to_conv().weight
        conv.weight.copy_(low + 0.02 * low.std() * torch.randn(low.shape, generator=torch.Generator().manual_seed(0)))
    by_evbmf = TuckerConv2d.from_conv(conv, evbmf=0.0)
    assert (by_evbmf.rank_in, by_evbmf.rank_out) == (3, 5)
    by_energy = TuckerConv2d.from_conv(conv, energy=0.99)
    lost = (by_energy.to_conv().weight - conv.weight).square().sum() / conv.weight.square().sum()
    assert lost <= 0.01
    assert TuckerConv2d.from_conv(conv, ranks=(99, 99)).core.shape == (24, 16, 3, 3)
    for wrong, message in (
        ({"ranks": (0, 3)}, "ranks must be at least 1"),
        ({"ranks": (2, 3), "energy": 0.5}, "give one of ranks, energy and evbmf"),
    ):
        with pytest.raises(ValueError, match=message):
            TuckerConv2d.from_conv(conv, **wrong)
    with pytest.raises(ValueError, match="groups = 2, which mix no channels"):
        TuckerConv2d.from_conv(nn.Conv2d(4, 6, 3, groups=2))
    with pytest.raises(TypeError, match="is a Linear, not a Conv2d"):
        TuckerConv2d.from_conv(nn.Linear(3, 4))


def test_conversion_keeps_dtype_flags_and_shares_nothing():
    conv = nn.Conv2d(6, 8, 3, dtype=torch.bfloat16).eval()
    conv.bias.requires_grad_(False)
    layer = TuckerConv2d.from_conv(conv, ranks=(3, 4))
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert not layer.training
    assert [name for name, p in layer.named_parameters() if not p.requires_grad] == ["bias"]
    for other in (layer.to_plain(), layer.to_basis()):
        assert not other.training
        mine = {p.data_ptr() for p in layer.parameters()}
        assert not mine & {p.data_ptr() for p in other.parameters()}
    assert layer.to_basis().trains_basis
    assert not TuckerConv2d.from_conv(conv.requires_grad_(False)).to_basis().trains_basis


def test_a_chain_of_other_libraries():
    first, core, last = nn.Conv2d(6, 3, 1, bias=False), nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.Conv2d(4, 9, 1)
    x = image(first, dtype=torch.float32)
    layer = TuckerConv2d.from_chain(first, core, last)
    testing.check_same_layer(layer(x), last(core(first(x))))
    without = nn.Conv2d(4, 9, 1, bias=False)
    testing.check_same_layer(TuckerConv2d.from_chain(first, core, without)(x), without(core(first(x))))
    for wrong, message in (
        ((nn.Conv2d(6, 3, 1), core, last), "first has a bias"),
        ((nn.Conv2d(6, 3, 3, bias=False), core, last), "first must be 1×1"),
        ((first, nn.Conv2d(5, 4, 3), last), "core must take the 3 channels"),
        ((first, core, nn.Conv2d(5, 9, 1)), "last must be 1×1 of 4 channels"),
        ((first, core, nn.Conv2d(4, 8, 1, groups=2)), "last must have one group"),
    ):
        with pytest.raises(ValueError, match=message):
            TuckerConv2d.from_chain(*wrong)


@pytest.mark.parametrize("bias", [True, False])
def test_a_following_norm_folds_exactly(bias):
    layer = TuckerConv2d(5, 8, 3, rank_in=3, rank_out=4, padding=1, bias=bias, dtype=torch.float64).eval()
    norm = nn.BatchNorm2d(8, dtype=torch.float64)
    norm(torch.randn(5, 8, 4, 4, dtype=torch.float64) * 3 + 1)
    norm.eval()
    x = image(layer)
    expected = norm(layer(x))
    close(layer.fold(norm)(x), expected)
    with pytest.raises(ValueError, match="must have out_channels = 8"):
        layer.fold(nn.BatchNorm2d(4))
    layer.activation = "relu"
    with pytest.raises(ValueError, match="relu stands before norm"):
        layer.fold(norm)


def test_residual_and_activation():
    layer = TuckerConv2d(5, 8, 3, rank_in=3, rank_out=4, padding=1, activation="relu6", dtype=torch.float64)
    x, skip = image(layer), 4 * torch.randn(2, 8, 9, 11, dtype=torch.float64)
    dense = layer.to_plain(collapse=True)[0]
    close(layer(x, skip), (dense(x) + skip).clamp(0, 6))
    close(layer(x[0], skip[0]), (dense(x[0]) + skip[0]).clamp(0, 6))


# --- packed weights ---------------------------------------------------------------------------------------------------

X = torch.randn(2, 6, 8, 9, generator=torch.Generator().manual_seed(0))
CHANGES = {
    "core in place": lambda layer: layer.core.mul_(-1.5),
    "u_out in place": lambda layer: layer.u_out[2:3].add_(1),
    "u_in in place": lambda layer: layer.u_in.mul_(2),
    "new core": lambda layer: setattr(layer, "core", nn.Parameter(torch.randn(5, 4, 3, 3))),
    "new data": lambda layer: setattr(layer.u_out, "data", torch.randn(9, 5)),
    "load": lambda layer: layer.load_state_dict({k: torch.rand_like(v) for k, v in layer.state_dict().items()}),
    "reset": lambda layer: layer.reset_parameters(),
    "there and back": lambda layer: layer.half().float(),
    "written past PyTorch, then repack": lambda layer: [layer.core.data.mul_(2), layer.repack()],
    "geometry": lambda layer: setattr(layer, "stride", (2, 1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed(change, monkeypatch):
    packs = []
    original = module.tucker_conv2d_pack
    monkeypatch.setattr(module, "tucker_conv2d_pack", lambda *a, **k: packs.append(1) or original(*a, **k))
    layer = TuckerConv2d(6, 9, 3, rank_in=4, rank_out=5, padding=1).eval()
    with torch.no_grad():
        before = layer(X)
        assert torch.equal(layer(X), before)
        assert len(packs) == 1
        CHANGES[change](layer)
        after = layer(X)
        testing.check_same_layer(after, layer.to_plain()(X))
        assert after.shape != before.shape or not torch.equal(after, before)
    layer(X).sum().backward()
    assert layer.core.grad is not None


def test_the_state_holds_the_weights_alone():
    layer = TuckerConv2d(6, 9, 3, rank_in=4, rank_out=5).eval()
    with torch.no_grad():
        expected = layer(X)
    assert list(layer.state_dict()) == ["u_in", "core", "u_out", "bias"]
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded._prepared._entry is None
    with torch.no_grad():
        assert torch.equal(loaded(X), expected)


def test_graphs_pack_inside(fresh_compiler):
    layer = TuckerConv2d(6, 9, 3, rank_in=4, rank_out=5, activation="relu").eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), layer(X))
        layer.core.mul_(2)
        torch.testing.assert_close(compiled(X), layer(X))
    exported = torch.export.export(layer.requires_grad_(False), (X,))
    assert set(exported.state_dict) | set(exported.constants) == set(layer.state_dict())


def test_initial_values_keep_the_signal():
    layer = TuckerConv2d(48, 64, 3, rank_in=24, rank_out=32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer.u_in.mT @ layer.u_in, torch.eye(24))
    x = torch.randn(4, 48, 10, 10, generator=torch.Generator().manual_seed(1))
    assert 1.5 < layer(x).detach().var() < 2.5
    again = TuckerConv2d(48, 64, 3, rank_in=24, rank_out=32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.core, layer.core)
    assert TuckerConv2d(3, 4, 3, rank_in=6, rank_out=9).u_in.shape == (3, 6)
    assert TuckerConv2d(3, 4, 3, rank_in=2, rank_out=2, device="meta").core.is_meta


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rank_in": 0}, ValueError, "rank_in must be at least 1, got 0"),
        ({"rank_out": 2.0}, TypeError, "rank_out must be an int, got 2.0"),
        ({"padding_mode": "mirror"}, ValueError, "padding_mode must be one of zeros, reflect"),
        ({"activation": "gelu"}, ValueError, "activation must be None, 'relu' or 'relu6'"),
        ({"stride": 0}, ValueError, "stride must be at least 1"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=f"TuckerConv2d: {message}"):
        TuckerConv2d(4, 6, 3, **{"rank_in": 2, "rank_out": 3, **arguments})


def test_the_representation_shows_what_was_given():
    layer = TuckerConv2d(4, 6, 3, rank_in=2, rank_out=3, padding=1, bias=False, activation="relu")
    assert str(layer) == (
        "TuckerConv2d(4, 6, kernel_size=(3, 3), rank_in=2, rank_out=3, stride=(1, 1), padding=(1, 1), bias=False, "
        "activation='relu')"
    )
    assert isinstance(layer.to_basis(), BasisConv2d)


def test_the_example_of_the_documentation_runs():
    assert doctest.testmod(module).failed == 0
