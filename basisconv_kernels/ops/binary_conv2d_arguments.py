"""The arguments of ``binary_conv2d``: checked against each other, and brought into the form that the backends take."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from basisconv_kernels.core import checks
from basisconv_kernels.core.packed import PackedTensor, check, check_threshold
from basisconv_kernels.reference.binary_conv2d import ESTIMATORS, Settings

OP = "binary_conv2d"
OUTPUTS = ("float", "int32", "packed")
MOST = 2**31 - 1


class Sizes(NamedTuple):
    """What holds for all batches and maps."""

    C: int
    K: int
    R: int
    S: int
    planes: int


def normal_form(
    input: Any,
    weight: Any,
    scale: Any,
    bias: Any,
    pixel_scale: Any,
    threshold: Any,
    scale_group: Any,
    stride: Any,
    padding: Any,
    padding_value: Any,
    dilation: Any,
    groups: Any,
    activation: Any,
    output: Any,
    estimator: Any,
) -> tuple[Settings, Sizes]:
    """Check every argument against every other.

    Returns:
        The settings with an empty ``backend``, and the sizes of the weights.

    Raises:
        TypeError, ValueError: as ``binary_conv2d`` documents them.
    """
    N, C, H, W, planes, encoding = _input(input)
    K, taps_in, R, S = _weight(weight)
    _same_device(input, weight, {"scale": scale, "bias": bias, "pixel_scale": pixel_scale, "scale_group": scale_group})

    if not isinstance(groups, int) or isinstance(groups, bool):
        raise TypeError(f"{OP}: groups must be an int, got {groups!r}")
    if groups < 1:
        raise ValueError(f"{OP}: groups must be at least 1, got {groups}")
    if taps_in * groups != C:
        raise ValueError(
            f"{OP}: weight must be [K, C/groups, R, S] with C/groups = {C}/{groups} from input, "
            f"got {[K, taps_in, R, S]}"
        )
    if K % groups:
        raise ValueError(f"{OP}: K = weight.shape[0] must be divisible by groups = {groups}, got {K}")
    stride = checks.pair(OP, "stride", stride, at_least=1)
    dilation = checks.pair(OP, "dilation", dilation, at_least=1)
    padding = checks.padding4(OP, padding, (R, S), stride, dilation)
    OH, OW = checks.output_size(OP, (H, W), (R, S), stride, padding, dilation)
    _padding_value(padding_value, encoding)
    largest = taps_in * R * S * (2**planes - 1 if encoding == "unsigned" else 1)
    if largest > MOST:
        raise ValueError(f"{OP}: sums of up to {largest} do not fit into int32; split the input into channel groups")

    if output not in OUTPUTS:
        raise ValueError(f"{OP}: output must be 'float', 'int32' or 'packed', got {output!r}")
    checks.activation(OP, activation)
    _epilogue(output, scale, bias, pixel_scale, activation, threshold)
    if threshold is not None:
        check_threshold(OP, threshold, K, _device(input), integers=True)
    _scales(scale, scale_group, K)
    if bias is not None:
        _floats("bias", bias, 1, "[K]")
        if bias.shape[0] != K:
            raise ValueError(f"{OP}: bias must be [K] with K = weight.shape[0] = {K}, got {list(bias.shape)}")
    if pixel_scale is not None:
        _floats("pixel_scale", pixel_scale, 4, "[N, 1, OH, OW]")
        if tuple(pixel_scale.shape) != (N, 1, OH, OW):
            raise ValueError(
                f"{OP}: pixel_scale must be [N, 1, OH, OW] = {[N, 1, OH, OW]}, got {list(pixel_scale.shape)}"
            )
    # operator.index makes a size that a graph left open a constant: one graph a weight shape, for all batches and maps.
    sizes = Sizes(*(operator.index(size) for size in (C, K, R, S, planes)))
    settings = Settings(
        stride=stride,
        padding=padding,
        padding_value=padding_value,
        dilation=dilation,
        groups=groups,
        activation=activation,
        output=output,
        dtype=_dtype(input, scale, bias, pixel_scale),
        channels=sizes.C,
        encoding=encoding,
        packed_weight=isinstance(weight, PackedTensor),
        estimators=_estimators(estimator),
        backend="",
    )
    return settings, sizes


def _device(value: Tensor | PackedTensor) -> torch.device:
    return value.device


def _floats(name: str, value: Any, dim: int, layout: str) -> None:
    checks.tensor(OP, name, value, dim, layout)
    if value.dtype not in checks.FLOAT_DTYPES:
        raise TypeError(f"{OP}: {name} must be float32, bfloat16, float16 or float64, got {value.dtype}")


def _input(input: Any) -> tuple[int, int, int, int, int, str | None]:
    """(N, C, H, W, planes, encoding); no planes and no encoding of a real input."""
    if isinstance(input, PackedTensor):
        check(input)
        return (*input.shape, input.planes, input.encoding)
    if not isinstance(input, Tensor):
        raise TypeError(f"{OP}: input must be a Tensor [N, C, H, W] or a PackedTensor, got {type(input).__name__}")
    if input.dtype == torch.int32:
        raise TypeError(
            f"{OP}: input must be real numbers or a PackedTensor, got int32; words alone do not say how many channels "
            "they hold: PackedTensor(words, channels) does"
        )
    _floats("input", input, 4, "[N, C, H, W]")
    N, C, H, W = input.shape
    return (N, C, H, W, 0, None)


def _weight(weight: Any) -> tuple[int, int, int, int]:
    """[K, C/groups, R, S]."""
    shape: tuple[int, int, int, int]
    if isinstance(weight, PackedTensor):
        check(weight)
        if weight.encoding != "sign":
            raise ValueError(f"{OP}: weight must hold signs, got a PackedTensor of encoding {weight.encoding!r}")
        shape = weight.shape
    elif isinstance(weight, Tensor):
        _floats("weight", weight, 4, "[K, C/groups, R, S]")
        K, taps_in, R, S = weight.shape
        shape = (K, taps_in, R, S)
    else:
        raise TypeError(
            f"{OP}: weight must be a Tensor [K, C/groups, R, S] or a PackedTensor, got {type(weight).__name__}"
        )
    if min(shape) < 1:
        raise ValueError(f"{OP}: weight must be [K, C/groups, R, S] with no empty side, got {list(shape)}")
    return shape


def _same_device(input: Any, weight: Any, others: dict[str, Any]) -> None:
    home = _device(input)
    for name, value in {"weight": weight, **others}.items():
        if isinstance(value, (Tensor, PackedTensor)) and value.device != home:
            raise ValueError(
                f"{OP}: {name} must be on the device of input, {home}, got {value.device}; move one of them"
            )


def _padding_value(value: Any, encoding: str | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{OP}: padding_value must be 0, 1 or -1, got {value!r}")
    if value not in (-1, 0, 1):
        raise ValueError(f"{OP}: padding_value must be 0, 1 or -1, got {value}")
    if value and encoding == "unsigned":
        raise ValueError(f"{OP}: padding_value must be 0 for unsigned codes, whose zero is exact, got {value}")


def _epilogue(
    output: str, scale: Any, bias: Any, pixel_scale: Any, activation: str | None, threshold: Any
) -> None:  # fmt: skip
    given = {"scale": scale, "bias": bias, "pixel_scale": pixel_scale, "activation": activation}
    present = [name for name, value in given.items() if value is not None]
    if output != "float" and present:
        way_out = "; fold it into threshold with Threshold.fold" if output == "packed" else ""
        raise ValueError(f"{OP}: {present[0]} belongs to output='float', got output={output!r}{way_out}")
    if output != "packed" and threshold is not None:
        raise ValueError(f"{OP}: threshold belongs to output='packed', got output={output!r}")


def _scales(scale: Any, scale_group: Any, K: int) -> None:
    if scale is None:
        if scale_group is not None:
            raise ValueError(f"{OP}: scale_group says which scale an output takes, so it needs scale, got None")
        return
    if scale_group is None:
        _floats("scale", scale, 1, "[K]")
        if scale.shape[0] != K:
            raise ValueError(
                f"{OP}: scale must be [K] with K = weight.shape[0] = {K}, got {list(scale.shape)}; for fewer scales "
                "give scale_group"
            )
        return
    _floats("scale", scale, 1, "[scale groups]")
    checks.tensor(OP, "scale_group", scale_group, 1, "[K]")
    if scale_group.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{OP}: scale_group must be int64 or int32, got {scale_group.dtype}")
    if scale_group.shape[0] != K:
        raise ValueError(f"{OP}: scale_group must be [K] with K = weight.shape[0] = {K}, got {list(scale_group.shape)}")


def check_scale_group(scale: Tensor, scale_group: Tensor) -> None:
    """Refuse indices out of range, before they are used; on the CPU, where looking costs no synchronisation."""
    least, most = int(scale_group.min()), int(scale_group.max())
    if least < 0 or most >= scale.shape[0]:
        raise ValueError(
            f"{OP}: scale_group must be 0 to {scale.shape[0] - 1}, the places in scale, got {least} to {most}"
        )


def _dtype(input: Any, scale: Tensor | None, bias: Tensor | None, pixel_scale: Tensor | None) -> torch.dtype:
    """Of a float result: that of a real input, for a packed one that of scale, bias or pixel_scale; or autocast's."""
    given = [t for t in (input, scale, bias, pixel_scale) if isinstance(t, Tensor)]
    dtype = given[0].dtype if given else torch.float32
    device = _device(input).type
    if dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype


def _estimators(estimator: Any) -> tuple[str, str]:
    pair = (estimator, estimator) if isinstance(estimator, str) else estimator
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(name in ESTIMATORS for name in pair):
        names = ", ".join(map(repr, ESTIMATORS))
        raise ValueError(f"{OP}: estimator must be {names}, or one of them for input and one for weight, got {pair!r}")
    return (pair[0], pair[1])
