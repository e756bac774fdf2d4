"""``ternary_conv2d`` in plain PyTorch: what the op means, and the fallback where no kernel runs.

Weights are two bit planes [K, 2, R, S, words], in the packed format of docs/packed_formats.md with the encoding
"ternary": a bit of plane 0 makes its weight +1, one of plane 1 makes it −1, none makes it 0. Channel c of the filter's
group is bit ``c mod 32`` of word ``c div 32``; bits past C/G are zero, and no bit is set in both planes.

Arguments arrive checked and in normal form (see ``ops/ternary_conv2d.py``): pairs, the padding as (top, bottom, left,
right), scales [K] or None.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.layout import HALF as HALF
from basisconv_kernels.core.layout import cast, conv2d, laid_out, memory_format, symmetric
from basisconv_kernels.core.packed import WORD_BITS
from basisconv_kernels.core.packed import pack_planes as pack_bits
from basisconv_kernels.core.packed import unpack_planes as unpack_bits


class Gradients(NamedTuple):
    """One gradient an input of the op that can have one; None where none was asked for."""

    input: Tensor | None
    scale: Tensor | None
    negative_scale: Tensor | None
    bias: Tensor | None


# --- the planes -------------------------------------------------------------------------------------------------------


def pack_planes(weight: Tensor, *, checked: bool = True) -> Tensor:
    """The planes [K, 2, R, S, words] (int32) of ternary weights.

    Args:
        weight (Tensor[K, C/groups, R, S]): of any dtype; every value is −1, 0 or +1.
        checked (bool): look whether that is so.

    Raises:
        ValueError: a value that is none of the three.
    """
    if checked and not bool(((weight == 0) | (weight.abs() == 1)).all()):
        raise ValueError("pack_planes: weight must hold -1, 0 and +1 only; ternarise it first")
    return pack_bits(torch.stack([weight > 0, weight < 0], dim=1))


def unpack_planes(planes: Tensor, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(where a weight is +1, where it is −1), each [K, C/groups, R, S] of zeros and ones in ``dtype``."""
    both = unpack_bits(planes, channels).to(dtype)
    return both[:, 0].contiguous(), both[:, 1].contiguous()


def unpack_weight(planes: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """The weights −1, 0, +1 [K, C/groups, R, S] that the planes stand for."""
    plus, minus = unpack_planes(planes, channels, dtype)
    return plus - minus


def planes_problem(planes: Tensor, channels: int) -> str | None:
    """What is wrong with the bits of planes for filters of so many channels, in words; None where nothing is."""
    if bool((planes[:, 0] & planes[:, 1]).any()):
        return "a weight has its bit in both planes"
    tail = channels % WORD_BITS
    if tail and bool((planes[..., -1] >> tail != 0).any()):  # an arithmetic shift: a set bit 31 stays visible
        return f"bits past the {channels} channels are set"
    return None


# --- the op -----------------------------------------------------------------------------------------------------------


def forward(
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
    """``act(scale·Σ₊ − negative_scale·Σ₋ + bias)``, the sums of the input under the +1 and under the −1 weights.

    One scale multiplies one sum, ``Σ₊ − Σ₋``; two scales need both. float32 and float64 compute in their own dtype,
    bfloat16 and float16 in float32; the result is rounded once.
    """
    padded, pad = symmetric(input, padding)
    wide = torch.float32 if input.dtype in HALF else input.dtype
    padded = padded.to(wide)
    plus, minus = unpack_planes(planes, input.shape[1] // groups, wide)

    def summed(weight: Tensor, factor: Tensor | None) -> Tensor:
        maps = conv2d(padded, weight, None, stride, pad, dilation, groups)
        return maps if factor is None else maps * factor.to(wide)[:, None, None]

    one = negative_scale is None
    out = summed(plus - minus, scale) if one else summed(plus, scale) - summed(minus, negative_scale)
    if bias is not None:
        out = out + bias.to(wide)[:, None, None]
    if activation == "relu":
        out = F.relu(out)
    elif activation == "relu6":
        out = F.relu6(out)
    return laid_out(cast(out, input.dtype), memory_format(input))


def scaled_weight(
    planes: Tensor, scale: Tensor | None, negative_scale: Tensor | None, channels: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight [K, C/groups, R, S] that the op convolves with: +scale, 0, −negative_scale."""
    plus, minus = unpack_planes(planes, channels, dtype)
    if scale is None:
        return plus - minus
    shape = (-1, 1, 1, 1)
    other = scale if negative_scale is None else negative_scale
    return plus * scale.to(dtype).reshape(shape) - minus * other.to(dtype).reshape(shape)


def backward(
    grad_output: Tensor,
    output: Tensor | None,
    input: Tensor,
    planes: Tensor,
    scale: Tensor | None,
    negative_scale: Tensor | None,
    stride: Pair,
    padding: Quad,
    dilation: Pair,
    groups: int,
    activation: str | None,
    wanted: tuple[bool, bool, bool, bool],
) -> Gradients:
    """The explicit gradients.

    With ``g = grad_output`` where the activation's slope is 1, else 0, and the weight gradient ``G = wgrad(input, g)``
    of an ordinary convolution [K, C/G, R, S]::

        d bias = Σ g over n, y, x      d input = convᵀ(g, scale·plus − negative_scale·minus)
        d scale = Σ G·plus             d negative_scale = −Σ G·minus            (two scales)
        d scale = Σ G·(plus − minus)                                            (one scale)

    Everything is summed in float32 at least, and rounded once.

    Args:
        output (Tensor or None): the op's result; needed with an activation only.
        wanted: which of input, scale, negative_scale, bias need a gradient.
    """
    if activation == "relu":
        grad_output = torch.ops.aten.threshold_backward(grad_output, output, 0)
    elif activation == "relu6":
        grad_output = torch.ops.aten.hardtanh_backward(grad_output, output, 0.0, 6.0)
    padded, pad = symmetric(input, padding)
    channels = input.shape[1] // groups
    wide = torch.float32 if input.dtype in HALF else input.dtype

    def conv_backward(g: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten.convolution_backward(
            g, x, weight, None, stride, pad, dilation, False, [0, 0], groups, mask
        )

    d_input = d_scale = d_negative = None
    if wanted[0]:
        weight = scaled_weight(planes, scale, negative_scale, channels, wide)
        d_input = conv_backward(grad_output.to(wide), padded.to(wide), weight, [True, False, False])[0]
        d_input = d_input.to(input.dtype)
        if padded is not input:
            top, _, left, _ = padding
            d_input = d_input[:, :, top : top + input.shape[2], left : left + input.shape[3]]
    if wanted[1] or wanted[2]:
        plus, minus = unpack_planes(planes, channels, wide)
        dense = conv_backward(grad_output.to(wide), padded.to(wide), plus, [False, True, False])[1]
        if wanted[1] and scale is not None:
            d_scale = (dense * (plus - minus if negative_scale is None else plus)).sum((1, 2, 3)).to(scale.dtype)
        if wanted[2] and negative_scale is not None:
            d_negative = -(dense * minus).sum((1, 2, 3)).to(negative_scale.dtype)
    d_bias = grad_output.sum((0, 2, 3)) if wanted[3] else None
    return Gradients(d_input, d_scale, d_negative, d_bias)
