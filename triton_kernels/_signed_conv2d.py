"""The convolution with filters of bits on matrix instructions: what ternary, stacked and binary convolutions launch.

A program owns BM consecutive pixels in the order (n, oy, ox) and BL output filters of one group. Each step multiplies
[BL filters, BK channels] by [BK channels, BM pixels] of one tap. Filters come from memory as words and become numbers
of the activation's type in the registers that the instruction reads:

- *signs*: +1 where the bit is set, −1 elsewhere;
- *ternary*: two planes. With one scale +1, −1 or 0, and the scale follows the sum; with two the numbers themselves are
  ``scale`` and ``−negative_scale``, which have the dtype of the activations already: in 16 bits their products are
  exact in float32, so one accumulator serves both;
- *stacked*: the signs of channel split i of output k are those of bank filter ``index[k, i]``: full filters exist in
  registers alone, and maps of splits nowhere.

Pixels are real numbers, their signs (``BINARIZE``), or bits: packed signs, or packed codes of up to four planes. Signs
and codes are multiplied in float16 and their sums are whole numbers, exact below 2²⁴.

Layouts: input [N, H, W, C] in memory with any strides of n, y, x and 1 of c, or words [N, planes, H, W, words]; filters
[filters, planes, R, S, words], dense; the result with any strides. See ``basis_conv2d_pointers`` for the loop.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from basisconv_kernels.core import checks
from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.packed import words_for
from basisconv_kernels.triton_kernels import bits_configs, configs
from basisconv_kernels.triton_kernels._bits import either_of, signs_of, store_sums, zeros_and_ones
from basisconv_kernels.triton_kernels._common import WIDEST, channels_fastest, jit, located, vector, wide
from basisconv_kernels.triton_kernels._launch import Launch
from basisconv_kernels.triton_kernels.basis_conv2d import device_of
from basisconv_kernels.triton_kernels.bits_configs import BitsTile, unit

MOST_PLANS = 4096  # then all are forgotten
ONE = {torch.float16: 0x3C00, torch.bfloat16: 0x3F80}  # 1 in the bits of a type, 0 for 32-bit types
EXACT = 2**24  # below it float32 holds every whole number


@triton.jit
def filters_of(
    filters, index, k, live_k, c, C, LOW, splits, n, tap, filter_k, filter_p, words, positive, negative,
    BL: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr, TERNARY: tl.constexpr, ONE: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    """Filters [BL, BK] of one tap as numbers; ``c`` are the first channels of the units. Past C they are anything."""
    if index is not None:
        split = c // LOW
        c -= split * LOW
        one_of = tl.load(
            index + (k[:, None] * splits + split[None, :]), mask=live_k[:, None] & (split < splits)[None, :], other=0
        ).to(k.dtype)
        live = live_k[:, None] & (one_of >= 0) & (one_of < n)  # no other index is looked up
        rows = one_of * filter_k
    else:
        live = live_k[:, None]
        rows = k[:, None] * filter_k
    word = c // 32
    at = filters + (rows + (tap * words + word)[None, :])
    live = live & (word < words)[None, :]
    plus = tl.load(at, mask=live, other=0)
    if TERNARY:
        minus = tl.load(at + filter_p, mask=live, other=0)
        found = either_of(plus, minus, positive, negative, BL, BK, ONE, TYPE)
    else:
        found = signs_of(plus, c % 32, BL, BK, UNIT, ONE, TYPE)
    return found


@triton.jit
def pixels_of(
    input, at, inside, first, block, C, input_p,
    BM: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr, PLANES: tl.constexpr, CODES: tl.constexpr,
    BINARIZE: tl.constexpr, PAD: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """BM pixels of BK channels from ``block`` on as numbers; 0 past C, outside the image ``PAD``.

    Args:
        at: [BM] offsets of the pixels in input.
        first: first channel of the group.
    """
    c = block + tl.arange(0, BK)
    live = inside[:, None] & (c < C)[None, :]
    if PLANES == 0:
        x = tl.load(input + at[:, None] + (first + c)[None, :], mask=live, other=0.0)
        if BINARIZE:
            x = tl.where(x >= 0, 1.0, -1.0).to(TYPE)
    else:
        unit = first + block + tl.arange(0, BK // UNIT) * UNIT
        word = at[:, None] + (unit // 32)[None, :]
        here = inside[:, None] & (unit < first + C)[None, :]
        if CODES:
            x = tl.zeros((BM, BK), TYPE)
            for plane in tl.static_range(PLANES):
                words = tl.load(input + word + plane * input_p, mask=here, other=0)
                x += zeros_and_ones(words, unit % 32, BM, BK, UNIT, 0x3C00, TYPE) * (1 << plane)
        else:
            x = signs_of(tl.load(input + word, mask=here, other=0), unit % 32, BM, BK, UNIT, 0x3C00, TYPE)
    if BINARIZE or PLANES > 0:
        x = tl.where(live, x, 0.0).to(TYPE)
        if PAD != 0:
            x = tl.where(inside[:, None] | (c >= C)[None, :], x, PAD).to(TYPE)
    return x


@jit
def signed_conv2d_forward(
    input, filters, index, scale, negative_scale, bias, pixel_scale, value, flip, out,
    pixels, C, K, LOW, splits, n_filters, words, out_words, H, W, OH, OW, R, S, stride_y, stride_x, top, left,
    dilation_y, dilation_x, GROUPS,
    input_n, input_y, input_x, input_p, filter_k, filter_p, scale_k, negative_k, bias_k, out_n, out_k, out_y, out_x,
    BM: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr, VECTOR: tl.constexpr, UNIT: tl.constexpr,
    INPUT_UNIT: tl.constexpr, PLANES: tl.constexpr, CODES: tl.constexpr, BINARIZE: tl.constexpr, PAD: tl.constexpr,
    TERNARY: tl.constexpr, ONE: tl.constexpr, OUTPUT: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program an output tile, on the x axis of the grid, tiles of the same pixels side by side; see the head."""
    TYPE: tl.constexpr = tl.float16 if BINARIZE or PLANES > 0 else input.dtype.element_ty
    # Locate.
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    tiles_k = tl.cdiv(K, BL)  # of a group
    chunk = program % (tiles_k * GROUPS)
    group = chunk // tiles_k
    first_k = (chunk % tiles_k) * BL
    pixel = program // (tiles_k * GROUPS) * BM + tl.arange(0, BM)
    live = pixel < pixels
    n, oy, ox = located(pixel, OH, OW)
    iy = oy * stride_y - top
    ix = ox * stride_x - left
    in_rows = n * input_n
    k = first_k + tl.arange(0, BL)
    live_k = k < K
    k += group * K

    positive = tl.full((BL,), 1.0, TYPE)
    negative = tl.full((BL,), -1.0, TYPE)
    if negative_scale is not None:
        positive = tl.load(scale + k * scale_k, mask=live_k, other=0.0).to(TYPE)
        negative = -tl.load(negative_scale + k * negative_k, mask=live_k, other=0.0).to(TYPE)

    # Sums [BL, BM].
    v = tl.zeros((BL, BM), tl.float32)
    blocks = tl.cdiv(C, BK)
    for i in range(R * S * blocks):
        tap = i // blocks
        block = (i - tap * blocks) * BK
        y = iy + tap // S * dilation_y
        x = ix + tap % S * dilation_x
        inside = live & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        at = tl.multiple_of(in_rows + y * input_y + x * input_x, VECTOR)
        image = pixels_of(
            input, at, inside, group * C, block, C, input_p, BM, BK, INPUT_UNIT, PLANES, CODES, BINARIZE, PAD, TYPE
        )
        units = block + tl.arange(0, BK // UNIT) * UNIT
        weights = filters_of(
            filters, index, k, live_k, units, C, LOW, splits, n_filters, tap, filter_k, filter_p, words,
            positive, negative, BL, BK, UNIT, TERNARY, ONE, TYPE,
        )  # fmt: skip
        v = tl.dot(weights, tl.trans(image), v, input_precision=PRECISION)

    # Epilogue.
    factor = scale
    if negative_scale is not None:
        factor = None
    rows = n * out_n + oy * out_y + ox * out_x
    store_sums(
        tl.trans(v), k, live_k, pixel, live, rows, first_k // 32, out_words, out, out_k, factor, scale_k, bias, bias_k,
        pixel_scale, value, flip, OUTPUT, ACTIVATION, BM, BL,
    )  # fmt: skip


# --- the call ---------------------------------------------------------------------------------------------------------


class Operands(NamedTuple):
    """The tensors of a call; filters are words [filters, planes, R, S, words]."""

    input: Tensor
    filters: Tensor
    index: Tensor | None = None  # [K, splits], of stacked filters
    scale: Tensor | None = None
    negative_scale: Tensor | None = None
    bias: Tensor | None = None
    pixel_scale: Tensor | None = None
    value: Tensor | None = None  # thresholds
    flip: Tensor | None = None


class Kind(NamedTuple):
    """What a call computes, beside its tensors.

    Attributes:
        channels: C.
        encoding: of a packed input, None for a real one.
        binarize: whether the signs of a real input enter.
        output: ``"float"``, ``"int32"`` or ``"packed"``; the last one without groups.
        dtype: of a float result.
        layout: of a result that is not packed.
        tile: a row of the table, for tests; None chooses.
    """

    op: str
    stride: Pair
    padding: Quad
    dilation: Pair
    groups: int
    activation: str | None
    channels: int
    dtype: torch.dtype
    layout: torch.memory_format
    encoding: str | None = None
    binarize: bool = False
    padding_value: int = 0
    ternary: bool = False
    output: str = "float"
    tile: BitsTile | None = None


class Plan(NamedTuple):
    """How calls of one kind run."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: torch.memory_format
    launch: Launch | None  # None where the result has no elements

    def result(self, device: Any) -> Tensor:
        """Room for the result."""
        return torch.empty(self.shape, dtype=self.dtype, device=device, memory_format=self.layout)


_plans: dict[tuple[Any, ...], Plan] = {}


def forward(operands: Operands, kind: Kind) -> Tensor:
    """``conv2d(input, filters)`` and what ``kind`` makes of the sums, arguments in normal form."""
    if kind.encoding is None:
        operands = operands._replace(input=channels_fastest(operands.input))
    arithmetic = configs.HALF if kind.binarize or kind.encoding else configs.arithmetic_of(operands.input.dtype, False)
    key = (arithmetic, kind, *map(_seen, operands))
    plan = _plans.get(key)
    if plan is None:
        plan = _plan(arithmetic, operands, kind)
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        _plans[key] = plan
    out = plan.result(operands.input.device)
    if plan.launch is not None:
        plan.launch(*operands, out)
    return out


def _seen(tensor: Tensor | None) -> Any:
    """What a plan depends on."""
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % WIDEST


def sizes_of(operands: Operands, kind: Kind) -> tuple[int, int, int, int, int, int]:
    """(N, H, W, K, OH, OW)."""
    shape = operands.input.shape
    N, H, W = (shape[0], *shape[2:4])
    K = operands.filters.shape[0] if operands.index is None else operands.index.shape[0]
    kernel = (operands.filters.shape[2], operands.filters.shape[3])
    return (N, H, W, K, *checks.output_size(kind.op, (H, W), kernel, kind.stride, kind.padding, kind.dilation))


def result_of(operands: Operands, kind: Kind) -> tuple[tuple[int, ...], torch.dtype, torch.memory_format]:
    """Shape, dtype and layout of the result."""
    N, _, _, K, OH, OW = sizes_of(operands, kind)
    if kind.output == "packed":
        return (N, 1, OH, OW, words_for(K)), torch.int32, torch.contiguous_format
    return (N, K, OH, OW), torch.int32 if kind.output == "int32" else kind.dtype, kind.layout


def device_under(operands: Operands) -> configs.Device:
    """What the choice of a tile sees of the device of a call."""
    return device_of(operands.input.device.index)


def _plan(arithmetic: str, operands: Operands, kind: Kind) -> Plan:
    input, filters, index, scale, negative, bias, *_ = operands
    N, H, W, K, OH, OW = sizes_of(operands, kind)
    made = Plan(*result_of(operands, kind), None)
    out = made.result("meta")
    if out.numel() == 0:
        return made
    C, filters_a_group, pixels = kind.channels // kind.groups, K // kind.groups, N * OH * OW
    device = device_under(operands)
    splits = 1 if index is None else index.shape[1]
    low = C // splits
    many, planes, R, S, words = filters.shape
    packed = kind.encoding is not None
    input_n, input_p, input_y, input_x = input.stride()[:4]
    starts = (input_n, input_y, input_x, *((C,) if kind.groups > 1 else ()))
    widest, bits, far = 1 if packed else vector(input, *starts), unit(low, splits), wide(pixels, input, filters, out)
    rows = bits_configs.BITS if packed else bits_configs.SIGNS if kind.binarize else arithmetic
    load = WIDEST if packed else widest * input.element_size()
    most = bits_configs.most_sums(load, bits, far, made.layout == torch.channels_last)
    tile = kind.tile or bits_configs.product_tile(rows, C, filters_a_group, pixels, device, most)
    steps = (out.stride(0), 0, out.stride(2), out.stride(3)) if kind.output == "packed" else out.stride()
    operand = torch.float16 if kind.binarize or packed else input.dtype
    rest = (
        pixels, C, filters_a_group, low, splits, many, words, words_for(K), H, W, OH, OW, R, S, *kind.stride,
        kind.padding[0], kind.padding[2], *kind.dilation, kind.groups,
        input_n, input_y, input_x, input_p if packed else 0, planes * R * S * words, R * S * words,
        *(0 if t is None else t.stride(0) for t in (scale, negative, bias)), *steps,
        tile.BM, tile.BL, tile.BK, widest, bits, unit(C, kind.groups),
        input.shape[1] if packed else 0, kind.encoding == "unsigned", kind.binarize, kind.padding_value, kind.ternary,
        ONE.get(operand, 0), kind.output, kind.activation, configs.input_precision(arithmetic),
        far,
    )  # fmt: skip
    programs = -(-pixels // tile.BM) * -(-filters_a_group // tile.BL) * kind.groups
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    return made._replace(launch=Launch(signed_conv2d_forward, programs, rest, **options))
