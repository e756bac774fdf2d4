"""``stacked_binary_conv2d`` as loops over single numbers: slow, obvious, and free of every convolution of PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def forward(
    problem: Any, values: Tensor, bank: Tensor, index: Tensor, scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The op on Python floats, map by map as the paper tells it; ``values`` are what enters the sums.

    Returns:
        Tensor[N, K, OH, OW]: float64 on the CPU.
    """
    p = problem
    top, _, left, _ = p.padding
    oh, ow = p.output_size
    image, filters, chosen = values.tolist(), bank.tolist(), index.tolist()
    outputs_of_group = p.K // p.groups

    def bank_map(n: int, part: int, j: int, y: int, x: int) -> float:
        total = 0.0
        for c in range(p.low):
            for r in range(p.R):
                for s in range(p.S):
                    row = y * p.stride[0] + r * p.dilation[0] - top
                    column = x * p.stride[1] + s * p.dilation[1] - left
                    if 0 <= row < p.H and 0 <= column < p.W:
                        total += filters[j][c][r][s] * image[n][part * p.low + c][row][column]
        return total

    out = torch.empty(p.N, p.K, oh, ow, dtype=torch.float64)
    for n in range(p.N):
        for y in range(oh):
            for x in range(ow):
                for k in range(p.K):
                    first = k // outputs_of_group * p.splits
                    value = sum(bank_map(n, first + i, chosen[k][i], y, x) for i in range(p.splits))
                    value = value * (1.0 if scale is None else float(scale[k]))
                    value += 0.0 if bias is None else float(bias[k])
                    if p.activation is not None:
                        value = max(value, 0.0)
                    if p.activation == "relu6":
                        value = min(value, 6.0)
                    out[n, k, y, x] = value
    return out
