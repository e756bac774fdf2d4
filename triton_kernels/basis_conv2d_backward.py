"""The gradients of ``basis_conv2d`` for one group, each in a kernel of its own; sums over pixels have a fixed order.

With g = grad_output where the activation's slope is 1, else 0, and pixels p = (n, oy, ox)::

    dZ[p, q] = Σ_k g[p, k] · coefficients[k, q]                       rounded to the dtype like Z
    d coefficients[k, q] = Σ_p g[p, k] · Z[p, q]    d bias[k] = Σ_p g[p, k]      Z is computed again, tile by tile
    d input = convᵀ(dZ, basis): each input pixel gathers the dZ of the windows that read it
    d basis[q, r, s, c] = Σ_p dZ[p, q] · input[p·stride + tap − padding, c]

Sums over pixels are split among programs: each writes its part in float32, and the parts are added in their order.
No atomics, so two runs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from basisconv_kernels.triton_kernels._common import jit, located
from basisconv_kernels.triton_kernels.basis_conv2d_pointers import gathered_maps


@triton.jit
def sloped(gradient, output, at_gradient, at_output, inside, ACTIVATION: tl.constexpr):
    """g: the gradient where the activation let its argument through; NaN results let it through."""
    g = tl.load(gradient + at_gradient, mask=inside, other=0.0)
    if ACTIVATION is not None:
        y = tl.load(output + at_output, mask=inside, other=0.0)
        g = tl.where(y <= 0.0, 0.0, g)
        if ACTIVATION == "relu6":
            g = tl.where(y >= 6.0, 0.0, g)
    return g


@jit
def basis_conv2d_backward_maps(
    gradient, output, coefficients, d_maps,
    pixels, Q, K, OH, OW,
    gradient_n, gradient_k, gradient_y, gradient_x, output_n, output_k, output_y, output_x, mix_k, mix_q,
    BM: tl.constexpr, BQ: tl.constexpr, BL: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The maps' gradient dZ [pixels, Q]; one program BM pixels and BQ basis filters."""
    filter_blocks = tl.cdiv(Q, BQ)
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    pixel = program // filter_blocks * BM + tl.arange(0, BM)
    live = pixel < pixels
    n, oy, ox = located(pixel, OH, OW)
    gradient_rows = n * gradient_n + oy * gradient_y + ox * gradient_x
    output_rows = n * output_n + oy * output_y + ox * output_x
    q = (program % filter_blocks).to(tl.int32) * BQ + tl.arange(0, BQ)
    live_q = q < Q
    dz = tl.zeros((BM, BQ), tl.float32)
    for start in range(0, K, BL):
        k = start + tl.arange(0, BL)
        live_k = k < K
        inside = live[:, None] & live_k[None, :]
        far_k = k.to(pixel.dtype)[None, :]
        g = sloped(
            gradient, output, gradient_rows[:, None] + far_k * gradient_k, output_rows[:, None] + far_k * output_k,
            inside, ACTIVATION,
        )  # fmt: skip
        at = coefficients + k[:, None] * mix_k + q[None, :] * mix_q
        mix = tl.load(at, mask=live_k[:, None] & live_q[None, :], other=0.0)
        dz = tl.dot(g, mix, dz, input_precision=PRECISION)
    at = d_maps + (pixel[:, None] * Q + q[None, :])
    tl.store(at, dz.to(d_maps.dtype.element_ty), mask=live[:, None] & live_q[None, :])


