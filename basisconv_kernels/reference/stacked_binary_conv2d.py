"""``stacked_binary_conv2d`` in plain PyTorch: what the op means, and the fallback where no kernel runs.

Arguments arrive checked and in normal form (see ``ops/stacked_binary_conv2d.py``). Split i of group g is slice
``g·splits + i`` of the channels; the one bank B runs over all of them::

    U[g·splits + i, j] = conv2d(slice g·splits + i of X, B[j])
    out[k] = act(scale[k] · Σ_i U[g(k)·splits + i, index[k, i]] + bias[k])
           = act(scale[k] · conv2d(X, Ŵ)[k] + bias[k])      Ŵ[k] = B[index[k, 0]], B[index[k, 1]], … side by side

Adding up maps and putting filters side by side is the same sum, so the op may run either way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.estimators import estimated, signs
from basisconv_kernels.core.layout import cast, conv2d, laid_out, memory_format, symmetric
from basisconv_kernels.core.packed import unpack_planes

ROUTES = ("filters", "splits")


class Settings(NamedTuple):
    """The arguments of a call that are no tensors, in normal form.

    Attributes:
        binarize: whether the signs of the input enter the sums; nothing is left to do for packed signs.
        dtype: of the result.
        channels: C.
        encoding: of a packed input, ``"sign"`` or ``"unsigned"``; None for a real one.
        packed_bank: whether ``bank`` is words [n, 1, R, S, ⌈cs/32⌉] instead of real numbers.
        estimator: what stands in for the derivative of the sign of the input.
        backend: the one chosen.
    """

    stride: Pair
    padding: Quad
    dilation: Pair
    groups: int
    binarize: bool
    activation: str | None
    dtype: torch.dtype
    channels: int
    encoding: str | None
    packed_bank: bool
    estimator: str
    backend: str


class Gradients(NamedTuple):
    """One gradient a tensor of the op; None where none was asked for. ``selection`` is [K, splits, n]."""

    input: Tensor | None
    bank: Tensor | None
    selection: Tensor | None
    scale: Tensor | None
    bias: Tensor | None


def input_values(input: Tensor, settings: Settings) -> Tensor:
    """What enters the sums [N, C, H, W]: the input, its signs, or the codes of a packed one; float32 or float64."""
    wide = torch.float64 if settings.dtype == torch.float64 else torch.float32
    if settings.encoding is None:
        return (signs(input) if settings.binarize else input).to(wide)
    bits = unpack_planes(input, settings.channels)
    if settings.encoding == "sign":
        return (2 * bits[:, 0] - 1).to(wide)
    places = torch.arange(bits.shape[1], device=bits.device, dtype=torch.int32)
    return (bits << places[:, None, None, None]).sum(1).to(wide)


def bank_values(bank: Tensor, splits: int, settings: Settings) -> Tensor:
    """The bank [n, cs, R, S] as float32, or float64 for a float64 result."""
    wide = torch.float64 if settings.dtype == torch.float64 else torch.float32
    if settings.packed_bank:
        bank = 2 * unpack_planes(bank, settings.channels // settings.groups // splits)[:, 0] - 1
    return bank.to(wide).contiguous()  # the same bits, however the bank came: convolutions look at strides


def stacked_filters(bank: Tensor, index: Tensor) -> Tensor:
    """Ŵ [K, C/G, R, S] without scale: for each output its bank filters side by side."""
    K, splits = index.shape
    low, R, S = bank.shape[1:]
    return bank.index_select(0, index.reshape(-1)).reshape(K, splits * low, R, S)


def split_maps(values: Tensor, bank: Tensor, pad: Pair, settings: Settings) -> Tensor:
    """U [N, slices, n, OH, OW]: the bank over every slice of the channels, the slices folded into the batch."""
    N, C, H, W = values.shape
    n, low = bank.shape[:2]
    folded = values.reshape(N * (C // low), low, H, W)
    maps = conv2d(folded, bank, None, settings.stride, pad, settings.dilation, 1)
    return maps.view(N, C // low, n, *maps.shape[2:])


def map_rows(index: Tensor, n: int, groups: int) -> Tensor:
    """[K, splits]: the row of U as [slices·n] that output k adds up in split i."""
    K, splits = index.shape
    group = torch.arange(K, device=index.device) // (K // groups)
    slices = group[:, None] * splits + torch.arange(splits, device=index.device)
    return slices * n + index


def stacked_maps(values: Tensor, bank: Tensor, index: Tensor, settings: Settings, route: str | None = None) -> Tensor:
    """Σ_i U[·, index[k, i]] [N, K, OH, OW], by the cheaper of the two routes or by the one asked for."""
    padded, pad = symmetric(values, settings.padding)
    n, K, splits = bank.shape[0], *index.shape
    if (route or cheaper_forward(n, K, settings.groups)) == "filters":
        filters = stacked_filters(bank, index)
        return conv2d(padded, filters, None, settings.stride, pad, settings.dilation, settings.groups)
    maps = split_maps(padded, bank, pad, settings).flatten(1, 2)
    rows = map_rows(index, n, settings.groups)
    total = maps.index_select(1, rows[:, 0])
    for i in range(1, splits):
        total = total + maps.index_select(1, rows[:, i])
    return total


def cheaper_forward(n: int, K: int, groups: int) -> str:
    """``"splits"`` where the bank has at most half the filters of a group's outputs: maps cost memory, too."""
    return "splits" if 2 * n <= K // groups else "filters"


