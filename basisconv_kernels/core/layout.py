"""Memory formats, padding and PyTorch's convolution of maps [N, C, H, W]: what all references share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from basisconv_kernels.core.checks import Pair, Quad

HALF = (torch.bfloat16, torch.float16)
SMALL = 8  # pixels of a map's shorter side, see convolution_backward


def memory_format(input: Tensor) -> torch.memory_format:
    """The layout that the strides of ``input`` [N, C, H, W] state, and that the result gets: channels_last or NCHW.

    PyTorch's own rule, so that a layer fits between two of PyTorch's: channels_last where each stride reaches past what
    the dimensions before it span, in the order C, W, H, N. Where C is 1 or a map is one pixel, both formats describe
    the same memory and the strides of the dimensions of size 1 say which is meant; where they fit both, NCHW is.
    """
    size, stride = input.shape, input.stride()
    if stride[1] == 0:
        return torch.contiguous_format
    span = 0
    for dim in (1, 3, 2, 0):
        if size[dim] == 0 or stride[dim] < span or (dim == 0 and stride[1] == span):
            return torch.contiguous_format
        span = size[dim] * stride[dim]
    return torch.channels_last


def laid_out(maps: Tensor, layout: torch.memory_format) -> Tensor:
    """Dense ``maps`` in a layout, with strides that state it; not copied if they do.

    ``contiguous`` alone leaves maps with one channel, or of one pixel, in the strides that they have. Nothing is called
    that would change nothing: under torch.compile, torch 2.11 loses the gradients of a Function whose forward ends so.
    """
    dense = maps if maps.is_contiguous(memory_format=layout) else maps.contiguous(memory_format=layout)
    return dense if memory_format(dense) == layout else dense.to(memory_format=layout)


def cast(maps: Tensor, dtype: torch.dtype) -> Tensor:
    """``maps`` in a dtype; not even called for where it is theirs, see ``laid_out``."""
    return maps if maps.dtype == dtype else maps.to(dtype)


def conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    """``torch.nn.functional.conv2d``, kept away from a fault of it.

    One channel in channels_last, several images, a horizontal stride and one output a row give wrong sums, and reads
    beside the input, in PyTorch 2.13 (oneDNN on AVX-512). One output needs no stride: it is left away, with the columns
    that only another output would reach.
    """
    if input.shape[1] == 1 and stride[1] > 1 and input.device.type == "cpu":
        unread = input.shape[3] + 2 * padding[1] - (weight.shape[3] - 1) * dilation[1] - 1
        if unread < stride[1]:
            input = F.pad(input, (padding[1], padding[1] - unread))
            stride, padding = (stride[0], 1), (padding[0], 0)
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def convolution_backward(
    grad_output: Tensor | None,
    input: Tensor,
    weight: Tensor,
    bias_size: list[int] | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """``aten.convolution_backward``, kept away from faults of it: d input, d weight and d bias, as far as wanted.

    16-bit tensors on a processor: where maps are small and a stride, a dilation or a filter reaches far in them,
    PyTorch 2.13 (oneDNN on AMX) gives wrong gradients of the weight, or touches memory beside its own. These are
    computed in float32 and rounded.
    """
    half = input.dtype in HALF and input.device.type == "cpu"
    if half and _reaches_far(input, weight, stride, dilation):
        wide = (None if t is None else t.float() for t in (grad_output, input, weight))
        found = torch.ops.aten.convolution_backward(
            *wide, bias_size, stride, padding, dilation, False, [0, 0], groups, wanted
        )
        narrow = (None if t is None else t.to(input.dtype) for t in found)
        return tuple(narrow)  # type: ignore[return-value]
    return torch.ops.aten.convolution_backward(
        grad_output, input, weight, bias_size, stride, padding, dilation, False, [0, 0], groups, wanted
    )


def _reaches_far(input: Tensor, weight: Tensor, stride: Pair, dilation: Pair) -> bool:
    far = (*stride, *dilation) != (1, 1, 1, 1) or input.shape[2] < weight.shape[2] or input.shape[3] < weight.shape[3]
    return far and min(input.shape[2:]) < SMALL


def symmetric(input: Tensor, padding: Quad) -> tuple[Tensor, Pair]:
    """Split the padding into what conv2d takes (equal on both sides) and zeros written around the input."""
    top, bottom, left, right = padding
    N, C, H, W = input.shape
    if H == 0 or W == 0:  # conv2d refuses a map without pixels, though its padding may have some
        return input.new_zeros(N, C, H + top + bottom, W + left + right), (0, 0)
    if top == bottom and left == right:
        return input, (top, left)
    return F.pad(input, (left, right, top, bottom)), (0, 0)
