"""``bitpack`` in Triton: the kernel of ``_packing``, which also packs real filters for the convolutions."""

from __future__ import annotations

from torch import Tensor

from basisconv_kernels.triton_kernels import _packing


def forward(input: Tensor, value: Tensor | None, flip: Tensor | None, planes: int, codes: bool) -> Tensor:
    """Words [N, planes, H, W, ⌈C/32⌉] of maps [N, C, H, W], arguments checked; see ``_packing.packed``."""
    return _packing.packed(input, value, flip, planes, codes)
