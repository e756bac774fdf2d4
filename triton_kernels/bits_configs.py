"""Which tile a convolution with filters of bits runs on: a table as data, and pure functions that choose from it.

Nothing here needs Triton or a GPU. BM pixels, BL output filters, BK channels a step, a multiple of the 32 channels of a
word. Every row is compiled ahead of time in ``tests/triton/test_bits_ahead_of_time.py``; no row may spill.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from basisconv_kernels.triton_kernels.configs import FLOAT32, HALF, PROGRAMS_A_CORE, TF32, Device

WORD = 32
LARGE, SMALL = 128 * 128, 64 * 64  # sums of a tile: the most, and the most of one whose addresses are not simple
LEAST_UNIT = 16  # bits of a unit, and
WIDE_LOAD = 16  # bytes of a load, below which addresses take more registers


class BitsTile(NamedTuple):
    """One row of a table."""

    BM: int
    BL: int
    BK: int
    warps: int
    stages: int


# Filters are the first operand of the product, which the matrix instruction of a Hopper reads from registers, 64 rows
# at least. Four warps: with eight GPUs have computed flattened loops wrongly. The largest first.
HOPPER_PRODUCTS: dict[str, tuple[BitsTile, ...]] = {
    HALF: (
        BitsTile(128, 128, 64, 4, 4),
        BitsTile(64, 128, 64, 4, 4),
        BitsTile(128, 64, 64, 4, 4),
        BitsTile(64, 64, 64, 4, 4),
        BitsTile(32, 64, 64, 4, 4),
    ),
    TF32: (BitsTile(64, 64, 32, 4, 3), BitsTile(32, 64, 32, 4, 3)),
    FLOAT32: (BitsTile(32, 64, 32, 4, 2),),
}
# Before: accumulators and both operands share the registers.
PRODUCTS: dict[str, tuple[BitsTile, ...]] = {
    **HOPPER_PRODUCTS,
    HALF: (
        BitsTile(64, 128, 64, 4, 3),
        BitsTile(128, 64, 64, 4, 3),
        BitsTile(64, 64, 64, 4, 3),
        BitsTile(32, 64, 64, 4, 3),
    ),
}
# Pixels that become numbers in registers too take room beside the filters: signs of real ones, and bits.
SIGNS, BITS = "signs", "bits"
_OF_SIGNS = (BitsTile(64, 128, 64, 4, 3), BitsTile(64, 64, 64, 4, 3), BitsTile(32, 64, 64, 4, 3))
for _table in (HOPPER_PRODUCTS, PRODUCTS):
    _table.update({SIGNS: _OF_SIGNS, BITS: _OF_SIGNS[2:]})
# Popcounts: BK channels are the words that a step adds up.
COUNTS: tuple[BitsTile, ...] = (BitsTile(32, 64, 64, 4, 1), BitsTile(32, 32, 64, 4, 1))


def product_tile(kind: str, C: int, filters: int, pixels: int, device: Device, most: int = LARGE) -> BitsTile:
    """The tile for C channels and so many output filters of a group, and N·OH·OW pixels, from the list of a kind.

    Of the rows no wider than the filters the first whose tiles keep every multiprocessor busy, else the last.

    Args:
        most: the largest BM·BL, see ``most_sums``.
    """
    rows = (HOPPER_PRODUCTS if device.capability >= (9, 0) else PRODUCTS)[kind]
    narrow = min(row.BL for row in rows)
    fitting = [row for row in rows if max(narrow, filters) >= row.BL and most >= row.BM * row.BL]
    wanted = PROGRAMS_A_CORE * device.cores
    for row in fitting:
        if math.ceil(pixels / row.BM) * math.ceil(filters / row.BL) >= wanted:
            return fitted(row, C, most)
    return fitted(fitting[-1], C, most)


def most_sums(load: int, unit: int, far: bool, channels_last: bool) -> int:
    """The largest BM·BL: addresses take registers, and where they are not simple larger tiles would spill.

    Args:
        load: bytes of the widest load of pixels.
        unit: bits of a unit, see ``unit``.
        far: whether offsets have 64 bits.
        channels_last: the layout of the result.
    """
    if load < WIDE_LOAD:
        return SMALL // 2
    return SMALL if far or unit < LEAST_UNIT or not channels_last else LARGE


def fitted(tile: BitsTile, C: int, most: int) -> BitsTile:
    """The tile no deeper than its problem, nor than a word where pixels are loaded in small pieces."""
    words = 1 if most < SMALL else math.ceil(C / WORD)
    return tile._replace(BK=min(tile.BK, WORD << (words - 1).bit_length()))


def count_tile(filters: int, pixels: int, device: Device) -> BitsTile:
    """The tile of the popcount kernel."""
    large, small = COUNTS
    blocks = math.ceil(pixels / large.BM) * math.ceil(filters / large.BL)
    return large if filters > small.BL and blocks >= PROGRAMS_A_CORE * device.cores else small


def unit(channels: int, parts: int) -> int:
    """Bits of a unit where ``parts`` runs of ``channels`` channels lie one behind the other."""
    return math.gcd(channels, WORD) if parts > 1 else WORD
