"""``basis_conv2d`` in plain PyTorch: the backend ``reference``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from basisconv_kernels.reference import basis_conv2d as reference

if TYPE_CHECKING:
    from basisconv_kernels.core.problem import Conv2dProblem


def supports(problem: Conv2dProblem) -> list[str]:
    """Everything."""
    return []


def forward(
    input: Tensor,
    basis_weight: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    packed: Tensor | None,
    settings: tuple[Any, ...],
    keep_maps: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The reference, or what computes the same by the kernels of a GPU's libraries for the dtype."""
    arguments = (input, basis_weight, coefficients, bias, residual, *settings[:-1])
    if library_has_it(input, basis_weight, coefficients, residual, settings):
        result, maps = by_the_library(input, basis_weight, coefficients, bias, *settings[:-2])
        return result, maps if keep_maps else None
    return reference.forward_with_maps(*arguments) if keep_maps else (reference.forward(*arguments), None)


def library_has_it(
    input: Tensor, basis_weight: Tensor, coefficients: Tensor, residual: Tensor | None, settings: tuple[Any, ...]
) -> bool:
    """Whether two library kernels compute what the contract says: 16 bits on a GPU, summed in float32.

    Elsewhere the reference widens 16-bit tensors: on a processor, for ``precise``, in compact groups, and where an H200
    showed that the library rounds otherwise: with a residual, which its products add after a rounding, and in NCHW,
    where its convolutions of odd numbers of channels did not sum in float32.
    """
    if input.device.type != "cuda" or input.dtype not in reference.HALF or settings[5] or residual is not None:
        return False
    if reference.memory_format(input) != torch.channels_last:
        return False
    return reference.coefficient_groups(coefficients, basis_weight.shape[0], settings[3]) == 1


def by_the_library(
    input: Tensor,
    basis_weight: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """A convolution and a matrix product in the dtype of ``input``; the result, and Z [N, Q, OH, OW], channels_last.

    The product adds the bias before it rounds, which a convolution of PyTorch does after.
    """
    padded, pad = reference.symmetric(input, padding)
    maps = F.conv2d(padded, basis_weight, None, stride, pad, dilation, groups)
    N, Q, OH, OW = maps.shape
    rows = F.linear(maps.permute(0, 2, 3, 1).reshape(-1, Q), coefficients, bias)
    out = rows.view(N, OH, OW, coefficients.shape[0]).permute(0, 3, 1, 2)
    if activation is not None:
        out = F.relu(out) if activation == "relu" else F.relu6(out)
    return reference.laid_out(out, torch.channels_last), maps
