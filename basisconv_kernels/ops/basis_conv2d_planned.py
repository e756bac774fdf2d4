"""The short way of a repeated eager call on the CPU whose weights are packed.

The first such call is checked, planned and run like every other one. What it was is then remembered under the packed
tensor's address and the arguments that are no tensors, as a plan: bytes that the native op reads. A later call hands
plan and tensors to that op, which checks the tensors against the plan and against each other, as it does for every
caller. Where it refuses, nobody is told: the call goes the long way, which has the words for what is wrong, if anything
is. So an address that was given out again does no harm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from basisconv_kernels.core import registry
from basisconv_kernels.core.eager import ORDINARY, kinds, undisturbed
from basisconv_kernels.ops.basis_conv2d_native import PRESENT

_KEPT = 4096
_LASTING = (int, str, tuple, bool, type(None))  # kinds of arguments that hash and stay what they are
_NUMBERS = 4  # stride, padding, dilation and groups come first among the arguments
_known: dict[tuple[Any, ...], tuple[tuple[Any, ...], Tensor]] = {}
if PRESENT:
    _planned = torch.ops.basisconv.basis_conv2d_planned.default._op


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
    key = (id(packed), registry.wish(), arguments)
    try:
        found = _known.get(key)
    except TypeError:  # a list for a tuple
        return None
    if found is None or not _goes(input, basis_weight, coefficients, bias, residual, packed):
        return None
    (stride, padding, dilation, groups, *_), plan = found
    same = arguments[0] is stride and arguments[1] is padding and arguments[2] is dilation and arguments[3] is groups
    if not same and any(kinds(a) != kinds(b) for a, b in zip(arguments[:_NUMBERS], found[0][:_NUMBERS], strict=True)):
        return None
    try:
        return _planned(input, basis_weight, coefficients, bias, residual, packed, plan)
    except RuntimeError:
        _known.pop(key, None)
        return None


def _goes(input: Any, basis_weight: Any, coefficients: Any, bias: Any, residual: Any, packed: Any) -> bool:
    """Whether a native op may be called on these tensors without anybody noticing."""
    if not (
        type(input) is Tensor
        and type(basis_weight) in ORDINARY
        and type(coefficients) in ORDINARY
        and type(packed) is Tensor
        and (bias is None or type(bias) in ORDINARY)
        and (residual is None or type(residual) is Tensor)
        and undisturbed()
    ):
        return False
    return not torch.is_grad_enabled() or not (
        input.requires_grad
        or basis_weight.requires_grad
        or coefficients.requires_grad
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )


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
        settings: what the arguments came to, the backend last: the native one for the CPU.
        any_layout: tells whether the backend is the same for inputs of the other memory format.
    """
    if any(type(argument) not in _LASTING for argument in arguments):
        return
    input, basis_weight, coefficients, bias, residual = tensors
    key = (id(packed), registry.wish(), arguments)
    if key in _known or not _goes(input, basis_weight, coefficients, bias, residual, packed):
        return
    if len(_known) >= _KEPT:
        _known.clear()
    plan = torch.ops.basisconv.basis_conv2d_plan.default(
        input, basis_weight, coefficients, *settings[:-1], any_layout()
    )
    _known[key] = (arguments, plan)
