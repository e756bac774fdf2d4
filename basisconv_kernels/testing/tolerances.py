"""The one file with numbers: how far a result may be from the float64 oracle.

Two rules, both must hold.

1. *Every element*: ``|error| ≤ u·(Σ_q|A||Z| + |Y|) + γ(n)·Σ_q|A|Σ_d|F||X|``. The first term is what the contract
   rounds: the basis maps Z (16-bit dtypes only, not if precise) and the result Y, u = 2⁻⁸ for bfloat16, 2⁻¹¹ for
   float16. The second is what n additions in the accumulator's dtype may lose in any order, γ(n) = n·u/(1 − n·u).
2. *All elements together*: neither the worst error nor the root mean square is more than ``PLAIN_FACTOR`` times that of
   plain PyTorch, two convolutions at the same dtype, plus a floor. Rule 1 alone would let a long sum lose far more than
   it does.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from basisconv_kernels.core.problem import Conv2dProblem
from basisconv_kernels.reference import basis_conv2d as reference
from basisconv_kernels.reference import stacked_binary_conv2d as stacked
from basisconv_kernels.reference import ternary_conv2d as ternary
from basisconv_kernels.reference.stacked_binary_conv2d_problem import StackedBinaryConv2dProblem
from basisconv_kernels.reference.ternary_conv2d_problem import TernaryConv2dProblem

# Half a unit in the last place of 1: the relative error of one rounding to nearest.
UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ACCUMULATOR = {torch.float64: torch.float64}  # float32 for the others

# Rule 2, the factor: a kernel sums in another order than PyTorch, and the worst elements of two orders differ.
PLAIN_FACTOR = 2.0
# Rule 2, the floors, in roundings of the partial sums: for cases so small that plain PyTorch happens to be exact, and
# for 16-bit dtypes, where a changed order of summation may flip one rounding of the result and one of Z.
WORST_FLOOR_ROUNDINGS = 4.0
MEAN_FLOOR_ROUNDINGS = 1.0
# The mean over few elements scatters: n of them raise its floor by the factor 1 + this/√n. Those that padding alone
# reaches have no error in any order of summation and are not among the n.
MEAN_SCATTER = 8.0

# Winograd: absolute sums of its transforms over those of the nine products, and how many pixels to the side of an
# output's window a tile mixes in, down and across. F(2×2, 3×3): (1·2 + 1.5·2 + 1.5·2)/3 each way. F(2×4, 3×3) with the
# points 0, ±5/8, ±3/2 and infinity, for sums over many channels only: 24/3 across.
WINOGRAD = ((8.0 / 3.0) * (8.0 / 3.0), (1, 1))
WINOGRAD_WIDE = ((8.0 / 3.0) * (24.0 / 3.0), (1, 3))
WINOGRAD_WIDE_CHANNELS = 64
# With stride 2, tiles of 2×2: (2 + 2 + 1)/3 each way. Without constants, so whole numbers stay exact.
WINOGRAD_STRIDE_2 = ((5.0 / 3.0) * (5.0 / 3.0), (0, 0))
# TF32 cuts each operand of a product to 10 bits behind the leading one; four operands lie between input and result.
TF32_SHARE = 4 * 2.0**-10
# Bias, residual, the two roundings between the stages and Winograd's eight additions a direction.
EXTRA_ADDITIONS = 20
# The products of rounding errors that rule 1 leaves out.
SECOND_ORDER = 1.0 + 2.0**-6
# The oracle of float64 is itself float64: it may be wrong by as much as the candidate.
ORACLE_SHARE = {torch.float64: 2.0}

# float64 against explicit formulas and finite differences (gradcheck): the step sets these, not the dtype.
GRADCHECK = {"eps": 1e-6, "atol": 1e-6, "rtol": 1e-6}

# Layers and networks computed in two ways, see ``testing.same``: the largest difference as a share of the largest
# number of the result. float64: SVDs and folded BatchNorms lose a few of its 15 digits. float32: eight of its 24 bits,
# for Winograd arithmetic and folded BatchNorms. 16-bit dtypes: eight units in the last place of the largest number.
SAME_LAYER = {torch.float64: 1e-9, torch.float32: 2.0**-16, torch.bfloat16: 2.0**-4, torch.float16: 2.0**-7}
# A network passes roundings on from layer to layer, and its BatchNorms may divide by small numbers: three bits more in
# float32, one in the 16-bit dtypes, where more would let anything pass.
SAME_NETWORK = {torch.float64: 1e-9, torch.float32: 2.0**-13, torch.bfloat16: 2.0**-3, torch.float16: 2.0**-6}
# Formulas on whole matrices in float64 (spectra, bases, losses), an element each: rtol and atol of assert_close.
FORMULA = {"rtol": 1e-9, "atol": 1e-9}


@dataclass(frozen=True)
class Bound:
    """The oracle's result and what each element may be away from it."""

    expected: Tensor
    allowed: Tensor
    partial_sums: Tensor  # the size of what each element is added up from, for the floors of rule 2


