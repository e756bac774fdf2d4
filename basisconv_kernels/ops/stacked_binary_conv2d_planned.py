"""The short way of a repeated eager call of ``stacked_binary_conv2d`` with packed weights; see ``core.eager``.

Signs that run as popcounts over full filters always go the long way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from basisconv_kernels.core.eager import Plans, call, plain
from basisconv_kernels.core.packed import PackedTensor
from basisconv_kernels.ops.stacked_binary_conv2d_native import by_popcount, numbers
from basisconv_kernels.reference.stacked_binary_conv2d import Settings

REAL = (None, None)  # formats of operands none of which is packed

plans = Plans("stacked_binary_conv2d")


def run(tensors: tuple[Any, ...], packed: Tensor, arguments: tuple[Any, ...]) -> Tensor | None:
    """The result, None where the call must go the long way.

    Args:
        tensors: input, bank, index, scale and bias as given to ``stacked_binary_conv2d``.
        packed: as for ``stacked_binary_conv2d``.
        arguments: stride, padding, dilation, groups, binarize_input, activation, estimator and backend.
    """
    return call(plans.known, plans.native, packed, arguments, _formats(tensors), *_operands(tensors))


def _formats(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the torch op does not see: the formats of packed operands."""
    input, bank = tensors[:2]
    return (
        input.format if type(input) is PackedTensor else None,
        bank.format if type(bank) is PackedTensor else None,
    )


def _operands(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """The tensors that the torch op takes; packed weights come behind them."""
    input, bank, *others = tensors
    return (
        input.words if type(input) is PackedTensor else input,
        bank.words if type(bank) is PackedTensor else bank,
        *others,
    )


def remember(tensors: tuple[Any, ...], packed: Tensor, arguments: tuple[Any, ...], settings: Settings) -> None:
    """Let the next call of this kind go the short way, where it can.

    Args:
        tensors, packed, arguments: as for ``run``, of a call that went the long way on the native backend of the CPU.
        settings: what the arguments came to.
    """
    operands = _operands(tensors)
    bank, index = operands[1:3]
    popcounts = settings.binarize and by_popcount(bank.shape[0], index.shape[0], settings.groups)
    rounded = settings.encoding is not None and settings.dtype != torch.float32  # the op gives float32
    if not (popcounts or rounded or index.dim() != 2) and plain(*operands, packed):
        plans.keep(packed, arguments, _formats(tensors), lambda: (*operands, *numbers(bank, index, settings)))