def forward(
    input: Tensor,
    bank: Tensor,
    index: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    packed: Tensor | None,
    settings: Settings,
    route: str | None = None,
) -> Tensor:
    """Run the op: sums in float32 (float64 for float64), one rounding to the dtype at the end.

    Args:
        index (Tensor[K, splits]): int64.
        packed: of a native kernel; not needed here.
        route (str, optional): one of ``ROUTES``; None takes the cheaper.
    """
    splits = index.shape[1]
    values = input_values(input, settings)
    out = stacked_maps(values, bank_values(bank, splits, settings), index, settings, route)
    if scale is not None:
        out = out * scale.to(out.dtype)[:, None, None]
    if bias is not None:
        out = out + bias.to(out.dtype)[:, None, None]
    if settings.activation == "relu":
        out = F.relu(out)
    elif settings.activation == "relu6":
        out = F.relu6(out)
    return laid_out(cast(out, settings.dtype), layout_of(input, settings))


def layout_of(input: Tensor, settings: Settings) -> torch.memory_format:
    """The memory format of the result: that of a real input; channels_last, the order of packed words, else."""
    return torch.channels_last if settings.encoding is not None else memory_format(input)


def cheaper_backward(n: int, K: int, splits: int, taps: int, pixels: int, groups: int) -> str:
    """The route with fewer multiplications for the gradients of bank and selections.

    By filters: one weight gradient ``K·D·M`` and two products ``2·K·n·D``, M the pixels of the batch. By splits: the
    maps again and their weight gradient, ``2·n·C·R·S·M``, and the products with the selections, ``2·K·splits·n·M``.
    """
    by_filters = K * taps * pixels + 2 * K * n * taps
    by_splits = 2 * n * taps * groups * pixels + 2 * K * splits * n * pixels
    return "splits" if by_splits < by_filters else "filters"


def backward(
    grad_output: Tensor,
    output: Tensor | None,
    input: Tensor,
    bank: Tensor,
    index: Tensor,
    scale: Tensor | None,
    settings: Settings,
    wanted: tuple[bool, bool, bool, bool, bool],
    route: str | None = None,
) -> Gradients:
    """The explicit gradients of the op as a function of bank, one-hot selections P [K, splits, n], scale and bias.

    With ``g = grad_output`` where the activation's slope is 1, else 0, and ``e = scale·g``; by filters, from one
    ordinary weight gradient::

        Gd = wgrad(X, g) [K, splits, cs·R·S]      d scale[k] = Σ_i <Gd[k, i], B[index[k, i]]>      d bias = Σ g
        d bank[j] = Σ_{index[k, i] = j} scale[k]·Gd[k, i]      d P[k, i, j] = scale[k]·<Gd[k, i], B[j]>
        d X = convᵀ(e, Ŵ)

    by splits, from the maps U of the bank::

        dU[s, j] = Σ_{k in group of s: index[k, i(s)] = j} e[k]      d bank[j] = Σ_s wgrad(X_s, dU[s, j])
        d P[k, i, j] = <e[k], U[s(k, i), j]>      d scale[k] = <g[k], Σ_i U[s(k, i), index[k, i]]>
        d X_s = Σ_j convᵀ(dU[s, j], B[j])

    The two are equal up to rounding. The sums over outputs that share a filter are products with one-hot matrices, so
    that their order is fixed. All is float32 (float64 for float64); nothing is rounded to the dtype here.

    Args:
        output (Tensor or None): the op's result; needed with an activation only.
        index (Tensor[K, splits]): int64.
        wanted: which of input, bank, selection, scale, bias need a gradient.
        route (str, optional): one of ``ROUTES``; None takes the cheaper.
    """
    splits = index.shape[1]
    values, filters = input_values(input, settings), bank_values(bank, splits, settings)
    g = grad_output.to(values.dtype)
    if settings.activation is not None and output is not None:
        live = output > 0
        if settings.activation == "relu6":
            live &= output < 6
        g = torch.where(live, g, 0.0)
    d_bias = g.sum((0, 2, 3)) if wanted[4] else None
    if not any(wanted[:4]):
        return Gradients(None, None, None, None, d_bias)
    n, taps = filters.shape[0], splits * filters[0].numel()
    if route is None:
        pixels = g.shape[0] * g.shape[2] * g.shape[3]
        route = cheaper_backward(n, index.shape[0], splits, taps, pixels, settings.groups)
    by = _by_filters if route == "filters" else _by_splits
    d_padded, d_bank, d_selection, d_scale = by(g, values, filters, index, scale, settings, wanted)
    d_input = None
    if d_padded is not None:
        top, _, left, _ = (0, 0, 0, 0) if d_padded.shape == values.shape else settings.padding
        d_input = d_padded[:, :, top : top + values.shape[2], left : left + values.shape[3]]
        d_input = (
            estimated(d_input, input, settings.estimator)
            if settings.binarize and settings.encoding is None
            else d_input
        )
    return Gradients(d_input, d_bank, d_selection, d_scale, d_bias)


