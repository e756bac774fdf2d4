"""The native torch ops of ``binary_conv2d``: calling them, packing for them, and what torch must know about them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from basisconv_kernels.core import checks, extension, machine
from basisconv_kernels.core.autograd import call_raw, register_without_gradient
from basisconv_kernels.core.layout import memory_format
from basisconv_kernels.core.packed import PackedTensor, Threshold, words_for
from basisconv_kernels.core.problem import dtype_name
from basisconv_kernels.reference.binary_conv2d import Settings
from basisconv_kernels.reference.binary_conv2d_problem import BinaryConv2dProblem

OP = "binary_conv2d"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA_MOST_TILES = 65_535  # of filters, see csrc/cuda/binary_conv2d.cu
CUDA_TILES = (16, 64)  # filters in a tile: where a group has no more than the first, and elsewhere
# Constants, because graphs are traced through the functions that ask; the format is part of such a graph.
PRESENT = extension.load() is None
FORMAT = extension.facts().get("binary_pack_format", 0)


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
    """The torch ops that C++ registers for the CPU and for CUDA."""
    if packed is not None and (packed.device != input.device or packed.dtype != torch.uint8):
        raise ValueError(
            f"{OP}: packed must be what binary_conv2d_pack gives, uint8 on {input.device}, "
            f"got {packed.dtype} on {packed.device}; pack the weights again"
        )
    value, flip = (None, None) if threshold is None else (threshold.value, threshold.flip)
    if weight.device.type == "cuda":
        weight = _signs_in_float32(weight)
    arguments = (input, weight, scale, bias, pixel_scale, value, flip, packed, *numbers(settings))
    return call_raw(torch.ops.basisconv.binary_conv2d.default, *arguments)


def numbers(settings: Settings) -> tuple[Any, ...]:
    """The arguments of the torch op that are no tensors."""
    s = settings
    output = dtype_name(s.dtype) if s.output == "float" else s.output
    return (
        s.stride, s.padding, s.padding_value, s.dilation, s.groups, s.activation, output, s.channels, s.encoding,
        s.packed_weight,
    )  # fmt: skip


def cuda_supports(problem: BinaryConv2dProblem) -> list[str]:
    """The reasons against the CUDA kernels; those of this machine's device count where there is one."""
    against = []
    if problem.device != "cuda":
        against.append(f"runs on CUDA devices, the tensors are on {problem.device}")
    if problem.dtype not in DTYPES:
        against.append(f"has no {problem.dtype} kernel")
    filters = problem.K // problem.groups
    tiles = problem.groups * -(-filters // CUDA_TILES[filters > CUDA_TILES[0]])
    if tiles > CUDA_MOST_TILES:
        against.append(f"takes at most {CUDA_MOST_TILES} tiles of filters, {problem.groups} groups have {tiles}")
    return against + machine.against_capability()


def _signs_in_float32(weight: Tensor) -> Tensor:
    """The CUDA kernels read no float64, and a conversion would make -1e-300 a zero, which counts as plus."""
    return torch.where(weight >= 0, 1.0, -1.0).float() if weight.dtype == torch.float64 else weight


def binary_conv2d_pack(weight: Tensor | PackedTensor, *, groups: int = 1) -> Tensor | None:
    """Rearrange the signs of filters once for the native kernel, for the ``packed`` argument of ``binary_conv2d``.

    Args:
        weight (Tensor[K, C/groups, R, S] or PackedTensor): as for ``binary_conv2d``.
        groups (int): as it will be given to ``binary_conv2d``.

    Returns:
        Tensor[bytes] (uint8), good for this instruction set only and checked on use; on CUDA good for every device, and
        of filters of the same number of bytes but other sizes it gives NaN, −2³¹ or bits that are all 0. None where no
        native kernel takes these filters, and then ``packed=None`` is right.
    """
    words = isinstance(weight, PackedTensor)
    tensor = weight.words if isinstance(weight, PackedTensor) else weight
    if not words:
        checks.tensor(f"{OP}_pack", "weight", tensor, 4, "[K, C/groups, R, S]")
    on_cuda = tensor.device.type == "cuda" and "cuda" in extension.facts()
    if not PRESENT or not (on_cuda or tensor.device.type == "cpu"):
        return None
    if on_cuda:
        tensor = _signs_in_float32(tensor)
    channels = (weight.channels if isinstance(weight, PackedTensor) else int(tensor.shape[1])) * groups
    return torch.ops.basisconv.binary_conv2d_pack.default(tensor.detach(), words, channels, groups, FORMAT)


def _fake_forward(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    pixel_scale: Tensor | None,
    threshold: Tensor | None,
    flip: Tensor | None,
    packed: Tensor | None,
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
    """Shape, dtype and strides of the result, for tracing."""
    size = (input.shape[2], input.shape[3])
    OH, OW = checks.output_size(OP, size, (weight.shape[2], weight.shape[3]), stride, padding, dilation)
    N, K = input.shape[0], weight.shape[0]
    if output == "packed":
        return input.new_empty((N, 1, OH, OW, words_for(K)), dtype=torch.int32)
    layout = torch.channels_last if encoding is not None else memory_format(input)
    dtype = getattr(torch, output)
    return torch.empty((N, K, OH, OW), dtype=dtype, device=input.device, memory_format=layout)


def _fake_pack(weight: Tensor, words: bool, channels: int, groups: int, format: int) -> Tensor:
    sizes = (int(weight.shape[0]), int(weight.shape[2]), int(weight.shape[3]))
    ops = torch.ops.basisconv
    cuda = weight.device.type == "cuda"
    packed_bytes = ops.binary_conv2d_cuda_packed_bytes if cuda else ops.binary_conv2d_packed_bytes
    count = packed_bytes.default(*sizes, channels, groups)
    return weight.new_empty(count, dtype=torch.uint8)


def _flops(input: Sequence[int], weight: Sequence[int], *rest: Any, out_shape: Sequence[int], **_: Any) -> int:
    """Two operations a pair of bits, as torch counts a convolution; once a plane of a packed input."""
    groups, channels, encoding = rest[10], rest[13], rest[14]
    planes = 1 if encoding is None else input[1]
    N, OH, OW = (out_shape[0], *(out_shape[2:4]))
    return 2 * planes * N * OH * OW * weight[0] * (channels // groups) * weight[2] * weight[3]


def _register() -> None:
    """Teach torch what the native op does to shapes, gradients and operation counts."""
    for native, fake in (("binary_conv2d", _fake_forward), ("binary_conv2d_pack", _fake_pack)):
        register_without_gradient(native, OP, fake)
    register_flop_formula(torch.ops.basisconv.binary_conv2d)(_flops)


if PRESENT:
    _register()
