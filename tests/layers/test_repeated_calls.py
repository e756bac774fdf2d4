"""Repeated calls of stacked and ternary layers; those of ``BasisConv2d`` have a file of their own."""

import copy

import pytest
import torch
from torch import nn

from basisconv_kernels import StackedBinaryConv2d, TernaryConv2d, bitpack, use_backend
from basisconv_kernels.core import registry
from basisconv_kernels.layers.stacked_binary_conv2d import planned
from tests.ops.planned_calls import same

pytestmark = [
    pytest.mark.skipif(registry.absent("cpu") is not None, reason=f"cpu: {registry.absent('cpu')}"),
    pytest.mark.skipif(planned.plans.native is None, reason="calls have no short way here"),
    pytest.mark.usefixtures("cache", "no_gradients"),
]


def stacked(**settings):
    return StackedBinaryConv2d(8, 12, 3, bank=6, splits=2, padding=1, **generated(), **settings)


def ternary(**settings):
    return TernaryConv2d(8, 12, 3, padding=1, **generated(), **settings)


def generated():
    return {"generator": torch.Generator().manual_seed(1)}


KINDS = {
    "stacked": stacked,
    "stacked, frozen": lambda **settings: stacked(**settings).freeze(),
    "ternary": ternary,
    "ternary, two scales": lambda **settings: ternary(rule="ttq", **settings),
    "ternary, packed": lambda **settings: ternary(**settings).pack(),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def image(seed=0, size=(2, 8, 9, 7)):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def called(kind, **settings):
    """A layer that has been called twice, so that the next call can go the short way."""
    made = KINDS[kind](**settings).eval()
    made(image()), made(image())
    return made


def check(made, seed=0):
    """Two calls give what a layer gives that remembers nothing."""
    for _ in range(2):
        same(made(image(seed)), copy.deepcopy(made)(image(seed)))


@kinds
def test_repeated_calls_go_the_short_way_with_equal_bits(kind, short):
    made = called(kind, activation="relu", stride=2)
    short.clear()
    for seed in range(3):
        check(made, seed)
    assert len(short) == 6
    assert all(out is not None for out in short)


def doubled(made):
    """The layer with all its numbers doubled in place."""
    for tensor in (*made.parameters(), *made.buffers()):
        if tensor.is_floating_point():
            tensor.mul_(2)


def negated(made):
    for tensor in made.parameters():
        tensor.neg_()


CHANGES = {
    "numbers in place": doubled,
    "signs in place": negated,
    "scale replaced": lambda made: setattr(made, "scale", nn.Parameter(made.scale.abs() * 3 + 1)),
    "bias replaced": lambda made: setattr(made, "bias", nn.Parameter(made.bias + 1)),
    "no bias": lambda made: setattr(made, "bias", None),
    "data of the bias": lambda made: setattr(made.bias, "data", made.bias.data + 1),
    "stride": lambda made: setattr(made, "stride", (2, 1)),
    "padding": lambda made: setattr(made, "pad_amounts", (0, 0, 2, 2)),
    "padding mode": lambda made: setattr(made, "padding_mode", "circular"),
    "dilation": lambda made: setattr(made, "dilation", (2, 2)),
    "activation": lambda made: setattr(made, "activation", "relu"),
    "backend": lambda made: setattr(made, "backend", "reference"),
    "state": lambda made: made.load_state_dict(other_state(made)),
}


def other_state(made):
    """The state of a layer like ``made`` of other random values."""
    other = copy.deepcopy(made)
    for tensor in (*other.parameters(), *other.buffers()):
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5)).abs())
    return other.state_dict()


@kinds
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_counts_at_once(kind, change):
    made = called(kind, **({"rule": "ttq"} if kind == "ternary" and change == "scale replaced" else {}))
    if change == "scale replaced" and made.scale is None:
        pytest.skip("has no scale of its own")
    CHANGES[change](made)
    check(made)


@kinds
def test_gradients_are_recorded_where_a_source_wants_one(kind):
    made = called(kind)
    wanting = [p for p in made.parameters() if p.requires_grad]
    with torch.enable_grad():
        assert made(image()).requires_grad == bool(wanting)
        assert made(image().requires_grad_()).requires_grad
        for p in wanting[:1]:
            made.requires_grad_(False)
            p.requires_grad_(True)
            made(image())
            with torch.no_grad():
                made(image()), made(image())
            assert made(image()).requires_grad
    made.requires_grad_(False)
    check(made)


@kinds
def test_what_is_no_such_call_goes_the_long_way(kind):
    made = called(kind)
    with use_backend("reference"):
        same(made(image()), copy.deepcopy(made)(image()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert made(image()).dtype == copy.deepcopy(made)(image()).dtype
    same(made(image()[0]), copy.deepcopy(made)(image()[0]))
    with pytest.raises(ValueError) as after:
        made(image()[:, 1:])
    with pytest.raises(ValueError) as before:
        copy.deepcopy(made)(image()[:, 1:])
    assert str(after.value) == str(before.value)
    check(made)


def test_bits_after_numbers():
    made = called("stacked, frozen", binarize_input=True)
    bits = bitpack(image())
    for _ in range(2):
        same(made(bits), copy.deepcopy(made)(bits))
        check(made)
