"""``basis_conv2d`` in Triton: choose the kernel and the tile, lay the tensors out, launch.

The kernels read channels_last memory. An input in NCHW is copied once, the result is written in NCHW straight away; a
basis weight is read as [Q, R, S, C/G], which is how it lies in a model converted ``.to(memory_format=channels_last)``,
else it is copied too. Strided views of channels_last tensors are read where they are.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from basisconv_kernels.core import checks
from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.reference.basis_conv2d import HALF, memory_format
from basisconv_kernels.triton_kernels import configs
from basisconv_kernels.triton_kernels._common import channels_fastest, vector, wide
from basisconv_kernels.triton_kernels.basis_conv2d_descriptors import basis_conv2d_forward_descriptors
from basisconv_kernels.triton_kernels.basis_conv2d_pointers import basis_conv2d_forward_pointers

OP = "basis_conv2d"


@functools.cache
def device_of(index: int | None) -> configs.Device:
    """What the choice of a tile sees of a CUDA device; the interpreter, which has none, is a Hopper with one core."""
    if index is None:
        return configs.HOPPER._replace(cores=1)
    properties = torch.cuda.get_device_properties(index)
    shared = getattr(properties, "shared_memory_per_block_optin", 99 * 1024)
    return configs.Device((properties.major, properties.minor), properties.multi_processor_count, shared)


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
    N, C, H, W = input.shape
    Q, _, R, S = basis_weight.shape
    K = coefficients.shape[0]
    OH, OW = checks.output_size(OP, (H, W), (R, S), stride, padding, dilation)
    out = torch.empty((N, K, OH, OW), dtype=input.dtype, device=input.device, memory_format=memory_format(input))
    if out.numel() == 0:
        return out
    device = device_of(input.device.index)
    arithmetic = configs.arithmetic_of(input.dtype, precise)
    input, basis_weight = channels_fastest(input), channels_fastest(basis_weight)
    against = configs.against_descriptors(arithmetic, C, Q, (H, W), stride, groups, device.capability)
    against = against or _against_memory(input, stride)
    if path == "descriptors" and against:
        raise ValueError(f"{OP}: no descriptor path: {against}")
    tensors = (input, basis_weight, coefficients, bias, residual, out)
    if against or path == "pointers":
        _through_pointers(*tensors, stride, padding, dilation, groups, activation, precise, arithmetic, device, tile)
    else:
        _through_descriptors(*tensors, stride, padding, dilation, activation, arithmetic, device, tile)
    return out


def _epilogue_strides(coefficients: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> list[int]:
    beside = (0, 0, 0, 0) if residual is None else residual.stride()
    return [*coefficients.stride(), 0 if bias is None else bias.stride(0), *beside, *out.stride()]


def _through_pointers(
    input: Tensor, basis_weight: Tensor, coefficients: Tensor, bias: Tensor | None, residual: Tensor | None,
    out: Tensor, stride: Pair, padding: Quad, dilation: Pair, groups: int, activation: str | None, precise: bool,
    arithmetic: str, device: configs.Device, given: configs.Tile | None,
) -> None:  # fmt: skip
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
    basis_conv2d_forward_pointers[(-(-pixels // tile.BM) * chunks,)](
        input, basis_weight, coefficients, bias, residual, out,
        pixels, C, Q // groups, own_K, *input.shape[2:], OH, OW, R, S, *stride, padding[0], padding[2], *dilation,
        groups, input_n, input_y, input_x, basis_q, basis_r, basis_s,
        *_epilogue_strides(coefficients, bias, residual, out),
        BM=tile.BM, BQ=tile.BQ, BK=tile.BK, BL=tile.BL,
        VECTOR=min(vector(input, *starts), vector(basis_weight, basis_q, basis_r, basis_s)),
        SPLIT=split, COMPACT=compact, ACTIVATION=activation, PRECISE=precise and input.dtype in HALF,
        PRECISION=configs.input_precision(arithmetic), WIDE=wide(pixels, input, residual, out),
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip


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
) -> None:  # fmt: skip
    (N, C, H, W), (Q, _, R, S), K = input.shape, basis_weight.shape, coefficients.shape[0]
    OH, OW = out.shape[2:]
    if not basis_weight.is_contiguous(memory_format=torch.channels_last) or basis_weight.data_ptr() % 16:
        basis_weight = basis_weight.clone(memory_format=torch.channels_last)
    tile = given or configs.descriptor_tile(arithmetic, Q, C, K, N * OH * OW, stride[0], device)
    BN, TH, TW = configs.box(tile.BM, N, OH, OW)
    # A dimension of size 1 may have any stride; a descriptor wants a multiple of 16 bytes.
    x = input.stride(3) if W > 1 else C
    y = input.stride(2) if H > 1 else W * x
    n = input.stride(0) if N > 1 else H * y
    if stride == (1, 1):
        pixels = TensorDescriptor(input, [N, H, W, C], [n, y, x, 1], [BN, TH, TW, tile.BK])
    else:
        shape, strides = [N, H // 2, 2, W // 2, 2 * C], [n, 2 * y, y, 2 * C, 1]
        pixels = TensorDescriptor(input, shape, strides, [BN, TH, 1, TW, tile.BK])
    flat = C % tile.BK == 0
    if flat:
        filters = TensorDescriptor(basis_weight, [Q, R * S * C], [R * S * C, 1], [tile.BQ, tile.BK])
    else:
        filters = TensorDescriptor(basis_weight, [Q, R * S, C], [R * S * C, C, 1], [tile.BQ, 1, tile.BK])
    programs = -(-N // BN) * -(-OH // TH) * -(-OW // TW)
    basis_conv2d_forward_descriptors[(programs,)](
        pixels, filters, coefficients, bias, residual, out, N, C, Q, K, OH, OW, padding[0], padding[2], *dilation,
        *_epilogue_strides(coefficients, bias, residual, out),
        R=R, S=S, STRIDE=stride[0], BN=BN, TH=TH, TW=TW, BQ=tile.BQ, BK=tile.BK, BL=tile.BL,
        BLOCKS=-(-C // tile.BK), FLAT=flat, UNROLLED=configs.unrolled(tile), ACTIVATION=activation,
        PRECISION=configs.input_precision(arithmetic), WIDE=wide(N * OH * OW, residual, out),
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip
