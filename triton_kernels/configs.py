"""Which tile a call of ``basis_conv2d`` runs on: a table as data, and pure functions that choose from it.

Nothing here needs Triton or a GPU. Sizes are powers of two: BM pixels, BQ ≥ Q basis filters on chip, BK channels a
step, BL outputs a chunk of the second stage. Registers, shared memory and instructions of every row, compiled ahead of
time, stand in ``tests/triton/compiled.json``; no row may spill.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

SMALLEST = 16  # side of a matrix instruction's operand
PROGRAMS_A_CORE = 2.0  # below that many tiles a multiprocessor, smaller ones
MOST_WARPS = 4  # of a program: with eight GPUs have computed flattened loops of taps and channels wrongly


class Tile(NamedTuple):
    """One row of the table."""

    BM: int
    BQ: int
    BK: int
    BL: int
    warps: int
    stages: int


class Device(NamedTuple):
    """What the choice sees of a GPU; ``cores`` are multiprocessors, ``shared`` bytes of shared memory a program."""

    capability: tuple[int, int]
    cores: int
    shared: int


HOPPER = Device((9, 0), 132, 227 * 1024)  # H100 SXM, H200

# Arithmetic of the two products: 16-bit operands, TF32, or exact float32 without matrix instructions.
HALF, TF32, FLOAT32 = "half", "tf32", "float32"


def arithmetic_of(dtype: torch.dtype, precise: bool) -> str:
    """The arithmetic of a call: TF32 for float32 exactly where cuDNN's convolutions would use it."""
    if dtype != torch.float32:
        return FLOAT32 if precise else HALF
    tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return TF32 if tf32 and not precise else FLOAT32


def input_precision(arithmetic: str) -> str:
    """What Triton's products of float32 operands are asked for; 16-bit operands are exact in any case."""
    return "tf32" if arithmetic == TF32 else "ieee"


# Each list: the largest BM first; where tiles are too few for the device, the next smaller one is taken.
POINTERS: dict[str, tuple[Tile, ...]] = {
    HALF: (
        Tile(128, 16, 64, 64, 4, 3),
        Tile(64, 16, 64, 64, 4, 3),
        Tile(128, 32, 64, 64, 4, 3),
        Tile(64, 32, 128, 64, 4, 3),
        Tile(64, 64, 64, 64, 4, 4),
        Tile(64, 128, 64, 64, 4, 3),
        Tile(64, 256, 32, 32, 4, 3),
    ),
    TF32: (
        Tile(64, 16, 32, 32, 4, 3),
        Tile(64, 32, 32, 32, 4, 3),
        Tile(64, 64, 32, 32, 4, 3),
        Tile(64, 128, 32, 32, 4, 3),
    ),
    FLOAT32: (
        Tile(64, 16, 16, 32, 4, 2),
        Tile(64, 32, 16, 32, 4, 2),
        Tile(32, 64, 16, 32, 4, 2),
    ),
}


