"""Training steps of ``basis_conv2d`` without a wish: which run as two convolutions of PyTorch, and how these run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from basisconv_kernels.core import checks, registry, selfcheck, tuning
from basisconv_kernels.core.problem import Conv2dProblem
from basisconv_kernels.ops.basis_conv2d_model import slower_in_training
from basisconv_kernels.reference import basis_conv2d as reference

if TYPE_CHECKING:
    from basisconv_kernels.ops.basis_conv2d import Settings

OP = "basis_conv2d"
# What earns back, in one step of float32, the packing that new weights need and the Python in our backward: pixels of a
# batch, or fewer of them that take so many multiply-accumulates with the basis. Fitted to steps of basis_conv2d.
PIXELS_WORTH_PACKING = 1024
FEW_PIXELS, MACS_WORTH_PACKING = 192, 48_000_000

Step = Callable[..., Tensor]


class Training(NamedTuple):
    """What steps of one kind run as: two convolutions, or None for our Function."""

    eager: Step | None
    captured: Step | None

    def now(self) -> Step | None:
        """For a call that happens now: while a graph is captured, the times in a graph count alone."""
        return self.captured if self.eager is not self.captured and selfcheck.capturing() else self.eager


OURS = Training(None, None)


def decide(settings: Settings, problem: Conv2dProblem, input: Tensor, basis_weight: Tensor, mixing: Tensor) -> Training:
    """What a step whose weights change runs as.

    On a processor, unpacked float32 weights pay where Winograd saves work and there are pixels enough; elsewhere the
    two convolutions, which the explicit backward runs in any case, are as fast, need no packing and no Python in their
    backward. On a GPU they are taken unless a step was measured there, and our kernels were not slower.
    """
    if registry.wish() is not None:
        return OURS
    if input.device.type == "cuda":
        plainly = [
            settings.backend == "reference" or settings.backend in slower_in_training(problem, ways)
            for ways in (tuning.WAYS, ("graph",))
        ]
    else:
        pays = packing_pays(input, basis_weight, settings.stride, settings.dilation, settings.precise)
        plainly = [settings.backend == "cpu" and not pays] * 2
    if not any(plainly):
        return OURS
    step = two_convolutions(settings, input, basis_weight, mixing)
    eager, captured = (step if each else None for each in plainly)
    return Training(eager, captured)


def packing_pays(input: Tensor, filters: Tensor, stride: checks.Pair, dilation: checks.Pair, precise: bool) -> bool:
    """Whether our kernels pay on a processor where ``filters`` [Q, C, R, S] change from call to call."""
    if input.dtype != torch.float32:
        return True
    if precise or filters.shape[2:] != (3, 3) or not stride == dilation == (1, 1):
        return False
    pixels = input.shape[0] * input.shape[2] * input.shape[3]
    enough = pixels >= FEW_PIXELS and pixels * filters.numel() >= MACS_WORTH_PACKING
    return pixels >= PIXELS_WORTH_PACKING or enough


def two_convolutions(settings: tuple[Any, ...], input: Tensor, basis_weight: Tensor, coefficients: Tensor) -> Step:
    """Two convolutions under PyTorch's own autograd, for tensors like these.

    What a user would write, ReLU and the residual in place: on a GPU that spares memory and its traffic. All that does
    not change from step to step is decided here. 16-bit steps on a GPU round the sums with bias and residual as PyTorch
    does, once more often than the kernels.

    Args:
        settings: of the calls, in normal form.
        input, basis_weight, coefficients: of one of them; the others have the same shapes, dtypes and memory format.

    Returns:
        Callable: (input, basis_weight, coefficients, bias, residual) → the result.
    """
    stride, padding, dilation, groups, activation, precise, _ = settings
    Q, _, R, S = basis_weight.shape
    H, W = input.shape[2:]
    widened = input.dtype in reference.HALF and (precise or input.device.type != "cuda")
    one_channel = input.device.type == "cpu" and input.shape[1] == 1 and stride[1] > 1  # see core.layout.conv2d
    if widened or one_channel or not min(H, W):
        return lambda *tensors: reference.forward(*tensors, *settings[:-1])
    top, bottom, left, right = padding
    even = (top, left) == (bottom, right)
    geometry = _short(stride, (top, left) if even else (0, 0), dilation, groups)
    filters = (*coefficients.shape, 1, 1)
    mixing = _short((1, 1), (0, 0), (1, 1), reference.coefficient_groups(coefficients, Q, groups))
    layout = reference.memory_format(input)
    OH, OW = checks.output_size(OP, (H, W), (R, S), stride, padding, dilation)
    ambiguous = filters[0] == 1 or OH * OW == 1  # contiguous strides state either memory format there

    def step(
        input: Tensor, basis_weight: Tensor, coefficients: Tensor, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        padded = input if even else F.pad(input, (left, right, top, bottom))
        maps = torch.conv2d(padded, basis_weight, None, *geometry)
        out = torch.conv2d(maps, coefficients.view(filters), bias, *mixing)
        if residual is not None:
            out.add_(residual)
        if activation is not None:
            out = out.relu_() if activation == "relu" else F.relu6(out, inplace=True)
        if not ambiguous and out.is_contiguous(memory_format=layout):
            return out
        return reference.laid_out(out, layout)

    return step


def _short(*geometry: Any) -> tuple[Any, ...]:
    """Stride, padding, dilation and groups for ``torch.conv2d``, whose reading of them costs more than a look-up.

    Equal pairs are one number, and what it would take anyway is left out from the end.
    """
    found = [value[0] if isinstance(value, tuple) and value[0] == value[1] else value for value in geometry]
    while found and found[-1] == (1, 0, 1, 1)[len(found) - 1]:
        found.pop()
    return tuple(found)
