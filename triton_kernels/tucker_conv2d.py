"""``tucker_conv2d`` in Triton, the whole chain in one pass: neither M nor Z is ever stored.

A program owns a tile of output pixels. For each tap it computes M of the pixels that the tap reads, rounds it, and adds
its product with the core to Z; then the outputs follow in chunks as in ``basis_conv2d``. So M is computed once a tap::

    products an output pixel = R·S·(C·rank_in + rank_in·rank_out) + rank_out·K

which pays where taps do not overlap (a 1×1 core, a stride as long as the core) and where rank_in is small; elsewhere
the first 1×1 is a call of its own and the rest is the kernel of ``basis_conv2d``. Zeros around M are zeros: the first
stage has no bias, and M of a pixel outside the image is set to zero, whatever u_in holds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from basisconv_kernels.core import checks
from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.layout import memory_format
from basisconv_kernels.triton_kernels import configs
from basisconv_kernels.triton_kernels._common import channels_fastest, jit, located, store_outputs, vector, wide
from basisconv_kernels.triton_kernels.basis_conv2d_pointers import mixed_maps
from basisconv_kernels.triton_kernels.configs import power_of_two

OP = "tucker_conv2d"


@triton.jit
def reduced_pixels(
    input,
    at,  # [BM] offsets of the pixels in input
    inside,  # [BM]
    u_in,
    u_c,
    u_i,
    i,  # [BI]
    live_i,  # [BI]
    C,
    BM: tl.constexpr,
    BI: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """M [BM, BI] of some pixels, rounded to the dtype; zero outside the image and in columns past the rank."""
    m = tl.zeros((BM, BI), tl.float32)
    for start in range(0, C, BK):
        c = start + tl.arange(0, BK)
        live_c = c < C
        pixels = tl.load(input + at[:, None] + c[None, :], mask=inside[:, None] & live_c[None, :], other=0.0)
        factor = tl.load(u_in + c[:, None] * u_c + i[None, :] * u_i, mask=live_c[:, None] & live_i[None, :], other=0.0)
        m = tl.dot(pixels, factor, m, input_precision=PRECISION)
    return tl.where(inside[:, None] & live_i[None, :], m, 0.0).to(u_in.dtype.element_ty)


@jit
def tucker_conv2d_forward(
    input, u_in, core, u_out, bias, residual, out,
    pixels, C, rank_in, Q, K, H, W, OH, OW, R, S, stride_y, stride_x, top, left, dilation_y, dilation_x,
    input_n, input_y, input_x, u_c, u_i, core_q, core_i, core_r, core_s, mix_k, mix_q, bias_k,
    residual_n, residual_k, residual_y, residual_x, out_n, out_k, out_y, out_x,
    BM: tl.constexpr, BI: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BL: tl.constexpr, VECTOR: tl.constexpr,
    CORE_VECTOR: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program BM output pixels, on the x axis of the grid; see the head of this file."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    pixel = program * BM + tl.arange(0, BM)
    live = pixel < pixels
    n, oy, ox = located(pixel, OH, OW)
    i = tl.arange(0, BI)
    live_i = i < rank_in
    q = tl.arange(0, BQ)
    live_q = q < Q

    z = tl.zeros((BM, BQ), tl.float32)
    for tap in range(R * S):
        y = oy * stride_y - top + tap // S * dilation_y
        x = ox * stride_x - left + tap % S * dilation_x
        inside = live & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        at = tl.multiple_of(n * input_n + y * input_y + x * input_x, VECTOR)
        m = reduced_pixels(input, at, inside, u_in, u_c, u_i, i, live_i, C, BM, BI, BK, PRECISION)
        at = tl.multiple_of(q * core_q + tap // S * core_r + tap % S * core_s, CORE_VECTOR)
        filters = tl.load(core + at[:, None] + i[None, :] * core_i, mask=live_q[:, None] & live_i[None, :], other=0.0)
        z = tl.dot(m, tl.trans(filters), z, input_precision=PRECISION)
    z = tl.where(live_q[None, :], z, 0.0)

    out_rows = n * out_n + oy * out_y + ox * out_x
    residual_rows = n * residual_n + oy * residual_y + ox * residual_x
    for start in range(0, K, BL):
        k = start + tl.arange(0, BL)
        live_k = k < K
        mix = tl.load(
            u_out + k[:, None] * mix_k + q[None, :] * mix_q, mask=live_k[:, None] & live_q[None, :], other=0.0
        )
        result = mixed_maps(z, mix, tl.zeros((BM, BL), tl.float32), False, PRECISION)
        store_outputs(
            result, k, live_k, live, out_rows, out, out_k, bias, bias_k, residual, residual_rows, residual_k, ACTIVATION
        )


def forward(
    input: Tensor,
    u_in: Tensor,
    core: Tensor,
    u_out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Quad,
    dilation: Pair,
    activation: str | None,
) -> Tensor:
    """``act(u_out · conv2d(u_inᵀ · input, core) + bias + residual)`` in one pass, arguments in normal form.

    Raises:
        ValueError: ``configs.against_one_pass`` has a reason.
    """
    N, C, H, W = input.shape
    Q, rank_in, R, S = core.shape
    K = u_out.shape[0]
    arithmetic = configs.arithmetic_of(input.dtype, False)
    if (against := configs.against_one_pass(arithmetic, rank_in, Q, False)) is not None:
        raise ValueError(f"{OP}: not in one pass: {against}")
    OH, OW = checks.output_size(OP, (H, W), (R, S), stride, padding, dilation)
    out = torch.empty((N, K, OH, OW), dtype=input.dtype, device=input.device, memory_format=memory_format(input))
    if out.numel() == 0:
        return out
    input, core = channels_fastest(input), channels_fastest(core)
    BM, BK, BL = configs.ONE_PASS[arithmetic]
    pixels = N * OH * OW
    beside = (0, 0, 0, 0) if residual is None else residual.stride()
    input_n, _, input_y, input_x = input.stride()
    tucker_conv2d_forward[(-(-pixels // BM),)](
        input, u_in, core, u_out, bias, residual, out,
        pixels, C, rank_in, Q, K, H, W, OH, OW, R, S, *stride, padding[0], padding[2], *dilation,
        input_n, input_y, input_x, *u_in.stride(), *core.stride(), *u_out.stride(),
        0 if bias is None else bias.stride(0), *beside, *out.stride(),
        BM=BM, BI=power_of_two(rank_in), BQ=power_of_two(Q), BK=min(BK, power_of_two(C)), BL=min(BL, power_of_two(K)),
        VECTOR=vector(input, input_n, input_y, input_x),
        CORE_VECTOR=vector(core, core.stride(0), core.stride(2), core.stride(3)),
        ACTIVATION=activation, PRECISION=configs.input_precision(arithmetic), WIDE=wide(pixels, input, residual, out),
        num_warps=4, num_stages=3, enable_fp_fusion=True,
    )  # fmt: skip
    return out
