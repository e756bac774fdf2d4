"""``binary_conv2d`` in plain PyTorch: what the op means, and the fallback where no kernel runs.

Arguments arrive checked and in normal form (see ``ops/binary_conv2d.py``).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.estimators import ESTIMATORS as ESTIMATORS
from basisconv_kernels.core.estimators import estimated as estimated
from basisconv_kernels.core.estimators import signs as signs
from basisconv_kernels.core.estimators import slope as slope
from basisconv_kernels.core.layout import conv2d, laid_out, memory_format, symmetric
from basisconv_kernels.core.packed import Threshold, pack_planes, unpack_planes


class Settings(NamedTuple):
    """The arguments of a call that are no tensors, in normal form.

    Attributes:
        dtype: of a float result.
        channels: C.
        encoding: of a packed input; None for a real one.
        packed_weight: whether ``weight`` is words [K, 1, R, S, ⌈(C/G)/32⌉] instead of real numbers.
        estimators: straight-through estimators of input and weight.
        backend: the one chosen.
    """

    stride: Pair
    padding: Quad
    padding_value: int
    dilation: Pair
    groups: int
    activation: str | None
    output: str
    dtype: torch.dtype
    channels: int
    encoding: str | None
    packed_weight: bool
    estimators: tuple[str, str]
    backend: str


class Gradients(NamedTuple):
    """One gradient a tensor of the op; None where none was asked for."""

    input: Tensor | None
    weight: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    pixel_scale: Tensor | None


def input_values(input: Tensor, settings: Settings) -> Tensor:
    """What enters the sums, as float32 [N, C, H, W]: signs of a real input, signs or codes of a packed one."""
    if settings.encoding is None:
        return signs(input).float()
    bits = unpack_planes(input, settings.channels)
    if settings.encoding == "sign":
        return 2.0 * bits[:, 0] - 1.0
    places = torch.arange(bits.shape[1], device=bits.device, dtype=torch.int32)
    return (bits << places[:, None, None, None]).sum(1).float()


def weight_signs(weight: Tensor, settings: Settings) -> Tensor:
    """±1 as float32 [K, C/G, R, S]."""
    if settings.packed_weight:
        return 2.0 * unpack_planes(weight, settings.channels // settings.groups)[:, 0] - 1.0
    return signs(weight).float()


def padded_values(values: Tensor, padding: Quad, padding_value: int) -> tuple[Tensor, Pair]:
    """Values and what is left of the padding for conv2d: zeros are its own, ±1 are written around the map."""
    if padding_value == 0:
        return symmetric(values, padding)
    top, bottom, left, right = padding
    N, C, H, W = values.shape
    out = values.new_full((N, C, H + top + bottom, W + left + right), float(padding_value))
    out[:, :, top : top + H, left : left + W] = values
    return out, (0, 0)


def integer_sums(values: Tensor, filters: Tensor, settings: Settings) -> Tensor:
    """Convolve whole numbers: v [N, K, OH, OW] (int32). float32 is exact below 2^24, float64 beyond."""
    padded, pad = padded_values(values, settings.padding, settings.padding_value)
    largest = 15 if settings.encoding == "unsigned" else 1
    dtype = torch.float32 if largest * math.prod(filters.shape[1:]) <= 2**24 else torch.float64
    sums = conv2d(padded.to(dtype), filters.to(dtype), None, settings.stride, pad, settings.dilation, settings.groups)
    return sums.round().to(torch.int32)


def layout_of(input: Tensor, settings: Settings) -> torch.memory_format:
    """The memory format of the result: that of a real input; channels_last, the order of packed words, else."""
    return torch.channels_last if settings.encoding is not None else memory_format(input)


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
    """``v = conv2d(sign(input), sign(weight))``, then what ``settings.output`` asks for.

    int32: v. packed: the bits ``v >= 0``, or those of ``threshold``, as words [N, 1, OH, OW, ⌈K/32⌉]. float:
    ``act(v·scale·pixel_scale + bias)`` in float32 (float64 for float64), rounded once to the dtype.
    """
    sums = integer_sums(input_values(input, settings), weight_signs(weight, settings), settings)
    if settings.output == "packed":
        return pack_planes((sums >= 0 if threshold is None else threshold.bits(sums))[:, None])
    layout = layout_of(input, settings)
    if settings.output == "int32":
        return laid_out(sums, layout)
    return laid_out(scaled(sums, scale, bias, pixel_scale, settings), layout)


def scaled(
    sums: Tensor, scale: Tensor | None, bias: Tensor | None, pixel_scale: Tensor | None, settings: Settings
) -> Tensor:
    """The float epilogue; ``scale`` is one number an output already."""
    wide = torch.float64 if settings.dtype == torch.float64 else torch.float32
    out = sums.to(wide)
    if scale is not None:
        out = out * scale.to(wide)[:, None, None]
    if pixel_scale is not None:
        out = out * pixel_scale.to(wide)
    if bias is not None:
        out = out + bias.to(wide)[:, None, None]
    if settings.activation == "relu":
        out = F.relu(out)
    elif settings.activation == "relu6":
        out = F.relu6(out)
    return out.to(settings.dtype)


def backward(
    grad_output: Tensor,
    output: Tensor | None,
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    pixel_scale: Tensor | None,
    settings: Settings,
    wanted: tuple[bool, bool, bool, bool, bool],
) -> Gradients:
    """The explicit gradients of a float result.

    With ``g = grad_output`` where the activation's slope is 1, else 0, and ``e = g·scale·pixel_scale``::

        d bias = Σ g over n, y, x      d scale[k] = Σ g·pixel_scale·v over n, y, x      d pixel_scale = Σ_k g·scale·v
        d input = convᵀ(e, sign(weight))·slope(input)       d weight = wgrad(sign(input), e)·slope(weight)

    In float32 (float64 for float64), rounded once to the dtype of each tensor.

    Args:
        output (Tensor or None): the op's result; needed with an activation only.
        wanted: which of input, weight, scale, bias, pixel_scale need a gradient.
    """
    wide = torch.float64 if settings.dtype == torch.float64 else torch.float32
    g = grad_output.to(wide)
    if settings.activation is not None and output is not None:
        live = output > 0
        if settings.activation == "relu6":
            live &= output < 6
        g = torch.where(live, g, 0.0)
    values, filters = input_values(input, settings).to(wide), weight_signs(weight, settings).to(wide)
    by_channel = 1.0 if scale is None else scale.to(wide)[:, None, None]
    by_pixel = 1.0 if pixel_scale is None else pixel_scale.to(wide)

    d_input = d_weight = d_scale = d_bias = d_pixel = None
    if wanted[3]:
        d_bias = g.sum((0, 2, 3))
    if wanted[2] or wanted[4]:
        weighted = g * integer_sums(values.float(), filters.float(), settings).to(wide)
        if wanted[2]:
            d_scale = (weighted * by_pixel).sum((0, 2, 3))
        if wanted[4]:
            d_pixel = (weighted * by_channel).sum(1, keepdim=True)
    if wanted[0] or wanted[1]:
        padded, pad = padded_values(values, settings.padding, settings.padding_value)
        d_padded, d_weight, _ = torch.ops.aten.convolution_backward(
            (g * by_channel * by_pixel).contiguous(), padded, filters, None, settings.stride, pad, settings.dilation,
            False, [0, 0], settings.groups, [wanted[0], wanted[1], False],
        )  # fmt: skip
        if wanted[0]:
            top, _, left, _ = (0, 0, 0, 0) if padded.shape == values.shape else settings.padding
            d_input = d_padded[:, :, top : top + values.shape[2], left : left + values.shape[3]]
            d_input = estimated(d_input, input, settings.estimators[0])
        if wanted[1]:
            d_weight = estimated(d_weight, weight, settings.estimators[1])
    return Gradients(d_input, d_weight, d_scale, d_bias, d_pixel)
