"""The Triton backend of ``ternary_conv2d``: what it can run, its torch op, and what torch must know about that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from basisconv_kernels.core import triton_devices
from basisconv_kernels.core.autograd import refuse_gradients
from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.layout import memory_format
from basisconv_kernels.ops import ternary_conv2d_native as native
from basisconv_kernels.reference.ternary_conv2d_problem import TernaryConv2dProblem

OP = "ternary_conv2d"


def supports(problem: TernaryConv2dProblem) -> list[str]:
    """The reasons against a problem."""
    return triton_devices.against(problem.device, problem.dtype, native.DTYPES)


def forward(
    input: Tensor,
    planes: Tensor,
    scale: Tensor | None,
    negative_scale: Tensor | None,
    bias: Tensor | None,
    packed: Tensor | None,
    settings: tuple[Any, ...],
) -> Tensor:
    """``torch.ops.basisconv_triton.ternary_conv2d``; it reads the planes themselves."""
    arguments = (input, planes, scale, negative_scale, bias, *settings[:-1])
    if torch.compiler.is_compiling():
        return torch.ops.basisconv_triton.ternary_conv2d.default(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.basisconv_triton.ternary_conv2d.default(*arguments)


def _launch(
    input: Tensor,
    planes: Tensor,
    scale: Tensor | None,
    negative_scale: Tensor | None,
    bias: Tensor | None,
    stride: Pair,
    padding: Quad,
    dilation: Pair,
    groups: int,
    activation: str | None,
) -> Tensor:
    from basisconv_kernels.triton_kernels import ternary_conv2d as kernels
    from basisconv_kernels.triton_kernels._signed_conv2d import Kind, Operands

    geometry: Any = (tuple(stride), tuple(padding), tuple(dilation), groups)
    kind = Kind(OP, *geometry, activation, int(input.shape[1]), input.dtype, memory_format(input))
    operands = Operands(input, planes, None, scale, negative_scale, bias)
    with triton_devices.on(input.device):
        return kernels.forward(operands, kind)


def _fake(input: Tensor, planes: Tensor, scale: Any, negative_scale: Any, bias: Any, *rest: Any) -> Tensor:
    return native._fake_forward(input, planes, scale, negative_scale, bias, None, *rest)


def _flops(input: Any, planes: Any, *rest: Any, out_shape: Any, **_: Any) -> int:
    """As for the native op, whose sixth argument is the packed planes."""
    return native._flops(input, planes, *rest[:3], None, *rest[3:], out_shape=out_shape)


_library = torch.library.Library("basisconv_triton", "FRAGMENT")  # registrations live as long as this
_library.define(
    "ternary_conv2d(Tensor input, Tensor planes, Tensor? scale, Tensor? negative_scale, Tensor? bias, int[] stride, "
    "int[] padding, int[] dilation, int groups, str? activation) -> Tensor"
)
_library.impl("ternary_conv2d", _launch, triton_devices.KEY)
torch.library.register_fake("basisconv_triton::ternary_conv2d", _fake, lib=_library)
refuse_gradients("ternary_conv2d", OP)
register_flop_formula(torch.ops.basisconv_triton.ternary_conv2d)(_flops)
