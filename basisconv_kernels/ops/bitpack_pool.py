"""Max-pooling of maps whose signs are packed: unions and intersections of words, 32 channels at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from basisconv_kernels.core import checks
from basisconv_kernels.core.checks import Pair
from basisconv_kernels.core.packed import PackedTensor, check, pack_planes, words_for

OP = "packed_max_pool2d"


def packed_max_pool2d(
    packed: PackedTensor,
    kernel_size: int | Pair,
    *,
    stride: int | Pair | None = None,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    falling: Tensor | None = None,
) -> PackedTensor:
    """The signs of a max-pooled map, from the signs of the map.

    ``bit[n, c, y, x] = any bit of the window``, or ``all bits of the window`` in channels that are ``falling``

    Where the sign that follows the pool rises with its number, the largest number of a window has the bit 1 if any has;
    where it falls (behind a BatchNorm of negative weight), if all have. Pixels of the padding count for nothing.

    Args:
        packed (PackedTensor): signs [N, C, H, W].
        kernel_size, stride, padding, dilation: as in ``torch.nn.functional.max_pool2d``.
        falling (Tensor[C] of bool, or int32 words [⌈C/32⌉], optional): channels of the second kind; none by default.

    Returns:
        PackedTensor: signs [N, C, OH, OW]. No gradients.

    Raises:
        TypeError, ValueError: arguments that do not fit; the message names both sides.

    Example:
        >>> import torch
        >>> from basisconv_kernels import bitpack, packed_max_pool2d, unpack
        >>> x = torch.randn(1, 40, 8, 8)
        >>> pooled = packed_max_pool2d(bitpack(x), 2)
        >>> torch.equal(unpack(pooled), unpack(bitpack(torch.nn.functional.max_pool2d(x, 2))))
        True
    """
    if not isinstance(packed, PackedTensor):
        raise TypeError(f"{OP}: packed must be a PackedTensor, got {type(packed).__name__}")
    check(packed)
    if packed.encoding != "sign":
        raise ValueError(f"{OP}: packed must hold signs, got a PackedTensor of encoding {packed.encoding!r}")
    kernel, steps, around, spread = window(kernel_size, stride, padding, dilation)
    _, C, H, W = packed.shape
    OH, OW = checks.output_size(OP, (H, W), kernel, steps, (around[0], around[0], around[1], around[1]), spread)
    turned = falling_words(falling, C)
    words = packed.words if turned is None else packed.words ^ turned
    words = F.pad(words, (0, 0, around[1], around[1], around[0], around[0]))
    found: Tensor | None = None
    for r in range(kernel[0]):
        for s in range(kernel[1]):
            y, x = r * spread[0], s * spread[1]
            piece = words[:, :, y : y + (OH - 1) * steps[0] + 1 : steps[0], x : x + (OW - 1) * steps[1] + 1 : steps[1]]
            found = piece.contiguous() if found is None else found | piece
    if found is None:  # no window has no pixels
        raise ValueError(f"{OP}: kernel_size must be at least 1, got {kernel_size}")
    return PackedTensor(found if turned is None else found ^ turned, C)


def window(
    kernel_size: int | Pair, stride: int | Pair | None, padding: int | Pair, dilation: int | Pair
) -> tuple[Pair, Pair, Pair, Pair]:
    """(kernel, stride, padding, dilation) as pairs, checked as ``max_pool2d`` does."""
    kernel = checks.pair(OP, "kernel_size", kernel_size, at_least=1)
    steps = kernel if stride is None else checks.pair(OP, "stride", stride, at_least=1)
    around = checks.pair(OP, "padding", padding, at_least=0)
    if any(2 * p > k for p, k in zip(around, kernel, strict=True)):
        raise ValueError(f"{OP}: padding must be at most half of kernel_size = {kernel}, got {around}")
    return kernel, steps, around, checks.pair(OP, "dilation", dilation, at_least=1)


def falling_words(falling: Tensor | None, channels: int) -> Tensor | None:
    """The channels as the bits of words, zero behind the last."""
    if falling is None:
        return None
    if falling.dtype == torch.bool and tuple(falling.shape) == (channels,):
        return pack_planes(falling[None, None, :, None, None]).reshape(-1)
    if falling.dtype != torch.int32 or tuple(falling.shape) != (words_for(channels),):
        raise ValueError(
            f"{OP}: falling must be bool [{channels}], or int32 words [{words_for(channels)}], got {falling.dtype} "
            f"{list(falling.shape)}"
        )
    return falling
