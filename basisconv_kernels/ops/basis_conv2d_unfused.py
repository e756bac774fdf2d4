"""Training steps of ``basis_conv2d`` that two convolutions under PyTorch's own autograd do faster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from basisconv_kernels.core import registry
from basisconv_kernels.core.autograd import refuse_by_name
from basisconv_kernels.reference import basis_conv2d as reference

if TYPE_CHECKING:
    from basisconv_kernels.ops.basis_conv2d import Settings

OP = "basis_conv2d"
# Fewer pixels of a float32 batch than these do not earn back, in one forward, the packing that new weights need.
PIXELS_WORTH_PACKING = 1024


def trains_faster(settings: Settings, input: Tensor, basis_weight: Tensor) -> bool:
    """Whether a step whose weights change is better off with two convolutions of PyTorch and its own autograd.

    Unpacked float32 weights pay where Winograd saves work and there are pixels enough; elsewhere the two convolutions,
    which the explicit backward runs in any case, are as fast, need no packing and no Python in their backward.
    """
    if settings.backend != "cpu" or input.dtype != torch.float32 or registry.wish() is not None:
        return False
    winograd = basis_weight.shape[2:] == (3, 3) and settings.stride == settings.dilation == (1, 1)
    pixels = input.shape[0] * input.shape[2] * input.shape[3]
    return settings.precise or not winograd or pixels < PIXELS_WORTH_PACKING


def run(tensors: tuple[Any, ...], settings: Settings) -> Tensor:
    """The reference under PyTorch's autograd; like the Function it refuses double backward."""
    input, basis_weight, coefficients, bias, residual = tensors
    result = reference.forward(input, basis_weight, coefficients, bias, residual, *settings[:-1])
    result.register_hook(_refuse_graph)
    return result


def _refuse_graph(gradient: Tensor) -> None:
    if torch.is_grad_enabled():
        refuse_by_name(OP)
