"""``basis_conv2d`` as two convolutions of PyTorch: the backend ``reference``, and training steps that are faster so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from basisconv_kernels.core import registry
from basisconv_kernels.core.autograd import refuse_by_name
from basisconv_kernels.reference import basis_conv2d as reference

if TYPE_CHECKING:
    from basisconv_kernels.core.problem import Conv2dProblem
    from basisconv_kernels.ops.basis_conv2d import Settings

OP = "basis_conv2d"
# Fewer pixels of a float32 batch than these do not earn back, in one forward, the packing that new weights need.
PIXELS_WORTH_PACKING = 1024


# --- the backend ------------------------------------------------------------------------------------------------------


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


# --- training ---------------------------------------------------------------------------------------------------------


def trains_faster(settings: Settings, input: Tensor, basis_weight: Tensor, coefficients: Tensor) -> bool:
    """Whether a step whose weights change is better off with two convolutions of PyTorch and its own autograd.

    On a processor, unpacked float32 weights pay where Winograd saves work and there are pixels enough; elsewhere the
    two convolutions, which the explicit backward runs in any case, are as fast, need no packing and no Python in their
    backward. On a GPU they are taken unless a step was measured there, and our kernels were not slower.
    """
    if registry.wish() is not None:
        return False
    if input.device.type == "cuda":
        return trains_plainly(settings, input, basis_weight, coefficients)
    if settings.backend != "cpu" or input.dtype != torch.float32:
        return False
    winograd = basis_weight.shape[2:] == (3, 3) and settings.stride == settings.dilation == (1, 1)
    pixels = input.shape[0] * input.shape[2] * input.shape[3]
    return settings.precise or not winograd or pixels < PIXELS_WORTH_PACKING


_DECISIONS_KEPT = 4096
_decisions: dict[tuple[Any, ...], bool] = {}


def trains_plainly(settings: Settings, input: Tensor, basis_weight: Tensor, coefficients: Tensor) -> bool:
    """``trains_faster`` on a GPU, remembered by what the choice sees."""
    layout = reference.memory_format(input)
    key = (settings, input.dtype, input.device, layout, basis_weight.shape, coefficients.shape)
    found = _decisions.get(key)
    if found is None:
        from basisconv_kernels.ops.basis_conv2d import problem_of
        from basisconv_kernels.ops.basis_conv2d_model import slower_in_training

        Q, taps_in, R, S = basis_weight.shape
        sizes = (taps_in, Q, *coefficients.shape[:1], R, S, coefficients.shape[1])
        problem = problem_of(input.device.type, input.dtype, layout, sizes, settings)
        if len(_decisions) >= _DECISIONS_KEPT:
            _decisions.clear()
        found = _decisions[key] = settings.backend == "reference" or settings.backend in slower_in_training(problem)
    return found


def run(tensors: tuple[Any, ...], settings: Settings) -> Tensor:
    """Two convolutions under PyTorch's autograd; like the Function it refuses double backward.

    16-bit steps on a GPU round the sums with bias and residual as PyTorch does, once more often than the kernels.
    """
    input, basis_weight, coefficients, bias, residual = tensors
    if input.device.type == "cuda" and input.dtype in reference.HALF and not settings.precise:
        result = convolutions(input, basis_weight, coefficients, bias, residual, *settings[:-2])
    else:
        result = reference.forward(input, basis_weight, coefficients, bias, residual, *settings[:-1])
    result.register_hook(_refuse_graph)
    return result


def convolutions(
    input: Tensor,
    basis_weight: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
    activation: str | None,
) -> Tensor:
    """What a user would write, in the dtype of ``input``."""
    padded, pad = reference.symmetric(input, padding)
    maps = F.conv2d(padded, basis_weight, None, stride, pad, dilation, groups)
    mixing_groups = reference.coefficient_groups(coefficients, basis_weight.shape[0], groups)
    out = F.conv2d(maps, coefficients[:, :, None, None], bias, groups=mixing_groups)
    out = out if residual is None else out + residual
    if activation is not None:
        out = F.relu(out) if activation == "relu" else F.relu6(out)
    return reference.laid_out(out, reference.memory_format(input))


def _refuse_graph(gradient: Tensor) -> None:
    if torch.is_grad_enabled():
        refuse_by_name(OP)
