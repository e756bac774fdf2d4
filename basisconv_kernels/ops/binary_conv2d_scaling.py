"""The scales of XNOR-Net for ``binary_conv2d``: of filters, of groups of filters, and of input pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from basisconv_kernels.core import checks
from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.layout import conv2d, symmetric


def filter_scale(weight: Tensor, scale_group: Tensor | None = None, groups: int | None = None) -> Tensor:
    """The least-squares scale α of ``α·sign(weight)``: the mean magnitude of a filter, or of all filters of a group.

    ``α[k] = mean |weight[k]|``, or ``α[g] = mean |weight[k]| over all k with scale_group[k] = g``

    Args:
        weight (Tensor[K, C/groups, R, S]): real filters.
        scale_group (Tensor[K], optional): int64, which scale each filter takes.
        groups (int, optional): how many scales there are; None counts them in ``scale_group``.

    Returns:
        Tensor[K] or [groups]: a group without filters gets 0. Gradients flow into ``weight``, which together with those
        of ``binary_conv2d`` gives the gradient of a binary-weight network.
    """
    mean = weight.abs().mean((1, 2, 3))
    if scale_group is None:
        return mean
    count = int(scale_group.max()) + 1 if groups is None else groups
    member = (torch.arange(count, device=weight.device)[:, None] == scale_group).to(mean.dtype)
    return (member @ mean) / member.sum(1).clamp(min=1)  # filters are of one size, so means of means are means


def magnitude_map(
    input: Tensor,
    kernel_size: int | Pair,
    *,
    stride: int | Pair = 1,
    padding: int | Pair | Quad | str = 0,
    dilation: int | Pair = 1,
) -> Tensor:
    """XNOR-Net's scale of each output pixel: the mean magnitude of the input over channels and the filter's window.

    ``map[n, 0, y, x] = mean over r, s of (mean over c of |input[n, c, y', x']|)``, zero outside the image

    Args:
        input (Tensor[N, C, H, W]): real input of the layer, before its sign is taken.
        kernel_size, stride, padding, dilation: of the layer.

    Returns:
        Tensor[N, 1, OH, OW]: for ``pixel_scale`` of ``binary_conv2d``.
    """
    checks.tensor("magnitude_map", "input", input, 4, "[N, C, H, W]")
    R, S = checks.pair("magnitude_map", "kernel_size", kernel_size, at_least=1)
    steps = checks.pair("magnitude_map", "stride", stride, at_least=1)
    spread = checks.pair("magnitude_map", "dilation", dilation, at_least=1)
    around = checks.padding4("magnitude_map", padding, (R, S), steps, spread)
    padded, pad = symmetric(input.abs().mean(1, keepdim=True), around)
    return conv2d(padded, input.new_full((1, 1, R, S), 1 / (R * S)), None, steps, pad, spread, 1)
