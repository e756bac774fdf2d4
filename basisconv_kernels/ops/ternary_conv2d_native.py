"""The native torch ops of ``ternary_conv2d``: calling them, packing for them, and what torch must know about them."""

from __future__ import annotations

from torch import Tensor


def ternary_conv2d_pack(planes: Tensor, channels: int, *, groups: int = 1) -> Tensor | None:
    """X."""
    return None
