"""Initial filter bases for training from scratch: random orthogonal, cosine, random unit vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def random_orthogonal(rows: int, taps: int, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """[rows, taps] with orthonormal rows, uniform over all such matrices (QR with the signs of its diagonal)."""
    q, r = torch.linalg.qr(normal((taps, rows), dtype, generator))
    diagonal = r.diagonal()
    return (q * torch.where(diagonal < 0, -1.0, 1.0).to(dtype)).mT.contiguous()


def random_unit(rows: int, taps: int, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """[rows, taps] of independent random unit vectors, for more filters than taps."""
    return torch.nn.functional.normalize(normal((rows, taps), dtype, generator), dim=1)


def dct(rows: int, filter_shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """[rows, C·R·S]: the ``rows`` lowest frequencies of the orthonormal DCT-II over (channel, row, column).

    ``f_{u,v,w}[c, r, s] = cosine_C(u, c) · cosine_R(v, r) · cosine_S(w, s)``, in the order of ``u/C + v/R + w/S``;
    equal sums keep the order (u, v, w).
    """
    factors = [_cosines(size) for size in filter_shape]
    frequencies = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float64) / size for size in filter_shape))
    order = torch.argsort(frequencies.reshape(-1, 3).sum(1), stable=True)[:rows]
    basis = torch.einsum("uc,vr,ws->uvwcrs", *factors).reshape(math.prod(filter_shape), -1)
    return basis[order].to(dtype)


def _cosines(size: int) -> Tensor:
    """[frequency, position]: the orthonormal DCT-II of one dimension."""
    steps = torch.arange(size, dtype=torch.float64)
    cosines = torch.cos(math.pi / size * torch.outer(steps, steps + 0.5)) * math.sqrt(2 / size)
    cosines[0] /= math.sqrt(2)
    return cosines


def normal(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """Drawn on the generator's device, else on the CPU, so that a seed means the same wherever the layer lives."""
    device = "cpu" if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)
