"""``tucker_conv2d`` in plain PyTorch: what the op means, and the fallback where no kernel runs.

Arguments arrive checked and in normal form (see ``ops/tucker_conv2d.py``): strides and dilations as pairs, the padding
as (top, bottom, left, right), tensors of one dtype on one device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.layout import HALF as HALF
from basisconv_kernels.core.layout import cast, conv2d, convolution_backward, laid_out, memory_format, symmetric


class Gradients(NamedTuple):
    """One gradient an input of the op; None where none was asked for."""

    input: Tensor | None
    u_in: Tensor | None
    core: Tensor | None
    u_out: Tensor | None
    bias: Tensor | None
    residual: Tensor | None


class Stages(NamedTuple):
    """What lies between the stages: M [N, rank_in, H, W] and Z [N, rank_out, OH, OW]."""

    reduced: Tensor
    maps: Tensor


def forward(
    input: Tensor,
    u_in: Tensor,
    core: Tensor,
    u_out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Quad,
    dilation: Pair,
    activation: str | None,
    precise: bool,
) -> Tensor:
    """``act(u_out · conv2d(u_inᵀ · input, core) + bias + residual)``.

    float32 and float64 compute in their own dtype. bfloat16 and float16 accumulate in float32, round M and Z once each
    to the dtype (not if ``precise``) and round the result once.
    """
    stages = _stages(input, u_in, core, stride, padding, dilation, precise)
    return _expand(stages.maps, input, u_out, bias, residual, activation)


def forward_with_stages(
    input: Tensor,
    u_in: Tensor,
    core: Tensor,
    u_out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Quad,
    dilation: Pair,
    activation: str | None,
    precise: bool,
) -> tuple[Tensor, Stages]:
    """``forward``, and M and Z in the dtype of ``input`` for the backward."""
    stages = _stages(input, u_in, core, stride, padding, dilation, precise)
    result = _expand(stages.maps, input, u_out, bias, residual, activation)
    return result, Stages(stages.reduced.to(input.dtype), stages.maps.to(input.dtype))


def reduce_channels(input: Tensor, u_in: Tensor) -> Tensor:
    """M [N, rank_in, H, W] = u_inᵀ · input, not rounded: float32 for 16-bit dtypes."""
    weight = u_in.t()[:, :, None, None]
    if input.dtype in HALF:
        input, weight = input.float(), weight.float()
    if 0 in input.shape[2:]:  # conv2d refuses a map without pixels
        return input.new_zeros(input.shape[0], u_in.shape[1], *input.shape[2:])
    return F.conv2d(input, weight)


def _stages(
    input: Tensor, u_in: Tensor, core: Tensor, stride: Pair, padding: Quad, dilation: Pair, precise: bool
) -> Stages:
    """M and Z; for 16-bit dtypes float32 tensors, whose values are rounded unless ``precise``.

    Zeros around M are zeros around the input: the first stage has no bias.
    """
    half = input.dtype in HALF
    reduced = reduce_channels(input, u_in)
    if half and not precise:
        reduced = reduced.to(input.dtype).float()
    padded, pad = symmetric(reduced, padding)
    maps = conv2d(padded, core.to(padded.dtype), None, stride, pad, dilation, 1)
    if half and not precise:
        maps = maps.to(input.dtype).float()
    return Stages(reduced, maps)


def _expand(
    maps: Tensor, input: Tensor, u_out: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None
) -> Tensor:
    """The last stage; dtype and memory format of the result are those of ``input``."""
    offset = None if bias is None else bias.to(maps.dtype)
    out = F.conv2d(maps, u_out.to(maps.dtype)[:, :, None, None], offset)
    if residual is not None:
        out = out + residual.to(out.dtype)
    if activation == "relu":
        out = F.relu(out)
    elif activation == "relu6":
        out = F.relu6(out)
    return laid_out(cast(out, input.dtype), memory_format(input))


def backward(
    grad_output: Tensor,
    output: Tensor | None,
    input: Tensor,
    u_in: Tensor,
    core: Tensor,
    u_out: Tensor,
    stride: Pair,
    padding: Quad,
    dilation: Pair,
    activation: str | None,
    wanted: tuple[bool, bool, bool, bool, bool, bool],
    stages: Stages | None = None,
) -> Gradients:
    """The explicit gradients.

    With ``g = grad_output`` where the activation's slope is 1, else 0::

        d bias = Σ g over n, y, x     d residual = g                  d u_out = g · Zᵀ
        dZ = u_outᵀ · g               d core = wgrad(M, dZ)           dM = convᵀ(dZ, core)
        d input = u_in · dM           d u_in = input · dMᵀ

    dZ and dM are rounded to the dtype like Z and M; sums over pixels accumulate in float32 at least, in a fixed order.

    Args:
        output (Tensor or None): the op's result; needed with an activation only.
        wanted: which of input, u_in, core, u_out, bias, residual need a gradient.
        stages (Stages or None): M and Z if the forward kept them; else they are computed again.
    """
    if activation == "relu":
        grad_output = torch.ops.aten.threshold_backward(grad_output, output, 0)
    elif activation == "relu6":
        grad_output = torch.ops.aten.hardtanh_backward(grad_output, output, 0.0, 6.0)
    wants_input, wants_u_in, wants_core, wants_u_out, wants_bias, wants_residual = wanted
    if stages is None and (wants_core or wants_u_out):
        unrounded = _stages(input, u_in, core, stride, padding, dilation, precise=False)
        stages = Stages(unrounded.reduced.to(input.dtype), unrounded.maps.to(input.dtype))
    rank_in, rank_out = u_in.shape[1], u_out.shape[1]

    def like(values: Tensor | None, channels: int, pixels: Tensor) -> Tensor:
        """What a gradient reads the values of, or a stand-in for its shape where it does not."""
        return pixels.new_empty(pixels.shape[0], channels, *pixels.shape[2:]) if values is None else values

    d_reduced = d_core = d_u_out = d_u_in = d_input = None
    before_core = wants_input or wants_u_in
    if before_core or wants_core or wants_u_out:
        maps = like(stages.maps if stages else None, rank_out, grad_output)
        d_maps, d_expand = _convolution_backward(
            grad_output, maps, u_out[:, :, None, None], (before_core or wants_core, wants_u_out)
        )
        d_u_out = d_expand[:, :, 0, 0] if d_expand is not None else None
    if before_core or wants_core:
        reduced = like(stages.reduced if stages else None, rank_in, input)
        padded, pad = symmetric(reduced, padding)
        d_padded, d_core = _convolution_backward(d_maps, padded, core, (before_core, wants_core), stride, pad, dilation)
        d_reduced = d_padded
        if d_padded is not None and padded is not reduced:
            top, _, left, _ = padding
            d_reduced = d_padded[:, :, top : top + input.shape[2], left : left + input.shape[3]]
    if before_core:
        d_input, d_reduce = _convolution_backward(
            d_reduced, input, u_in.t()[:, :, None, None], (wants_input, wants_u_in)
        )
        d_u_in = d_reduce[:, :, 0, 0].t() if d_reduce is not None else None
    return Gradients(
        d_input,
        d_u_in,
        d_core,
        d_u_out,
        grad_output.sum((0, 2, 3)) if wants_bias else None,
        grad_output if wants_residual else None,
    )


def _convolution_backward(
    grad_output: Tensor | None,
    input: Tensor,
    weight: Tensor,
    wanted: tuple[bool, bool],
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
) -> tuple[Tensor | None, Tensor | None]:
    """(d input, d weight) of one convolution, by PyTorch's own kernels."""
    d_input, d_weight, _ = convolution_backward(
        grad_output, input, weight, None, stride, padding, dilation, 1, [*wanted, False]
    )
    return d_input if wanted[0] else None, d_weight if wanted[1] else None
