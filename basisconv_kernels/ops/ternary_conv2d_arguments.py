"""The arguments of ``ternary_conv2d``: checked against each other, and brought into the form that the backends take."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from basisconv_kernels.core import checks
from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.packed import WORD_BITS, words_for

OP = "ternary_conv2d"

Fixed = tuple[Pair, Quad, Pair, int, str | None]
Sizes = tuple[int, int, int, int]


def check_planes(op: str, planes: Any, taps_in: int | None) -> None:
    """Refuse what are no planes [K, 2, R, S, words]; ``taps_in`` is C/groups, None where nothing states it."""
    layout = "[K, 2, R, S, words]"
    if not isinstance(planes, Tensor):
        raise TypeError(f"{op}: planes must be a Tensor {layout}, got {type(planes).__name__}; ternary_planes makes it")
    checks.tensor(op, "planes", planes, 5, layout)
    if planes.dtype != torch.int32:
        raise TypeError(f"{op}: planes must be int32 words, got {planes.dtype}; ternary_planes(weight) makes them")
    if planes.shape[1] != 2 or min(planes.shape[1:]) < 1:
        raise ValueError(
            f"{op}: planes must be {layout} with the planes of +1 and of -1 and no empty side, got {list(planes.shape)}"
        )
    if taps_in is not None and planes.shape[4] != words_for(taps_in):
        raise ValueError(
            f"{op}: planes must be {layout} with words = ceil(C/groups / {WORD_BITS}) = {words_for(taps_in)} for "
            f"C/groups = {taps_in}, got {list(planes.shape)}"
        )


def _scale(name: str, scale: Tensor, K: int) -> Tensor:
    """A scale that is [K] or one number, as it is."""
    if not isinstance(scale, Tensor):
        raise TypeError(f"{OP}: {name} must be a Tensor [K] or of one number, got {type(scale).__name__}")
    if scale.layout is not torch.strided:
        raise TypeError(f"{OP}: {name} must be a dense tensor, got layout {scale.layout}; call .to_dense() first")
    if scale.dim() > 1 or (scale.dim() == 1 and scale.shape[0] not in (1, K)):
        raise ValueError(
            f"{OP}: {name} must be [K] with K = planes.shape[0] = {K}, or one number, got {list(scale.shape)}"
        )
    return scale


def normal_form(
    input: Tensor,
    planes: Tensor,
    scale: Tensor | None,
    negative_scale: Tensor | None,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    activation: Any,
) -> tuple[Fixed, Sizes, tuple[Tensor | None, Tensor | None]]:
    """Check every argument against every other.

    Returns:
        (stride, padding, dilation, groups, activation) in normal form; the sizes that hold for all batches and maps,
        (C/G, K, R, S); and the two scales.

    Raises:
        TypeError, ValueError: as ``ternary_conv2d`` documents them.
    """
    checks.tensor(OP, "input", input, 4, "[N, C, H, W]")
    if not isinstance(groups, int) or isinstance(groups, bool):
        raise TypeError(f"{OP}: groups must be an int, got {groups!r}")
    if groups < 1:
        raise ValueError(f"{OP}: groups must be at least 1, got {groups}")
    C, H, W = input.shape[1:]
    if C < 1 or C % groups:
        raise ValueError(f"{OP}: C = input.shape[1] must be at least 1 and divisible by groups = {groups}, got {C}")
    check_planes(OP, planes, operator.index(C // groups))
    if planes.device != input.device:
        raise ValueError(
            f"{OP}: planes must be on the device of input, {input.device}, got {planes.device}; move one of them"
        )
    K, _, R, S, _ = planes.shape
    if K % groups:
        raise ValueError(f"{OP}: K = planes.shape[1] must be divisible by groups = {groups}, got {K}")
    if negative_scale is not None and scale is None:
        raise ValueError(f"{OP}: negative_scale needs scale beside it, got None; torch.ones(()) keeps the +1 weights")
    scales = tuple(
        None if value is None else _scale(name, value, K)
        for name, value in (("scale", scale), ("negative_scale", negative_scale))
    )
    if bias is not None:
        checks.tensor(OP, "bias", bias, 1, "[K]")
        if bias.shape[0] != K:
            raise ValueError(f"{OP}: bias must be [K] with K = planes.shape[0] = {K}, got {list(bias.shape)}")
    checks.same_kind(OP, "input", input, {"scale": scales[0], "negative_scale": scales[1], "bias": bias})

    stride = checks.pair(OP, "stride", stride, at_least=1)
    dilation = checks.pair(OP, "dilation", dilation, at_least=1)
    padding = checks.padding4(OP, padding, (R, S), stride, dilation)
    checks.activation(OP, activation)
    checks.output_size(OP, (H, W), (R, S), stride, padding, dilation)
    sizes = tuple(operator.index(size) for size in (C // groups, K, R, S))
    return (stride, padding, dilation, groups, activation), sizes, scales  # type: ignore[return-value]
