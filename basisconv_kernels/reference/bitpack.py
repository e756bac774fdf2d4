"""``bitpack`` and ``unpack`` in plain PyTorch: what the bits mean, and the fallback where no kernel runs."""

from __future__ import annotations

import torch
from torch import Tensor

from basisconv_kernels.core.packed import Threshold, pack_planes, unpack_planes


def forward(input: Tensor, threshold: Threshold | None, planes: int, encoding: str) -> Tensor:
    """``input`` [N, C, H, W] → words [N, planes, H, W, ⌈C/32⌉] (int32).

    sign: the bit is ``input >= 0``, or what ``threshold`` says; −0 gives 1 and NaN gives 0.
    unsigned: the bits of ``round(clamp(input, 0, 2^planes − 1))``, half to even, NaN as 0.
    """
    if encoding == "sign":
        bits = input >= 0 if threshold is None else threshold.bits(input)
        return pack_planes(bits[:, None])
    codes = quantized(input, planes)
    return pack_planes(torch.stack([(codes >> plane) & 1 for plane in range(planes)], dim=1).bool())


def quantized(input: Tensor, planes: int) -> Tensor:
    """The codes (int32) that the planes of an unsigned encoding hold."""
    clamped = input.clamp(0, 2**planes - 1)
    return (clamped.nan_to_num().round() if input.is_floating_point() else clamped).to(torch.int32)


def unpack(words: Tensor, channels: int, encoding: str) -> Tensor:
    """Words → values [N, C, H, W] (int32): ±1, or Σ 2^plane·bit."""
    bits = unpack_planes(words, channels)
    if encoding == "sign":
        return 2 * bits[:, 0] - 1
    values = bits[:, 0].clone()
    for plane in range(1, words.shape[1]):
        values += bits[:, plane] << plane
    return values
