"""``binary_conv2d`` in Triton: popcounts of packed maps, and matrix instructions on unpacked signs for real ones.

**Popcounts** (packed input). A program owns BM pixels in the order (n, oy, ox) and BL filters of one group, and adds up
words. Signs by XOR, over the taps inside the image alone, which a mask a pixel picks::

    Σ a·w = L − 2·Σ popc((a ⊕ w) ∧ inside)      L: channels times taps inside

Bits behind the last channel are 0 in both. Codes by AND, b their planes; pixels outside are 0, nothing is masked::

    Σ a·w = Σ_b 2^b·(2·Σ popc(a_b ∧ w) − Σ popc(a_b))

Padding with ±1 reads words of ones or zeros there, and L counts all taps. The words of a pixel hold all groups; where
these end inside a word, two neighbours are shifted together.

Popcounts run on a sixteenth of the lanes that products of matrix instructions have; they are what Triton has for one
bit. Real input is not packed first: its signs are multiplied as float16 (``_signed_conv2d``), exact below 2²⁴.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from basisconv_kernels.core.packed import words_for
from basisconv_kernels.triton_kernels import _packing, bits_configs
from basisconv_kernels.triton_kernels import _signed_conv2d as signed
from basisconv_kernels.triton_kernels._bits import first_bits, set_bits, store_sums
from basisconv_kernels.triton_kernels._common import jit, located, wide
from basisconv_kernels.triton_kernels._launch import Launch
from basisconv_kernels.triton_kernels._signed_conv2d import Kind, Operands, Plan


@triton.jit
def group_word(at, word, shift, inside, words, C, SHIFTED: tl.constexpr, first_word):
    """Word ``word`` of a group's channels [BM]: bits behind its last channel, and words not ``inside``, are 0.

    Args:
        at: [BM] addresses of the pixels' first words.
        shift, first_word: where the group begins.
        words: of a pixel.
    """
    here = first_word + word
    low = tl.load(at + here, mask=inside & (here < words), other=0)
    if SHIFTED:
        next = tl.load(at + here + 1, mask=inside & (here + 1 < words), other=0)
        low = low.to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
        high = (next.to(tl.uint32, bitcast=True) << 1) << (31 - shift).to(tl.uint32)
        low = (low | high).to(tl.int32, bitcast=True) & first_bits(C - word * 32)
    return low


@jit
def binary_conv2d_counts(
    input, filters, scale, bias, pixel_scale, value, flip, out,
    pixels, C, K, words, group_words, out_words, H, W, OH, OW, R, S, stride_y, stride_x, top, left,
    dilation_y, dilation_x, GROUPS,
    input_n, input_y, input_x, input_p, filter_k, scale_k, bias_k, out_n, out_k, out_y, out_x,
    BM: tl.constexpr, BL: tl.constexpr, STEP: tl.constexpr, PLANES: tl.constexpr, CODES: tl.constexpr,
    SHIFTED: tl.constexpr, PAD: tl.constexpr, OUTPUT: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program an output tile, on the x axis of the grid, tiles of the same pixels side by side; see the head."""
    # Locate.
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    tiles_k = tl.cdiv(K, BL)  # of a group
    chunk = program % (tiles_k * GROUPS)
    group = chunk // tiles_k
    first_k = (chunk % tiles_k) * BL
    pixel = program // (tiles_k * GROUPS) * BM + tl.arange(0, BM)
    live = pixel < pixels
    n, oy, ox = located(pixel, OH, OW)
    iy = oy * stride_y - top
    ix = ox * stride_x - left
    k = first_k + tl.arange(0, BL)
    live_k = k < K
    k += group * K
    first_word = group * C // 32
    shift = group * C % 32

    # Count, plane by plane: a count that is shifted at once is no longer seen to be one.
    counts = tl.zeros((BM, BL), tl.int32)
    taps = tl.zeros((BM,), tl.int32)  # inside the image; of codes: Σ_b 2^b·popc(a_b)
    steps = tl.cdiv(group_words, STEP)
    for plane in range(PLANES):
        found = tl.zeros((BM, BL), tl.int32)
        seen = tl.zeros((BM,), tl.int32)
        for i in range(R * S * steps):
            tap = i // steps
            step = i - tap * steps
            y = iy + tap // S * dilation_y
            x = ix + tap % S * dilation_x
            inside = live & (y >= 0) & (y < H) & (x >= 0) & (x < W)
            at = input + (n * input_n + y * input_y + x * input_x) + plane * input_p
            reach = tl.where(inside, -1, 0)
            if not CODES:
                seen += tl.where(inside & (step == 0), 1, 0)
            for j in tl.static_range(STEP):
                word = step * STEP + j + tl.zeros((1,), tl.int32)
                w = tl.load(
                    filters + (k * filter_k + tap * group_words + word), mask=live_k & (word < group_words), other=0
                )
                a = group_word(at, word, shift, inside & (word < group_words), words, C, SHIFTED, first_word)
                if CODES:
                    found += set_bits(a[:, None] & w[None, :])
                    seen += set_bits(a)
                elif PAD == 0:
                    found += set_bits((a[:, None] ^ w[None, :]) & reach[:, None])
                else:
                    if PAD == 1:
                        a = tl.where(inside, a, first_bits(C - word * 32))
                    found += set_bits(a[:, None] ^ w[None, :])
        counts += found << plane
        taps += seen << plane

    # Epilogue.
    if CODES:
        v = 2 * counts - taps[:, None]
    elif PAD == 0:
        v = (taps * C)[:, None] - 2 * counts
    else:
        v = R * S * C - 2 * counts
    rows = n * out_n + oy * out_y + ox * out_x
    store_sums(
        v, k, live_k, pixel, live, rows, first_k // 32, out_words, out, out_k, scale, scale_k, bias, bias_k,
        pixel_scale, value, flip, OUTPUT, ACTIVATION, BM, BL,
    )  # fmt: skip