def winograd_allowed(problem: Conv2dProblem) -> bool:
    """Whether the contract lets a kernel use Winograd arithmetic here, and lose exactness on whole numbers by it."""
    return _winograd_geometry(problem) and problem.stride == (1, 1)


def _winograd_geometry(problem: Conv2dProblem) -> bool:
    plain = problem.dtype == torch.float32 and not problem.precise and problem.dilation == (1, 1)
    return plain and (problem.R, problem.S) == (3, 3) and problem.stride in ((1, 1), (2, 2))


def winograd_growth(problem: Conv2dProblem) -> tuple[float, tuple[int, int]]:
    """How Winograd arithmetic may add to the rounding of sums, and how far a tile reaches; 1 and 0 where forbidden."""
    if not _winograd_geometry(problem):
        return 1.0, (0, 0)
    if problem.stride == (2, 2):
        return WINOGRAD_STRIDE_2
    channels = problem.taps // (problem.R * problem.S)
    return WINOGRAD_WIDE if channels >= WINOGRAD_WIDE_CHANNELS else WINOGRAD


def lost_in_sums(dtype: torch.dtype, additions: int) -> float:
    """γ(n): the relative error of n additions in the accumulator of a dtype, in any order."""
    share = additions * UNIT_ROUNDOFF[ACCUMULATOR.get(dtype, torch.float32)]
    return ORACLE_SHARE.get(dtype, 1.0) * share / (1.0 - share)


def _geometry(p: Conv2dProblem) -> tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int], int]:
    return p.stride, p.padding, p.dilation, p.groups


def spread(magnitude: Tensor, reach: tuple[int, int]) -> Tensor:
    """The largest value within ``reach`` rows and columns: a tile mixes in pixels beside those of the output."""
    if reach == (0, 0) or not magnitude.numel():
        return magnitude
    return F.max_pool2d(magnitude, (2 * reach[0] + 1, 2 * reach[1] + 1), 1, reach)


def forward_bound(
    problem: Conv2dProblem,
    input: Tensor,
    basis_weight: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    tf32: bool = False,
) -> Bound:
    """Rule 1 for the op's result, in float64 on the same rounded inputs; ``tf32`` where float32 products may use it."""
    x, f, a = input.double(), basis_weight.double(), coefficients.double()
    b, r = (None if t is None else t.double() for t in (bias, residual))
    geometry = _geometry(problem)
    expected = reference.forward(x, f, a, b, r, *geometry, problem.activation, True)

    def mixed(maps: Tensor, *extra: Tensor | None) -> Tensor:
        out = F.conv2d(maps, a.abs()[:, :, None, None], groups=problem.groups if problem.compact else 1)
        for more in extra:
            if more is not None:
                out = out + (more.abs() if more.dim() == 4 else more.abs()[:, None, None])
        return out

    growth, reach = winograd_growth(problem)
    magnitude = spread(x.abs(), reach)
    sums = mixed(reference.basis_maps(magnitude, f.abs(), *geometry), b, r)
    allowed = lost_in_sums(problem.dtype, problem.taps + problem.mixed + EXTRA_ADDITIONS) * growth * sums
    if tf32 and problem.dtype == torch.float32:
        allowed += TF32_SHARE * sums
    u = UNIT_ROUNDOFF[problem.dtype]
    allowed += u * expected.abs()
    smallest = torch.finfo(problem.dtype).smallest_normal * torch.finfo(problem.dtype).eps
    maps = reference.basis_maps(x, f, *geometry).abs()
    if problem.dtype in reference.HALF and not problem.precise:
        allowed += mixed(u * maps + smallest)
    return Bound(expected, allowed * SECOND_ORDER + smallest, mixed(maps, b, r))