@jit
def basis_conv2d_backward_coefficients(
    gradient, output, input, basis,
    parts,  # [splits, K, Q] float32
    bias_parts,  # [splits, K] float32 or None
    pixels, C, Q, K, H, W, OH, OW, R, S, stride_y, stride_x, top, left, dilation_y, dilation_x,
    gradient_n, gradient_k, gradient_y, gradient_x, output_n, output_k, output_y, output_x,
    input_n, input_y, input_x, basis_q, basis_r, basis_s,
    tiles,  # of one split
    BM: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BL: tl.constexpr, VECTOR: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A part of d coefficients [BL, BQ] and d bias [BL]; one program a block of both and a range of pixel tiles."""
    chunks = tl.cdiv(K, BL)
    filter_blocks = tl.cdiv(Q, BQ)
    program = tl.program_id(0)
    filter_block = program % filter_blocks
    program = program // filter_blocks
    split = program // chunks
    if WIDE:
        split = split.to(tl.int64)
    k = program % chunks * BL + tl.arange(0, BL)
    live_k = k < K
    far_k = k.to(split.dtype)[None, :]
    q = filter_block * BQ + tl.arange(0, BQ)
    live_q = q < Q
    part = tl.zeros((BL, BQ), tl.float32)
    bias_part = tl.zeros((BL,), tl.float32)
    for tile in range(split * tiles, (split + 1) * tiles):
        pixel = tile * BM + tl.arange(0, BM)
        live = pixel < pixels
        n, oy, ox = located(pixel, OH, OW)
        gradient_rows = n * gradient_n + oy * gradient_y + ox * gradient_x
        output_rows = n * output_n + oy * output_y + ox * output_x
        z = gathered_maps(
            input, n * input_n, oy * stride_y - top, ox * stride_x - left, live, 0, basis, q, live_q,
            C, H, W, R, S, dilation_y, dilation_x, input_y, input_x, basis_q, basis_r, basis_s,
            BM, BQ, BK, VECTOR, PRECISION,
        )  # fmt: skip
        g = sloped(
            gradient, output, gradient_rows[:, None] + far_k * gradient_k, output_rows[:, None] + far_k * output_k,
            live[:, None] & live_k[None, :], ACTIVATION,
        )  # fmt: skip
        part = tl.dot(tl.trans(g), z.to(g.dtype), part, input_precision=PRECISION)
        bias_part += tl.sum(g.to(tl.float32), 0)
    at = parts + (split * K + k[:, None]) * Q + q[None, :]
    tl.store(at, part, mask=live_k[:, None] & live_q[None, :])
    if bias_parts is not None:
        tl.store(bias_parts + split * K + k, bias_part, mask=k < tl.where(filter_block == 0, K, 0))


@jit
def basis_conv2d_backward_input(
    d_maps,  # [N, OH, OW, Q] dense
    basis, d_input,
    pixels,  # N·H·W
    C, Q, H, W, OH, OW, R, S, stride_y, stride_x, top, left, dilation_y, dilation_x,
    basis_q, basis_r, basis_s, d_input_n, d_input_c, d_input_y, d_input_x,
    BM: tl.constexpr, BQ: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """D input of BM pixels and BC channels; input row y is read by output row (y + top − r·dilation) / stride."""
    chunks = tl.cdiv(C, BC)
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    pixel = program // chunks * BM + tl.arange(0, BM)
    c = (program % chunks).to(tl.int32) * BC + tl.arange(0, BC)
    live_c = c < C
    n, y, x = located(pixel, H, W)
    live = pixel < pixels
    dx = tl.zeros((BM, BC), tl.float32)
    blocks = tl.cdiv(Q, BQ)
    for i in range(R * S * blocks):
        tap = i // blocks
        q = (i - tap * blocks) * BQ + tl.arange(0, BQ)
        live_q = q < Q
        from_y = y + top - tap // S * dilation_y
        from_x = x + left - tap % S * dilation_x
        oy = from_y // stride_y
        ox = from_x // stride_x
        reads = live & (from_y >= 0) & (from_x >= 0) & (oy < OH) & (ox < OW)
        reads = reads & (oy * stride_y == from_y) & (ox * stride_x == from_x)
        at = d_maps + (((n * OH + oy) * OW + ox) * Q)[:, None] + q[None, :]
        dz = tl.load(at, mask=reads[:, None] & live_q[None, :], other=0.0)
        at = basis + q[:, None] * basis_q + tap // S * basis_r + tap % S * basis_s + c[None, :]
        filters = tl.load(at, mask=live_q[:, None] & live_c[None, :], other=0.0)
        dx = tl.dot(dz, filters, dx, input_precision=PRECISION)
    at = d_input + (n * d_input_n + y * d_input_y + x * d_input_x)[:, None] + (c.to(pixel.dtype) * d_input_c)[None, :]
    tl.store(at, dx.to(d_input.dtype.element_ty), mask=live[:, None] & live_c[None, :])


@jit
def basis_conv2d_backward_basis(
    d_maps,  # [N, OH, OW, Q] dense
    input,
    parts,  # [splits, Q, R·S, C] float32
    pixels, C, Q, H, W, OH, OW, R, S, stride_y, stride_x, top, left, dilation_y, dilation_x,
    input_n, input_y, input_x,
    tiles,  # of one split
    BM: tl.constexpr, BQ: tl.constexpr, BC: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """A part of d basis [BQ, BC] of one tap; a program has one tap, one block of filters and channels, some tiles."""
    channel_blocks = tl.cdiv(C, BC)
    filter_blocks = tl.cdiv(Q, BQ)
    program = tl.program_id(0)
    c = program % channel_blocks * BC + tl.arange(0, BC)
    program = program // channel_blocks
    q = program % filter_blocks * BQ + tl.arange(0, BQ)
    program = program // filter_blocks
    tap = program % (R * S)
    split = program // (R * S)
    if WIDE:
        split = split.to(tl.int64)
    live_c = c < C
    live_q = q < Q
    part = tl.zeros((BQ, BC), tl.float32)
    for tile in range(split * tiles, (split + 1) * tiles):
        pixel = tile * BM + tl.arange(0, BM)
        live = pixel < pixels
        n, oy, ox = located(pixel, OH, OW)
        y = oy * stride_y - top + tap // S * dilation_y
        x = ox * stride_x - left + tap % S * dilation_x
        inside = live & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        at = tl.multiple_of(n * input_n + y * input_y + x * input_x, VECTOR)
        values = tl.load(input + at[:, None] + c[None, :], mask=inside[:, None] & live_c[None, :], other=0.0)
        at = d_maps + pixel[None, :] * Q + q[:, None]
        dz = tl.load(at, mask=live[None, :] & live_q[:, None], other=0.0)
        part = tl.dot(dz, values, part, input_precision=PRECISION)
    at = parts + ((split * Q + q[:, None]) * (R * S) + tap) * C + c[None, :]
    tl.store(at, part, mask=live_q[:, None] & live_c[None, :])
