"""What the Triton kernels of bits share: bits as operands of a product, counts, and what leaves as numbers or bits.

A word holds 32 channels, the lowest bit first (docs/packed_formats.md). A *unit* is a run of bits that never leaves a
word: 32 where operand and words begin at the same channel, a power of two below where they need not.

In 16 bits two neighbouring channels are made at once, as the halves of one 32-bit number, so that a channel costs two
instructions; the pairs meet in the register that a matrix instruction reads, and nothing is moved.
"""

from __future__ import annotations

import triton
import triton.language as tl

from basisconv_kernels.triton_kernels._common import activated

WORD = tl.constexpr(32)


@triton.jit
def _pairs(words, first, UNIT: tl.constexpr):
    """Two neighbouring bits a number, as bits 0 and 1: [rows, units, UNIT / 2].

    Args:
        words: [rows, units] int32; of each the bits from ``first`` [units] on.
    """
    words = words.to(tl.uint32, bitcast=True)
    if UNIT < WORD:
        words = words >> first.to(tl.uint32)[None, :]
    return (words[:, :, None] >> (tl.arange(0, UNIT // 2) * 2).to(tl.uint32)[None, None, :]) & 3


@triton.jit
def _halves(pairs, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TYPE: tl.constexpr):
    """Numbers of 16 bits [ROWS, COLUMNS], of which each 32-bit number holds two, the lower one first."""
    both = tl.join(pairs.to(tl.uint16), (pairs >> 16).to(tl.uint16))
    return tl.reshape(both, (ROWS, COLUMNS)).to(TYPE, bitcast=True)


@triton.jit
def _single(words, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr):
    """Which bits are set, one a number: [ROWS, COLUMNS]."""
    words = words.to(tl.uint32, bitcast=True)
    if UNIT < WORD:
        words = words >> first.to(tl.uint32)[None, :]
    bits = (words[:, :, None] >> tl.arange(0, UNIT).to(tl.uint32)[None, None, :]) & 1
    return tl.reshape(bits, (ROWS, COLUMNS)) != 0


@triton.jit
def signs_of(
    words, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr, ONE: tl.constexpr, TYPE: tl.constexpr
):
    """+1 where a bit is set, −1 elsewhere [ROWS, COLUMNS]; ``ONE`` is 1 in the bits of a 16-bit type, else 0."""
    if ONE == 0 or UNIT == 1:
        found = tl.where(_single(words, first, ROWS, COLUMNS, UNIT), 1.0, -1.0).to(TYPE)
    else:
        # Bits 0 and 1 go to 15 and 31, the signs, by a multiplication in which no two bits meet.
        signs = (_pairs(words, first, UNIT) * 0x40008000) & 0x80008000
        found = _halves(signs ^ (ONE * 0x10001 | 0x80008000), ROWS, COLUMNS, TYPE)
    return found


@triton.jit
def zeros_and_ones(
    words, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr, ONE: tl.constexpr, TYPE: tl.constexpr
):
    """1 where a bit is set, 0 elsewhere [ROWS, COLUMNS]; ``ONE`` as for ``signs_of``."""
    if ONE == 0 or UNIT == 1:
        found = tl.where(_single(words, first, ROWS, COLUMNS, UNIT), 1.0, 0.0).to(TYPE)
    else:
        found = _halves(((_pairs(words, first, UNIT) * 0x8001) & 0x10001) * ONE, ROWS, COLUMNS, TYPE)
    return found


@triton.jit
def either_of(
    plus,  # [ROWS, units] words of the plane of +
    minus,  # of the plane of −; no bit is set in both
    positive,  # [ROWS] what a weight of + is, in TYPE
    negative,  # [ROWS] what one of − is
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ONE: tl.constexpr,
    TYPE: tl.constexpr,
):
    """``positive``, ``negative`` or 0 [ROWS, COLUMNS]."""
    if ONE == 0:
        below = tl.where(_single(minus, None, ROWS, COLUMNS, WORD), negative[:, None], 0.0)
        found = tl.where(_single(plus, None, ROWS, COLUMNS, WORD), positive[:, None], below).to(TYPE)
    else:
        high = positive.to(TYPE).to(tl.uint16, bitcast=True).to(tl.uint32)[:, None, None]
        low = negative.to(TYPE).to(tl.uint16, bitcast=True).to(tl.uint32)[:, None, None]
        # Bits 0 and 1 go to 0 and 16, where they choose a half each.
        above = ((_pairs(plus, None, WORD) * 0x8001) & 0x10001) * high
        below = ((_pairs(minus, None, WORD) * 0x8001) & 0x10001) * low
        found = _halves(above | below, ROWS, COLUMNS, TYPE)
    return found


@triton.jit
def set_bits(words):
    """How many bits are set, by shifts and masks: what the compiler takes for the instruction ``popc``."""
    x = words.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def first_bits(count):
    """The word whose lowest ``count`` bits are set, of any count; below 1 none, from 32 on all."""
    some = (tl.full((), 1, tl.int32) << tl.minimum(tl.maximum(count, 0), 31)) - 1
    return tl.where(count >= 32, -1, some)


@triton.jit
def joined(bits, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Words [ROWS, COLUMNS / 32] of bits [ROWS, COLUMNS]."""
    apart = tl.reshape(bits.to(tl.int32), (ROWS, COLUMNS // 32, 32)) << tl.arange(0, 32)[None, None, :]
    return tl.xor_sum(apart, axis=2)


@triton.jit
def store_sums(
    v,  # [BM, BL] sums: int32, or float32 of real numbers and of whole ones below 2²⁴
    k,  # [BL] output filters
    live_k,  # [BL]
    pixel,  # [BM] number of the pixel
    live,  # [BM] pixels inside the result
    rows,  # [BM] offsets of the pixels in out
    first_word,  # of the tile in a pixel of packed results
    words,  # of such a pixel
    out,
    out_k,
    scale,
    scale_k,
    bias,
    bias_k,
    pixel_scale,
    value,
    flip,
    OUTPUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BL: tl.constexpr,
):
    """What leaves: ``act(v·scale·pixel_scale + bias)`` in float32, rounded once; v itself; or bits of it."""
    inside = live[:, None] & live_k[None, :]
    far_k = k.to(rows.dtype)[None, :]
    if OUTPUT == "packed":
        v = v.to(tl.int32)
        if value is not None:
            bound = tl.load(value + k, mask=live_k, other=0)[None, :]
            falls = tl.load(flip + k, mask=live_k, other=0).to(tl.int1)[None, :]
            bits = (falls & (v <= bound)) | (~falls & (v >= bound))
        else:
            bits = v >= 0
        word = first_word + tl.arange(0, BL // 32)
        at = out + (rows[:, None] + word.to(rows.dtype)[None, :])
        tl.store(at, joined(bits & live_k[None, :], BM, BL), mask=live[:, None] & (word < words)[None, :])
    elif OUTPUT == "int32":
        tl.store(out + (rows[:, None] + far_k * out_k), v.to(tl.int32), mask=inside)
    else:
        y = v.to(tl.float32)
        if scale is not None:
            y *= tl.load(scale + k * scale_k, mask=live_k, other=0.0).to(tl.float32)[None, :]
        if pixel_scale is not None:
            y *= tl.load(pixel_scale + pixel, mask=live, other=0.0).to(tl.float32)[:, None]
        if bias is not None:
            y += tl.load(bias + k * bias_k, mask=live_k, other=0.0).to(tl.float32)[None, :]
        y = activated(y, ACTIVATION)
        tl.store(out + (rows[:, None] + far_k * out_k), y.to(out.dtype.element_ty), mask=inside)
