"""``basis_conv2d`` in Triton: choose the kernel and the tile, lay the tensors out, launch.

The kernels read channels_last memory. An input in NCHW is copied once, the result is written in NCHW straight away; a
basis weight is read as [Q, R, S, C/G], which is how it lies in a model converted ``.to(memory_format=channels_last)``,
else it is copied too. Strided views of channels_last tensors are read where they are.

All of a call but its addresses is decided once, in a ``Plan`` kept by the shapes, strides and settings of the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from basisconv_kernels.core import checks
from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.reference.basis_conv2d import HALF, memory_format
from basisconv_kernels.triton_kernels import configs
from basisconv_kernels.triton_kernels._common import WIDEST, channels_fastest, vector, wide
from basisconv_kernels.triton_kernels._launch import Head, Launch, rebased, template
from basisconv_kernels.triton_kernels.basis_conv2d_descriptors import basis_conv2d_forward_descriptors
from basisconv_kernels.triton_kernels.basis_conv2d_pointers import basis_conv2d_forward_pointers

OP = "basis_conv2d"
MOST_PLANS = 4096  # then all are forgotten


@functools.cache
def device_of(index: int | None) -> configs.Device:
    """What the choice of a tile sees of a CUDA device; the interpreter, which has none, is a Hopper with one core."""
    if index is None:
        return configs.HOPPER._replace(cores=1)
    properties = torch.cuda.get_device_properties(index)
    shared = getattr(properties, "shared_memory_per_block_optin", 99 * 1024)
    return configs.Device((properties.major, properties.minor), properties.multi_processor_count, shared)


class Plan(NamedTuple):
    """How calls of one kind run."""

    shape: tuple[int, int, int, int]  # of the result
    layout: torch.memory_format
    heads: Callable[[Tensor, Tensor], tuple[Head, Head]]  # what the kernel takes for input and basis weight
    launch: Launch | None  # None where the result has no elements


_plans: dict[tuple[Any, ...], Plan] = {}


def forward(
    input: Tensor,
    basis_weight: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Quad,
    dilation: Pair,
    groups: int,
    activation: str | None,
    precise: bool,
    path: str | None = None,
    tile: configs.Tile | None = None,
) -> Tensor:
    """``act(coefficients · conv2d(input, basis_weight) + bias + residual)``, arguments in normal form.

    Args:
        path: "descriptors" or "pointers", for tests; None chooses.
        tile: a row of that path's table, for tests; None chooses.
    """
    given = input
    input, basis_weight = channels_fastest(input), channels_fastest(basis_weight)
    settings = (tuple(stride), tuple(padding), tuple(dilation), groups, activation, precise, path, tile)
    arithmetic = configs.arithmetic_of(input.dtype, precise)
    tensors = (input, basis_weight, coefficients, bias, residual)
    key = (
        arithmetic, settings, given.stride(), input.dtype, input.device,
        *((t.shape, t.stride(), t.data_ptr() % WIDEST) if t is not None else None for t in tensors),
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        plan = _plan(memory_format(given), arithmetic, settings, *tensors)
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        _plans[key] = plan
    out = torch.empty(plan.shape, dtype=input.dtype, device=input.device, memory_format=plan.layout)
    if plan.launch is not None:
        plan.launch(*plan.heads(input, basis_weight), coefficients, bias, residual, out)
    return out


def _plan(
    layout: torch.memory_format,
    arithmetic: str,
    settings: tuple[Pair, Quad, Pair, int, str | None, bool, str | None, configs.Tile | None],
    input: Tensor,
    basis_weight: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Plan:
    stride, padding, dilation, groups, activation, precise, path, tile = settings
    N, C, H, W = input.shape
    Q, _, R, S = basis_weight.shape
    shape = (N, coefficients.shape[0], *checks.output_size(OP, (H, W), (R, S), stride, padding, dilation))
    out = torch.empty(shape, dtype=input.dtype, device="meta", memory_format=layout)
    if out.numel() == 0:
        return Plan(shape, layout, lambda input, basis: (input, basis), None)
    device = device_of(input.device.index)
    against = configs.against_descriptors(arithmetic, C, Q, (H, W), stride, groups, device.capability)
    against = against or _against_memory(input, stride)
    if path == "descriptors" and against:
        raise ValueError(f"{OP}: no descriptor path: {against}")
    tensors = (input, basis_weight, coefficients, bias, residual, out)
    pixels = shape[0] * shape[2] * shape[3]
    if against or path == "pointers" or (path is None and configs.pointers_are_faster(arithmetic, Q, pixels)):
        launch = _through_pointers(
            *tensors, stride, padding, dilation, groups, activation, precise, arithmetic, device, tile
        )
        return Plan(shape, layout, lambda input, basis: (input, basis), launch)
    heads, launch = _through_descriptors(*tensors, stride, padding, dilation, activation, arithmetic, device, tile)
    return Plan(shape, layout, heads, launch)


def _epilogue_strides(coefficients: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> list[int]:
    beside = (0, 0, 0, 0) if residual is None else residual.stride()
    return [*coefficients.stride(), 0 if bias is None else bias.stride(0), *beside, *out.stride()]


def _through_pointers(
    input: Tensor, basis_weight: Tensor, coefficients: Tensor, bias: Tensor | None, residual: Tensor | None,
    out: Tensor, stride: Pair, padding: Quad, dilation: Pair, groups: int, activation: str | None, precise: bool,
    arithmetic: str, device: configs.Device, given: configs.Tile | None,
) -> Launch:  # fmt: skip
    (Q, C, R, S), (K, mixed) = basis_weight.shape, coefficients.shape
    N, _, OH, OW = out.shape
    pixels = N * OH * OW
    compact = groups > 1 and mixed != Q
    own_K = K // groups if compact else K
    tile, split = configs.pointer_tile(arithmetic, Q // groups, C, own_K, pixels, device)
    tile = given or tile
    split = split or groups > 1
    chunks = -(-own_K // tile.BL) * (groups if compact else 1) if split else 1
    input_n, _, input_y, input_x = input.stride()
    basis_q, _, basis_r, basis_s = basis_weight.stride()
    starts = (input_n, input_y, input_x, *((C,) if groups > 1 else ()))
    rest = (
        pixels, C, Q // groups, own_K, *input.shape[2:], OH, OW, R, S, *stride, padding[0], padding[2], *dilation,
        groups, input_n, input_y, input_x, basis_q, basis_r, basis_s,
        *_epilogue_strides(coefficients, bias, residual, out), tile.BM, tile.BQ, tile.BK, tile.BL,
        min(vector(input, *starts), vector(basis_weight, basis_q, basis_r, basis_s)),
        split, compact, activation, precise and input.dtype in HALF, configs.input_precision(arithmetic),
        wide(pixels, input, residual, out),
    )  # fmt: skip
    return Launch(basis_conv2d_forward_pointers, -(-pixels // tile.BM) * chunks, rest, **_options(tile))


def _options(tile: configs.Tile) -> dict[str, Any]:
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def _against_memory(input: Tensor, stride: Pair) -> str | None:
    """Why no descriptor describes this channels_last memory; None where one does."""
    N, C, H, W = input.shape
    if min(H, W) == 0:
        return "a map without pixels"
    aligned = configs.DESCRIPTOR_BYTES // input.element_size()
    sides = [(N, 0), (H, 2), (W, 3)]
    if input.data_ptr() % configs.DESCRIPTOR_BYTES or any(
        size > 1 and (input.stride(dim) % aligned or input.stride(dim) == 0) for size, dim in sides
    ):
        return f"the input or its strides are no multiples of {configs.DESCRIPTOR_BYTES} bytes"
    if stride == (2, 2) and input.stride(3) != C:
        return "gaps between the pixels of a row"
    return None


def _through_descriptors(
    input: Tensor, basis_weight: Tensor, coefficients: Tensor, bias: Tensor | None, residual: Tensor | None,
    out: Tensor, stride: Pair, padding: Quad, dilation: Pair, activation: str | None,
    arithmetic: str, device: configs.Device, given: configs.Tile | None,
) -> tuple[Callable[[Tensor, Tensor], tuple[Head, Head]], Launch]:  # fmt: skip
    (N, C, H, W), (Q, _, R, S), K = input.shape, basis_weight.shape, coefficients.shape[0]
    OH, OW = out.shape[2:]
    copied = not basis_weight.is_contiguous(memory_format=torch.channels_last) or basis_weight.data_ptr() % WIDEST != 0
    basis_weight = _dense(basis_weight) if copied else basis_weight
    tile = given or configs.descriptor_tile(arithmetic, Q, C, K, N * OH * OW, stride[0], device)
    BN, TH, TW = configs.box(tile.BM, N, OH, OW)
    # A dimension of size 1 may have any stride; a descriptor wants a multiple of 16 bytes.
    x = input.stride(3) if W > 1 else C
    y = input.stride(2) if H > 1 else W * x
    n = input.stride(0) if N > 1 else H * y
    if stride == (1, 1):
        pixels = template([N, H, W, C], [n, y, x, 1], [BN, TH, TW, tile.BK], input)
    else:
        shape, strides = [N, H // 2, 2, W // 2, 2 * C], [n, 2 * y, y, 2 * C, 1]
        pixels = template(shape, strides, [BN, TH, 1, TW, tile.BK], input)
    flat = C % tile.BK == 0
    if flat:
        filters = template([Q, R * S * C], [R * S * C, 1], [tile.BQ, tile.BK], basis_weight)
    else:
        filters = template([Q, R * S, C], [R * S * C, C, 1], [tile.BQ, 1, tile.BK], basis_weight)
    programs = -(-N // BN) * -(-OH // TH) * -(-OW // TW)
    rest = (
        N, C, Q, K, OH, OW, padding[0], padding[2], *dilation, *_epilogue_strides(coefficients, bias, residual, out),
        R, S, stride[0], BN, TH, TW, tile.BQ, tile.BK, tile.BL, -(-C // tile.BK), flat,
        activation, configs.input_precision(arithmetic), wide(N * OH * OW, residual, out),
    )  # fmt: skip

    def heads(input: Tensor, basis_weight: Tensor) -> tuple[Head, Head]:
        return rebased(pixels, input), rebased(filters, _dense(basis_weight) if copied else basis_weight)

    return heads, Launch(basis_conv2d_forward_descriptors, programs, rest, **_options(tile))


def _dense(basis_weight: Tensor) -> Tensor:
    """A copy that a descriptor can describe."""
    return basis_weight.clone(memory_format=torch.channels_last)
