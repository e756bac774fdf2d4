"""The Triton backend of ``stacked_binary_conv2d``: what it can run, its torch op, and what torch must know of that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from basisconv_kernels.core import checks, triton_devices
from basisconv_kernels.core.autograd import refuse_gradients
from basisconv_kernels.core.layout import memory_format
from basisconv_kernels.core.problem import dtype_name
from basisconv_kernels.ops import stacked_binary_conv2d_native as native
from basisconv_kernels.reference.stacked_binary_conv2d import Settings
from basisconv_kernels.reference.stacked_binary_conv2d_problem import StackedBinaryConv2dProblem

OP = "stacked_binary_conv2d"
LARGEST = 2**24  # sums of whole numbers that float32 holds


def supports(problem: Any) -> list[str]:
    """The reasons against a problem."""
    against = triton_devices.against(problem.device, problem.dtype, native.DTYPES)
    if isinstance(problem, StackedBinaryConv2dProblem) and problem.mode != "real":
        largest = problem.taps * (2**problem.planes - 1 if problem.mode == "codes" else 1)
        if largest > LARGEST:
            against.append(f"adds up whole numbers below {LARGEST}, these sums reach {largest}")
    return against


def forward(
    input: Tensor,
    bank: Tensor,
    index: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    packed: Tensor | None,
    settings: Settings,
) -> Tensor:
    """``torch.ops.basisconv_triton.stacked_binary_conv2d``; it reads bank and index themselves."""
    s = settings
    binarize = s.binarize and s.encoding is None
    arguments = (
        input, bank, index, scale, bias, s.stride, s.padding, s.dilation, s.groups, binarize, s.activation,
        dtype_name(s.dtype), s.channels, s.encoding,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        return torch.ops.basisconv_triton.stacked_binary_conv2d.default(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.basisconv_triton.stacked_binary_conv2d.default(*arguments)


def _launch(
    input: Tensor,
    bank: Tensor,
    index: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    binarize: bool,
    activation: str | None,
    dtype: str,
    channels: int,
    encoding: str | None,
) -> Tensor:
    from basisconv_kernels.triton_kernels import stacked_binary_conv2d as kernels
    from basisconv_kernels.triton_kernels._signed_conv2d import Kind, Operands

    geometry: Any = (tuple(stride), tuple(padding), tuple(dilation), groups)
    layout = torch.channels_last if encoding is not None else memory_format(input)
    kind = Kind(
        OP, *geometry, activation, channels, getattr(torch, dtype), layout, encoding=encoding, binarize=binarize
    )
    with triton_devices.on(input.device):
        return kernels.forward(Operands(input, bank, index, scale, None, bias), kind)


def _fake(
    input: Tensor,
    bank: Tensor,
    index: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    binarize: bool,
    activation: str | None,
    dtype: str,
    channels: int,
    encoding: str | None,
) -> Tensor:
    kernel = (bank.shape[2], bank.shape[3])
    OH, OW = checks.output_size(OP, (input.shape[2], input.shape[3]), kernel, stride, padding, dilation)
    return torch.empty(
        (input.shape[0], index.shape[0], OH, OW),
        dtype=getattr(torch, dtype),
        device=input.device,
        memory_format=torch.channels_last if encoding is not None else memory_format(input),
    )


def _flops(input: Any, bank: Any, index: Any, *rest: Any, out_shape: Any, **_: Any) -> int:
    """Two FLOP a product of the full filters, which is what runs."""
    N, K, OH, OW = out_shape
    groups, channels = rest[5], rest[9]
    return 2 * N * OH * OW * K * (channels // groups) * bank[2] * bank[3]


_library = torch.library.Library("basisconv_triton", "FRAGMENT")  # registrations live as long as this
_library.define(
    "stacked_binary_conv2d(Tensor input, Tensor bank, Tensor index, Tensor? scale, Tensor? bias, int[] stride, "
    "int[] padding, int[] dilation, int groups, bool binarize, str? activation, str dtype, int channels, "
    "str? encoding) -> Tensor"
)
_library.impl("stacked_binary_conv2d", _launch, triton_devices.KEY)
torch.library.register_fake("basisconv_triton::stacked_binary_conv2d", _fake, lib=_library)
refuse_gradients("stacked_binary_conv2d", OP)
register_flop_formula(torch.ops.basisconv_triton.stacked_binary_conv2d)(_flops)
