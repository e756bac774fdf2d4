"""One tiny run of every op against the reference: what ``doctor`` does with each backend and dtype."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from basisconv_kernels import testing
from basisconv_kernels.ops.basis_conv2d import basis_conv2d
from basisconv_kernels.ops.binary_conv2d import binary_conv2d
from basisconv_kernels.ops.bitpack import bitpack
from basisconv_kernels.ops.stacked_binary_conv2d import stacked_binary_conv2d
from basisconv_kernels.ops.ternary_conv2d import ternary_conv2d
from basisconv_kernels.ops.tucker_conv2d import tucker_conv2d
from basisconv_kernels.testing import ternary_conv2d as ternary


def _run_basis_conv2d(backend: str, dtype: torch.dtype, device: str) -> None:
    """A small odd-sized case, forward and (in float32) backward, within the tolerances of ``testing``."""
    kernel = functools.partial(basis_conv2d, backend=backend)
    case = testing.case("odd_sizes").at(dtype=dtype, device=device)
    testing.check(case, kernel)
    if dtype is torch.float32:
        testing.check_gradients(case, kernel)


def _run_binary_conv2d(backend: str, dtype: torch.dtype, device: str) -> None:
    """A small odd-sized case in every output mode, bit for bit."""
    case = testing.binary_case("odd_sizes").at(dtype=dtype, device=device)
    testing.check_binary(case, functools.partial(binary_conv2d, backend=backend))


def _run_bitpack(backend: str, dtype: torch.dtype, device: str) -> None:
    """Signs, thresholds and codes of the same case."""
    case = testing.binary_case("odd_sizes").at(dtype=dtype, device=device)
    testing.check_pack(case, functools.partial(bitpack, backend=backend))


def _run_ternary_conv2d(backend: str, dtype: torch.dtype, device: str) -> None:
    """The same for ``ternary_conv2d``, with two scales."""
    kernel = functools.partial(ternary_conv2d, backend=backend)
    case = next(case for case in ternary.TERNARY_CASES if case.name == "two_scales").at(dtype=dtype, device=device)
    ternary.check(case, kernel)
    if dtype is torch.float32:
        ternary.check_gradients(case, kernel)


def _run_stacked_binary_conv2d(backend: str, dtype: torch.dtype, device: str) -> None:
    """The same for stacked filters; their gradients are plain PyTorch on every backend."""
    case = testing.stacked_case("odd_sizes").at(dtype=dtype, device=device)
    testing.check_stacked(case, functools.partial(stacked_binary_conv2d, backend=backend))


def _run_tucker_conv2d(backend: str, dtype: torch.dtype, device: str) -> None:
    kernel = functools.partial(tucker_conv2d, backend=backend)
    case: Any = testing.tucker_case("odd_sizes").at(dtype=dtype, device=device)
    testing.check_tucker(case, kernel)
    if dtype is torch.float32:
        testing.check_tucker_gradients(case, kernel)


TINY_RUNS: dict[str, Callable[[str, torch.dtype, str], None]] = {
    "basis_conv2d": _run_basis_conv2d,
    "binary_conv2d": _run_binary_conv2d,
    "bitpack": _run_bitpack,
    "ternary_conv2d": _run_ternary_conv2d,
    "stacked_binary_conv2d": _run_stacked_binary_conv2d,
    "tucker_conv2d": _run_tucker_conv2d,
}
