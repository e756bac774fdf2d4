"""``basis_conv2d`` in plain PyTorch: what the op means, and the fallback where no kernel runs.

Arguments arrive checked and in normal form (see ``ops/basis_conv2d.py``): strides and dilations as pairs, the padding
as (top, bottom, left, right), tensors of one dtype on one device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.layout import HALF as HALF
from basisconv_kernels.core.layout import cast, conv2d, convolution_backward
from basisconv_kernels.core.layout import laid_out as laid_out
from basisconv_kernels.core.layout import memory_format as memory_format
from basisconv_kernels.core.layout import symmetric as symmetric


class Gradients(NamedTuple):
    """One gradient an input of the op; None where none was asked for."""

    input: Tensor | None
    basis_weight: Tensor | None
    coefficients: Tensor | None
    bias: Tensor | None
    residual: Tensor | None


def coefficient_groups(coefficients: Tensor, basis_channels: int, groups: int) -> int:
    """Groups of the 1×1 stage: G for compact coefficients [K, Q/G], 1 for [K, Q]."""
    return groups if groups > 1 and coefficients.shape[1] != basis_channels else 1


def basis_maps(input: Tensor, basis_weight: Tensor, stride: Pair, padding: Quad, dilation: Pair, groups: int) -> Tensor:
    """Z [N, Q, OH, OW] = conv2d(input, basis_weight); 16-bit dtypes accumulate in float32 and come back as float32."""
    padded, pad = symmetric(input, padding)
    if input.dtype in HALF:
        padded, basis_weight = padded.float(), basis_weight.float()
    return conv2d(padded, basis_weight, None, stride, pad, dilation, groups)


def forward(
    input: Tensor,
    basis_weight: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Quad,
    dilation: Pair,
    groups: int,
    activation: str | None,
    precise: bool,
) -> Tensor:
    """``act(coefficients · conv2d(input, basis_weight) + bias + residual)``.

    float32 and float64 compute in their own dtype. bfloat16 and float16 accumulate in float32, round Z once to the
    dtype (not if ``precise``) and round the result once.
    """
    maps = basis_maps(input, basis_weight, stride, padding, dilation, groups)
    return recombine(maps, input, coefficients, bias, residual, groups, activation, precise)


def forward_with_maps(
    input: Tensor,
    basis_weight: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Quad,
    dilation: Pair,
    groups: int,
    activation: str | None,
    precise: bool,
) -> tuple[Tensor, Tensor]:
    """``forward``, and Z [N, Q, OH, OW] in the dtype of ``input`` for the backward."""
    maps = basis_maps(input, basis_weight, stride, padding, dilation, groups)
    result = recombine(maps, input, coefficients, bias, residual, groups, activation, precise)
    return result, maps.to(input.dtype)


def recombine(
    maps: Tensor,
    input: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    groups: int,
    activation: str | None,
    precise: bool,
) -> Tensor:
    """Stage 2 from Z as ``basis_maps`` gives it; dtype and memory format of the result are those of ``input``."""
    basis_channels = maps.shape[1]
    if maps.dtype != input.dtype:  # 16 bits: stage 2 in float32 too
        maps = maps if precise else maps.to(input.dtype).to(maps.dtype)
        coefficients = coefficients.to(maps.dtype)
        bias = None if bias is None else bias.to(maps.dtype)
    mixing_groups = coefficient_groups(coefficients, basis_channels, groups)
    out = F.conv2d(maps, coefficients[:, :, None, None], bias, groups=mixing_groups)
    if residual is not None:
        out = out + residual.to(out.dtype)
    if activation == "relu":
        out = F.relu(out)
    elif activation == "relu6":
        out = F.relu6(out)
    return laid_out(cast(out, input.dtype), memory_format(input))


def sloped(grad_output: Tensor, output: Tensor | None, activation: str | None) -> Tensor:
    """``grad_output`` where the activation's slope is 1, else 0; the slope is read off the op's result."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward.default(grad_output, output, 0)
    if activation == "relu6":
        return torch.ops.aten.hardtanh_backward.default(grad_output, output, 0.0, 6.0)
    return grad_output


def backward(
    grad_output: Tensor,
    output: Tensor | None,
    input: Tensor,
    basis_weight: Tensor,
    coefficients: Tensor,
    stride: Pair,
    padding: Quad,
    dilation: Pair,
    groups: int,
    activation: str | None,
    wanted: tuple[bool, bool, bool, bool, bool],
    maps: Tensor | None = None,
) -> Gradients:
    """The explicit gradients.

    With ``g = grad_output`` where the activation's slope is 1, else 0::

        d bias = Σ g over n, y, x        d residual = g              d coefficients = g · Zᵀ
        dZ = coefficientsᵀ · g           d input = convᵀ(dZ, basis_weight)      d basis_weight = wgrad(input, dZ)

    dZ is rounded to the dtype like Z; sums over pixels accumulate in float32 at least, in a fixed order.

    Args:
        output (Tensor or None): the op's result; needed with an activation only.
        wanted: which of input, basis_weight, coefficients, bias, residual need a gradient.
        maps (Tensor[N, Q, OH, OW] or None): Z if the forward kept it; else it is computed again.
    """
    grad_output = sloped(grad_output, output, activation)
    mixing = coefficients.view(*coefficients.shape, 1, 1)
    mixing_groups = coefficient_groups(coefficients, basis_weight.shape[0], groups)
    padded, pad = symmetric(input, padding)

    d_maps = d_input = d_basis = d_coefficients = d_bias = None
    if wanted[2] or wanted[0] or wanted[1]:
        if maps is None:
            # Z itself enters d coefficients alone; a frozen recombination needs only its shape.
            maps = (
                conv2d(padded, basis_weight, None, stride, pad, dilation, groups)
                if wanted[2]
                else grad_output.new_empty(grad_output.shape[0], basis_weight.shape[0], *grad_output.shape[2:])
            )
        with_bias = wanted[2] and wanted[3]  # one pass over grad_output for both
        d_maps, d_mixing, d_bias = convolution_backward(
            grad_output, maps, mixing, [mixing.shape[0]] if with_bias else None, (1, 1), (0, 0), (1, 1), mixing_groups,
            [wanted[0] or wanted[1], wanted[2], with_bias],
        )  # fmt: skip
        d_coefficients = d_mixing.flatten(1) if wanted[2] else None
    if wanted[0] or wanted[1]:
        d_padded, d_basis, _ = convolution_backward(
            d_maps, padded, basis_weight, None, stride, pad, dilation, groups, [wanted[0], wanted[1], False]
        )
        d_input = d_padded
        if wanted[0] and padded is not input:
            top, _, left, _ = padding
            d_input = d_padded[:, :, top : top + input.shape[2], left : left + input.shape[3]]
    if wanted[3] and d_bias is None:
        d_bias = grad_output.sum((0, 2, 3))
    return Gradients(
        d_input if wanted[0] else None,
        d_basis if wanted[1] else None,
        d_coefficients,
        d_bias if wanted[3] else None,
        grad_output if wanted[4] else None,
    )
