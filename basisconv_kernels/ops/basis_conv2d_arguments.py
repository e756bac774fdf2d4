"""The arguments of ``basis_conv2d``: checked against each other, and brought into the form that the backends take."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor

from basisconv_kernels.core import checks
from basisconv_kernels.core.checks import Pair, Quad

OP = "basis_conv2d"

Fixed = tuple[Pair, Quad, Pair, int, str | None, bool]
Sizes = tuple[int, int, int, int, int, int]


def normal_form(
    input: Tensor,
    basis_weight: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    activation: Any,
    precise: Any,
) -> tuple[Fixed, Sizes]:
    """Check every argument against every other.

    Returns:
        (stride, padding, dilation, groups, activation, precise) in normal form, and the sizes that hold for all batches
        and maps: (C/G, Q, K, R, S, coefficients an output).

    Raises:
        TypeError, ValueError: as ``basis_conv2d`` documents them.
    """
    checks.tensor(OP, "input", input, 4, "[N, C, H, W]")
    checks.tensor(OP, "basis_weight", basis_weight, 4, "[Q, C/groups, R, S]")
    checks.tensor(OP, "coefficients", coefficients, 2, "[K, Q]")
    C, H, W = input.shape[1:]
    Q, taps_in, R, S = basis_weight.shape
    K, mixed = coefficients.shape
    if bias is not None:
        checks.tensor(OP, "bias", bias, 1, "[K]")
    if residual is not None:
        checks.tensor(OP, "residual", residual, 4, "[N, K, OH, OW]")
    others = {"basis_weight": basis_weight, "coefficients": coefficients, "bias": bias, "residual": residual}
    checks.same_kind(OP, "input", input, others)

    if not isinstance(groups, int) or isinstance(groups, bool):
        raise TypeError(f"{OP}: groups must be an int, got {groups!r}")
    if groups < 1:
        raise ValueError(f"{OP}: groups must be at least 1, got {groups}")
    if min(Q, R, S, taps_in) < 1:
        raise ValueError(
            f"{OP}: basis_weight must be [Q, C/groups, R, S] with no empty side, got {list(basis_weight.shape)}"
        )
    if K < 1:
        raise ValueError(f"{OP}: coefficients must be [K, Q] with K at least 1, got {list(coefficients.shape)}")
    if taps_in * groups != C:
        raise ValueError(
            f"{OP}: basis_weight must be [Q, C/groups, R, S] with C/groups = {C}/{groups} from input.shape[1], "
            f"got {list(basis_weight.shape)}"
        )
    if Q % groups:
        raise ValueError(f"{OP}: Q = basis_weight.shape[0] must be divisible by groups = {groups}, got {Q}")
    if mixed != Q and (groups == 1 or mixed != Q // groups):
        compact = f", or [K, Q/groups] = [{K}, {Q // groups}] block-diagonal" if groups > 1 else ""
        raise ValueError(
            f"{OP}: coefficients must be [K, Q] with Q = basis_weight.shape[0] = {Q}{compact}, "
            f"got {list(coefficients.shape)}"
        )
    if mixed != Q and K % groups:
        raise ValueError(
            f"{OP}: coefficients [K, Q/groups] need K divisible by groups = {groups}, got {list(coefficients.shape)}"
        )
    if bias is not None and bias.shape[0] != K:
        raise ValueError(f"{OP}: bias must be [K] with K = coefficients.shape[0] = {K}, got {list(bias.shape)}")

    stride = checks.pair(OP, "stride", stride, at_least=1)
    dilation = checks.pair(OP, "dilation", dilation, at_least=1)
    padding = checks.padding4(OP, padding, (R, S), stride, dilation)
    checks.activation(OP, activation)
    OH, OW = checks.output_size(OP, (H, W), (R, S), stride, padding, dilation)
    if residual is not None and tuple(residual.shape) != (input.shape[0], K, OH, OW):
        raise ValueError(
            f"{OP}: residual must be [N, K, OH, OW] = {[input.shape[0], K, OH, OW]}, got {list(residual.shape)}; "
            "it is added before the activation and not broadcast"
        )
    # operator.index makes a size that a graph left open a constant: one graph a weight shape, for all batches and maps.
    sizes = tuple(operator.index(size) for size in (taps_in, Q, K, R, S, mixed))
    return (stride, padding, dilation, groups, activation, bool(precise)), sizes  # type: ignore[return-value]
