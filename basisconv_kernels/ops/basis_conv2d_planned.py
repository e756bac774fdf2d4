"""The short way of a repeated eager call of ``basis_conv2d`` with packed weights; see ``core.eager``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from basisconv_kernels.core.eager import Plans, call, plain

plans = Plans("basis_conv2d")


def run(
    input: Tensor,
    basis_weight: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    packed: Tensor,
    arguments: tuple[Any, ...],
) -> Tensor | None:
    """The result, None where the call must go the long way.

    Args:
        input, basis_weight, coefficients, bias, residual, packed: as for ``basis_conv2d``, unchecked.
        arguments: stride, padding, dilation, groups, activation, precise and backend as given, unchecked.
    """
    return call(plans.known, plans.native, packed, arguments, None, input, basis_weight, coefficients, bias, residual)


def remember(
    tensors: tuple[Any, ...],
    packed: Tensor,
    arguments: tuple[Any, ...],
    settings: tuple[Any, ...],
    any_layout: Callable[[], bool],
) -> None:
    """Let the next call of this kind go the short way, where it can.

    Args:
        tensors: input, basis_weight, coefficients, bias and residual of a call that went the long way.
        packed, arguments: as for ``run``.
        settings: what the arguments came to, the backend last: a native one.
        any_layout: tells whether the backend is the same for inputs of the other memory format.
    """
    if plain(*tensors, packed):
        plans.keep(packed, arguments, None, lambda: (*tensors[:3], *settings[:-1], any_layout()))