def backward_bound(
    problem: Conv2dProblem,
    grad_output: Tensor,
    output: Tensor,
    input: Tensor,
    basis_weight: Tensor,
    coefficients: Tensor,
    tf32: bool = False,
) -> dict[str, Bound]:
    """The same rule for the five gradients; the slope of the activation is read off ``output``.

    Z and dZ are each rounded once, so the sums of absolute values are allowed two roundings more than the float32 loss.
    """
    x, f, a, g = (t.double() for t in (input, basis_weight, coefficients, grad_output))
    wanted = (True, True, True, True, True)
    geometry = _geometry(problem)
    exact = reference.backward(g, output.double(), x, f, a, *geometry, problem.activation, wanted)
    live = exact[4]  # the gradient of the residual: grad_output where the slope is 1
    sums = reference.backward(live.abs(), None, x.abs(), f.abs(), a.abs(), *geometry, None, wanted)  # type: ignore[union-attr]
    oh, ow = problem.output_size
    additions = problem.N * oh * ow + problem.taps + problem.mixed + problem.K + EXTRA_ADDITIONS
    growth, _ = winograd_growth(problem)
    u = UNIT_ROUNDOFF[problem.dtype]
    share = lost_in_sums(problem.dtype, additions) * growth
    if tf32 and problem.dtype == torch.float32:
        share += TF32_SHARE
    smallest = torch.finfo(problem.dtype).smallest_normal * torch.finfo(problem.dtype).eps
    bounds = {}
    for name, expected, total in zip(exact._fields, exact, sums, strict=True):
        if expected is None or total is None:  # all were wanted
            continue
        allowed = (share + (2 * u if problem.dtype in reference.HALF else 0.0)) * total + u * expected.abs()
        # Of n terms with random signs the sum is about √n terms large.
        partial_sums = torch.maximum(expected.abs(), total / sqrt(additions))
        bounds[name] = Bound(expected, allowed * SECOND_ORDER + smallest, partial_sums)
    return bounds


def ternary_forward_bound(
    problem: TernaryConv2dProblem,
    input: Tensor,
    planes: Tensor,
    scale: Tensor | None,
    negative_scale: Tensor | None,
    bias: Tensor | None,
    tf32: bool = False,
) -> Bound:
    """Rule 1 for ``ternary_conv2d``: one rounding of the result, and the additions of D numbers in any order."""
    x = input.double()
    a, n, b = (None if t is None else t.double() for t in (scale, negative_scale, bias))
    geometry = _ternary_geometry(problem)
    expected = ternary.forward(x, planes, a, n, b, *geometry, problem.activation)
    plus, minus = ternary.unpack_planes(planes, problem.C // problem.groups, torch.float64)
    either = ternary.pack_planes(plus + minus)
    largest = torch.ones(problem.K, device=x.device).double() if a is None else a.abs()
    largest = largest if n is None else torch.maximum(largest, n.abs())
    sums = ternary.forward(x.abs(), either, largest, None, None if b is None else b.abs(), *geometry, None)
    allowed = lost_in_sums(problem.dtype, problem.taps + EXTRA_ADDITIONS) * sums
    if tf32 and problem.dtype == torch.float32:
        allowed += TF32_SHARE * sums
    allowed += UNIT_ROUNDOFF[problem.dtype] * expected.abs()
    smallest = torch.finfo(problem.dtype).smallest_normal * torch.finfo(problem.dtype).eps
    return Bound(expected, allowed * SECOND_ORDER + smallest, sums)


def ternary_backward_bound(
    problem: TernaryConv2dProblem,
    grad_output: Tensor,
    output: Tensor,
    input: Tensor,
    planes: Tensor,
    scale: Tensor | None,
    negative_scale: Tensor | None,
) -> dict[str, Bound]:
    """The same rule for the gradients of ``ternary_conv2d``."""
    x, g = input.double(), grad_output.double()
    a, n = (None if t is None else t.double() for t in (scale, negative_scale))
    geometry = _ternary_geometry(problem)
    wanted = (True, a is not None, n is not None, True)
    exact = ternary.backward(g, output.double(), x, planes, a, n, *geometry, problem.activation, wanted)
    plus, minus = ternary.unpack_planes(planes, problem.C // problem.groups, torch.float64)
    either = ternary.pack_planes(plus + minus)
    largest = torch.ones(problem.K, device=x.device).double() if a is None else a.abs()
    largest = largest if n is None else torch.maximum(largest, n.abs())
    sums = ternary.backward(
        g.abs(), None, x.abs(), either, largest, None, *geometry, None, (True, True, False, True)
    )._asdict()
    sums["negative_scale"] = sums["scale"]
    oh, ow = problem.output_size
    additions = problem.N * oh * ow + problem.taps + problem.K * problem.R * problem.S + EXTRA_ADDITIONS
    share = lost_in_sums(problem.dtype, additions)
    smallest = torch.finfo(problem.dtype).smallest_normal * torch.finfo(problem.dtype).eps
    bounds = {}
    for name, expected in exact._asdict().items():
        if expected is not None:
            allowed = share * sums[name] + UNIT_ROUNDOFF[problem.dtype] * expected.abs()
            bounds[name] = Bound(expected, allowed * SECOND_ORDER + smallest, sums[name])
    return bounds


def _ternary_geometry(
    p: TernaryConv2dProblem,
) -> tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int], int]:
    return p.stride, p.padding, p.dilation, p.groups


