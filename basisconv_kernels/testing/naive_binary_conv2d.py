"""``binary_conv2d`` as loops over single whole numbers: slow, obvious, and free of every convolution of PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from basisconv_kernels.reference.binary_conv2d_problem import BinaryConv2dProblem


def sums(problem: BinaryConv2dProblem, values: Tensor, signs: Tensor) -> Tensor:
    """The sums v, for maps of a few pixels.

    Args:
        problem: the geometry.
        values (Tensor[N, C, H, W]): whole numbers: ±1, or codes.
        signs (Tensor[K, C/groups, R, S]): ±1.

    Returns:
        Tensor[N, K, OH, OW]: int32.
    """
    p = problem
    top, _, left, _ = p.padding
    oh, ow = p.output_size
    image, filters = values.int().tolist(), signs.int().tolist()
    channels, outputs_of_group = p.C // p.groups, p.K // p.groups
    out = torch.empty(p.N, p.K, oh, ow, dtype=torch.int32)
    for n in range(p.N):
        for k in range(p.K):
            first = k // outputs_of_group * channels
            for y in range(oh):
                for x in range(ow):
                    total = 0
                    for c in range(channels):
                        for r in range(p.R):
                            for s in range(p.S):
                                row = y * p.stride[0] + r * p.dilation[0] - top
                                column = x * p.stride[1] + s * p.dilation[1] - left
                                inside = 0 <= row < p.H and 0 <= column < p.W
                                value = image[n][first + c][row][column] if inside else p.padding_value
                                total += value * filters[k][c][r][s]
                    out[n, k, y, x] = total
    return out


def words(bits: Tensor) -> list[list[list[list[list[int]]]]]:
    """Bits [N, planes, C, H, W] (0 or 1) as unsigned words [N][planes][H][W][⌈C/32⌉], by the text of the format."""
    N, planes, C, H, W = bits.shape
    values = bits.int().tolist()

    def word(n: int, plane: int, y: int, x: int, number: int) -> int:
        channels = range(32 * number, min(C, 32 * number + 32))
        return sum(values[n][plane][c][y][x] * 2 ** (c % 32) for c in channels)

    return [
        [[[[word(n, b, y, x, i) for i in range((C + 31) // 32)] for x in range(W)] for y in range(H)]
         for b in range(planes)]
        for n in range(N)
    ]  # fmt: skip
