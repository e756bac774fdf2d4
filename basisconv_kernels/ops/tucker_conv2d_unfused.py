"""``tucker_conv2d`` as three convolutions of PyTorch: the backend ``reference``, and training that is faster so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from basisconv_kernels.core import registry
from basisconv_kernels.core.layout import laid_out, memory_format
from basisconv_kernels.ops import basis_conv2d_unfused as basis
from basisconv_kernels.ops.basis_conv2d_training import packing_pays, two_convolutions
from basisconv_kernels.reference import tucker_conv2d as reference

if TYPE_CHECKING:
    from basisconv_kernels.ops.tucker_conv2d import Forward, Settings


def forward(
    input: Tensor,
    u_in: Tensor,
    core: Tensor,
    u_out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    packed: Tensor | None,
    settings: tuple[Any, ...],
    keep_stages: bool = False,
) -> Forward:
    """The reference, or what computes the same by the kernels of a GPU's libraries for the dtype."""
    if library_has_it(input, residual, settings):
        result, stages = by_the_library(input, u_in, core, u_out, bias, *settings[:-2])
    elif keep_stages:
        result, stages = reference.forward_with_stages(input, u_in, core, u_out, bias, residual, *settings[:-1])
    else:
        return reference.forward(input, u_in, core, u_out, bias, residual, *settings[:-1]), None, None
    return (result, *stages) if keep_stages else (result, None, None)


def library_has_it(input: Tensor, residual: Tensor | None, settings: tuple[Any, ...]) -> bool:
    """As in ``basis_conv2d_unfused``; conv2d refuses maps without pixels, which the reference knows about."""
    half = input.device.type == "cuda" and input.dtype in reference.HALF and not settings[4] and residual is None
    return half and memory_format(input) == torch.channels_last and 0 not in input.shape[2:]


def by_the_library(
    input: Tensor,
    u_in: Tensor,
    core: Tensor,
    u_out: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    activation: str | None,
) -> tuple[Tensor, reference.Stages]:
    """Two convolutions and a matrix product in the dtype of ``input``; the result, M and Z."""
    reduced = F.conv2d(input, u_in.t()[:, :, None, None])
    out, maps = basis.by_the_library(reduced, core, u_out, bias, stride, padding, dilation, 1, activation)
    return laid_out(out, memory_format(input)), reference.Stages(reduced, maps)


def trains_faster(settings: Settings, input: Tensor, core: Tensor) -> bool:
    """Whether a step whose weights change is better off with three convolutions of PyTorch and its own autograd.

    The rule of ``basis_conv2d``, whose kernel runs here: it pays where Winograd saves work, on pixels enough. On a GPU
    no step is measured yet, so none is trusted to be faster.
    """
    if registry.wish() is not None:
        return False
    if input.device.type == "cuda":
        return True
    if settings.backend != "cpu" or input.dtype != torch.float32:
        return False
    return not packing_pays(input, core, settings.stride, settings.dilation, settings.precise)


def run(tensors: tuple[Any, ...], settings: Settings) -> Tensor:
    """Three convolutions under PyTorch's autograd.

    16-bit steps on a GPU round the sums with bias and residual as PyTorch does, once more often than the kernels.
    """
    input, u_in, core, u_out, bias, residual = tensors
    by_library = input.device.type == "cuda" and input.dtype in reference.HALF and not settings.precise
    if not by_library or not input.numel():
        return reference.forward(input, u_in, core, u_out, bias, residual, *settings[:-1])
    stride, padding, dilation, activation, precise, backend = settings
    reduced = torch.conv2d(input, u_in.t()[:, :, None, None])
    two = two_convolutions((stride, padding, dilation, 1, activation, precise, backend), reduced, core, u_out)
    return laid_out(two(reduced, core, u_out, bias, residual), memory_format(input))
