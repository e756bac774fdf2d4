"""The short way of repeated calls of ``binary_conv2d`` with packed weights: same bits, same refusals."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from basisconv_kernels import (
    PackedTensor,
    Threshold,
    binary_conv2d,
    binary_conv2d_pack,
    bitpack,
    testing,
    use_backend,
)
from basisconv_kernels.core import registry
from basisconv_kernels.ops import binary_conv2d_planned as planned
from tests.ops.planned_calls import counted, refused_in_the_same_words, same

pytestmark = [
    pytest.mark.skipif(registry.absent("cpu") is not None, reason=f"cpu: {registry.absent('cpu')}"),
    pytest.mark.usefixtures("cache"),
]

X = torch.randn(2, 6, 5, 7, generator=torch.Generator().manual_seed(0))
W = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(1))
SIGNS, CODES = bitpack(X), bitpack(X, bits=2)
T = Threshold(torch.tensor([0, 3, -5, 1], dtype=torch.int32), torch.tensor([False, True, False, True]))
ONES = torch.ones(4)


@pytest.fixture
def short(monkeypatch):
    """What went the short way."""
    return counted(monkeypatch, planned.plans)


def bits_of(result):
    return result.words if isinstance(result, PackedTensor) else result


def known(**given):
    """A function of changes to a call that went the long way and the short way, with equal results."""
    given = {"input": X, "weight": W, **given}
    given["packed"] = binary_conv2d_pack(given["weight"], groups=given.get("groups", 1))
    call = functools.partial(binary_conv2d, **given)
    first = call()
    same(first, call())
    same(first, binary_conv2d(**{**given, "packed": None}))
    return call


CALLS = {
    "real": {},
    "channels last": {"input": X.contiguous(memory_format=torch.channels_last), "scale": ONES, "bias": -ONES},
    "half": {"input": X.half(), "scale": ONES.half()},
    "bfloat16": {"input": X.bfloat16(), "weight": W.double(), "activation": "relu"},
    "sums": {"output": "int32", "stride": 2, "padding": (1, 0, 2, 1), "padding_value": -1},
    "bits": {"output": "packed", "threshold": T, "padding": "same", "padding_value": 1},
    "bits of bits": {"input": SIGNS, "weight": bitpack(W), "output": "packed", "dilation": (1, 2)},
    "codes": {"input": CODES, "scale": ONES, "pixel_scale": torch.rand(2, 1, 3, 5)},
    "codes in half": {"input": CODES, "scale": ONES.half()},
    "groups": {"weight": W[:, :3], "groups": 2, "estimator": ("identity", "clip")},
    "empty": {"input": X[:0]},
}


@pytest.mark.parametrize("name", CALLS)
def test_the_short_way_gives_what_the_long_one_gives(name, short):
    call = known(**CALLS[name])
    assert (short.calls, short.refused) == (1, 0)
    results = [bits_of(call()) for _ in range(2)]
    assert results[0].data_ptr() != results[1].data_ptr() or not results[0].numel()
    assert (short.calls, short.refused) == (3, 0)


BAD = {
    "rank": ({}, {"input": X[0]}, ValueError),
    "no tensor": ({}, {"input": [1]}, TypeError),
    "bare words": ({"input": SIGNS}, {"input": SIGNS.words}, TypeError),
    "integers": ({}, {"input": X.long()}, TypeError),
    "sparse": ({}, {"input": X.to_sparse()}, TypeError),
    "elsewhere": ({}, {"input": X.to("meta")}, ValueError),
    "channels": ({}, {"weight": W[:, 1:]}, ValueError),
    "input channels": ({"input": SIGNS}, {"input": bitpack(X[:, 1:])}, ValueError),
    "codes for a weight": ({"weight": bitpack(W)}, {"weight": bitpack(W, bits=2)}, ValueError),
    "padding of codes": ({"input": SIGNS, "padding_value": 1}, {"input": CODES}, ValueError),
    "other weights": ({}, {"weight": W[1:]}, RuntimeError),
    "groups": ({}, {"groups": 2}, ValueError),
    "half groups": ({}, {"groups": 1.0}, TypeError),
    "stride": ({"stride": 1}, {"stride": True}, TypeError),
    "strides": ({"stride": (1, 1)}, {"stride": (1, 1.0)}, TypeError),
    "padding value": ({"padding_value": 0}, {"padding_value": False}, TypeError),
    "too small": ({}, {"input": X[:, :, :2]}, ValueError),
    "output": ({}, {"output": "int8"}, ValueError),
    "activation": ({}, {"activation": "gelu"}, ValueError),
    "scaled bits": ({"output": "packed"}, {"scale": ONES}, ValueError),
    "scaled sums": ({"output": "int32"}, {"bias": ONES}, ValueError),
    "float threshold": ({}, {"threshold": T}, ValueError),
    "threshold size": (
        {"output": "packed", "threshold": T},
        {"threshold": Threshold(T.value[1:], T.flip[1:])},
        ValueError,
    ),
    "threshold type": (
        {"output": "packed", "threshold": T},
        {"threshold": Threshold(T.value.float(), T.flip)},
        TypeError,
    ),
    "scale size": ({"scale": ONES}, {"scale": torch.ones(2)}, ValueError),
    "scale kind": ({"scale": ONES}, {"scale": ONES.int()}, TypeError),
    "scale elsewhere": ({"scale": ONES}, {"scale": ONES.to("meta")}, ValueError),
    "bias size": ({"bias": ONES}, {"bias": torch.ones(5)}, ValueError),
    "pixel scale": ({"pixel_scale": torch.ones(2, 1, 3, 5)}, {"pixel_scale": torch.ones(2, 1, 5, 7)}, ValueError),
    "groups of no scale": ({}, {"scale_group": torch.zeros(4).long()}, ValueError),
    "estimator": ({}, {"estimator": "tanh"}, ValueError),
    "backend": ({}, {"backend": "tpu"}, RuntimeError),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_at_first_is_refused_in_the_same_words_later(name, short):
    good, changes, error = BAD[name]
    refused_in_the_same_words(planned.plans, known(**good), changes, error)


def test_a_packed_tensor_of_another_version_is_refused_later_too(short):
    call = known(input=SIGNS)
    other = replace(SIGNS)
    object.__setattr__(other, "version", 2)
    with pytest.raises(ValueError, match="version must be 1"):
        call(input=other)


def test_packed_bytes_that_became_those_of_other_filters_are_refused(short):
    call = known()
    packed = call.keywords["packed"]
    packed.copy_(binary_conv2d_pack(torch.randn(4, 3, 3, 6).permute(0, 3, 1, 2)))
    call()
    packed[:64].zero_()
    with pytest.raises(RuntimeError, match="packed was made for other weights"):
        call()


def test_the_dtype_of_a_result_of_bits_follows_the_scale(short):
    call = known(input=SIGNS, scale=ONES)
    assert call(scale=ONES.half()).dtype == torch.float16
    assert call(scale=None).dtype == torch.float32
    assert call(scale=ONES.double()).dtype == torch.float64
    assert short.refused >= 1


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
    assert counter.get_total_flops() == 2 * 2 * 3 * 5 * 4 * 6 * 9
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.vmap(lambda x: call(input=x))(X[None])
    with testing.poisoned_allocations():
        call()
    call(scale=torch.ones(2), scale_group=torch.tensor([0, 1, 1, 0]))
    assert short.calls == before
    call()
    assert short.calls == before + 1


# --- the native op itself, which trusts nobody ------------------------------------------------------------------------


def native(plan, packed=None, **changes):
    given = {"input": X, "weight": W, "scale": ONES, "bias": None, "pixel_scale": None, "threshold": None, "flip": None}
    packed = binary_conv2d_pack(W) if packed is None else packed
    return torch.ops.basisconv.binary_conv2d_planned.default(*{**given, **changes}.values(), packed, plan)


def a_plan():
    return torch.ops.basisconv.binary_conv2d_plan.default(
        X, W, ONES, None, None, None, None, [1, 1], [1, 1, 1, 1], 0, [1, 1], 1, "relu", "float32", 6, None, False
    )


def test_no_plan_makes_the_planned_op_read_or_write_beyond_its_tensors():
    """Numbers of a plan replaced one by one: refused, or the result of some other valid geometry."""
    words = a_plan().view(torch.int64)
    expected = native(a_plan())
    for i in range(words.numel()):
        for value in (-(2**40), -1, 0, 1, 2, 3, 4, 5, 2**40):
            changed = words.clone()
            changed[i] = value
            try:
                found = native(changed.view(torch.uint8))
            except RuntimeError:
                continue
            assert found.shape[0] == expected.shape[0]
    assert torch.equal(native(a_plan()), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"input": X.half()}, {"input": X.contiguous(memory_format=torch.channels_last)}, {"weight": W.double()},
        {"weight": W[1:]}, {"scale": None}, {"bias": ONES}, {"threshold": T.value, "flip": T.flip},
        {"input": SIGNS.words}, {"packed": binary_conv2d_pack(W)[:-1]}, {"packed": torch.zeros(8)},
    ],
    ids=lambda changes: "-".join(changes),
)  # fmt: skip
def test_the_planned_op_refuses_what_its_plan_was_not_made_for(changes):
    with pytest.raises(RuntimeError, match="binary_conv2d"):
        native(a_plan(), **changes)
    for wrong in (a_plan()[:-1], torch.cat([a_plan(), a_plan()]), a_plan().to(torch.int8)):
        with pytest.raises(RuntimeError, match="plan must be what binary_conv2d_plan gives"):
            native(wrong)