def fitted(tile: Tile, C: int, K: int, arithmetic: str, device: Device) -> Tile:
    """The tile no wider than its problem, with as many stages as the shared memory of the device holds."""
    tile = tile._replace(BK=min(tile.BK, power_of_two(C)), BL=min(tile.BL, power_of_two(K)))
    size = 2 if arithmetic == HALF else 4
    stage = max((tile.BM + tile.BQ) * tile.BK, tile.BL * tile.BQ) * size
    return tile._replace(stages=max(2, min(tile.stages, device.shared // stage)))


def power_of_two(size: int, least: int = SMALLEST) -> int:
    """The smallest power of two that is at least ``size`` and ``least``."""
    return max(least, 1 << (size - 1).bit_length())


def pointer_tile(arithmetic: str, Q: int, C: int, K: int, pixels: int, device: Device) -> tuple[Tile, bool]:
    """The tile of the pointer kernel for Q basis filters and C channels of a group, and whether Z is computed in parts.

    Args:
        pixels: N·OH·OW.
    """
    rows = POINTERS[arithmetic]
    BQ = power_of_two(Q)
    fitting = [row for row in rows if BQ == row.BQ]
    split = not fitting
    if split:
        widest = max(row.BQ for row in rows if row.BQ <= BQ)
        fitting = [row for row in rows if widest == row.BQ]
    tile = largest_that_fills(fitting, pixels, device)
    return fitted(tile, C, K, arithmetic, device), split


def largest_that_fills(rows: Sequence[Tile], pixels: int, device: Device, programs: float = PROGRAMS_A_CORE) -> Tile:
    """The first row with so many tiles a multiprocessor, else the last: the one with the smallest BM."""
    for row in rows:
        if -(-pixels // row.BM) >= programs * device.cores:
            return row
    return rows[-1]


# --- the descriptor path ----------------------------------------------------------------------------------------------

DESCRIPTORS_FROM = (9, 0)  # compute capability of the first tensor memory unit
MANY_PIXELS = 20_000  # of the output
DESCRIPTOR_BYTES = 16  # bases and strides are multiples of it

# Zᵀ has BQ rows: 64 are the fewest of a matrix instruction of four warps. Those of 16 bits come from a sweep of up to
# 26 tiles on each of 19 layers of an H200; one image of 64 or 128 channels was not among these, nor were 64 filters on
# maps from 56² on.
DESCRIPTORS: dict[str, tuple[Tile, ...]] = {
    HALF: (
        Tile(128, 64, 64, 64, 4, 4),
        Tile(64, 64, 64, 64, 4, 3),
        Tile(32, 64, 128, 64, 4, 4),
        Tile(16, 64, 128, 64, 4, 5),
        Tile(128, 128, 64, 64, 4, 3),
        Tile(64, 128, 64, 64, 4, 5),
        Tile(16, 128, 128, 64, 4, 5),
        Tile(64, 256, 64, 64, 4, 5),
        Tile(16, 256, 64, 64, 4, 5),
    ),
    TF32: (
        Tile(128, 64, 32, 32, 4, 4),
        Tile(64, 64, 32, 32, 4, 4),
        Tile(64, 128, 32, 32, 4, 3),
    ),
}
DESCRIPTOR_PROGRAMS_A_CORE = {HALF: 0.7, TF32: PROGRAMS_A_CORE}  # the first by that sweep


class Box(NamedTuple):
    """Output pixels of one program: images × rows × columns."""

    BN: int
    TH: int
    TW: int


def against_descriptors(
    arithmetic: str,
    C: int,
    Q: int,
    map_size: tuple[int, int],
    stride: tuple[int, int],
    groups: int,
    capability: tuple[int, int],
) -> str | None:
    """Why a call cannot take the descriptor path, apart from how its tensors lie in memory; None where it can."""
    if capability < DESCRIPTORS_FROM:
        return "no tensor memory unit before compute capability {}.{}".format(*DESCRIPTORS_FROM)
    rows = DESCRIPTORS.get(arithmetic)
    if rows is None:
        return "exact float32 products use no matrix instructions"
    if arithmetic == TF32 and capability >= (10, 0):
        return "TF32 through descriptors spills registers there"
    if groups > 1:
        return "the basis has groups"
    if all(row.BQ < Q for row in rows):
        return f"more than {max(row.BQ for row in rows)} basis filters"
    aligned = DESCRIPTOR_BYTES // (2 if arithmetic == HALF else 4)
    if C % aligned:
        return f"C is no multiple of {aligned}"
    if stride == (1, 1):
        return None
    if stride != (2, 2):
        return "a stride that is neither 1 nor 2"
    if C % SMALLEST:
        return f"stride 2 with C no multiple of {SMALLEST}"
    if map_size[0] % 2 or map_size[1] % 2:
        return "stride 2 on an odd map"
    return None


def pointers_are_faster(arithmetic: str, Q: int, pixels: int) -> bool:
    """Where the descriptor path may run and the other one is quicker: few filters, which it pads to 64, many pixels.

    On an H200 64→16→64 at 56² took 24 µs instead of 35, 64→32→64 27 instead of 32, 128→32→128 at 28² 16 instead of 19,
    each at batch 32; at batch 1 only the descriptor path was measured.
    """
    return arithmetic == HALF and Q <= 32 and pixels >= MANY_PIXELS


def descriptor_tile(arithmetic: str, Q: int, C: int, K: int, pixels: int, stride: int, device: Device) -> Tile:
    """The tile of the descriptor kernel where ``against_descriptors`` has nothing against it."""
    rows = DESCRIPTORS[arithmetic]
    BQ = min(row.BQ for row in rows if row.BQ >= Q)
    programs = DESCRIPTOR_PROGRAMS_A_CORE[arithmetic]
    tile = largest_that_fills([row for row in rows if BQ == row.BQ], pixels, device, programs)
    if stride == 2:  # a block must not reach into the other plane's channels
        tile = tile._replace(BK=min(tile.BK, C & -C))
    return fitted(tile, C, K, arithmetic, device)


def box(BM: int, N: int, OH: int, OW: int) -> Box:
    """The box of BM pixels whose grid computes the fewest pixels in vain; among equals the squarest, of few images."""
    found = []
    for high in range(BM.bit_length()):
        for wide in range(BM.bit_length() - high):
            TH, TW = 1 << high, 1 << wide
            BN = BM // (TH * TW)
            covered = -(-N // BN) * BN * -(-OH // TH) * TH * -(-OW // TW) * TW
            found.append((covered, BN, abs(high - wide), -TW, Box(BN, TH, TW)))
    return min(found)[-1]


# --- tucker_conv2d in one pass ----------------------------------------------------------------------------------------

LARGEST_RANK = 64  # of both: the sums of M and Z are registers
# Pixels, channels a step, outputs a chunk.
ONE_PASS: dict[str, tuple[int, int, int]] = {HALF: (64, 32, 64), TF32: (32, 32, 32), FLOAT32: (32, 16, 32)}


def against_one_pass(arithmetic: str, rank_in: int, rank_out: int, precise: bool) -> str | None:
    """Why the chain of ``tucker_conv2d`` cannot run in one pass; None where it can."""
    largest = LARGEST_RANK // 2 if arithmetic == FLOAT32 else LARGEST_RANK
    if max(rank_in, rank_out) > largest:
        return f"a rank above {largest}"
    return "M and Z in float32" if precise else None


# --- gradients --------------------------------------------------------------------------------------------------------

# Blocks of the gradient kernels: pixels, basis filters, channels or outputs.
GRADIENTS: dict[str, tuple[int, int, int]] = {HALF: (64, 64, 64), TF32: (32, 64, 32), FLOAT32: (32, 32, 32)}
SPLITS_A_CORE = 4  # parts of a sum over pixels, for all blocks of its result together


def splits(blocks: int, tiles: int, device: Device) -> tuple[int, int]:
    """(parts of a sum over ``tiles`` tiles of pixels, tiles a part); each part has ``blocks`` blocks of results."""
    wanted = max(1, SPLITS_A_CORE * device.cores // blocks)
    each = -(-tiles // min(wanted, tiles))
    return -(-tiles // each), each


def gradient_block(most: int, size: int, aligned: bool) -> int:
    """Side of a block of the gradient kernels: no wider than its problem, half as wide for loads of single elements.

    Their addresses take the registers that spill otherwise.
    """
    return min(most if aligned else max(SMALLEST, most // 2), power_of_two(size))


def own_gradients(groups: int, cudnn: bool) -> bool:
    """Whether the gradients are computed by our kernels, or by PyTorch's convolutions.

    cuDNN's were faster in every training step measured on an H200 (docs/gpu.md): d coefficients of ours computes Z
    again for each block of outputs. Ours remain for GPUs where cuDNN is off or not there.
    """
    return groups == 1 and not cudnn
