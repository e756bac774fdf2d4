"""Deliberately wrong kernels: each must be caught, and by what it does wrong."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from basisconv_kernels import basis_conv2d, testing
from basisconv_kernels.testing import Mismatch


def right(input, basis_weight, coefficients, bias=None, **settings):
    return basis_conv2d(input, basis_weight, coefficients, bias, **settings, backend="reference")


def maps_and_rest(input, basis_weight, coefficients, settings):
    """Z in float32, and the 1×1 stage as a function of Z, bias and residual; for faults between the stages."""
    top, bottom, left, right_ = settings["padding"]
    padded = F.pad(input, (left, right_, top, bottom)).float()
    groups = settings["groups"]

    def stage1(padded, basis):
        return F.conv2d(padded, basis.float(), None, settings["stride"], 0, settings["dilation"], groups)

    def stage2(maps, bias=None):
        return F.conv2d(maps, coefficients.float()[:, :, None, None], None if bias is None else bias.float())

    return padded, stage1, stage2


def swapped_axes(input, basis_weight, *rest, **settings):
    return right(input, basis_weight.transpose(2, 3), *rest, **settings)


def swapped_strides(*tensors, **settings):
    return right(*tensors, **{**settings, "stride": settings["stride"][::-1], "padding": settings["padding"][::-1]})


def border_off_by_one(*tensors, **settings):
    top, bottom, left, right_ = settings["padding"]
    return right(*tensors, **{**settings, "padding": (top - 1, bottom + 1, left, right_)})


def last_row_repeated(*tensors, **settings):
    out = right(*tensors, **settings)
    out[:, :, -1] = out[:, :, -2]
    return out


def bias_twice(input, basis_weight, coefficients, bias=None, **settings):
    return right(input, basis_weight, coefficients, 2 * bias, **settings)


def bias_before_the_mixing(input, basis_weight, coefficients, bias=None, **settings):
    shifted = coefficients.sum(1) * bias.mean()
    return right(input, basis_weight, coefficients, shifted, **settings)


def channel_tail_dropped(input, basis_weight, *rest, **settings):
    whole = input.shape[1] // 8 * 8
    return right(input[:, :whole], basis_weight[:, :whole], *rest, **settings)


def basis_tail_dropped(input, basis_weight, coefficients, *rest, **settings):
    return right(input, basis_weight[:-1], coefficients[:, :-1], *rest, **settings)


def maps_not_rounded(*tensors, **settings):
    return right(*tensors, **{**settings, "precise": True})


def maps_rounded_although_precise(*tensors, **settings):
    return right(*tensors, **{**settings, "precise": False})


def maps_rounded_twice(input, basis_weight, coefficients, bias=None, **settings):
    """Rounds each half of the channels' sum, then the sum."""
    padded, stage1, stage2 = maps_and_rest(input, basis_weight, coefficients, settings)
    half = input.shape[1] // 2
    low, high = (stage1(padded[:, s], basis_weight[:, s]).to(input.dtype) for s in (slice(half), slice(half, None)))
    return stage2((low + high).float(), bias).to(input.dtype)


def maps_truncated(input, basis_weight, coefficients, bias=None, **settings):
    """Cuts the low bits of Z instead of rounding to nearest."""
    padded, stage1, stage2 = maps_and_rest(input, basis_weight, coefficients, settings)
    maps = stage1(padded, basis_weight).contiguous().view(torch.int32) & -(2**16)
    return stage2(maps.view(torch.float32), bias).to(input.dtype)


def result_rounded_before_the_bias(input, basis_weight, coefficients, bias=None, **settings):
    return right(input, basis_weight, coefficients, **settings) + bias[:, None, None]


def few_digits(input, basis_weight, *rest, **settings):
    """TF32 operands in a float32 kernel: ten bits of mantissa."""
    return right(
        *((t.view(torch.int32) & -(2**13)).view(torch.float32) for t in (input, basis_weight)), *rest, **settings
    )


def half_precision_sums(input, basis_weight, coefficients, bias=None, **settings):
    """Rounds the running sum of Z after every channel."""
    padded, stage1, stage2 = maps_and_rest(input, basis_weight, coefficients, settings)
    total = torch.zeros((), dtype=input.dtype)
    for c in range(input.shape[1]):
        total = total + stage1(padded[:, c : c + 1], basis_weight[:, c : c + 1]).to(input.dtype)
    return stage2(total.float(), bias).to(input.dtype)


def element_unwritten(*tensors, **settings):
    expected = right(*tensors, **settings)
    out = torch.empty_like(expected)
    out.view(-1)[:-1] = expected.view(-1)[:-1]
    return out


def nan_at_the_end(*tensors, **settings):
    out = right(*tensors, **settings)
    out.view(-1)[-1] = torch.nan
    return out


def ignores_strides(input, *rest, **settings):
    _, c, h, w = input.shape
    return right(input.as_strided(input.shape, (c * h * w, h * w, w, 1)), *rest, **settings)


def writes_to_the_input(input, *rest, **settings):
    out = right(input, *rest, **settings)
    input[-1, -1, -1, -1] += 1
    return out


