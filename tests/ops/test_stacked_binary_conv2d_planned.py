"""The short way of repeated calls of ``stacked_binary_conv2d`` with packed weights: same bits, same refusals."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from basisconv_kernels import bitpack, stacked_binary_conv2d, stacked_binary_conv2d_pack, testing, use_backend
from basisconv_kernels.core import registry
from basisconv_kernels.ops import stacked_binary_conv2d_planned as planned
from tests.ops.planned_calls import counted, refused_in_the_same_words, same

pytestmark = [
    pytest.mark.skipif(registry.absent("cpu") is not None, reason=f"cpu: {registry.absent('cpu')}"),
    pytest.mark.usefixtures("cache"),
]

DRAWN = torch.Generator().manual_seed(0)
X = torch.randn(2, 14, 9, 11, generator=DRAWN)
BANK = torch.where(torch.randn(5, 7, 3, 3, generator=DRAWN) >= 0, 1.0, -1.0)
INDEX = torch.randint(5, (13, 2), generator=DRAWN)
SCALE = torch.rand(13, generator=DRAWN)


@pytest.fixture
def short(monkeypatch):
    """What went the short way."""
    return counted(monkeypatch, planned.plans)


def prepared(**changes):
    """A call with its packed weights."""
    given = {"input": X, "bank": BANK, "index": INDEX, **changes}
    how = {name: given[name] for name in ("groups", "binarize_input") if name in given}
    return functools.partial(
        stacked_binary_conv2d, **given, packed=stacked_binary_conv2d_pack(given["bank"], given["index"], **how)
    )


def known(**changes):
    """A function of changes to a call that went the long way and the short way, with equal results."""
    call = prepared(**changes)
    first = call()
    same(first, call())
    same(first, call(packed=None))
    return call


CALLS = {
    "real": {"scale": SCALE, "bias": -SCALE, "padding": 1},
    "channels last": {"input": X.contiguous(memory_format=torch.channels_last), "activation": "relu"},
    "half": {"input": X.half(), "scale": SCALE.double(), "stride": 2},
    "bfloat16": {"input": X.bfloat16(), "bank": BANK.to(torch.int8), "index": INDEX.int()},
    "packed bank": {"bank": bitpack(BANK), "padding": (0, 1, 2, 0), "dilation": (1, 2)},
    "bits": {"input": bitpack(X), "padding": "same"},
    "codes": {"input": bitpack(X, bits=3), "scale": SCALE},
    "signs": {"bank": BANK[:2], "index": INDEX % 2, "binarize_input": True},
    "groups": {"bank": BANK[:, :1], "index": INDEX[:7, :1], "groups": 7, "input": X[:, :7]},
    "empty": {"input": X[:0]},
}


@pytest.mark.parametrize("name", CALLS)
def test_the_short_way_gives_what_the_long_one_gives(name, short):
    call = known(**CALLS[name])
    results = [call() for _ in range(2)]
    assert (short.calls, short.refused) == (3, 0)
    assert results[0].data_ptr() != results[1].data_ptr() or not results[0].numel()


LONG = {
    "popcounts": {"binarize_input": True},
    "codes in half": {"input": bitpack(X, bits=2), "scale": SCALE.half()},
    "a list": {"stride": [1, 1]},
}


@pytest.mark.parametrize("name", LONG)
def test_what_has_no_short_way(name, short):
    call = known(**LONG[name])
    call()
    assert (short.calls, short.refused) == (0, 0)


BAD = {
    "input rank": ({}, {"input": X[0]}, ValueError),
    "an integer input": ({}, {"input": X.int()}, TypeError),
    "input channels": ({}, {"input": X[:, :13]}, ValueError),
    "input elsewhere": ({}, {"input": X.to("meta")}, ValueError),
    "words of other channels": ({"input": bitpack(X)}, {"input": bitpack(X[:, :13])}, ValueError),
    "a bank of another width": ({}, {"bank": torch.ones(5, 6, 3, 3)}, ValueError),
    "another bank": ({}, {"bank": BANK[:4], "index": INDEX % 4}, RuntimeError),
    "codes as a bank": ({"bank": bitpack(BANK)}, {"bank": bitpack(BANK, bits=2)}, ValueError),
    "fewer outputs": ({}, {"index": INDEX[:12]}, RuntimeError),
    "a float index": ({}, {"index": INDEX.float()}, TypeError),
    "scale size": ({"scale": SCALE}, {"scale": SCALE[1:]}, ValueError),
    "scale kind": ({"scale": SCALE}, {"scale": SCALE.int()}, TypeError),
    "bias rank": ({"bias": SCALE}, {"bias": SCALE[:, None]}, ValueError),
    "bias elsewhere": ({"bias": SCALE}, {"bias": SCALE.to("meta")}, ValueError),
    "groups": ({"groups": 1}, {"groups": True}, TypeError),
    "stride": ({"stride": 1}, {"stride": 1.0}, TypeError),
    "binarize": ({"binarize_input": False}, {"binarize_input": 0}, TypeError),
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
    leaf = X.clone().requires_grad_()
    assert torch.autograd.grad(call(input=leaf).sum(), leaf)[0].shape == X.shape
    with torch.autocast("cpu", torch.bfloat16):
        assert call().dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == 2 * 2 * 7 * 9 * (5 * 7 * 2 * 9 + 13 * 2)
    with testing.poisoned_allocations():
        call()
    assert short.calls == before
    call()
    assert short.calls == before + 1


def test_no_plan_makes_the_planned_op_read_or_write_beyond_its_tensors():
    """Numbers of a plan replaced one by one: refused, or the result of some other valid geometry."""
    shapes = ([5, 7, 3, 3], [13, 2])
    plan = torch.ops.basisconv.stacked_binary_conv2d_plan.default(
        X, BANK, INDEX, SCALE, None, *shapes, [1, 1], [0, 0, 0, 0], [1, 1], 1, "real", "relu"
    )
    native = torch.ops.basisconv.stacked_binary_conv2d_planned.default
    packed = stacked_binary_conv2d_pack(BANK, INDEX)
    expected = stacked_binary_conv2d(X, BANK, INDEX, SCALE, activation="relu", backend="cpu")
    words = plan.view(torch.int64)
    for i in range(words.numel()):
        for value in (-(2**40), -1, 0, 1, 2, 3, 4, 2**40):
            changed = words.clone()
            changed[i] = value
            try:
                found = native(X, BANK, INDEX, SCALE, None, packed, changed.view(torch.uint8))
            except RuntimeError:
                continue
            assert found.shape[:2] == expected.shape[:2]
    assert torch.equal(native(X, BANK, INDEX, SCALE, None, packed, plan), expected)
    for wrong in (X.half(), X.contiguous(memory_format=torch.channels_last), X[0], bitpack(X).words):
        with pytest.raises(RuntimeError, match="stacked_binary_conv2d_planned"):
            native(wrong, BANK, INDEX, SCALE, None, packed, plan)
    for wrong in (packed[:-1], torch.zeros_like(packed), packed.float()):
        with pytest.raises(RuntimeError, match="packed"):
            native(X, BANK, INDEX, SCALE, None, wrong, plan)
    with pytest.raises(RuntimeError, match="plan must be what stacked_binary_conv2d_plan gives"):
        native(X, BANK, INDEX, SCALE, None, packed, plan[:-8])
