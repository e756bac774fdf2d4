"""Layers and networks computed in two ways: converted and dense, folded and not, saved and loaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from basisconv_kernels.testing import tolerances
from basisconv_kernels.testing.compare import Mismatch


def check_same_layer(got: Tensor, expected: Tensor) -> None:
    """Compare two results of one layer: ``max|got − expected| ≤ share·max|expected|``, the share of ``tolerances``.

    Args:
        got (Tensor): its dtype sets the share.
        expected (Tensor): of the same shape, in the same dtype or a wider one.

    Raises:
        Mismatch: another shape, a NaN or infinity where none is expected, or a larger difference; says where.
    """
    _check("layer", tolerances.SAME_LAYER, got, expected)


def check_same_network(got: Tensor, expected: Tensor) -> None:
    """``check_same_layer`` for the result of a whole network, whose layers pass their roundings on."""
    _check("network", tolerances.SAME_NETWORK, got, expected)


def _check(what: str, shares: Mapping[torch.dtype, float], got: Tensor, expected: Tensor) -> None:
    if got.shape != expected.shape:
        raise Mismatch(f"{what}: shape {list(got.shape)} where {list(expected.shape)} was expected")
    if not got.numel():
        return
    exact = expected.detach().double()
    error = (got.detach().double() - exact).abs()
    allowed = shares[got.dtype] * exact.abs().max().item()
    wrong = ~(error <= allowed)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise Mismatch(
            f"{what}: first mismatch at {list(at)}: got {got[at].item():.9g}, expected {exact[at].item():.9g} ± "
            f"{allowed:.3g}; {int(wrong.sum())} of {wrong.numel()} are wrong, by up to {error.max().item():.3g}"
        )