def writes_past_the_bias(input, basis_weight, coefficients, bias=None, **settings):
    bias.as_strided((1,), (1,), bias.storage_offset() + len(bias))[0] = 0
    return right(input, basis_weight, coefficients, bias, **settings)


def adds_into_the_residual(*tensors, residual, **settings):
    return residual.copy_(right(*tensors, residual=residual, **settings))


def forgets_the_residual(*tensors, residual, **settings):
    return right(*tensors, residual=None, **settings)


def activation_before_the_residual(*tensors, residual, **settings):
    return right(*tensors, residual=None, **settings) + residual


def relu6_without_its_upper_end(*tensors, **settings):
    return right(*tensors, **{**settings, "activation": "relu"})


def groups_mixed_up(input, basis_weight, coefficients, *rest, **settings):
    return right(input, basis_weight, coefficients.roll(coefficients.shape[0] // 3, 0), *rest, **settings)


def wrong_layout(*tensors, **settings):
    return right(*tensors, **settings).contiguous()


def wrong_dtype(*tensors, **settings):
    return right(*tensors, **settings).float()


def wrong_shape(*tensors, **settings):
    return right(*tensors, **settings)[:, :, :, :-1]


def no_tensor(*tensors, **settings):
    return right(*tensors, **settings).tolist()


calls = itertools.count()


def changes_with_every_call(*tensors, **settings):
    """The smallest difference there is, as from a race in a sum."""
    out = right(*tensors, **settings)
    out[0, 0, 0, 0] = torch.nextafter(out[0, 0, 0, 0], torch.tensor(float("inf") if next(calls) % 2 else -float("inf")))
    return out


def keeps_one_output_buffer(*tensors, **settings):
    """Returns the memory of an earlier result, which changes under the caller's feet."""
    out = right(*tensors, **settings)
    return buffers[0].copy_(out) if buffers else buffers.append(out) or out


buffers: list[torch.Tensor] = []


def returns_the_residual(*tensors, residual, **settings):
    return residual


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FAULTS = [
    (swapped_axes, "odd_sizes", F32, "first mismatch"),
    (swapped_strides, "stride", F32, "must have shape"),
    (border_off_by_one, "odd_sizes", F32, "first mismatch"),
    (last_row_repeated, "channels_last", BF16, "y=8"),
    (bias_twice, "bias", F32, "first mismatch"),
    (bias_before_the_mixing, "bias", F32, "first mismatch"),
    (channel_tail_dropped, "past_a_block", F32, "first mismatch"),
    (basis_tail_dropped, "odd_sizes", F32, "first mismatch"),
    (maps_not_rounded, "odd_sizes", BF16, "on whole numbers"),
    (maps_not_rounded, "odd_sizes", F16, "on whole numbers"),
    (maps_rounded_although_precise, "precise", BF16, "first mismatch"),
    (maps_rounded_twice, "odd_sizes", BF16, "first mismatch"),
    (maps_rounded_twice, "odd_sizes", F16, "first mismatch"),
    (maps_truncated, "odd_sizes", BF16, "first mismatch"),
    (result_rounded_before_the_bias, "bias", BF16, "first mismatch"),
    (few_digits, "past_a_block", F32, "of plain PyTorch"),
    (half_precision_sums, "past_a_block", BF16, "first mismatch"),
    (half_precision_sums, "past_a_block", F16, "first mismatch"),
    (element_unwritten, "odd_sizes", F32, "got nan"),
    (nan_at_the_end, "odd_sizes", F32, "got nan"),
    (ignores_strides, "sliced", F32, "got nan"),
    (ignores_strides, "channels_last", F32, "must be dense"),
    (writes_to_the_input, "odd_sizes", F32, "wrote to input"),
    (writes_past_the_bias, "bias", F32, "wrote to memory beside bias"),
    (adds_into_the_residual, "residual_relu", F32, "wrote to residual"),
    (forgets_the_residual, "residual_relu", F32, "first mismatch"),
    (activation_before_the_residual, "residual_relu", F32, "first mismatch"),
    (relu6_without_its_upper_end, "whole_epilogue", F32, "first mismatch"),
    (groups_mixed_up, "groups_compact", F32, "first mismatch"),
    (wrong_layout, "channels_last", F32, "must be dense in torch.channels_last"),
    (wrong_dtype, "odd_sizes", F16, "must have dtype"),
    (wrong_shape, "odd_sizes", F32, "must have shape"),
    (no_tensor, "odd_sizes", F32, "must be a Tensor"),
    (changes_with_every_call, "odd_sizes", F32, "two runs"),
    (keeps_one_output_buffer, "odd_sizes", F32, "memory of an earlier result"),
    (returns_the_residual, "residual_relu", F32, "memory of an input"),
]


@pytest.mark.parametrize(
    ("fault", "name", "dtype", "says"), FAULTS, ids=[f"{f.__name__}-{str(d)[6:]}-{n}" for f, n, d, _ in FAULTS]
)
def test_fault_is_caught(fault, name, dtype, says):
    buffers.clear()
    case = testing.case(name).at(dtype=dtype)
    testing.check(case, right)
    with pytest.raises(Mismatch, match=says) as raised:
        testing.check(case, fault)
    assert name in str(raised.value)
