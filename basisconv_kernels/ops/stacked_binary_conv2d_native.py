"""The native torch ops of ``stacked_binary_conv2d``: calling them, packing for them, what torch knows of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from basisconv_kernels.core import checks, extension
from basisconv_kernels.core.autograd import call_raw, register_without_gradient
from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.layout import memory_format
from basisconv_kernels.core.packed import PackedTensor, unpack_planes
from basisconv_kernels.core.problem import dtype_name
from basisconv_kernels.core.selfcheck import Check
from basisconv_kernels.ops import binary_conv2d_native as binary
from basisconv_kernels.ops import binary_conv2d_selfcheck, stacked_binary_conv2d_selfcheck
from basisconv_kernels.ops import ternary_conv2d_cuda as ternary
from basisconv_kernels.reference.binary_conv2d_problem import BinaryConv2dProblem
from basisconv_kernels.reference.stacked_binary_conv2d import Settings, stacked_filters
from basisconv_kernels.reference.stacked_binary_conv2d_problem import StackedBinaryConv2dProblem

OP = "stacked_binary_conv2d"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POPCOUNTS_A_PICK = 4
FORMAT = 2  # of packed filters, kStackedPackVersion of csrc/cpu/stacked_binary_conv2d_plan.h
# A constant, because graphs are traced through the functions that ask; a library of before this op has none.
PRESENT = extension.load() is None and hasattr(torch.ops.basisconv, "stacked_binary_conv2d_pack")


def forward(
    input: Tensor,
    bank: Tensor,
    index: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    packed: Tensor | None,
    settings: Settings,
) -> Tensor:
    """The torch op that C++ registers for the CPU; of signs, that of ``binary_conv2d`` where popcounts are faster."""
    if settings.binarize and by_popcount(bank.shape[0], index.shape[0], settings.groups):
        return _popcounts(input, bank, index, scale, bias, packed, settings)
    if packed is None:
        packed = _pack(bank, index, settings.packed_bank, settings.channels // settings.groups // index.shape[1],
                       settings.groups)  # fmt: skip
    elif packed.device != input.device or packed.dtype != torch.uint8:
        raise ValueError(
            f"{OP}: packed must be what stacked_binary_conv2d_pack gives, uint8 on {input.device}, "
            f"got {packed.dtype} on {packed.device}; pack the filters again"
        )
    op = torch.ops.basisconv.stacked_binary_conv2d.default
    out = call_raw(op, input, packed, scale, bias, *numbers(bank, index, settings))
    return out if out.dtype == settings.dtype else out.to(settings.dtype)  # packed input: one rounding of a float32


def numbers(bank: Tensor, index: Tensor, settings: Settings) -> tuple[Any, ...]:
    """The arguments of the torch op that are no tensors."""
    mode = "signs" if settings.binarize and settings.encoding is None else "real"
    if settings.encoding is not None:
        mode = "packed_signs" if settings.encoding == "sign" else "packed_codes"
    # Words are [n, 1, R, S, words], values [n, cs, R, S].
    n, R, S = bank.shape[0], bank.shape[2], bank.shape[3]
    low = settings.channels // settings.groups // index.shape[1]
    return (
        (n, low, R, S), tuple(index.shape), settings.stride, settings.padding, settings.dilation, settings.groups, mode,
        settings.activation,
    )  # fmt: skip


def forward_on_cuda(
    input: Tensor,
    bank: Tensor,
    index: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    packed: Tensor | None,
    settings: Settings,
) -> Tensor:
    """Full filters: on tensor cores, with real numbers or bits, products cost less than adding up maps of a bank."""
    if settings.binarize or settings.encoding is not None:
        return _popcounts(input, bank, index, scale, bias, packed, settings)
    if packed is None:
        low = settings.channels // settings.groups // index.shape[1]
        packed = ternary.pack(_signs(_full_filters(bank, index, settings.packed_bank, low)), settings.channels)
    elif packed.device != input.device or packed.dtype != torch.uint8:
        raise ValueError(
            f"{OP}: packed must be what stacked_binary_conv2d_pack gives, uint8 on {input.device}, "
            f"got {packed.dtype} on {packed.device}; pack the filters again"
        )
    geometry = (settings.stride, settings.padding, settings.dilation)
    kernel = (bank.shape[2], bank.shape[3])
    return ternary.run(input, packed, scale, bias, index.shape[0], kernel, geometry, settings.activation)


def _signs(filters: Tensor) -> Tensor:
    """Words [K, 1, R, S, words] of ±1."""
    return torch.ops.basisconv.bitpack.default(filters, None, None, 1, False)


def cuda_supports(problem: StackedBinaryConv2dProblem) -> list[str]:
    """The reasons against the CUDA kernels of ``binary_conv2d``, for real numbers against that of ternary filters."""
    p = problem
    if isinstance(p, StackedBinaryConv2dProblem) and p.mode != "real":
        return binary.cuda_supports(_with_full_filters(p))
    return ternary.against(p.device, p.dtype, p.C, p.groups)  # a plain layer is open in its mode


def cuda_check(problem: StackedBinaryConv2dProblem) -> Check:
    """The check of the kernels that run."""
    if problem.mode == "real":
        return stacked_binary_conv2d_selfcheck.cuda(problem)
    return binary_conv2d_selfcheck.cuda(_with_full_filters(problem))


def _with_full_filters(problem: StackedBinaryConv2dProblem) -> BinaryConv2dProblem:
    p = problem
    return BinaryConv2dProblem(
        C=p.C, K=p.K, R=p.R, S=p.S, N=p.N, H=p.H, W=p.W, stride=p.stride, padding=p.padding, dilation=p.dilation,
        groups=p.groups, planes=p.planes, unsigned=p.mode == "codes", dtype=p.dtype, device=p.device,
        channels_last=p.channels_last, activation=p.activation,
    )  # fmt: skip


def by_popcount(n: int, K: int, groups: int) -> bool:
    """Whether signs of the input are convolved with full filters by XOR and popcount instead of tables and stacking.

    Popcounts do four to six times as many products a second as tables (64 to 512 channels, AVX2 and AVX-512), and
    stacking saves K/n of them.
    """
    return binary.PRESENT and POPCOUNTS_A_PICK * n >= K // groups


def _popcounts(
    input: Tensor,
    bank: Tensor,
    index: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    packed: Tensor | None,
    settings: Settings,
) -> Tensor:
    low = settings.channels // settings.groups // index.shape[1]
    if packed is None:
        filters = _full_filters(bank, index, settings.packed_bank, low)
    else:  # of which the op reads the sizes alone
        shape = (index.shape[0], low * index.shape[1], bank.shape[2], bank.shape[3])
        filters = torch.empty((), device=bank.device).expand(shape)
    dtype = dtype_name(settings.dtype)
    arguments = (
        input, filters, scale, bias, None, None, None, packed, settings.stride, settings.padding, 0, settings.dilation,
        settings.groups, settings.activation, dtype, settings.channels, settings.encoding, False,
    )  # fmt: skip
    return call_raw(torch.ops.basisconv.binary_conv2d.default, *arguments)


def _full_filters(bank: Tensor, index: Tensor, packed_bank: bool, low: int) -> Tensor:
    values = 2 * unpack_planes(bank, low)[:, 0] - 1 if packed_bank else bank
    return stacked_filters(values.detach().to(torch.float32), index.to(torch.int64))


def _pack(bank: Tensor, index: Tensor, packed_bank: bool, low: int, groups: int) -> Tensor:
    values = 2 * unpack_planes(bank, low)[:, 0] - 1 if packed_bank else bank
    return torch.ops.basisconv.stacked_binary_conv2d_pack.default(
        values.detach().to(torch.float32), index.to(torch.int64), groups, FORMAT
    )


def stacked_binary_conv2d_pack(
    bank: Tensor | PackedTensor, index: Tensor, *, groups: int = 1, binarize_input: bool = False
) -> Tensor | None:
    """Rearrange bank and index once for the native kernel, for the ``packed`` argument of ``stacked_binary_conv2d``.

    Args:
        bank (Tensor[n, C/(groups·splits), R, S] or PackedTensor): as for ``stacked_binary_conv2d``.
        index (Tensor[K, splits]): integers, as for ``stacked_binary_conv2d``.
        groups (int), binarize_input (bool): as they will be given to ``stacked_binary_conv2d``.

    Returns:
        Tensor[bytes] (uint8), still bits, good for this instruction set only and checked on use; None where no native
        kernel exists, and then ``packed=None`` is right. Where full filters cost less than stacking maps (a bank of
        about K filters or more, and always on CUDA, where those for real input are numbers of two bytes), they are what
        is packed: ``stacked_binary_conv2d_form`` says which.

    Raises:
        RuntimeError: bank values other than ±1, or an index out of range.
    """
    on_cuda = bank.device.type == "cuda"
    if not PRESENT or not (on_cuda or bank.device.type == "cpu"):
        return None
    packed = isinstance(bank, PackedTensor)
    values = bank.words if isinstance(bank, PackedTensor) else bank
    low = bank.channels if isinstance(bank, PackedTensor) else bank.shape[1]
    if on_cuda and not binarize_input:
        channels = low * index.shape[1] * groups
        filters = _full_filters(values, index, packed, low)
        return ternary.pack(_signs(filters), channels) if ternary.packs(filters, channels, groups) else None
    if on_cuda or (binarize_input and by_popcount(values.shape[0], index.shape[0], groups)):
        return binary.binary_conv2d_pack(_full_filters(values, index, packed, low), groups=groups)
    return _pack(values, index, packed, low, groups)


def stacked_binary_conv2d_form(bank_shape: Sequence[int], index_shape: Sequence[int], groups: int = 1) -> str:
    """What the native kernel runs for such a bank and index: ``"stacked"`` maps or ``"expanded"`` filters; see docs.

    On a processor with a matrix unit that of maps which it multiplies, from nine pixels on.
    """
    if not PRESENT:
        return "stacked"
    shapes = (list(bank_shape), list(index_shape))
    return "expanded" if torch.ops.basisconv.stacked_binary_conv2d_expanded.default(*shapes, groups) else "stacked"


def _fake_forward(
    input: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    bank_shape: Sequence[int],
    index_shape: Sequence[int],
    stride: Pair,
    padding: Quad,
    dilation: Pair,
    groups: int,
    mode: str,
    activation: str | None,
) -> Tensor:
    """Shape, dtype and strides of the result, for tracing."""
    words = mode.startswith("packed")
    kernel = (bank_shape[2], bank_shape[3])
    OH, OW = checks.output_size(OP, (input.shape[2], input.shape[3]), kernel, stride, padding, dilation)
    return torch.empty(
        (input.shape[0], index_shape[0], OH, OW),
        dtype=torch.float32 if words else input.dtype,
        device=input.device,
        memory_format=torch.channels_last if words else memory_format(input),
    )


def _fake_pack(bank: Tensor, index: Tensor, groups: int, format: int) -> Tensor:
    shapes = ([int(size) for size in bank.shape], [int(size) for size in index.shape])
    size = torch.ops.basisconv.stacked_binary_conv2d_packed_bytes.default(*shapes, groups)
    return bank.new_empty(size, dtype=torch.uint8)


def _flops(
    input: Sequence[int],
    packed: Any,
    scale: Any,
    bias: Any,
    bank_shape: Sequence[int],
    index_shape: Sequence[int],
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    *_: Any,
    out_shape: Sequence[int],
    **__: Any,
) -> int:
    """Two FLOP an addition, as if it were a multiply-accumulate: the bank over every split, then the stacking."""
    n, low, R, S = bank_shape
    K, splits = index_shape
    N, OH, OW = out_shape[0], out_shape[2], out_shape[3]
    return 2 * N * OH * OW * (n * low * splits * groups * R * S + K * splits)


def _register() -> None:
    """Teach torch what the native ops do to shapes, gradients and FLOP counts."""
    for native, fake in (("stacked_binary_conv2d", _fake_forward), ("stacked_binary_conv2d_pack", _fake_pack)):
        register_without_gradient(native, OP, fake)
    register_flop_formula(torch.ops.basisconv.stacked_binary_conv2d)(_flops)


if PRESENT:
    _register()
