"""``basis_conv2d`` forward for any geometry: stride, dilation, padding, groups, and any C, Q, K.

A program owns BM consecutive pixels in the order (n, oy, ox), so that small maps waste nothing. Two forms:

- *whole*: Z [BM, BQ] of all Q basis filters stays on chip, then the outputs follow in chunks of BL. One group, Q ≤ BQ.
- *split*: the basis filters come in blocks of BQ, each inside one group; a program owns BL outputs and adds up
  ``coefficients[:, block] · Z[block]``. With more than BL outputs stage 1 is computed once a chunk: general, not fast.

Layouts: input [N, H, W, C] in memory with any strides of n, y, x and 1 of c; basis [Q, R, S, C/G] alike; coefficients,
bias, residual and result with any strides. Sums are float32; Z is rounded once to the dtype, unless ``PRECISE``.

The tap and channel loop is one loop with a division, which Triton pipelines across taps; with eight warps GPUs have
computed such loops wrongly, so ``configs.py`` allows it four.
"""

from __future__ import annotations

import triton
import triton.language as tl

from basisconv_kernels.triton_kernels._common import jit, located, store_outputs


@triton.jit
def gathered_maps(
    input,
    rows,  # [BM] offsets of the images in input
    iy,  # [BM] first input row of each pixel's window, may lie outside
    ix,  # [BM] first input column
    live,  # [BM]
    first_channel,
    basis,
    q,  # [BQ] rows of basis
    live_q,  # [BQ]
    C,  # channels of a group
    H,
    W,
    R,
    S,
    dilation_y,
    dilation_x,
    input_y,
    input_x,
    basis_q,
    basis_r,
    basis_s,
    BM: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Z [BM, BQ] in float32 of some basis filters; columns that are not ``live_q`` are 0, whatever the input holds."""
    z = tl.zeros((BM, BQ), tl.float32)
    blocks = tl.cdiv(C, BK)
    for i in range(R * S * blocks):
        tap = i // blocks
        c = (i - tap * blocks) * BK + tl.arange(0, BK)
        live_c = c < C
        y = iy + tap // S * dilation_y
        x = ix + tap % S * dilation_x
        inside = live & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        at = tl.multiple_of(rows + y * input_y + x * input_x + first_channel, VECTOR)
        pixels = tl.load(input + at[:, None] + c[None, :], mask=inside[:, None] & live_c[None, :], other=0.0)
        at = tl.multiple_of(q * basis_q + tap // S * basis_r + tap % S * basis_s, VECTOR)
        filters = tl.load(basis + at[:, None] + c[None, :], mask=live_q[:, None] & live_c[None, :], other=0.0)
        z = tl.dot(pixels, tl.trans(filters), z, input_precision=PRECISION)
    return tl.where(live_q[None, :], z, 0.0)  # 0 · Inf of a row past the end is NaN


@triton.jit
def mixed_maps(z, coefficients, y, PRECISE: tl.constexpr, PRECISION: tl.constexpr):
    """``y + z · coefficientsᵀ`` for coefficients [BL, BQ]: the one place where Z is rounded."""
    if PRECISE:
        return tl.dot(z, tl.trans(coefficients.to(tl.float32)), y, input_precision="ieee")
    return tl.dot(z.to(coefficients.dtype), tl.trans(coefficients), y, input_precision=PRECISION)


@jit
def basis_conv2d_forward_pointers(
    input,
    basis,
    coefficients,
    bias,
    residual,
    out,
    pixels,  # N·OH·OW
    C,  # channels of a group
    Q,  # basis filters of a group
    K,  # outputs, of a group where coefficients are compact
    H,
    W,
    OH,
    OW,
    R,
    S,
    stride_y,
    stride_x,
    top,
    left,
    dilation_y,
    dilation_x,
    GROUPS,
    input_n,
    input_y,
    input_x,
    basis_q,
    basis_r,
    basis_s,
    mix_k,
    mix_q,
    bias_k,
    residual_n,
    residual_k,
    residual_y,
    residual_x,
    out_n,
    out_k,
    out_y,
    out_x,
    BM: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    BL: tl.constexpr,
    VECTOR: tl.constexpr,
    SPLIT: tl.constexpr,
    COMPACT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program an output tile, on the x axis of the grid; see the head of this file."""
    # Locate.
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    chunks = 1  # of BL outputs, of all groups: neighbours share the input
    if SPLIT:
        chunks = tl.cdiv(K, BL)
    if COMPACT:
        chunks = chunks * GROUPS
    pixel = program // chunks * BM + tl.arange(0, BM)
    live = pixel < pixels
    n, oy, ox = located(pixel, OH, OW)
    iy = oy * stride_y - top
    ix = ox * stride_x - left
    in_rows = n * input_n
    out_rows = n * out_n + oy * out_y + ox * out_x
    residual_rows = n * residual_n + oy * residual_y + ox * residual_x

    if SPLIT:
        chunk = program % chunks
        group = chunk * 0
        if COMPACT:
            group = chunk // tl.cdiv(K, BL)
            chunk = chunk % tl.cdiv(K, BL)
        k = chunk.to(tl.int32) * BL + tl.arange(0, BL)
        live_k = k < K
        k += group.to(tl.int32) * K
        y = tl.zeros((BM, BL), tl.float32)
        blocks = tl.cdiv(Q, BQ)  # of a group
        first = group * blocks
        last = first + blocks
        if not COMPACT:
            last = first + blocks * GROUPS
        for block in range(first, last):
            of = block // blocks
            q = (block % blocks).to(tl.int32) * BQ + tl.arange(0, BQ)
            live_q = q < Q
            column = q
            q += (of * Q).to(tl.int32)
            if not COMPACT:
                column = q
            z = gathered_maps(
                input, in_rows, iy, ix, live, of * C, basis, q, live_q, C, H, W, R, S, dilation_y, dilation_x,
                input_y, input_x, basis_q, basis_r, basis_s, BM, BQ, BK, VECTOR, PRECISION,
            )  # fmt: skip
            at = coefficients + k[:, None] * mix_k + column[None, :] * mix_q
            mix = tl.load(at, mask=live_k[:, None] & live_q[None, :], other=0.0)
            y = mixed_maps(z, mix, y, PRECISE, PRECISION)
        store_outputs(
            y, k, live_k, live, out_rows, out, out_k, bias, bias_k, residual, residual_rows, residual_k, ACTIVATION
        )
    else:
        q = tl.arange(0, BQ)
        live_q = q < Q
        z = gathered_maps(
            input, in_rows, iy, ix, live, 0, basis, q, live_q, C, H, W, R, S, dilation_y, dilation_x,
            input_y, input_x, basis_q, basis_r, basis_s, BM, BQ, BK, VECTOR, PRECISION,
        )  # fmt: skip
        for start in range(0, K, BL):
            k = start + tl.arange(0, BL)
            live_k = k < K
            at = coefficients + k[:, None] * mix_k + q[None, :] * mix_q
            mix = tl.load(at, mask=live_k[:, None] & live_q[None, :], other=0.0)
            y = mixed_maps(z, mix, tl.zeros((BM, BL), tl.float32), PRECISE, PRECISION)
            store_outputs(
                y, k, live_k, live, out_rows, out, out_k, bias, bias_k, residual, residual_rows, residual_k, ACTIVATION
            )
