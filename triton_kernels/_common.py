"""What the Triton kernels of all ops share: the epilogue, and what a launch must know of alignment."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 16  # bytes of the widest load of a thread, and what tensor maps ask of bases and strides
FAR = 2**31 - 2**20  # the largest offset in 32 bits; tiles reach past the last pixel by less than the rest


# Sizes that are only compared or looped over: one compiled kernel serves all of them, whether or not they are 1 or
# multiples of 16. Strides, C, Q and K are left out, since the width of a load hangs on them.
ANY_SIZE = (
    "pixels", "N", "H", "W", "OH", "OW", "R", "S", "stride_y", "stride_x", "top", "left", "dilation_y",
    "dilation_x", "GROUPS", "tiles", "LOW", "splits", "n_filters", "words", "out_words",
    "group_words",
)  # fmt: skip


def jit(kernel: Callable[..., None]) -> Any:
    """``triton.jit`` without a compilation for each kind of ``ANY_SIZE``."""
    runtime = [name for name, p in inspect.signature(kernel).parameters.items() if p.annotation == p.empty]
    return triton.jit(kernel, do_not_specialize=[name for name in runtime if name in ANY_SIZE])


@triton.jit
def activated(y, ACTIVATION: tl.constexpr):
    """Relu or relu6; a NaN stays."""
    if ACTIVATION is not None:
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == "relu6":
        y = tl.minimum(y, 6.0, propagate_nan=tl.PropagateNan.ALL)
    return y


@triton.jit
def located(pixel, OH, OW):
    """(n, oy, ox) of pixels numbered in this order, in the width of ``pixel``."""
    row = pixel // OW
    n = row // OH
    return n, row - n * OH, pixel - row * OW


@triton.jit
def store_outputs(
    y,  # [BM, BL] float32
    k,  # [BL] output filters
    live_k,  # [BL]
    live,  # [BM] pixels inside the result
    rows,  # [BM] offsets of the pixels in out
    out,
    out_k,
    bias,
    bias_k,
    residual,
    residual_rows,  # [BM] offsets of the pixels in residual
    residual_k,
    ACTIVATION: tl.constexpr,
):
    """``act(y + bias + residual)`` in float32, rounded once and stored. ``bias`` and ``residual`` may be None."""
    inside = live[:, None] & live_k[None, :]
    far_k = k.to(rows.dtype)[None, :]  # as wide as the offsets of the pixels
    if bias is not None:
        y += tl.load(bias + k * bias_k, mask=live_k, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        at = residual + (residual_rows[:, None] + far_k * residual_k)
        y += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    y = activated(y, ACTIVATION)
    tl.store(out + (rows[:, None] + far_k * out_k), y.to(out.dtype.element_ty), mask=inside)


def vector(tensor: Tensor, *strides: int) -> int:
    """Elements of ``tensor`` that one load may take: the largest power of two dividing base and strides, at most 16 B.

    Triton itself looks for multiples of 16 only, which C = 24 or C = 40 have in bytes, not in elements.
    """
    size = tensor.element_size()
    count = WIDEST // size
    while count > 1 and (tensor.data_ptr() % (count * size) or any(stride % count for stride in strides)):
        count //= 2
    return count


def wide(pixels: int, *tensors: Tensor | None) -> bool:
    """Whether pixels or elements are so many that 32 bits do not number them.

    Everywhere else the kernels compute their offsets in 32 bits: 64 of them make most of the instructions of a tile,
    and its registers spill.
    """
    return pixels > FAR or any(t is not None and _last(t) > FAR for t in tensors)


def _last(tensor: Tensor) -> int:
    """The offset of the last element."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def channels_fastest(tensor: Tensor) -> Tensor:
    """The tensor itself if its channels lie side by side, else a channels_last copy."""
    if tensor.shape[1] == 1 or tensor.stride(1) == 1:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last)
