"""``stacked_binary_conv2d`` in Triton: the products of ``_signed_conv2d`` with filters that are stacked in registers.

Each output adds up ``splits`` maps of the bank. Adding maps would take n/K of the products, but n maps of each split
had to be kept on chip and gathered, which Triton cannot; so a step looks up which bank filter stands in the channels
that it multiplies, and reads that filter's words. The bank stays n filters of bits in memory and in the caches.
"""

from __future__ import annotations

from torch import Tensor

from basisconv_kernels.triton_kernels import _packing
from basisconv_kernels.triton_kernels import _signed_conv2d as signed
from basisconv_kernels.triton_kernels._signed_conv2d import Kind, Operands


def forward(operands: Operands, kind: Kind) -> Tensor:
    """``act(scale·conv2d(input, Ŵ) + bias)``; filters are the bank, words [n, 1, R, S, words] or ±1 [n, cs, R, S]."""
    index = None if operands.index is None else operands.index.contiguous()
    operands = operands._replace(filters=_packing.filters_as_words(operands.filters), index=index)
    return signed.forward(operands, kind)