def binary_bound(
    sums: Tensor,
    dtype: torch.dtype,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    pixel_scale: Tensor | None = None,
    activation: str | None = None,
) -> Bound:
    """Rule 1 for the floats of ``binary_conv2d``: its sums are exact, what follows rounds four times.

    v to float, two factors and the bias, each at most one rounding of a value no larger than |v·scale·pixel| + |bias|;
    then once to the dtype.
    """
    expected = sums.double()
    for factor in (None if scale is None else scale[:, None, None], pixel_scale):
        expected = expected if factor is None else expected * factor.double()
    size = expected.abs()
    if bias is not None:
        expected, size = expected + bias.double()[:, None, None], size + bias.double().abs()[:, None, None]
    if activation is not None:
        expected = expected.clamp(min=0.0, max=6.0 if activation == "relu6" else None)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    u = UNIT_ROUNDOFF[dtype] if dtype in reference.HALF else 0.0
    allowed = lost_in_sums(dtype, 4) * size + u * expected.abs()
    return Bound(expected, allowed * SECOND_ORDER + smallest, size)


def stacked_bound(
    problem: StackedBinaryConv2dProblem,
    values: Tensor,
    bank: Tensor,
    index: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    tf32: bool = False,
) -> Bound:
    """Rule 1 for ``stacked_binary_conv2d``: sums of ±values in any order, a factor, an offset, one rounding.

    Args:
        values (Tensor[N, C, H, W]): what enters the sums, in float64.
    """
    p = problem
    filters = stacked.stacked_filters(bank.double(), index)
    factor = torch.ones((), dtype=torch.float64) if scale is None else scale.double()[:, None, None]
    offset = torch.zeros((), dtype=torch.float64) if bias is None else bias.double()[:, None, None]
    top, bottom, left, right = p.padding
    padded = F.pad(values, (left, right, top, bottom))
    expected = F.conv2d(padded, filters, None, p.stride, 0, p.dilation, p.groups) * factor + offset
    sums = F.conv2d(padded.abs(), filters.abs(), None, p.stride, 0, p.dilation, p.groups) * factor.abs() + offset.abs()
    partial_sums = expected.abs() + offset.abs()
    if p.activation is not None:
        expected = expected.clamp(min=0.0, max=6.0 if p.activation == "relu6" else None)
    smallest = torch.finfo(p.dtype).smallest_normal * torch.finfo(p.dtype).eps
    u = UNIT_ROUNDOFF[p.dtype]
    allowed = lost_in_sums(p.dtype, p.taps + p.splits + EXTRA_ADDITIONS) * sums + u * expected.abs()
    if tf32 and p.dtype == torch.float32:
        allowed += TF32_SHARE * sums
    return Bound(expected, allowed * SECOND_ORDER + smallest, torch.maximum(partial_sums, sums / sqrt(p.taps)))


def worst_beside_plain(plain_worst: float, partial_sums: float, dtype: torch.dtype) -> float:
    """The worst error of rule 2 from plain PyTorch's worst error and the largest partial sum."""
    return PLAIN_FACTOR * plain_worst + WORST_FLOOR_ROUNDINGS * UNIT_ROUNDOFF[dtype] * partial_sums


def allowed_beside_plain(plain_error: Tensor, bound: Bound, dtype: torch.dtype) -> tuple[float, float]:
    """Rule 2: the worst error and the root mean square that a candidate may have, from the errors of plain PyTorch."""
    if dtype in ORACLE_SHARE:  # the oracle has no more digits than plain PyTorch: rule 1 alone
        return float("inf"), float("inf")
    u = UNIT_ROUNDOFF[dtype]
    worst = worst_beside_plain(plain_error.max().item(), bound.partial_sums.max().item(), dtype)
    inexact = max(1, int(bound.partial_sums.count_nonzero()))
    floor = MEAN_FLOOR_ROUNDINGS * (1.0 + MEAN_SCATTER / sqrt(inexact))
    return worst, PLAIN_FACTOR * mean_square(plain_error) + floor * u * mean_square(bound.partial_sums)


def mean_square(values: Tensor) -> float:
    """The root of the mean square."""
    return values.square().mean().sqrt().item()
