"""``basis_conv2d`` forward through tensor descriptors: the fast path of devices with a tensor memory unit.

A program owns a box of BN images × TH rows × TW columns, BM = BN·TH·TW output pixels, and all Q basis filters.

1. *Load.* A tap's operand is the box of the input shifted by the tap, one descriptor load. What lies outside the image
   arrives as zero: the box is the padding, and there are no masks.
2. *Stage 1* adds up Zᵀ [BQ, BM] = filters · pixelsᵀ over taps and channels in float32. The filters come first because
   the compiler leaves a box of pixels in shared memory, and so lets matrix instructions read it there, only as the
   second operand; as the first it would pass through registers in every step. It also allows few pixels: BM may be 16.
3. *Stage 2.* Z, rounded once to the dtype, stays in registers while the outputs follow in chunks of BL.
4. *Epilogue.* Bias, residual and activation in float32, then one rounding.

Stride 2 reads the same memory as [N, H/2, 2, W/2, 2·C]: the parity of a tap's offset picks a plane, and within a plane
the pixels of a box lie side by side. Needs even H and W, and C % BK == 0, else the end of one plane's channels would
read the other's.

The loop over taps and channels is one, so that it is one software pipeline; four warps at most (``configs.py``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from basisconv_kernels.triton_kernels._common import jit, store_outputs
from basisconv_kernels.triton_kernels.basis_conv2d_pointers import mixed_maps


@triton.jit
def shifted_box(
    input, n, oy, ox, r, s, c, C, top, left, dilation_y, dilation_x,
    STRIDE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The input [BM, BK] that tap (r, s) reads for the output pixels of a box that begins at (n, oy, ox)."""
    if STRIDE == 1:
        box = input.load([n, oy + r * dilation_y - top, ox + s * dilation_x - left, c])
    else:
        # Offset o = r·dilation − top: row ⌊o/2⌋ of plane o mod 2. Division truncates, so keep its operand positive.
        y = r * dilation_y + top
        x = s * dilation_x + left
        box = input.load([n, oy + y // 2 - top, y % 2, ox + x // 2 - left, x % 2 * C + c])
    return tl.reshape(box, (BM, BK))


@triton.jit
def tap_filters(basis, tap, c, C, BQ: tl.constexpr, BK: tl.constexpr, FLAT: tl.constexpr):
    """The filters [BQ, BK] of one tap from channel c on; rows and channels past the end are zero."""
    return basis.load([0, tap * C + c]) if FLAT else tl.reshape(basis.load([0, tap, c]), (BQ, BK))


@jit
def basis_conv2d_forward_descriptors(
    input,  # descriptor [N, H, W, C], boxes [BN, TH, TW, BK]; stride 2: [N, H/2, 2, W/2, 2·C], [BN, TH, 1, TW, BK]
    basis,  # descriptor [Q, R·S·C], boxes [BQ, BK], or not FLAT [Q, R·S, C], boxes [BQ, 1, BK]
    coefficients,
    bias,
    residual,
    out,
    N,
    C,
    Q,
    K,
    OH,
    OW,
    top,
    left,
    dilation_y,
    dilation_x,
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
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    BN: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    BL: tl.constexpr,
    BLOCKS: tl.constexpr,  # of BK channels
    FLAT: tl.constexpr,  # BK divides C
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program a box, on the x axis of the grid; see the head of this file."""
    BM: tl.constexpr = BN * TH * TW
    program = tl.program_id(0)
    columns = tl.cdiv(OW, TW)
    rows = tl.cdiv(OH, TH)
    ox = program % columns * TW
    oy = program // columns % rows * TH
    n = program // columns // rows * BN

    maps = tl.zeros((BQ, BM), tl.float32)
    for i in range(R * S * BLOCKS):
        tap = i // BLOCKS
        c = i % BLOCKS * BK
        pixels = shifted_box(
            input, n, oy, ox, tap // S, tap % S, c, C, top, left, dilation_y, dilation_x, STRIDE, BM, BK
        )
        filters = tap_filters(basis, tap, c, C, BQ, BK, FLAT)
        maps = tl.dot(filters, tl.trans(pixels), maps, input_precision=PRECISION)
    q = tl.arange(0, BQ)
    live_q = q < Q
    maps = tl.where(live_q[:, None], maps, 0.0)  # 0 · Inf of a row past the end is NaN
    z = tl.trans(maps.to(coefficients.dtype.element_ty))

    m = tl.arange(0, BM)
    image = n + m // (TH * TW)
    y = oy + m // TW % TH
    x = ox + m % TW
    if WIDE:
        image, y, x = image.to(tl.int64), y.to(tl.int64), x.to(tl.int64)
    live = (image < N) & (y < OH) & (x < OW)
    out_rows = image * out_n + y * out_y + x * out_x
    residual_rows = image * residual_n + y * residual_y + x * residual_x
    for start in tl.range(0, K, BL, num_stages=2):
        k = start + tl.arange(0, BL)
        live_k = k < K
        at = coefficients + k[:, None] * mix_k + q[None, :] * mix_q
        mix = tl.load(at, mask=live_k[:, None] & live_q[None, :], other=0.0)
        result = mixed_maps(z, mix, tl.zeros((BM, BL), tl.float32), False, PRECISION)
        store_outputs(
            result, k, live_k, live, out_rows, out, out_k, bias, bias_k, residual, residual_rows, residual_k, ACTIVATION
        )
