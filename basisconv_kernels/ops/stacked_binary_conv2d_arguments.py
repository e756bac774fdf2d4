"""The arguments of ``stacked_binary_conv2d``: checked against each other, and in the form that the backends take."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from basisconv_kernels.core import checks
from basisconv_kernels.core.estimators import ESTIMATORS
from basisconv_kernels.core.packed import PackedTensor
from basisconv_kernels.reference.stacked_binary_conv2d import Settings

OP = "stacked_binary_conv2d"
INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)


class Sizes(NamedTuple):
    """What holds for all batches and maps."""

    K: int
    n: int
    splits: int
    R: int
    S: int
    planes: int


def normal_form(
    input: Any, bank: Any, index: Any, scale: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any,
    binarize_input: Any, activation: Any, estimator: Any,
) -> tuple[Settings, Sizes]:  # fmt: skip
    """Check every argument against every other; ``backend`` of the settings is left empty.

    Raises:
        TypeError, ValueError: as ``stacked_binary_conv2d`` documents them.
    """
    packed_input = isinstance(input, PackedTensor)
    if not packed_input:
        checks.tensor(OP, "input", input, 4, "[N, C, H, W]")
        if input.dtype not in checks.FLOAT_DTYPES:
            raise TypeError(f"{OP}: input must be float32, bfloat16, float16 or float64, got {input.dtype}")
    n, low, R, S = _bank_shape(bank)
    K, splits = _index_shape(index, n)
    for name, value in (("scale", scale), ("bias", bias)):
        if value is None:
            continue
        checks.tensor(OP, name, value, 1, "[K]")
        if value.dtype not in checks.FLOAT_DTYPES:
            raise TypeError(f"{OP}: {name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
        if value.shape[0] != K:
            raise ValueError(f"{OP}: {name} must be [K] with K = index.shape[0] = {K}, got {list(value.shape)}")
    for name, value in (("bank", bank), ("index", index), ("scale", scale), ("bias", bias)):
        if value is not None and value.device != input.device:
            raise ValueError(
                f"{OP}: {name} must be on the device of input, {input.device}, got {value.device}; move one of them"
            )
    C, H, W = input.shape[1:]
    _check_channels(C, K, splits, low, groups)
    stride = checks.pair(OP, "stride", stride, at_least=1)
    dilation = checks.pair(OP, "dilation", dilation, at_least=1)
    padding = checks.padding4(OP, padding, (R, S), stride, dilation)
    checks.activation(OP, activation)
    checks.output_size(OP, (H, W), (R, S), stride, padding, dilation)
    if not isinstance(binarize_input, bool):
        raise TypeError(f"{OP}: binarize_input must be True or False, got {binarize_input!r}")
    if packed_input and binarize_input and input.encoding != "sign":
        raise ValueError(
            f"{OP}: binarize_input takes signs of real numbers, but input holds {input.planes}-bit codes, none of "
            "which is negative; leave binarize_input=False"
        )
    if estimator not in ESTIMATORS:
        raise ValueError(f"{OP}: estimator must be {', '.join(map(repr, ESTIMATORS))}, got {estimator!r}")
    others = [t.dtype for t in (scale, bias, bank) if isinstance(t, Tensor) and t.is_floating_point()]
    dtype = (others or [torch.float32])[0] if packed_input else input.dtype
    # operator.index makes a size that a graph left open a constant: one graph a weight shape, for all batches and maps.
    K, n, splits, R, S = (operator.index(size) for size in (K, n, splits, R, S))
    sizes = Sizes(K, n, splits, R, S, input.planes if packed_input else 0)
    settings = Settings(
        stride, padding, dilation, groups, binarize_input and not packed_input, activation, dtype, operator.index(C),
        input.encoding if packed_input else None, isinstance(bank, PackedTensor), estimator, "",
    )  # fmt: skip
    return settings, sizes


def _bank_shape(bank: Any) -> tuple[int, int, int, int]:
    """(n, cs, R, S)."""
    if isinstance(bank, PackedTensor):
        if bank.encoding != "sign":
            raise ValueError(f"{OP}: a packed bank must hold signs, got encoding {bank.encoding!r}; see bitpack")
    else:
        checks.tensor(OP, "bank", bank, 4, "[n, C/(groups·splits), R, S]")
        if bank.dtype not in (*checks.FLOAT_DTYPES, torch.int8):
            raise TypeError(f"{OP}: bank must hold +1 and −1 in a float dtype or int8, got {bank.dtype}")
    n, low, R, S = bank.shape
    if min(n, low, R, S) < 1:
        raise ValueError(f"{OP}: bank must be [n, C/(groups·splits), R, S] with no empty side, got {list(bank.shape)}")
    return n, low, R, S


def _index_shape(index: Any, n: int) -> tuple[int, int]:
    """(K, splits) of an index, or of the one-hot selections in its place."""
    if isinstance(index, Tensor) and index.dim() == 3:
        checks.tensor(OP, "index", index, 3, "[K, splits, n]")
        if index.dtype not in checks.FLOAT_DTYPES:
            raise TypeError(f"{OP}: one-hot selections [K, splits, n] must be of a float dtype, got {index.dtype}")
        if index.shape[2] != n:
            raise ValueError(
                f"{OP}: one-hot selections must be [K, splits, n] with n = bank.shape[0] = {n}, got {list(index.shape)}"
            )
    else:
        checks.tensor(OP, "index", index, 2, "[K, splits]")
        if index.dtype not in INDEX_DTYPES:
            raise TypeError(f"{OP}: index must be int64, int32, int16 or uint8, got {index.dtype}")
    K, splits = index.shape[:2]
    if min(K, splits) < 1:
        raise ValueError(f"{OP}: index must be [K, splits] with no empty side, got {list(index.shape)}")
    return K, splits


def _check_channels(C: int, K: int, splits: int, low: int, groups: Any) -> None:
    if not isinstance(groups, int) or isinstance(groups, bool):
        raise TypeError(f"{OP}: groups must be an int, got {groups!r}")
    if groups < 1:
        raise ValueError(f"{OP}: groups must be at least 1, got {groups}")
    if C % (groups * splits):
        within = f" of {groups} groups" if groups > 1 else ""
        raise ValueError(
            f"{OP}: C = input.shape[1] = {C} is not divisible into splits = index.shape[1] = {splits} parts{within}; "
            "choose other splits, or keep the layer dense (a first layer with 3 channels, say)"
        )
    if low * groups * splits != C:
        raise ValueError(
            f"{OP}: bank must be [n, cs, R, S] with cs = C/(groups·splits) = {C}/({groups}·{splits}) = "
            f"{C // (groups * splits)} from input.shape[1] and index.shape[1], got cs = {low}"
        )
    if K % groups:
        raise ValueError(f"{OP}: K = index.shape[0] must be divisible by groups = {groups}, got {K}")


def check_values(bank: Any, index: Tensor, n: int) -> None:
    """Refuse bank values other than ±1 and filters that do not exist; reads both.

    Raises:
        ValueError: the message names the first such value.
    """
    if isinstance(bank, Tensor):
        wrong = bank.detach().abs() != 1
        if bool(wrong.any()):
            at = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"{OP}: bank must hold +1 and −1 only, got {bank[tuple(at)].item()} at {at} (of "
                f"{int(wrong.sum())} such); take signs first, where sign(0) = +1"
            )
    if index.dim() == 3:
        picked = index.detach()
        wrong = ((picked == 1).sum(-1) != 1) | ((picked == 0).sum(-1) != n - 1)
        if bool(wrong.any()):
            at = wrong.nonzero()[0].tolist()
            raise ValueError(f"{OP}: selections [K, splits, n] must be one-hot, those at [k, split] = {at} are not")
        return
    wrong = (index < 0) | (index >= n)
    if bool(wrong.any()):
        at = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{OP}: index must name bank filters 0 to {n - 1} (n = bank.shape[0] = {n}), got {int(index[tuple(at)])} "
            f"at {at}"
        )
