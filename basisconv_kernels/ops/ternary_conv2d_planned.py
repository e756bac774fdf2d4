"""The short way of a repeated eager call of ``ternary_conv2d`` on numbers with packed planes; see ``core.eager``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from basisconv_kernels.core.eager import Plans, call, plain

plans = Plans("ternary_conv2d")


def run(tensors: tuple[Any, ...], packed: Tensor, arguments: tuple[Any, ...]) -> Tensor | None:
    """The result, None where the call must go the long way.

    Args:
        tensors: input, planes, scale, negative_scale and bias as given to ``ternary_conv2d``.
        packed: as for ``ternary_conv2d``.
        arguments: stride, padding, dilation, groups, activation and backend.
    """
    return call(plans.known, plans.native, packed, arguments, None, *tensors)


def remember(tensors: tuple[Any, ...], packed: Tensor, arguments: tuple[Any, ...], settings: tuple[Any, ...]) -> None:
    """Let the next call of this kind go the short way, where it can.

    Args:
        tensors, packed, arguments: as for ``run``, of a call that went the long way on the native backend of the CPU.
        settings: what the arguments came to, the backend last.
    """
    if plain(*tensors, packed):
        plans.keep(packed, arguments, None, lambda: (*tensors, *settings[:-1]))
