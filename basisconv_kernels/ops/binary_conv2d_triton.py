"""The Triton backend of ``binary_conv2d``: what it can run, its torch op, and what torch must know about that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from basisconv_kernels.core import triton_devices
from basisconv_kernels.core.autograd import refuse_gradients
from basisconv_kernels.core.layout import memory_format
from basisconv_kernels.core.packed import Threshold
from basisconv_kernels.ops import binary_conv2d_native as native
from basisconv_kernels.reference.binary_conv2d import Settings
from basisconv_kernels.reference.binary_conv2d_problem import BinaryConv2dProblem

OP = "binary_conv2d"


def supports(problem: BinaryConv2dProblem) -> list[str]:
    """The reasons against a problem."""
    return triton_devices.against(problem.device, problem.dtype, native.DTYPES)


def forward(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    pixel_scale: Tensor | None,
    threshold: Threshold | None,
    packed: Tensor | None,
    settings: Settings,
) -> Tensor:
    """``torch.ops.basisconv_triton.binary_conv2d``; it needs no packed filters of its own."""
    value, flip = (None, None) if threshold is None else (threshold.value, threshold.flip)
    arguments = (input, weight, scale, bias, pixel_scale, value, flip, *native.numbers(settings))
    if torch.compiler.is_compiling():
        return torch.ops.basisconv_triton.binary_conv2d.default(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.basisconv_triton.binary_conv2d.default(*arguments)


def _launch(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    pixel_scale: Tensor | None,
    value: Tensor | None,
    flip: Tensor | None,
    stride: Any,
    padding: Any,
    padding_value: int,
    dilation: Any,
    groups: int,
    activation: str | None,
    output: str,
    channels: int,
    encoding: str | None,
    packed_weight: bool,
) -> Tensor:
    from basisconv_kernels.triton_kernels import binary_conv2d as kernels
    from basisconv_kernels.triton_kernels._signed_conv2d import Kind, Operands

    dtype = getattr(torch, output) if output not in ("int32", "packed") else torch.int32
    kind = Kind(
        OP, tuple(stride), tuple(padding), tuple(dilation), groups, activation, channels, dtype,
        torch.channels_last if encoding is not None else memory_format(input), encoding=encoding,
        padding_value=padding_value, output=output if output in ("int32", "packed") else "float",
    )  # fmt: skip
    pixel_scale, value, flip = (None if t is None else t.contiguous() for t in (pixel_scale, value, flip))
    operands = Operands(input, weight, None, scale, None, bias, pixel_scale, value, flip)
    with triton_devices.on(input.device):
        return kernels.forward(operands, kind)


def _fake(
    input: Tensor, weight: Tensor, scale: Any, bias: Any, pixel_scale: Any, value: Any, flip: Any, *rest: Any
) -> Tensor:
    return native._fake_forward(input, weight, scale, bias, pixel_scale, value, flip, None, *rest)


def _flops(input: Any, weight: Any, *rest: Any, out_shape: Any, **_: Any) -> int:
    """As for the native op, whose seventh further argument is the packed filters."""
    return native._flops(input, weight, *rest[:5], None, *rest[5:], out_shape=out_shape)


_library = torch.library.Library("basisconv_triton", "FRAGMENT")  # registrations live as long as this
_library.define(
    "binary_conv2d(Tensor input, Tensor weight, Tensor? scale, Tensor? bias, Tensor? pixel_scale, Tensor? value, "
    "Tensor? flip, int[] stride, int[] padding, int padding_value, int[] dilation, int groups, str? activation, "
    "str output, int channels, str? encoding, bool packed_weight) -> Tensor"
)
_library.impl("binary_conv2d", _launch, triton_devices.KEY)
torch.library.register_fake("basisconv_triton::binary_conv2d", _fake, lib=_library)
refuse_gradients("binary_conv2d", OP)
register_flop_formula(torch.ops.basisconv_triton.binary_conv2d)(_flops)
