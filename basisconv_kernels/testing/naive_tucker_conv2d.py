"""``tucker_conv2d`` by its definition: the dense filter rebuilt, then a convolution as loops over single numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from basisconv_kernels.testing.tucker_conv2d import TuckerCase


def forward(
    case: TuckerCase,
    input: Tensor,
    u_in: Tensor,
    core: Tensor,
    u_out: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The op on Python floats, that is in float64, for maps of a few pixels; no rounding to the dtype.

    Returns:
        Tensor[N, K, OH, OW]: float64 on the CPU.
    """
    p = case.problem
    top, _, left, _ = p.padding
    oh, ow = p.output_size
    image = input.tolist()
    weight = dense_weight(u_in, core, u_out).tolist()
    out = torch.empty(p.N, p.K, oh, ow, dtype=torch.float64)
    for n in range(p.N):
        for k in range(p.K):
            for y in range(oh):
                for x in range(ow):
                    total = 0.0 if bias is None else float(bias[k])
                    total += 0.0 if residual is None else float(residual[n, k, y, x])
                    for r in range(p.R):
                        for s in range(p.S):
                            row = y * p.stride[0] + r * p.dilation[0] - top
                            column = x * p.stride[1] + s * p.dilation[1] - left
                            if 0 <= row < p.H and 0 <= column < p.W:
                                for c in range(p.C):
                                    total += weight[k][c][r][s] * image[n][c][row][column]
                    if p.activation is not None:
                        total = max(total, 0.0)
                    if p.activation == "relu6":
                        total = min(total, 6.0)
                    out[n, k, y, x] = total
    return out


def dense_weight(u_in: Tensor, core: Tensor, u_out: Tensor) -> Tensor:
    """``weight[k,c,r,s] = Σ_{o,i} u_out[k,o]·core[o,i,r,s]·u_in[c,i]`` in float64, as loops over the ranks."""
    (C, _), (rank_out, rank_in, R, S), K = u_in.shape, core.shape, u_out.shape[0]
    weight = torch.zeros(K, C, R, S, dtype=torch.float64)
    for o in range(rank_out):
        for i in range(rank_in):
            outer = u_out[:, o].double()[:, None] * u_in[:, i].double()[None, :]
            weight += outer[:, :, None, None] * core[o, i].double()
    return weight
