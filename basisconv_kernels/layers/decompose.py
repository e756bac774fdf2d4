"""Decomposition of the filters of a convolution into a shared basis and coefficients: spectra, ranks, break-even.

Pure functions on tensors. Everything is computed on the CPU in float64, so that a conversion gives the same file
on every machine; nothing here knows a layer or a network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Entries this close to a row's largest magnitude count as equal to it: rounding must not decide a sign.
SIGN_TIE = 1e-6


@dataclass(frozen=True)
class FilterSpectrum:
    """The filters of one convolution, per group, in the order of what they contribute; every truncation is a slice.

    ``weight[g] = mixing[g] · rows[g]``, M = min(K/G, D), D = (C/G)·R·S.

    Attributes:
        singular_values (Tensor[G, M]): float64, descending within a group. Their squares are the energies: of the
            filters themselves, or of the layer's expected output where an input correlation was given.
        rows (Tensor[G, M, D]): basis filters, float64, unit length; orthonormal without an input correlation.
        mixing (Tensor[G, K/G, M]): coefficients, float64.
        filter_shape: (C/G, R, S).
        eps (float): relative rounding of the weights' own dtype (at most that of float32), for the numerical rank.
    """

    singular_values: Tensor
    rows: Tensor
    mixing: Tensor
    filter_shape: tuple[int, int, int]
    eps: float

    @property
    def groups(self) -> int:
        """G."""
        return self.singular_values.shape[0]

    @property
    def cap(self) -> int:
        """Most basis filters a group can use: ``min(K/G, D)``, further the numerical rank, at least 1."""
        size = max(self.mixing.shape[1], self.rows.shape[2])
        return numerical_rank(self.singular_values, size, self.eps)

    @property
    def energies(self) -> Tensor:
        """Tensor[M]: squared singular values, pooled over the groups."""
        return self.singular_values.square().sum(0)

    def kept_energy(self, per_group: int) -> float:
        """Energy kept by ``per_group`` basis filters in every group, in 0..1; 1 for an all-zero layer."""
        return float(kept_energy(self.singular_values)[per_group - 1])

    def channels_for_energy(self, energy: float) -> int:
        """Least number of basis filters per group that keeps ``energy``."""
        return min(channels_for_energy(self.singular_values, energy), self.cap)

    def truncate(self, per_group: int) -> tuple[Tensor, Tensor]:
        """The first ``per_group`` basis filters of every group: (basis_weight [Q, C/G, R, S], coefficients [K, Q/G]).

        Groups of lower rank than ``per_group`` get columns of exact zeros.
        """
        basis = self.rows[:, :per_group].reshape(-1, *self.filter_shape)
        mixing = self.mixing[:, :, :per_group].clone()
        size = max(self.mixing.shape[1], self.rows.shape[2])
        for group, values in enumerate(self.singular_values):
            mixing[group, :, numerical_rank(values[None], size, self.eps, least=0) :] = 0
        return basis.contiguous(), mixing.reshape(-1, per_group)

    def relative_error(self, per_group: int) -> float:
        """``‖weight − coefficients·basis_weight‖ / ‖weight‖`` (Frobenius) of a truncation; 0 for a zero layer."""
        dense = self.mixing @ self.rows
        norm = float(dense.norm())
        kept = self.mixing[:, :, :per_group] @ self.rows[:, :per_group]
        return float((dense - kept).norm()) / norm if norm else 0.0


def decompose(
    weight: Tensor, groups: int = 1, input_correlation: Tensor | None = None, *, name: str = "decompose"
) -> FilterSpectrum:
    """The filters of a convolution as basis and coefficients at full rank, one singular value decomposition a group.

    Plain: ``H = U·diag(s)·V``, basis rows V, coefficients U·diag(s); nothing is subtracted or normalised first. With an
    input correlation Σ = E[patch·patchᵀ]: ``H·Σ^½ = U·diag(s)·V'``, basis ``Uᵀ·H`` scaled to unit rows, coefficients U
    times the lengths; a truncation then loses the least expected output energy, ``Σ s²`` of what was dropped. The entry
    of largest magnitude in each basis row is positive, the first of them on a tie.

    Args:
        weight (Tensor[K, C/G, R, S]): any floating dtype, any device.
        groups (int): G; K must be divisible by it.
        input_correlation (Tensor[D, D] or [G, D, D], optional): symmetric, positive semi-definite; [D, D] serves every
            group.
        name (str): what an error message begins with.

    Raises:
        ValueError: NaN or infinite values, or shapes that do not fit.
        TypeError: a weight that is not floating point or has no values (meta device).

    Source: Tayyab, Mahalanobis 2019, arXiv 1906.04509; the groups and the data-aware form are derived.
    """
    H = filter_matrix(weight, groups, name)
    root = None if input_correlation is None else _correlation_root(input_correlation, groups, H.shape[2], name)
    if root is None:
        U, s, V = torch.linalg.svd(H, full_matrices=False)
        rows, mixing = V, U * s[:, None, :]
    else:
        U, s, _ = torch.linalg.svd(H @ root, full_matrices=False)
        rows = U.mT @ H
        lengths = rows.norm(dim=2)
        rows = rows / lengths.masked_fill(lengths == 0, 1)[:, :, None]
        mixing = U * lengths[:, None, :]
    signs = _canonical_signs(rows)
    eps = torch.finfo(torch.float64 if weight.dtype == torch.float64 else torch.float32).eps
    taps_in, R, S = weight.shape[1:]
    return FilterSpectrum(s, rows * signs[:, :, None], mixing * signs[:, None, :], (taps_in, R, S), eps)


def filter_matrix(weight: Tensor, groups: int, name: str) -> Tensor:
    """[G, K/G, D] in float64 on the CPU, checked."""
    if not weight.is_floating_point() or weight.is_meta:
        what = "has no values (meta device)" if weight.is_meta else f"is {weight.dtype}"
        raise TypeError(f"{name}: weight must be a floating point tensor with values, but it {what}")
    if weight.dim() != 4 or weight.numel() == 0 or groups < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"{name}: weight must be [K, C/groups, R, S], not empty, with K divisible by groups = {groups}, "
            f"got {list(weight.shape)}"
        )
    H = weight.detach().to("cpu", torch.float64).reshape(groups, weight.shape[0] // groups, -1)
    if not bool(torch.isfinite(H).all()):
        raise ValueError(f"{name}: weight holds NaN or infinite values; repair or skip this layer")
    return H


def _correlation_root(correlation: Tensor, groups: int, taps: int, name: str) -> Tensor:
    """Symmetric square root of the input correlation, [G, D, D] or [1, D, D]."""
    sigma = correlation.detach().to("cpu", torch.float64)
    sigma = sigma[None] if sigma.dim() == 2 else sigma
    if sigma.dim() != 3 or sigma.shape[0] not in (1, groups) or tuple(sigma.shape[1:]) != (taps, taps):
        raise ValueError(
            f"{name}: input_correlation must be [D, D] or [groups, D, D] with D = (C/groups)·R·S = {taps} and "
            f"groups = {groups}, got {list(correlation.shape)}"
        )
    if not bool(torch.isfinite(sigma).all()):
        raise ValueError(f"{name}: input_correlation holds NaN or infinite values")
    values, vectors = torch.linalg.eigh((sigma + sigma.mT) / 2)
    # An average of float32 patches is semi-definite up to its rounding only; more than that is no correlation.
    tolerance = math.sqrt(torch.finfo(torch.float32).eps) * float(values.abs().max())
    if float((sigma - sigma.mT).abs().max()) > tolerance or float(values.min()) < -tolerance:
        raise ValueError(f"{name}: input_correlation must be symmetric and positive semi-definite, the mean of p·pᵀ")
    return (vectors * values.clamp_min(0).sqrt()[:, None, :]) @ vectors.mT


def _canonical_signs(rows: Tensor) -> Tensor:
    """±1 for every row [G, M], so that its first entry of largest magnitude becomes positive."""
    magnitude = rows.abs()
    largest = (magnitude >= magnitude.amax(2, keepdim=True) * (1 - SIGN_TIE)).to(torch.int8).argmax(2, keepdim=True)
    return torch.where(rows.gather(2, largest)[:, :, 0] < 0, -1.0, 1.0).to(rows.dtype)


def numerical_rank(singular_values: Tensor, size: int, eps: float, *, least: int = 1) -> int:
    """``#{q : s_q > s_1 · size · eps}``, the largest over the groups and at least ``least``.

    Args:
        singular_values (Tensor[G, M]): descending within a group.
        size (int): the larger side of the filter matrix, max(K/G, D).
        eps (float): relative rounding of the weights.
        least (int): what an all-zero layer gets.
    """
    ranks = (singular_values > singular_values[:, :1] * size * eps).sum(1)
    return max(least, int(ranks.max()))


def kept_energy(singular_values: Tensor) -> Tensor:
    """Tensor[M]: energy kept by 1, 2, … M filters per group, pooled over the groups; ones for an all-zero layer.

    Args:
        singular_values (Tensor[G, M] or [M]): descending within a group.
    """
    squares = singular_values.to(torch.float64).square()
    cumulative = (squares.sum(0) if squares.dim() == 2 else squares).cumsum(0)
    total = cumulative[-1:]
    return torch.ones_like(cumulative) if float(total) == 0 else cumulative / total


def channels_for_energy(singular_values: Tensor, energy: float) -> int:
    """Least number of basis filters per group whose pooled energy reaches ``energy``.

    ``1 + first q with Σ_{i≤q} s_i² / Σ s² ≥ energy``, q from 0; all M where rounding leaves the last ratio below 1.

    Args:
        singular_values (Tensor[G, M] or [M]): descending within a group.
        energy (float): 0..1.

    Raises:
        ValueError: an energy outside 0..1.
    """
    if not 0 <= energy <= 1:
        raise ValueError(f"channels_for_energy: energy must lie in 0..1, got {energy}")
    short = int((kept_energy(singular_values) < energy).sum())
    return min(short + 1, singular_values.shape[-1])


def break_even(K: int, taps: int, groups: int = 1) -> float:
    """Q*: from this many basis filters on, the two stages cost no less than the dense convolution.

    ``Q* = K·D / (D + K/G)``, for block-diagonal coefficients; equal for multiply-accumulates and for parameters.

    Args:
        K (int): output channels.
        taps (int): D = (C/G)·R·S.
        groups (int): G.
    """
    return K * taps / (taps + K / groups)


def pays(Q: int, K: int, taps: int, groups: int = 1) -> bool:
    """Whether ``Q < Q*``, in whole numbers: ``Q·D + K·Q/G < K·D``."""
    return Q * taps + K * (Q // groups) < K * taps
