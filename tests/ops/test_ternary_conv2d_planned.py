"""The short way of repeated calls of ``ternary_conv2d`` with packed planes: same bits, same refusals."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from basisconv_kernels import bitpack, ternary_conv2d, ternary_conv2d_pack, ternary_planes, testing, use_backend
from basisconv_kernels.core import registry
from basisconv_kernels.ops import ternary_conv2d_planned as planned
from tests.ops.planned_calls import counted, refused_in_the_same_words, same

pytestmark = [
    pytest.mark.skipif(registry.absent("cpu") is not None, reason=f"cpu: {registry.absent('cpu')}"),
    pytest.mark.usefixtures("cache"),
]

DRAWN = torch.Generator().manual_seed(0)
X = torch.randn(2, 6, 9, 11, generator=DRAWN)
PLANES = ternary_planes(torch.randint(-1, 2, (8, 6, 3, 3), generator=DRAWN))
HALVES = ternary_planes(torch.randint(-1, 2, (8, 3, 3, 3), generator=DRAWN))
SCALE = torch.rand(8, generator=DRAWN)


@pytest.fixture
def short(monkeypatch):
    """What went the short way."""
    return counted(monkeypatch, planned.plans)


def known(**changes):
    """A function of changes to a call that went the long way and the short way, with equal results."""
    given = {"input": X, "planes": PLANES, **changes}
    groups = given.get("groups", 1)
    packed = ternary_conv2d_pack(given["planes"], given["input"].shape[1] // groups, groups=groups)
    call = functools.partial(ternary_conv2d, **given, packed=packed)
    first = call()
    same(first, call())
    same(first, call(packed=None))
    return call


CALLS = {
    "no scale": {"padding": 1},
    "scales": {"scale": SCALE, "negative_scale": -SCALE, "bias": SCALE, "activation": "relu6"},
    "one number": {"scale": torch.tensor(0.3), "negative_scale": torch.tensor([0.2])},
    "channels last": {"input": X.contiguous(memory_format=torch.channels_last), "stride": (2, 1)},
    "half": {"input": X.half(), "scale": SCALE.half(), "dilation": 2},
    "bfloat16": {"input": X.bfloat16(), "bias": SCALE.bfloat16(), "padding": (0, 1, 2, 0)},
    "groups": {"planes": HALVES, "groups": 2, "padding": "same"},
    "empty": {"input": X[:0]},
}


@pytest.mark.parametrize("name", CALLS)
def test_the_short_way_gives_what_the_long_one_gives(name, short):
    call = known(**CALLS[name])
    results = [call() for _ in range(2)]
    assert (short.calls, short.refused) == (3, 0)
    assert results[0].data_ptr() != results[1].data_ptr() or not results[0].numel()


def test_bits_and_lists_go_the_long_way(short):
    for changes in ({"input": bitpack(X)}, {"stride": [1, 1]}):
        packed = ternary_conv2d_pack(PLANES, 6)
        for _ in range(3):
            ternary_conv2d(**{"input": X, "planes": PLANES, **changes}, packed=packed)
    assert (short.calls, short.refused) == (0, 0)


BAD = {
    "input rank": ({}, {"input": X[0]}, ValueError),
    "an integer input": ({}, {"input": X.int()}, TypeError),
    "input channels": ({}, {"input": X[:, :5]}, RuntimeError),
    "more words": ({}, {"input": torch.zeros(1, 33, 9, 9)}, ValueError),
    "input elsewhere": ({}, {"input": X.to("meta")}, ValueError),
    "float planes": ({}, {"planes": PLANES.float()}, TypeError),
    "one plane": ({}, {"planes": PLANES[:, :1]}, ValueError),
    "fewer outputs": ({}, {"planes": PLANES[:7]}, RuntimeError),
    "scale size": ({"scale": SCALE}, {"scale": SCALE[1:]}, ValueError),
    "scale kind": ({"scale": SCALE}, {"scale": SCALE.half()}, TypeError),
    "scale rank": ({"scale": SCALE}, {"scale": SCALE[:1, None]}, ValueError),
    "scale no tensor": ({"scale": SCALE}, {"scale": 0.5}, TypeError),
    "a second scale alone": ({}, {"negative_scale": SCALE}, ValueError),
    "bias of one number": ({"bias": SCALE}, {"bias": SCALE[:1]}, ValueError),
    "bias without dimensions": ({"bias": SCALE}, {"bias": SCALE[0]}, ValueError),
    "bias elsewhere": ({"bias": SCALE}, {"bias": SCALE.to("meta")}, ValueError),
    "groups": ({"groups": 1}, {"groups": True}, TypeError),
    "stride": ({"stride": 1}, {"stride": 1.0}, TypeError),
    "activation": ({}, {"activation": "gelu"}, ValueError),
    "too small": ({}, {"input": X[:, :, :2]}, ValueError),
    "backend": ({}, {"backend": "tpu"}, RuntimeError),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_at_first_is_refused_in_the_same_words_later(name, short):
    good, changes, error = BAD[name]
    refused_in_the_same_words(planned.plans, known(**good), changes, error)


def test_packed_bytes_that_became_those_of_other_planes_are_refused(short):
    call = known()
    call.keywords["packed"][64:128].fill_(255)
    with pytest.raises(RuntimeError, match="packed was made for other planes, or is damaged"):
        call()


def test_wishes_gradients_autocast_and_modes_are_not_passed_by(short):
    call = known(scale=SCALE)
    before = short.calls
    with use_backend("reference"):
        same(call(), call(backend="reference"))
    for name, tensor in (("input", X), ("scale", SCALE)):
        leaf = tensor.clone().requires_grad_()
        assert torch.autograd.grad(call(**{name: leaf}).sum(), leaf)[0].shape == leaf.shape
    with torch.autocast("cpu", torch.bfloat16):
        assert call().dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == 2 * 2 * 7 * 9 * 8 * 6 * 9
    with testing.poisoned_allocations():
        call()
    assert short.calls == before
    call()
    assert short.calls == before + 1


def test_no_plan_makes_the_planned_op_read_or_write_beyond_its_tensors():
    """Numbers of a plan replaced one by one: refused, or the result of some other valid geometry."""
    plan = torch.ops.basisconv.ternary_conv2d_plan.default(
        X, PLANES, SCALE, None, None, [1, 1], [0, 0, 0, 0], [1, 1], 1, "relu"
    )
    native = torch.ops.basisconv.ternary_conv2d_planned.default
    packed = ternary_conv2d_pack(PLANES, 6)
    expected = ternary_conv2d(X, PLANES, SCALE, activation="relu", backend="cpu")
    words = plan.view(torch.int64)
    for i in range(words.numel()):
        for value in (-(2**40), -1, 0, 1, 2, 3, 4, 2**40):
            changed = words.clone()
            changed[i] = value
            try:
                found = native(X, PLANES, SCALE, None, None, packed, changed.view(torch.uint8))
            except RuntimeError:
                continue
            assert found.shape[:2] == expected.shape[:2]
    assert torch.equal(native(X, PLANES, SCALE, None, None, packed, plan), expected)
    for wrong in (X.half(), X.contiguous(memory_format=torch.channels_last), X[0], X[:, :5]):
        with pytest.raises(RuntimeError, match="ternary_conv2d_planned"):
            native(wrong, PLANES, SCALE, None, None, packed, plan)
    for wrong in (packed[:-2], torch.zeros_like(packed), packed.float()):
        with pytest.raises(RuntimeError, match="packed"):
            native(X, PLANES, SCALE, None, None, wrong, plan)
    with pytest.raises(RuntimeError, match="plan must be what ternary_conv2d_plan gives"):
        native(X, PLANES, SCALE, None, None, packed, plan[:-8])
