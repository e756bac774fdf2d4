"""Training steps of ``tucker_conv2d`` that three convolutions under PyTorch's own autograd do faster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from basisconv_kernels.core import registry
from basisconv_kernels.core.autograd import refuse_by_name
from basisconv_kernels.reference import tucker_conv2d as reference

if TYPE_CHECKING:
    from basisconv_kernels.ops.tucker_conv2d import Settings

OP = "tucker_conv2d"
# As in ``basis_conv2d``: fewer pixels of a float32 batch do not earn back the packing that new weights need.
PIXELS_WORTH_PACKING = 1024


def trains_faster(settings: Settings, input: Tensor, core: Tensor) -> bool:
    """Whether a step whose weights change is better off with three convolutions of PyTorch and its own autograd.

    The rule of ``basis_conv2d``, whose kernel runs here: it pays where Winograd saves work, on pixels enough.
    """
    if settings.backend != "cpu" or input.dtype != torch.float32 or registry.wish() is not None:
        return False
    winograd = core.shape[2:] == (3, 3) and settings.stride == settings.dilation == (1, 1)
    pixels = input.shape[0] * input.shape[2] * input.shape[3]
    return settings.precise or not winograd or pixels < PIXELS_WORTH_PACKING


def run(tensors: tuple[Any, ...], settings: Settings) -> Tensor:
    """The reference under PyTorch's autograd; like the Function it refuses double backward."""
    input, u_in, core, u_out, bias, residual = tensors
    result = reference.forward(input, u_in, core, u_out, bias, residual, *settings[:-1])
    result.register_hook(_refuse_graph)
    return result


def _refuse_graph(gradient: Tensor) -> None:
    if torch.is_grad_enabled():
        refuse_by_name(OP)
