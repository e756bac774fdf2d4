"""Maps and filters as words of 32 channels: signs, comparisons with thresholds, or few-bit codes.

A program packs one word of BP pixels, read with any strides. Layouts: input [N, C, H, W] with any strides; words
[N, planes, H, W, words], dense, whose bits behind the last channel are 0.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from basisconv_kernels.core.packed import words_for
from basisconv_kernels.triton_kernels._bits import joined
from basisconv_kernels.triton_kernels._common import jit, located, wide

BP = 128  # pixels of a program


@jit
def packing_forward(
    input, value, flip, out,
    pixels, C, OH, OW, words, input_n, input_c, input_y, input_x,
    BP: tl.constexpr, PLANES: tl.constexpr, CODES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program one word of BP pixels, on the x axis of the grid, the words of a pixel side by side."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    word = program % words
    pixel = program // words * BP + tl.arange(0, BP)
    live = pixel < pixels
    n, y, x = located(pixel, OH, OW)
    c = word * 32 + tl.arange(0, 32)
    inside = live[:, None] & (c < C)[None, :]
    at = (n * input_n + y * input_y + x * input_x)[:, None] + (c * input_c)[None, :]
    found = tl.load(input + at, mask=inside, other=0)
    if CODES:
        most: tl.constexpr = (1 << PLANES) - 1
        if found.dtype.is_floating():
            found = found.to(tl.float32)
            found = tl.where(found > 0, found, 0.0)  # NaN too
            found = tl.where(found < most, found, most)
            found = (found + 8388608.0) - 8388608.0  # at 2²³ numbers are whole: rounded half to even
        else:
            found = tl.minimum(tl.maximum(found, 0), most)
        codes = found.to(tl.int32)
        for plane in tl.static_range(PLANES):
            rows = ((n * PLANES + plane) * OH + y) * OW + x
            bits = inside & (((codes >> plane) & 1) != 0)
            packed = tl.reshape(joined(bits, BP, 32), (BP,))
            tl.store(out + rows * words + word, packed, mask=live)
    else:
        if value is not None:
            bound = tl.load(value + c, mask=c < C, other=0)[None, :]
            falls = tl.load(flip + c, mask=c < C, other=0).to(tl.int1)[None, :]
            bits = (falls & (found <= bound)) | (~falls & (found >= bound))
        else:
            bits = found >= 0
        packed = tl.reshape(joined(bits & inside, BP, 32), (BP,))
        tl.store(out + pixel * words + word, packed, mask=live)


def packed(input: Tensor, value: Tensor | None, flip: Tensor | None, planes: int, codes: bool) -> Tensor:
    """Words [N, planes, H, W, ⌈C/32⌉] of maps [N, C, H, W], arguments checked.

    Args:
        value, flip: of a threshold, for signs.
        planes, codes: 1 and False for signs; codes of 1 to 4 bits.
    """
    N, C, H, W = input.shape
    words = words_for(C)
    out = torch.empty((N, planes, H, W, words), dtype=torch.int32, device=input.device)
    pixels = N * H * W
    if out.numel() == 0:
        return out
    packing_forward[(-(-pixels // BP) * words,)](
        input, value, flip, out,
        pixels, C, H, W, words, input.stride(0), input.stride(1), input.stride(2), input.stride(3),
        BP=BP, PLANES=planes, CODES=codes, WIDE=wide(pixels * words, input, out), num_warps=4,
    )  # fmt: skip
    return out


def filters_as_words(weight: Tensor) -> Tensor:
    """Signs of real filters [K, C/G, R, S] as words [K, 1, R, S, words]; words as they are."""
    return weight.contiguous() if weight.dtype == torch.int32 else packed(weight.detach(), None, None, 1, False)
