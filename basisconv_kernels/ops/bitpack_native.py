"""The native torch op of ``bitpack``: calling it, and what torch must know about it."""

from __future__ import annotations

import torch
from torch import Tensor

from basisconv_kernels.core import extension
from basisconv_kernels.core.autograd import call_raw, register_without_gradient
from basisconv_kernels.core.packed import Threshold, words_for

OP = "bitpack"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32)
PRESENT = extension.load() is None


def forward(input: Tensor, threshold: Threshold | None, planes: int, encoding: str) -> Tensor:
    """The torch op that C++ registers for the CPU and for CUDA."""
    value, flip = (None, None) if threshold is None else (threshold.value, threshold.flip)
    arguments = (input, value, flip, planes, encoding == "unsigned")
    return call_raw(torch.ops.basisconv.bitpack.default, *arguments)


def _fake(input: Tensor, threshold: Tensor | None, flip: Tensor | None, bits: int, codes: bool) -> Tensor:
    N, C, H, W = input.shape
    return input.new_empty((N, bits, H, W, words_for(C)), dtype=torch.int32)


if PRESENT:
    register_without_gradient("bitpack", OP, _fake)
