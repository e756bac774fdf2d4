"""Rule 1 of ``testing.tolerances`` for the three stages of ``tucker_conv2d``; the numbers are those of that file.

``|error| ≤ u·|Y| + u·Σ|U_out||Z| + u·Σ|U_out|Σ|core||M| + γ(n)·Σ|U_out|Σ|core|Σ|U_in||X|``: the roundings of the result
and of the two maps (16-bit dtypes only, the maps' not if precise), and what n additions may lose in any order.
"""

from __future__ import annotations

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from basisconv_kernels.core.problem import TuckerConv2dProblem
from basisconv_kernels.reference import tucker_conv2d as reference
from basisconv_kernels.testing import tolerances
from basisconv_kernels.testing.tolerances import Bound

TF32_SHARE = tolerances.TF32_SHARE / 4 * 6  # six operands lie between input and result


def _core(p: TuckerConv2dProblem, reduced: Tensor, core: Tensor) -> Tensor:
    top, bottom, left, right = p.padding
    return F.conv2d(F.pad(reduced, (left, right, top, bottom)), core, None, p.stride, 0, p.dilation)


def forward_bound(
    problem: TuckerConv2dProblem,
    input: Tensor,
    u_in: Tensor,
    core: Tensor,
    u_out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    tf32: bool = False,
) -> Bound:
    """Rule 1 for the op's result, in float64 on the same rounded inputs; ``tf32`` where float32 products may use it."""
    p = problem
    x, i, f, o = input.double(), u_in.double(), core.double(), u_out.double()
    b, r = (None if t is None else t.double() for t in (bias, residual))
    expected = reference.forward(x, i, f, o, b, r, p.stride, p.padding, p.dilation, p.activation, True)

    def expanded(maps: Tensor, *extra: Tensor | None) -> Tensor:
        out = F.conv2d(maps, o.abs()[:, :, None, None])
        for more in extra:
            if more is not None:
                out = out + (more.abs() if more.dim() == 4 else more.abs()[:, None, None])
        return out

    growth, reach = tolerances.winograd_growth(p)
    magnitude = tolerances.spread(reference.reduce_channels(x.abs(), i.abs()), reach)
    sums = expanded(_core(p, magnitude, f.abs()), b, r)
    additions = p.C + p.taps + p.Q + tolerances.EXTRA_ADDITIONS
    allowed = tolerances.lost_in_sums(p.dtype, additions) * growth * sums
    if tf32 and p.dtype == torch.float32:
        allowed += TF32_SHARE * sums
    u = tolerances.UNIT_ROUNDOFF[p.dtype]
    allowed += u * expected.abs()
    smallest = torch.finfo(p.dtype).smallest_normal * torch.finfo(p.dtype).eps
    reduced = reference.reduce_channels(x, i)
    maps = _core(p, reduced, f).abs()
    if p.dtype in reference.HALF and not p.precise:
        through_core = _core(p, u * reduced.abs() + smallest, f.abs())
        allowed += expanded(u * maps + smallest + through_core)
    return Bound(expected, allowed * tolerances.SECOND_ORDER + smallest, expanded(maps, b, r))


def backward_bound(
    problem: TuckerConv2dProblem,
    grad_output: Tensor,
    output: Tensor,
    input: Tensor,
    u_in: Tensor,
    core: Tensor,
    u_out: Tensor,
    tf32: bool = False,
) -> dict[str, Bound]:
    """The same rule for the six gradients; the slope of the activation is read off ``output``.

    Each is a product of two maps that went through at most two roundings together (M and Z, M and dZ, dZ and dM), so
    the sums of absolute values are allowed two roundings more than the float32 loss.
    """
    p = problem
    x, i, f, o, g = (t.double() for t in (input, u_in, core, u_out, grad_output))
    wanted = (True,) * 6
    geometry = (p.stride, p.padding, p.dilation)
    exact = reference.backward(g, output.double(), x, i, f, o, *geometry, p.activation, wanted)
    live: Tensor = exact.residual  # type: ignore[assignment]  # grad_output where the slope is 1
    sums = reference.backward(live.abs(), None, x.abs(), i.abs(), f.abs(), o.abs(), *geometry, None, wanted)
    oh, ow = p.output_size
    additions = p.N * max(oh * ow, p.H * p.W) + p.C + p.taps + p.Q + p.K + tolerances.EXTRA_ADDITIONS
    growth, _ = tolerances.winograd_growth(p)
    u = tolerances.UNIT_ROUNDOFF[p.dtype]
    share = tolerances.lost_in_sums(p.dtype, additions) * growth
    if tf32 and p.dtype == torch.float32:
        share += TF32_SHARE
    smallest = torch.finfo(p.dtype).smallest_normal * torch.finfo(p.dtype).eps
    bounds = {}
    for name, expected, total in zip(exact._fields, exact, sums, strict=True):
        if expected is None or total is None:  # all were wanted
            continue
        allowed = (share + (2 * u if p.dtype in reference.HALF else 0.0)) * total + u * expected.abs()
        # Of n terms with random signs the sum is about √n terms large.
        partial_sums = torch.maximum(expected.abs(), total / sqrt(additions))
        bounds[name] = Bound(expected, allowed * tolerances.SECOND_ORDER + smallest, partial_sums)
    return bounds
