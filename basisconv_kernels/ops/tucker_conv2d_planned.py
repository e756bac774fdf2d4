"""The short way of a repeated eager call of ``tucker_conv2d`` with packed weights; see ``core.eager``.

The first 1×1 runs as always; the plan is one of ``basis_conv2d``, for the last two stages.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from basisconv_kernels.core.eager import Plans, plain
from basisconv_kernels.core.layout import laid_out, memory_format
from basisconv_kernels.ops.tucker_conv2d_native import between, first_stage

PRECISE = 4  # place of ``precise`` among the arguments

plans = Plans("basis_conv2d")


def run(tensors: tuple[Any, ...], packed: Tensor, arguments: tuple[Any, ...]) -> Tensor | None:
    """The result, None where the call must go the long way.

    Args:
        tensors: input, u_in, core, u_out, bias and residual as given to ``tucker_conv2d``.
        packed: as for ``tucker_conv2d``.
        arguments: stride, padding, dilation, activation, precise and backend.
    """
    if not plans.known or not plain(*tensors, packed):
        return None
    input, u_in = tensors[:2]
    seen = _seen(input, u_in)
    plan = None if seen is None else plans.of(packed, arguments, seen)
    if plan is None:
        return None
    layout = seen[0]
    try:
        reduced = laid_out(first_stage(input, u_in, layout, bool(arguments[PRECISE])), layout)
    except RuntimeError:  # that is not for these channels, say
        return None
    return plans.run(plan, packed, arguments, seen, reduced, *tensors[2:])


def _seen(input: Any, u_in: Any) -> Any:
    """What the torch op does not see of the operands of the first stage; None of what are none."""
    if input is None or u_in is None or input.dim() != 4 or input.layout is not torch.strided:
        return None
    # On a GPU the choice between one pass and two depends on the maps' size, and one pass has no plan.
    maps = input.shape if input.is_cuda else None
    return memory_format(input), maps, input.dtype, input.device, u_in.shape, u_in.dtype, u_in.device


def remember(tensors: tuple[Any, ...], packed: Tensor, arguments: tuple[Any, ...], settings: tuple[Any, ...]) -> None:
    """Let the next call of this kind go the short way, where it can: not where maps between the stages are wider.

    Args:
        tensors, packed, arguments: as for ``run``, of a call that went the long way on a native backend.
        settings: what the arguments came to, the backend last.
    """
    input, u_in, core, u_out = tensors[:4]
    stride, padding, dilation, activation, precise, _ = settings
    if between(input.dtype, precise) == input.dtype and plain(*tensors, packed):
        plans.keep(
            packed,
            arguments,
            _seen(input, u_in),
            lambda: (input, core, u_out, stride, padding, dilation, 1, activation, precise, True),
        )
