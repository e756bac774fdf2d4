"""``basis_conv2d`` as loops over single numbers: slow, obvious, and free of every convolution of PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from basisconv_kernels.testing.cases import Case


def forward(
    case: Case,
    input: Tensor,
    basis_weight: Tensor,
    coefficients: Tensor,
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
    image, filters, mixing = input.tolist(), basis_weight.tolist(), coefficients.tolist()
    channels, maps_of_group, outputs_of_group = p.C // p.groups, p.Q // p.groups, p.K // p.groups

    def basis_map(n: int, q: int, y: int, x: int) -> float:
        first = q // maps_of_group * channels
        total = 0.0
        for c in range(channels):
            for r in range(p.R):
                for s in range(p.S):
                    row = y * p.stride[0] + r * p.dilation[0] - top
                    column = x * p.stride[1] + s * p.dilation[1] - left
                    if 0 <= row < p.H and 0 <= column < p.W:
                        total += filters[q][c][r][s] * image[n][first + c][row][column]
        return total

    out = torch.empty(p.N, p.K, oh, ow, dtype=torch.float64)
    for n in range(p.N):
        for y in range(oh):
            for x in range(ow):
                maps = [basis_map(n, q, y, x) for q in range(p.Q)]
                for k in range(p.K):
                    first = k // outputs_of_group * maps_of_group if p.compact else 0
                    value = sum(a * maps[first + i] for i, a in enumerate(mixing[k]))
                    value += 0.0 if bias is None else float(bias[k])
                    value += 0.0 if residual is None else float(residual[n, k, y, x])
                    if p.activation is not None:
                        value = max(value, 0.0)
                    if p.activation == "relu6":
                        value = min(value, 6.0)
                    out[n, k, y, x] = value
    return out
