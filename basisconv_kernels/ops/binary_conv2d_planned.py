"""The short way of a repeated eager call of ``binary_conv2d`` with packed weights; see ``core.eager``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from basisconv_kernels.core.eager import Plans, call, plain
from basisconv_kernels.core.packed import PackedTensor, Threshold
from basisconv_kernels.ops.binary_conv2d_native import numbers
from basisconv_kernels.reference.binary_conv2d import Settings

OUTPUT = 6  # place of ``output`` among the arguments

plans = Plans("binary_conv2d")


def run(tensors: tuple[Any, ...], packed: Tensor, arguments: tuple[Any, ...]) -> Any:
    """The result, None where the call must go the long way.

    Args:
        tensors: input, weight, scale, bias, pixel_scale, threshold and scale_group as given to ``binary_conv2d``.
        packed: as for ``binary_conv2d``.
        arguments: stride, padding, padding_value, dilation, groups, activation, output, estimator and backend.
    """
    operands = _operands(tensors)
    made = call(plans.known, plans.native, packed, arguments, _formats(tensors), *operands)
    if made is None or arguments[OUTPUT] != "packed":
        return made
    return PackedTensor.of_kernel(made, operands[1].shape[0])


def _formats(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the torch op does not see: the formats of packed operands, and whether there is a threshold."""
    input, weight, _, _, _, threshold, scale_group = tensors
    return (
        input.format if type(input) is PackedTensor else None,
        weight.format if type(weight) is PackedTensor else None,
        type(threshold),
        type(scale_group),
    )


def _operands(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """The tensors that the torch op takes; packed weights come behind them."""
    input, weight, scale, bias, pixel_scale, threshold, _ = tensors
    return (
        input.words if type(input) is PackedTensor else input,
        weight.words if type(weight) is PackedTensor else weight,
        scale,
        bias,
        pixel_scale,
        *((threshold.value, threshold.flip) if type(threshold) is Threshold else (None, None)),
    )


def remember(tensors: tuple[Any, ...], packed: Tensor, arguments: tuple[Any, ...], settings: Settings) -> None:
    """Let the next call of this kind go the short way, where it can: not with scales that outputs share.

    Args:
        tensors, packed, arguments: as for ``run``, of a call that went the long way on a native backend.
        settings: what the arguments came to.
    """
    if tensors[-1] is not None or type(tensors[-2]) not in (Threshold, type(None)):
        return
    operands = _operands(tensors)
    if plain(*operands, packed):
        plans.keep(packed, arguments, _formats(tensors), lambda: (*operands, *numbers(settings)))
