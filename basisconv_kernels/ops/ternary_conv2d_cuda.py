"""The CUDA backend of ``ternary_conv2d``; its kernel also runs ``stacked_binary_conv2d`` with full filters.

``out = act(scale · conv2d(input, w) + bias)`` for filters of −1, 0 and +1. They lie packed as numbers, two bytes each:
on tensor cores their products cost what any products cost, and what the bits save is the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from basisconv_kernels.core import checks, extension, machine
from basisconv_kernels.core.autograd import call_raw, register_without_gradient
from basisconv_kernels.core.checks import Pair
from basisconv_kernels.core.layout import memory_format
from basisconv_kernels.core.problem import dtype_name
from basisconv_kernels.reference.ternary_conv2d_problem import TernaryConv2dProblem

OP = "ternary_conv2d"
DTYPES = (torch.bfloat16, torch.float16)
CHANNELS = 8  # that divide those of the input: 16 bytes
CAPABILITY = 9
# A constant, because graphs are traced through the functions that ask.
PRESENT = extension.load() is None and hasattr(torch.ops.basisconv, "ternary_conv2d_cuda")


def against(device: str, dtype: torch.dtype, channels: int, groups: int) -> list[str]:
    """The reasons against the kernel; those of this machine's device count where there is one."""
    found = []
    if device != "cuda":
        found.append(f"runs on CUDA devices, the tensors are on {device}")
    if dtype not in DTYPES:
        found.append(f"has no {dtype_name(dtype)} kernel")
    if groups > 1:
        found.append("has no kernel for groups")
    if channels % CHANNELS:
        found.append(f"takes numbers of channels that {CHANNELS} divides, here are {channels}")
    if "cuda" in extension.facts() and not PRESENT:
        found.append("the native library was built before there was this kernel; build it again")
    return found + machine.against_capability(CAPABILITY, CAPABILITY)


def packs(planes: Tensor, channels: int, groups: int) -> bool:
    """Whether the kernel has a form of its own for such bit planes."""
    return PRESENT and planes.device.type == "cuda" and groups == 1 and channels % CHANNELS == 0


def supports(problem: TernaryConv2dProblem) -> list[str]:
    """The reasons against a problem of ``ternary_conv2d``."""
    found = against(problem.device, problem.dtype, problem.C, problem.groups)
    two = isinstance(problem, TernaryConv2dProblem) and problem.scales == "two"  # a plain layer is open in its scales
    return [*found, "has one accumulator, two scales need two"] if two else found


def pack(planes: Tensor, channels: int) -> Tensor:
    """Bit planes [K, 1 or 2, R, S, words] (int32), signs or which are +1 and which −1, as bytes for the kernel."""
    return torch.ops.basisconv.ternary_conv2d_cuda_pack.default(planes, channels)


def forward(
    input: Tensor,
    planes: Tensor,
    scale: Tensor | None,
    negative_scale: Tensor | None,
    bias: Tensor | None,
    packed: Tensor | None,
    settings: tuple[Any, ...],
) -> Tensor:
    """The op: on packed filters, or on such as it packs itself."""
    if packed is None:
        packed = pack(planes, input.shape[1])
    elif packed.device != input.device or packed.dtype != torch.uint8:
        raise ValueError(
            f"{OP}: packed must be what ternary_conv2d_pack gives, uint8 on {input.device}, "
            f"got {packed.dtype} on {packed.device}; pack the planes again"
        )
    K, _, R, S, _ = planes.shape
    stride, padding, dilation, _, activation, _ = settings
    return run(input, packed, scale, bias, K, (R, S), (stride, padding, dilation), activation)


def run(
    input: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    K: int,
    kernel: Pair,
    geometry: tuple[Any, ...],
    activation: str | None,
) -> Tensor:
    """The torch op; ``geometry`` is stride, padding and dilation. Scale and bias count in float32."""
    kept = (input.dtype, torch.float32)
    scale, bias = (t if t is None or t.dtype in kept else t.to(torch.float32) for t in (scale, bias))
    arguments = (input, packed, scale, bias, K, kernel, *geometry, activation)
    return call_raw(torch.ops.basisconv.ternary_conv2d_cuda.default, *arguments)


def _fake_forward(
    input: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    K: int,
    kernel: Pair,
    stride: Pair,
    padding: tuple[int, int, int, int],
    dilation: Pair,
    activation: str | None,
) -> Tensor:
    """Shape, dtype and strides of the result, for tracing."""
    OH, OW = checks.output_size(OP, (input.shape[2], input.shape[3]), kernel, stride, padding, dilation)
    return torch.empty(
        (input.shape[0], K, OH, OW), dtype=input.dtype, device=input.device, memory_format=memory_format(input)
    )


def _fake_pack(planes: Tensor, channels: int) -> Tensor:
    kernel = (int(planes.shape[2]), int(planes.shape[3]))
    size = torch.ops.basisconv.ternary_conv2d_cuda_packed_bytes.default(int(planes.shape[0]), channels, kernel)
    return planes.new_empty(size, dtype=torch.uint8)


def _flops(
    input: Sequence[int],
    packed: Any,
    scale: Any,
    bias: Any,
    K: int,
    kernel: Pair,
    *_: Any,
    out_shape: Sequence[int],
    **__: Any,
) -> int:
    """Two FLOP a weight and output, as of the dense convolution."""
    return 2 * out_shape[0] * out_shape[2] * out_shape[3] * K * input[1] * kernel[0] * kernel[1]


def _register() -> None:
    """Teach torch what the native ops do to shapes, gradients and FLOP counts."""
    for native, fake in (("ternary_conv2d_cuda", _fake_forward), ("ternary_conv2d_cuda_pack", _fake_pack)):
        register_without_gradient(native, OP, fake)
    register_flop_formula(torch.ops.basisconv.ternary_conv2d_cuda)(_flops)


if PRESENT:
    _register()