_Found = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _by_filters(
    g: Tensor, values: Tensor, bank: Tensor, index: Tensor, scale: Tensor | None, settings: Settings,
    wanted: tuple[bool, ...],
) -> _Found:  # fmt: skip
    """(d padded input, d bank, d selection, d scale) by the dense-gradient route."""
    (K, splits), n = index.shape, bank.shape[0]
    factor = g.new_ones(K) if scale is None else scale.to(g.dtype)
    padded, pad = symmetric(values, settings.padding)
    weight = stacked_filters(bank, index) * factor[:, None, None, None]
    weights_wanted = any(wanted[1:4])
    # The weight gradient is that of Ŵ without scale only if g enters unscaled; dX wants the scaled filters.
    d_padded, dense, _ = torch.ops.aten.convolution_backward(
        g.contiguous(), padded, weight, None, settings.stride, pad, settings.dilation, False, [0, 0], settings.groups,
        [wanted[0], weights_wanted, False],
    )  # fmt: skip
    d_bank = d_selection = d_scale = None
    if weights_wanted:
        rows = dense.reshape(K, splits, -1)
        flat = bank.reshape(n, -1)
        if wanted[3]:
            d_scale = (rows * flat[index]).sum((1, 2))
        rows = rows * factor[:, None, None]
        if wanted[2]:
            d_selection = rows @ flat.T
        if wanted[1]:
            one_hot = F.one_hot(index.reshape(-1), n).to(g.dtype)
            d_bank = (one_hot.T @ rows.reshape(K * splits, -1)).reshape(bank.shape)
    return (d_padded if wanted[0] else None), d_bank, d_selection, d_scale


def _by_splits(
    g: Tensor, values: Tensor, bank: Tensor, index: Tensor, scale: Tensor | None, settings: Settings,
    wanted: tuple[bool, ...],
) -> _Found:  # fmt: skip
    """(d padded input, d bank, d selection, d scale) by the split route."""
    (K, splits), (n, low) = index.shape, bank.shape[:2]
    groups, N = settings.groups, g.shape[0]
    padded, pad = symmetric(values, settings.padding)
    scaled = g if scale is None else g * scale.to(g.dtype)[:, None, None]
    by_group = scaled.reshape(N, groups, K // groups, -1)
    one_hot = F.one_hot(index, n).to(g.dtype).view(groups, K // groups, splits, n)
    d_selection = d_scale = None
    if wanted[2] or wanted[3]:
        maps = split_maps(padded, bank, pad, settings).view(N, groups, splits, n, -1)
        if wanted[2]:
            d_selection = torch.einsum("bgkm,bgsjm->gksj", by_group, maps).reshape(K, splits, n)
        if wanted[3]:
            chosen = torch.einsum("gksj,bgsjm->bgkm", one_hot, maps).reshape(g.shape)
            d_scale = (g * chosen).sum((0, 2, 3))
    d_folded = d_bank = None
    if wanted[0] or wanted[1]:
        d_maps = torch.einsum("bgkm,gksj->bgsjm", by_group, one_hot)
        d_maps = d_maps.reshape(N * groups * splits, n, *g.shape[2:])
        folded = padded.reshape(N * groups * splits, low, *padded.shape[2:])
        d_folded, d_bank, _ = torch.ops.aten.convolution_backward(
            d_maps, folded, bank, None, settings.stride, pad, settings.dilation, False, [0, 0], 1,
            [wanted[0], wanted[1], False],
        )  # fmt: skip
    d_padded = d_folded.reshape(padded.shape) if wanted[0] and d_folded is not None else None
    return d_padded, (d_bank if wanted[1] else None), d_selection, d_scale
