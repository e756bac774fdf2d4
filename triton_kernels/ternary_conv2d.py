"""``ternary_conv2d`` in Triton: the products of ``_signed_conv2d`` with filters of two planes."""

from __future__ import annotations

from torch import Tensor

from basisconv_kernels.triton_kernels import _signed_conv2d as signed
from basisconv_kernels.triton_kernels._signed_conv2d import Kind, Operands


def forward(operands: Operands, kind: Kind) -> Tensor:
    """``act(scale·Σ₊ − negative_scale·Σ₋ + bias)``; filters are the planes [K, 2, R, S, words]."""
    return signed.forward(operands._replace(filters=operands.filters.contiguous()), kind._replace(ternary=True))
