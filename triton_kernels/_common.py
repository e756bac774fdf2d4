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


# Sizes that are only compared or looped over: one compiled kernel serves all of them, whether or not they are 1 or
# multiples of 16. Strides, C, Q and K are left out, since the width of a load hangs on them.
ANY_SIZE = (
    "pixels", "N", "H", "W", "OH", "OW", "R", "S", "stride_y", "stride_x", "top", "left", "dilation_y",
    "dilation_x", "GROUPS", "tiles",
)  # fmt: skip


def jit(kernel: Callable[..., None]) -> Any:
    """``triton.jit`` without a compilation for each kind of ``ANY_SIZE``."""
    runtime = [name for name, p in inspect.signature(kernel).parameters.items() if p.annotation == p.empty]
    return triton.jit(kernel, do_not_specialize=[name for name in runtime if name in ANY_SIZE])


@triton.jit
def activated(y, ACTIVATION: tl.constexpr):
    """Relu or relu6 by comparisons that a NaN fails, so that it stays."""
    if ACTIVATION is not None:
        y = tl.where(y < 0.0, 0.0, y)
    if ACTIVATION == "relu6":
        y = tl.where(y > 6.0, 6.0, y)
    return y


@triton.jit
def store_outputs(
    y,  # [BM, BL] float32
    k,  # [BL] output filters
    live_k,  # [BL]
    live,  # [BM] pixels inside the result
    rows,  # [BM] offsets of the pixels in out, int64
    out,
    out_k,
    bias,
    bias_k,
    residual,
    residual_rows,  # [BM] offsets of the pixels in residual, int64
    residual_k,
    ACTIVATION: tl.constexpr,
):
    """``act(y + bias + residual)`` in float32, rounded once and stored. ``bias`` and ``residual`` may be None."""
    inside = live[:, None] & live_k[None, :]
    if bias is not None:
        y += tl.load(bias + k * bias_k, mask=live_k, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        at = residual + residual_rows[:, None] + (k.to(tl.int64) * residual_k)[None, :]
        y += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    y = activated(y, ACTIVATION)
    tl.store(out + rows[:, None] + (k.to(tl.int64) * out_k)[None, :], y.to(out.dtype.element_ty), mask=inside)


def vector(tensor: Tensor, *strides: int) -> int:
    """Elements of ``tensor`` that one load may take: the largest power of two dividing base and strides, at most 16 B.

    Triton itself looks for multiples of 16 only, which C = 24 or C = 40 have in bytes, not in elements.
    """
    size = tensor.element_size()
    count = WIDEST // size
    while count > 1 and (tensor.data_ptr() % (count * size) or any(stride % count for stride in strides)):
        count //= 2
    return count


def channels_fastest(tensor: Tensor) -> Tensor:
    """The tensor itself if its channels lie side by side, else a channels_last copy."""
    if tensor.shape[1] == 1 or tensor.stride(1) == 1:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last)
