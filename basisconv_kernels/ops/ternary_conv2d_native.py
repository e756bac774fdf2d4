"""The native torch ops of ``ternary_conv2d``: calling them, packing for them, and what torch must know about them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from basisconv_kernels.core import checks, extension
from basisconv_kernels.core.autograd import call_raw, register_without_gradient
from basisconv_kernels.core.checks import Pair
from basisconv_kernels.core.layout import memory_format
from basisconv_kernels.core.packed import WORD_BITS, PackedTensor
from basisconv_kernels.ops import ternary_conv2d_cuda as cuda
from basisconv_kernels.reference.ternary_conv2d_problem import TernaryConv2dProblem

OP = "ternary_conv2d"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_TAPS = 2**16 - 1  # of R·S: the kernel's lists number the taps of a channel in 16 bits
# A constant, because graphs are traced through the functions that ask. A library of an earlier build lacks the op.
PRESENT = extension.load() is None and hasattr(torch.ops.basisconv, "ternary_conv2d_pack_fixed")
OUTDATED = extension.load() is None and not PRESENT


def forward(
    input: Tensor,
    planes: Tensor,
    scale: Tensor | None,
    negative_scale: Tensor | None,
    bias: Tensor | None,
    packed: Tensor | None,
    settings: tuple[Any, ...],
) -> Tensor:
    """The torch op that C++ registers for the CPU."""
    if packed is not None and (packed.device != input.device or packed.dtype != torch.uint8):
        raise ValueError(
            f"{OP}: packed must be what ternary_conv2d_pack gives, uint8 on {input.device}, "
            f"got {packed.dtype} on {packed.device}; pack the planes again"
        )
    arguments = (input, planes, scale, negative_scale, bias, packed, *settings[:-1])
    return call_raw(torch.ops.basisconv.ternary_conv2d.default, *arguments)


def cpu_supports(problem: TernaryConv2dProblem) -> list[str]:
    """The reasons against the CPU kernel."""
    against = []
    if OUTDATED:
        against.append("the native library does not have this op; build it again")
    if problem.device != "cpu":
        against.append(f"runs on the CPU, the tensors are on {problem.device}")
    if problem.dtype not in DTYPES:
        against.append(f"has no {problem.dtype} kernel")
    if problem.R * problem.S > MOST_TAPS:
        against.append(f"takes filters of at most {MOST_TAPS} taps a channel, these have {problem.R}×{problem.S}")
    return against


def takes_bits(bits: PackedTensor, planes: Tensor) -> bool:
    """Whether the native op adds these packed activations as 16-bit numbers, whose sums must fit."""
    largest = 1 if bits.encoding == "sign" else 2**bits.planes - 1
    _, _, R, S, words = planes.shape
    taps_in = min(bits.channels, words * WORD_BITS)
    return PRESENT and bits.device.type == "cpu" and taps_in * R * S * largest < 2**15


def forward_bits(
    bits: PackedTensor,
    planes: Tensor,
    scale: Tensor | None,
    negative_scale: Tensor | None,
    bias: Tensor | None,
    packed: Tensor | None,
    settings: tuple[Any, ...],
) -> Tensor:
    """The torch op for packed activations; everything that is a number is float32."""
    signs = bits.encoding == "sign"
    arguments = (bits.words, bits.channels, signs, planes, scale, negative_scale, bias, packed, *settings[:-1])
    return call_raw(torch.ops.basisconv.ternary_conv2d_bits.default, *arguments)


def ternary_conv2d_pack(planes: Tensor, channels: int, *, groups: int = 1) -> Tensor | None:
    """Rearrange planes once for the native kernel, for the ``packed`` argument of ``ternary_conv2d``.

    The kernel works through lists of the weights that are not 0, two bytes each, and eight bytes a filter and chunk of
    channels. Where tiles of 16 filters and 32 channels can be filled well enough, those follow, two bits a place, for
    processors with a matrix unit.

    Args:
        planes (Tensor[K, 2, R, S, words]): as for ``ternary_conv2d``.
        channels (int): C/groups.
        groups (int): as it will be given to ``ternary_conv2d``.

    Returns:
        Tensor[bytes] (uint8), the same on every processor and checked on use; None where the native kernel does not
        take these planes, and then ``packed=None`` is right. In a compiled graph, which must know sizes before weights,
        there is room for filters without a zero. On CUDA the filters as numbers, two bytes each, in the
        order in which tensor cores read them.
    """
    if cuda.packs(planes, channels, groups):
        return cuda.pack(planes, channels)
    too_large = planes.shape[2] * planes.shape[3] > MOST_TAPS
    if not PRESENT or planes.device.type != "cpu" or too_large:
        return None
    if torch.compiler.is_compiling():
        return torch.ops.basisconv.ternary_conv2d_pack_fixed.default(planes, channels, groups)
    return torch.ops.basisconv.ternary_conv2d_pack.default(planes, channels, groups)


def _fake_pack_fixed(planes: Tensor, channels: int, groups: int) -> Tensor:
    sizes = [int(size) for size in planes.shape]
    count = torch.ops.basisconv.ternary_conv2d_fixed_bytes.default(sizes, channels, groups)
    return planes.new_empty(count, dtype=torch.uint8)


def _fake_forward(
    input: Tensor,
    planes: Tensor,
    scale: Tensor | None,
    negative_scale: Tensor | None,
    bias: Tensor | None,
    packed: Tensor | None,
    stride: Pair,
    padding: tuple[int, int, int, int],
    dilation: Pair,
    groups: int,
    activation: str | None,
) -> Tensor:
    """Shape, dtype and strides of the result, for tracing."""
    kernel = (planes.shape[2], planes.shape[3])
    OH, OW = checks.output_size(OP, (input.shape[2], input.shape[3]), kernel, stride, padding, dilation)
    return torch.empty(
        (input.shape[0], planes.shape[0], OH, OW),
        dtype=input.dtype,
        device=input.device,
        memory_format=memory_format(input),
    )


def _flops(input: Sequence[int], planes: Sequence[int], *rest: Any, out_shape: Sequence[int], **__: Any) -> int:
    """Two FLOP a weight and output as of the dense convolution, as plain PyTorch counts; zeros are not left out."""
    N, K, OH, OW = out_shape
    groups = rest[7]
    return 2 * N * OH * OW * K * (input[1] // groups) * planes[2] * planes[3]


def _register() -> None:
    """Teach torch what the native op does to shapes, gradients and FLOP counts."""
    register_without_gradient("ternary_conv2d", OP, _fake_forward)
    torch.library.register_fake("basisconv::ternary_conv2d_pack_fixed", _fake_pack_fixed)
    register_flop_formula(torch.ops.basisconv.ternary_conv2d)(_flops)


if PRESENT:
    _register()
