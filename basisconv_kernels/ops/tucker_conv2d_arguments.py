"""The arguments of ``tucker_conv2d``: checked against each other, and brought into the form that the backends take."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from basisconv_kernels.core import checks
from basisconv_kernels.core.checks import Pair, Quad

OP = "tucker_conv2d"

Fixed = tuple[Pair, Quad, Pair, str | None, bool]
Sizes = tuple[int, int, int, int, int, int]


def normal_form(
    input: Tensor,
    u_in: Tensor,
    core: Tensor,
    u_out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    activation: Any,
    precise: Any,
) -> tuple[Fixed, Sizes]:
    """Check every argument against every other.

    Returns:
        (stride, padding, dilation, activation, precise) in normal form, and the sizes that hold for all batches and
        maps: (C, rank_in, rank_out, K, R, S).

    Raises:
        TypeError, ValueError: as ``tucker_conv2d`` documents them.
    """
    checks.tensor(OP, "input", input, 4, "[N, C, H, W]")
    checks.tensor(OP, "u_in", u_in, 2, "[C, rank_in]")
    checks.tensor(OP, "core", core, 4, "[rank_out, rank_in, R, S]")
    checks.tensor(OP, "u_out", u_out, 2, "[K, rank_out]")
    if bias is not None:
        checks.tensor(OP, "bias", bias, 1, "[K]")
    if residual is not None:
        checks.tensor(OP, "residual", residual, 4, "[N, K, OH, OW]")
    others = {"u_in": u_in, "core": core, "u_out": u_out, "bias": bias, "residual": residual}
    checks.same_kind(OP, "input", input, others)

    C, H, W = input.shape[1:]
    rank_out, rank_in, R, S = core.shape
    K = u_out.shape[0]
    if min(rank_out, rank_in, R, S) < 1:
        raise ValueError(f"{OP}: core must be [rank_out, rank_in, R, S] with no empty side, got {list(core.shape)}")
    if C < 1:
        raise ValueError(f"{OP}: input must be [N, C, H, W] with C at least 1, got {list(input.shape)}")
    if tuple(u_in.shape) != (C, rank_in):
        raise ValueError(
            f"{OP}: u_in must be [C, rank_in] with C = input.shape[1] = {C} and rank_in = core.shape[1] = {rank_in}, "
            f"got {list(u_in.shape)}"
        )
    if K < 1 or u_out.shape[1] != rank_out:
        raise ValueError(
            f"{OP}: u_out must be [K, rank_out] with K at least 1 and rank_out = core.shape[0] = {rank_out}, "
            f"got {list(u_out.shape)}"
        )
    if bias is not None and bias.shape[0] != K:
        raise ValueError(f"{OP}: bias must be [K] with K = u_out.shape[0] = {K}, got {list(bias.shape)}")

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
    sizes = tuple(operator.index(size) for size in (C, rank_in, rank_out, K, R, S))
    return (stride, padding, dilation, activation, bool(precise)), sizes  # type: ignore[return-value]


def known_maps(input: Tensor) -> tuple[int, int, int] | None:
    """(N, H, W) of a call on a GPU; None elsewhere, and where the call is traced and must choose for all sizes."""
    if torch.compiler.is_compiling() or input.device.type != "cuda":
        return None
    N, _, H, W = input.shape
    return (N, H, W) if all(type(size) is int for size in (N, H, W)) else None
