"""Every row of the tile table with the smallest problem that fills it: for the interpreter and for a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch

from basisconv_kernels import testing
from basisconv_kernels.core.problem import Conv2dProblem
from basisconv_kernels.triton_kernels import basis_conv2d as kernels
from basisconv_kernels.triton_kernels import configs


class Row(NamedTuple):
    """A tile on a path: "pointers", "descriptors", or "descriptors2", those at stride 2."""

    path: str
    arithmetic: str
    tile: configs.Tile

    def __str__(self) -> str:
        t = self.tile
        return f"{self.path} {self.arithmetic} {t.BM}×{t.BQ}×{t.BK}×{t.BL} {t.warps} warps {t.stages} stages"


HALF_ONLY = {configs.HALF: configs.DESCRIPTORS[configs.HALF]}  # TF32 at stride 2 is the same code
TABLES = {"pointers": configs.POINTERS, "descriptors": configs.DESCRIPTORS, "descriptors2": HALF_ONLY}
ROWS = [Row(path, kind, tile) for path, table in TABLES.items() for kind, rows in table.items() for tile in rows]


def case(row: Row, dtype: torch.dtype, device: str, whole_blocks: bool = False) -> testing.Case:
    """More pixels, channels and outputs than one tile has, and a basis filter less: every edge of the tile is met.

    With ``whole_blocks`` a step's channels divide those of the input, as they must at stride 2: filters are then read
    by another descriptor.
    """
    t = row.tile
    stride = 2 if row.path == "descriptors2" else 1
    C = t.BK * 2 if whole_blocks or stride == 2 else t.BK + 16
    height = 6 if t.BM <= 32 else 12
    problem = Conv2dProblem(
        N=1, C=C, H=height, W=14, Q=t.BQ - 1, K=t.BL + 1,
        stride=(stride, stride), padding=(1, 2, 0, 1), dtype=dtype, device=device, channels_last=True,
        bias=True, residual=True, activation="relu", precise=row.arithmetic == configs.FLOAT32 and dtype.itemsize == 2,
    )  # fmt: skip
    return testing.Case("row", str(row), problem)


def check(row: Row, dtype: torch.dtype, device: str) -> None:
    """The whole contract of the forward pass on this tile."""
    tf32 = row.arithmetic == configs.TF32
    path = row.path.removesuffix("2")

    def kernel(input, basis_weight, coefficients, bias, *, residual, **arguments):
        return kernels.forward(input, basis_weight, coefficients, bias, residual, **arguments, path=path, tile=row.tile)

    for whole_blocks in (False, True) if row.path == "descriptors" else (False,):
        testing.check(case(row, dtype, device, whole_blocks), kernel, tf32=tf32)
