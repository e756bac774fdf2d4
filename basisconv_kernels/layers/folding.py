"""The algebra that folds a BatchNorm into coefficients and collapses basis and coefficients to dense filters.

A BatchNorm in eval mode is ``z → g·z + e`` with ``g = γ/√(var + ε)`` and ``e = β − mean·g``. Between the stages it
becomes ``A' = A·diag(g)`` and ``bias' = bias + A·e``: e is added after stage 1 at every output pixel, so zero padding
changes nothing. Behind the layer it becomes ``A' = diag(g)·A`` and ``bias' = g·bias + e``.

``coefficients`` are [K, Q], or [K, Q/G] block-diagonal over the groups of the basis; every function takes both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute weights in: float32 for 16-bit dtypes, else their own."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def has_statistics(norm: nn.Module) -> bool:
    """Whether the module is a BatchNorm with running statistics, which alone can be folded."""
    return isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None


def scale_and_offset(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(g, e), each [channels], of a BatchNorm with its running statistics; differentiable in γ and β."""
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
        raise ValueError(
            f"fold: {type(norm).__name__} has no running statistics to fold; only a BatchNorm with "
            "track_running_stats=True can be folded"
        )
    dtype = wide(norm.running_var.dtype)
    scale = (norm.running_var.to(dtype) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.to(dtype)
    offset = -norm.running_mean.to(dtype) * scale
    return scale, offset if norm.bias is None else offset + norm.bias.to(dtype)


def _per_output(values: Tensor, coefficients: Tensor) -> Tensor:
    """Values [Q] of the basis maps → what each row of ``coefficients`` reads: [1, Q], or [K, Q/G] for compact ones."""
    K, mixed = coefficients.shape
    if mixed == values.shape[0]:
        return values[None]
    groups = values.shape[0] // mixed
    return values.reshape(groups, mixed).repeat_interleave(K // groups, 0)


def fold_between(coefficients: Tensor, bias: Tensor | None, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """``(A·diag(g), bias + A·e)``, in the wide dtype: the BatchNorm between the stages absorbed."""
    dtype = wide(coefficients.dtype)
    mixing = coefficients.to(dtype)
    # A sum of products, not a matrix product: autocast must not round it.
    shift = (mixing * _per_output(offset.to(dtype), coefficients)).sum(1)
    folded = mixing * _per_output(scale.to(dtype), coefficients)
    return folded, shift if bias is None else bias.to(dtype) + shift


def fold_after(coefficients: Tensor, bias: Tensor | None, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """``(diag(g)·A, g·bias + e)``, in the wide dtype: a BatchNorm behind the layer absorbed.

    ``coefficients`` may be dense filters [K, C/G, R, S] as well: a plain convolution folds the same way.
    """
    dtype = wide(coefficients.dtype)
    rows = scale.to(dtype).reshape(-1, *[1] * (coefficients.dim() - 1))
    shifted = offset.to(dtype) if bias is None else offset.to(dtype) + scale.to(dtype) * bias.to(dtype)
    return coefficients.to(dtype) * rows, shifted


def is_compact(coefficients: Tensor, basis_weight: Tensor, groups: int) -> bool:
    """Whether the coefficients are [K, Q/G]: for G = 1 both forms coincide and count as [K, Q]."""
    return groups > 1 and coefficients.shape[1] != basis_weight.shape[0]


def expand_compact(coefficients: Tensor, groups: int) -> Tensor:
    """[K, Q/G] → the block-diagonal [K, Q] of the same meaning."""
    return torch.block_diag(*coefficients.chunk(groups))


def dense_weight(basis_weight: Tensor, coefficients: Tensor, groups: int) -> tuple[Tensor, int]:
    """The filters, in float64 on the CPU, and the groups of the one convolution that equals both stages.

    [K, C/G, R, S] with G groups; coefficients that mix maps of different groups give [K, C, R, S] with one group.
    """
    basis, mixing = (t.detach().to("cpu", torch.float64) for t in (basis_weight, coefficients))
    Q, taps_in, R, S = basis.shape
    K = mixing.shape[0]
    if groups == 1 or is_compact(coefficients, basis_weight, groups):
        rows = basis.reshape(groups, Q // groups, -1)
        weight = mixing.reshape(groups, K // groups, -1) @ rows
        return weight.reshape(K, taps_in, R, S), groups
    # Group g of the basis reads its own channels only: K × (C/G) filters a group, side by side along the channels.
    per_group = Q // groups
    parts = [
        (mixing[:, g * per_group : (g + 1) * per_group] @ basis[g * per_group : (g + 1) * per_group].flatten(1))
        for g in range(groups)
    ]
    return torch.cat([part.reshape(K, taps_in, R, S) for part in parts], 1), 1
