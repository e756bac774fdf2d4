"""Tucker-2 decomposition of the filters of a convolution: HOSVD, HOOI, and ranks by EVBMF. Pure functions on tensors.

``weight[k,c,r,s] ≈ Σ_{o,i} u_out[k,o]·core[o,i,r,s]·u_in[c,i]``. Everything is computed on the CPU in float64, as in
``layers.decompose``.

Sources: De Lathauwer, De Moor, Vandewalle 2000 (HOSVD and HOOI); Kim et al. 2016, arXiv 1511.06530 (Tucker-2 of
convolutions, ranks by EVBMF); Nakajima et al. 2013, "Global Analytic Solution of Fully-observed Variational Bayesian
Matrix Factorization" (EVBMF).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from basisconv_kernels.layers.decompose import SIGN_TIE, filter_matrix, numerical_rank

SETTLED = 1e-5  # HOOI stops when a round gains less than this share of the energy


class TuckerFactors(NamedTuple):
    """The three tensors of the op, in float64; u_in and u_out have orthonormal columns."""

    u_in: Tensor
    core: Tensor
    u_out: Tensor


@dataclass(frozen=True)
class TuckerSpectrum:
    """The filters of one convolution with one group, and the HOSVD of which every truncation is a slice.

    Attributes:
        weight (Tensor[K, C, R, S]): float64.
        out_vectors (Tensor[K, M]), in_vectors (Tensor[C, M']): left singular vectors of the two unfoldings
            [K, C·R·S] and [C, K·R·S], in the order of their singular values; the entry of largest magnitude in each
            is positive.
        out_values (Tensor[M]), in_values (Tensor[M']): the singular values.
        kept (Tensor[M, M']): share of the energy ``‖weight‖²`` that the truncation to (row + 1) output and (column + 1)
            input vectors keeps; ones for an all-zero layer.
        eps (float): relative rounding of the weights' own dtype.
    """

    weight: Tensor
    out_vectors: Tensor
    in_vectors: Tensor
    out_values: Tensor
    in_values: Tensor
    kept: Tensor
    eps: float

    @property
    def caps(self) -> tuple[int, int]:
        """(rank_in, rank_out) at which nothing is lost: the numerical ranks of the unfoldings, at least 1."""
        K, C, R, S = self.weight.shape
        rank_in = numerical_rank(self.in_values[None], max(C, K * R * S), self.eps)
        return rank_in, numerical_rank(self.out_values[None], max(K, C * R * S), self.eps)

    def within_caps(self, rank_in: int, rank_out: int) -> tuple[int, int]:
        """The ranks lowered to what the other one can use: ``rank_in ≤ rank_out·R·S`` and the other way round."""
        taps = self.weight.shape[2] * self.weight.shape[3]
        most_in, most_out = self.caps
        rank_in, rank_out = min(rank_in, most_in), min(rank_out, most_out)
        rank_out = min(rank_out, rank_in * taps)
        return min(rank_in, rank_out * taps), rank_out

    def kept_energy(self, rank_in: int, rank_out: int) -> float:
        """Share of the energy that the HOSVD truncated to these ranks keeps; HOOI keeps no less."""
        return float(self.kept[rank_out - 1, rank_in - 1])

    def ranks_for_energy(self, energy: float, reads: float = 1.0) -> tuple[int, int]:
        """The ranks of least work that keep a share of the energy.

        Args:
            energy (float): 0..1.
            reads (float): ρ, pixels of the input for each of the output; the first 1×1 runs on those. With 1 the work
                is also proportional to the number of weights.

        Raises:
            ValueError: an energy outside 0..1.
        """
        if not 0 <= energy <= 1:
            raise ValueError(f"ranks_for_energy: energy must lie in 0..1, got {energy}")
        cap_in, cap_out = self.caps
        enough = self.kept[:cap_out, :cap_in] >= energy
        enough[-1, -1] = True  # rounding may leave the last share below 1
        work = self.work(reads)[:cap_out, :cap_in].masked_fill(~enough, math.inf)
        rank_out, rank_in = divmod(int(work.argmin()), cap_in)
        return rank_in + 1, rank_out + 1

    def work(self, reads: float = 1.0) -> Tensor:
        """Tensor[M, M']: multiply-accumulates of the three stages for each pixel of the output, for all ranks."""
        K, C, R, S = self.weight.shape
        rank_out = torch.arange(1, self.kept.shape[0] + 1, dtype=torch.float64)[:, None]
        rank_in = torch.arange(1, self.kept.shape[1] + 1, dtype=torch.float64)[None, :]
        return C * reads * rank_in + rank_out * (rank_in * R * S + K)

    def evbmf_ranks(self, weakening: float = 0.0) -> tuple[int, int]:
        """(rank_in, rank_out) by EVBMF on both unfoldings, within the caps.

        Args:
            weakening (float): 0..1, the share of the way from the EVBMF rank up to the full rank.
        """
        ranks = []
        for mode in (1, 0):
            found = max(1, evbmf_rank(self.weight.movedim(mode, 0).flatten(1)))
            full = self.caps[1 - mode]
            ranks.append(min(found, full) + math.floor(weakening * max(0, full - found)))
        return self.within_caps(*ranks)

    def truncate(self, rank_in: int, rank_out: int, *, rounds: int = 10) -> TuckerFactors:
        """The decomposition at these ranks: HOSVD, then up to ``rounds`` rounds of HOOI, until they gain nothing.

        ``u_out ← lead((W ×₁ u_inᵀ)₍₀₎)``, ``u_in ← lead((W ×₀ u_outᵀ)₍₁₎)``; the error ``‖W‖² − ‖core‖²`` never rises.
        """
        u_in, u_out = self.in_vectors[:, :rank_in], self.out_vectors[:, :rank_out]
        K, C, R, S = self.weight.shape
        by_out, by_in = self.weight.flatten(1), self.weight.movedim(1, 0).flatten(1)  # [K, C·R·S], [C, K·R·S]
        energy, total = self.kept_energy(rank_in, rank_out), float(self.weight.square().sum())
        for _ in range(rounds if energy < 1 - SETTLED else 0):
            reduced = (u_in.mT @ by_in).reshape(rank_in, K, R * S).movedim(1, 0).flatten(1)
            u_out = _leading(reduced, rank_out)
            reduced = (u_out.mT @ by_out).reshape(rank_out, C, R * S).movedim(1, 0).flatten(1)
            u_in = _leading(reduced, rank_in)
            before, energy = energy, float((u_in.mT @ reduced).square().sum()) / total
            if energy - before < SETTLED:
                break
        half = (u_out.mT @ by_out).reshape(rank_out, C, R * S)
        core = torch.matmul(u_in.mT, half).reshape(rank_out, rank_in, R, S)
        return TuckerFactors(u_in.contiguous(), core.contiguous(), u_out.contiguous())

    def relative_error(self, factors: TuckerFactors) -> float:
        """``‖weight − rebuilt‖ / ‖weight‖`` (Frobenius); 0 for a zero layer."""
        norm = float(self.weight.norm())
        return float((self.weight - rebuild(*factors)).norm()) / norm if norm else 0.0


def rebuild(u_in: Tensor, core: Tensor, u_out: Tensor) -> Tensor:
    """The dense filters [K, C, R, S] of the three tensors."""
    return torch.einsum("ko,oirs,ci->kcrs", u_out, core, u_in)


def tucker_spectrum(weight: Tensor, *, name: str = "tucker_spectrum") -> TuckerSpectrum:
    """The HOSVD of filters.

    Args:
        weight (Tensor[K, C, R, S]): any floating dtype, any device.
        name (str): what an error message begins with.

    Raises:
        TypeError, ValueError: not floating, without values, NaN or infinite.
    """
    W = filter_matrix(weight, 1, name)[0].reshape(weight.shape)
    out_vectors, out_values = _left_vectors(W.flatten(1))
    in_vectors, in_values = _left_vectors(W.movedim(1, 0).flatten(1))
    core = torch.einsum("kcrs,ko,ci->oirs", W, out_vectors, in_vectors)
    cumulative = core.square().sum((2, 3)).cumsum(0).cumsum(1)
    total = cumulative[-1, -1].clone()
    kept = torch.ones_like(cumulative) if float(total) == 0 else cumulative / total
    eps = torch.finfo(torch.float64 if weight.dtype == torch.float64 else torch.float32).eps
    return TuckerSpectrum(W, out_vectors, in_vectors, out_values, in_values, kept, eps)


def _left_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors, signs fixed, and singular values of a matrix [rows, columns]."""
    # Wide matrices: A = Rᵀ·Qᵀ, and Rᵀ has the same left vectors. It is square and far smaller.
    square = torch.linalg.qr(matrix.mT, mode="r")[1].mT if matrix.shape[1] > matrix.shape[0] else matrix
    vectors, values, _ = torch.linalg.svd(square, full_matrices=False)
    return _signed(vectors), values


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """The first left singular vectors: eigenvectors of the Gram matrix, since only their span matters here."""
    return _signed(torch.linalg.eigh(matrix @ matrix.mT)[1].flip(1)[:, :rank])


def _signed(vectors: Tensor) -> Tensor:
    """Each column times ±1, so that its first entry of largest magnitude becomes positive."""
    magnitude = vectors.abs()
    largest = (magnitude >= magnitude.amax(0, keepdim=True) * (1 - SIGN_TIE)).to(torch.int8).argmax(0, keepdim=True)
    return vectors * torch.where(vectors.gather(0, largest) < 0, -1.0, 1.0).to(vectors.dtype)


# --- EVBMF ------------------------------------------------------------------------------------------------------------


def evbmf_rank(matrix: Tensor) -> int:
    """The rank that empirical variational Bayesian matrix factorisation finds in a matrix; 0 where all is noise.

    Rows and columns of zeros are left out, and the noise variance σ² is the one of least free energy: a function of
    one variable, scanned over its known interval and refined around the least value.

    Args:
        matrix (Tensor[L, M]): either side may be the longer one.
    """
    A = matrix.detach().to("cpu", torch.float64)
    A = A[A.abs().amax(1) > 0] if A.numel() else A
    A = A[:, A.abs().amax(0) > 0] if A.numel() else A
    if not A.numel():
        return 0
    A = A.mT if A.shape[0] > A.shape[1] else A
    L, M = A.shape
    if L == 1:
        return 1
    values = _left_vectors(A)[1]
    values = values[values > values[0] * M * torch.finfo(torch.float64).eps]
    if len(values) < L:  # exactly of lower rank: no noise at all
        return len(values)
    alpha = L / M
    tau_bar = 2.5129 * math.sqrt(alpha)
    x_bar = (1 + tau_bar) * (1 + alpha / tau_bar)
    squares = values.square()
    upper = float(squares.sum()) / (L * M)
    index = min(math.ceil(L / (1 + alpha)) - 1, L - 1)
    lower = max(float(squares[index]) / (M * x_bar), float(squares[index:].mean()) / M)
    low, high = math.log(lower), math.log(max(upper, lower))
    for _ in range(4):
        grid = torch.linspace(low, high, 201, dtype=torch.float64)
        energies = _free_energy(squares[None, :] / (M * grid.exp()[:, None]), alpha, x_bar)
        best = int(energies.argmin())
        low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, 200)])
    return int((squares > M * math.exp((low + high) / 2) * x_bar).sum())


def _free_energy(x: Tensor, alpha: float, x_bar: float) -> Tensor:
    """Of each row of x = γ²/(M·σ²); the terms that σ² does not change are left out."""
    inside = (x - (1 + alpha)).square() - 4 * alpha
    tau = 0.5 * (x - (1 + alpha) + inside.clamp_min(0).sqrt())
    tau = torch.where(x > x_bar, tau, 1.0)  # any positive number, where the other branch is taken
    signal = x - tau + ((tau + 1) / x).log() + alpha * (tau / alpha + 1).log()
    return torch.where(x > x_bar, signal, x - x.log()).sum(1)
