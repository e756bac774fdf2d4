"""The short way of repeated calls of ``tucker_conv2d`` with packed weights: same bits, same refusals."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from basisconv_kernels import testing, tucker_conv2d, tucker_conv2d_pack, use_backend
from basisconv_kernels.core import registry
from basisconv_kernels.ops import tucker_conv2d_planned as planned
from tests.ops.planned_calls import counted, refused_in_the_same_words, same

pytestmark = [
    pytest.mark.skipif(registry.absent("cpu") is not None, reason=f"cpu: {registry.absent('cpu')}"),
    pytest.mark.usefixtures("cache"),
]

DRAWN = torch.Generator().manual_seed(0)
X = torch.randn(2, 10, 7, 8, generator=DRAWN)
U_IN = torch.randn(10, 4, generator=DRAWN)
CORE = torch.randn(5, 4, 3, 2, generator=DRAWN)
U_OUT = torch.randn(12, 5, generator=DRAWN)
BIAS = torch.randn(12, generator=DRAWN)
RESIDUAL = torch.randn(2, 12, 5, 7, generator=DRAWN)


@pytest.fixture
def short(monkeypatch):
    """What went the short way."""
    return counted(monkeypatch, planned.plans)


def known(dtype=torch.float32, **changes):
    """A function of changes to a call that went the long way and the short way, with equal results."""
    given = {"input": X, "u_in": U_IN, "core": CORE, "u_out": U_OUT, **changes}
    given = {name: value.to(dtype) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    how = {name: given[name] for name in ("stride", "dilation", "precise") if name in given}
    call = functools.partial(tucker_conv2d, **given, packed=tucker_conv2d_pack(given["core"], given["u_out"], **how))
    first = call()
    same(first, call())
    same(first, call(packed=None))
    return call


CALLS = {
    "plain": {},
    "epilogue": {"bias": BIAS, "residual": RESIDUAL, "activation": "relu"},
    "channels last": {"input": X.contiguous(memory_format=torch.channels_last), "stride": (2, 1), "padding": 1},
    "half": {"dtype": torch.half, "dilation": (1, 2)},
    "bfloat16": {"dtype": torch.bfloat16, "bias": BIAS, "padding": "same"},
    "precise": {"precise": True, "padding": (0, 1, 2, 0)},
    "empty": {"input": X[:0]},
}


@pytest.mark.parametrize("name", CALLS)
def test_the_short_way_gives_what_the_long_one_gives(name, short):
    call = known(**CALLS[name])
    results = [call() for _ in range(2)]
    assert (short.calls, short.refused) == (3, 0)
    assert results[0].data_ptr() != results[1].data_ptr() or not results[0].numel()


def test_wide_maps_between_the_stages_go_the_long_way(short):
    known(torch.bfloat16, precise=True)()
    assert (short.calls, short.refused) == (0, 0)


def test_both_layouts_have_a_plan_of_their_own(short):
    call = known()
    other = X.contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        same(call(input=other), call(input=other, packed=None))
        call()
    assert (short.calls, short.refused) == (4, 0)


BAD = {
    "no input": ({}, {"input": None}, TypeError),
    "input rank": ({}, {"input": X[0]}, ValueError),
    "an integer input": ({}, {"input": X.int()}, TypeError),
    "input channels": ({}, {"input": X[:, 1:]}, ValueError),
    "input sparse": ({}, {"input": X.to_sparse()}, TypeError),
    "input elsewhere": ({}, {"input": X.to("meta")}, ValueError),
    "u_in of three dimensions": ({}, {"u_in": U_IN[None]}, ValueError),
    "u_in of other ranks": ({}, {"u_in": U_IN[:, 1:]}, ValueError),
    "u_in of another dtype": ({}, {"u_in": U_IN.half()}, TypeError),
    "u_in elsewhere": ({}, {"u_in": U_IN.to("meta")}, ValueError),
    "core of other ranks": ({}, {"core": CORE[1:]}, ValueError),
    "other weights": ({}, {"core": CORE[1:], "u_out": U_OUT[:, 1:]}, RuntimeError),
    "u_out of another dtype": ({}, {"u_out": U_OUT.half()}, TypeError),
    "bias size": ({"bias": BIAS}, {"bias": BIAS[1:]}, ValueError),
    "bias elsewhere": ({"bias": BIAS}, {"bias": BIAS.to("meta")}, ValueError),
    "residual size": ({"residual": RESIDUAL}, {"residual": RESIDUAL[:1]}, ValueError),
    "stride": ({"stride": 1}, {"stride": True}, TypeError),
    "activation": ({}, {"activation": "gelu"}, ValueError),
    "too small": ({}, {"input": X[:, :, :2]}, ValueError),
    "backend": ({}, {"backend": "tpu"}, RuntimeError),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_at_first_is_refused_in_the_same_words_later(name, short):
    good, changes, error = BAD[name]
    refused_in_the_same_words(planned.plans, known(**good), changes, error)


def test_wishes_gradients_autocast_and_modes_are_not_passed_by(short):
    call = known()
    before = short.calls
    with use_backend("reference"):
        same(call(), call(backend="reference"))
    for name, tensor in (("input", X), ("u_in", U_IN)):
        leaf = tensor.clone().requires_grad_()
        assert torch.autograd.grad(call(**{name: leaf}).sum(), leaf)[0].shape == leaf.shape
    with torch.autocast("cpu", torch.bfloat16):
        assert call().dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == 2 * 2 * (7 * 8 * 10 * 4 + 5 * 7 * (5 * 4 * 6 + 12 * 5))
    with testing.poisoned_allocations():
        call()
    assert short.calls == before
    call()
    assert short.calls == before + 1