_plans: dict[tuple[Any, ...], Plan] = {}


def forward(operands: Operands, kind: Kind) -> Tensor:
    """Sums of signs or codes with signs, and what ``kind.output`` makes of them; filters are words or real numbers."""
    operands = operands._replace(filters=_packing.filters_as_words(operands.filters))
    if kind.output == "packed" and kind.groups > 1:  # tiles of filters end with a group, words do not
        sums = forward(operands._replace(value=None, flip=None), kind._replace(output="int32"))
        return _packing.packed(sums, operands.value, operands.flip, 1, False)
    if kind.encoding is None:
        _, _, R, S, _ = operands.filters.shape
        if kind.channels // kind.groups * R * S < signed.EXACT:
            return signed.forward(operands, kind._replace(binarize=True))
        words = _packing.packed(operands.input, None, None, 1, False)
        operands, kind = operands._replace(input=words), kind._replace(encoding="sign")
    return _counted(operands, kind)


def _counted(operands: Operands, kind: Kind) -> Tensor:
    key = (kind, *map(signed._seen, operands))
    plan = _plans.get(key)
    if plan is None:
        plan = _plan(operands, kind)
        if len(_plans) >= signed.MOST_PLANS:
            _plans.clear()
        _plans[key] = plan
    out = plan.result(operands.input.device)
    if plan.launch is not None:
        input, filters, _, scale, _, bias, pixel_scale, value, flip = operands
        plan.launch(input, filters, scale, bias, pixel_scale, value, flip, out)
    return out


def _plan(operands: Operands, kind: Kind) -> Plan:
    input, filters, _, scale, _, bias, *_ = operands
    N, H, W, K, OH, OW = signed.sizes_of(operands, kind)
    made = Plan(*signed.result_of(operands, kind), None)
    out = made.result("meta")
    if out.numel() == 0:
        return made
    C, filters_a_group, pixels = kind.channels // kind.groups, K // kind.groups, N * OH * OW
    tile = kind.tile or bits_configs.count_tile(filters_a_group, pixels, signed.device_under(operands))
    _, _, R, S, group_words = filters.shape
    input_n, input_p, input_y, input_x, _ = input.stride()
    steps = (out.stride(0), 0, out.stride(2), out.stride(3)) if kind.output == "packed" else out.stride()
    rest = (
        pixels, C, filters_a_group, input.shape[4], group_words, words_for(K), H, W, OH, OW, R, S, *kind.stride,
        kind.padding[0], kind.padding[2], *kind.dilation, kind.groups,
        input_n, input_y, input_x, input_p, R * S * group_words,
        *(0 if t is None else t.stride(0) for t in (scale, bias)), *steps,
        tile.BM, tile.BL, min(tile.BK // 32, group_words), input.shape[1], kind.encoding == "unsigned",
        kind.groups > 1, kind.padding_value, kind.output, kind.activation, wide(pixels, input, filters, out),
    )  # fmt: skip
    programs = -(-pixels // tile.BM) * -(-filters_a_group // tile.BL) * kind.groups
    return made._replace(launch=Launch(binary_conv2d_counts, programs, rest, num_warps=tile.warps))
