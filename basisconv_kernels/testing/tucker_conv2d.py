"""Cases, inputs and comparison for ``tucker_conv2d``; the rules are those of ``testing.check``.

A kernel takes ``(input, u_in, core, u_out, bias, *, stride, padding, dilation, activation, residual, precise)`` with
the arguments in normal form: pairs, and padding as (top, bottom, left, right).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log2, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from basisconv_kernels.core.problem import TuckerConv2dProblem
from basisconv_kernels.reference import tucker_conv2d as reference
from basisconv_kernels.testing import compare, tolerances, tucker_conv2d_bounds
from basisconv_kernels.testing.candidates import Kernel
from basisconv_kernels.testing.cases import Case
from basisconv_kernels.testing.compare import Mismatch, Report
from basisconv_kernels.testing.inputs import (
    _SIGNIFICANT_BITS,
    GUARD,
    Inputs,
    _place,
    _strides,
    poisoned_allocations,
)

NAMES = ("input", "u_in", "core", "u_out", "bias", "residual")
Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class TuckerCase(Case):
    """One problem of ``tucker_conv2d`` and the way in which its tensors lie in memory; views are those of ``Case``."""

    problem: TuckerConv2dProblem

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the op that are no tensors."""
        return {name: value for name, value in super().arguments().items() if name != "groups"}


def _case(name: str, reason: str, sizes: str, *, view: str = "dense", **flags: Any) -> TuckerCase:
    """``sizes`` reads ``N C H W rank_in rank_out K R S``."""
    n, c, h, w, i, o, k, r, s = map(int, sizes.split())
    return TuckerCase(
        name, reason, TuckerConv2dProblem(N=n, C=c, H=h, W=w, rank_in=i, Q=o, K=k, R=r, S=s, **flags), view
    )


_ONE = (1, 1, 1, 1)
_EPILOGUE: dict[str, Any] = {"bias": True, "residual": True}

TUCKER_CASES: tuple[TuckerCase, ...] = (
    #                                                                                    N  C  H  W  I  O  K R S
    _case("odd_sizes", "no size is a multiple of a vector", "2 5 9 11 3 7 13 3 3", padding=_ONE),
    _case("full_vectors", "all sizes multiples of a vector: no tail code runs", "1 24 12 20 16 8 32 3 3", padding=_ONE),
    _case("past_a_block", "more of everything than one register block", "1 37 4 6 35 41 67 3 3"),
    _case("rank_in_one", "rank_in = 1: the core sees one map", "2 6 8 7 1 4 9 3 3", padding=_ONE),
    _case("rank_out_one", "rank_out = 1", "2 6 8 7 4 1 9 3 3", padding=_ONE, bias=True),
    _case("ranks_above_channels", "ranks that save nothing are allowed", "2 3 7 8 5 9 6 3 3", padding=_ONE),
    _case("one_channel", "C = 1: dense in both formats, the strides say NCHW", "2 1 8 9 2 3 5 3 3", padding=_ONE),
    _case("one_channel_channels_last", "the same, the strides say channels_last", "2 1 8 9 2 3 5 3 3",
          channels_last=True, padding=_ONE),
    _case("one_output_channels_last", "K = 1: the strides of the result must still say channels_last",
          "3 4 6 8 2 5 1 3 3", channels_last=True, padding=_ONE),
    _case("empty_batch", "N = 0: nothing may be launched, the shape must be right", "0 4 7 9 2 3 5 3 3", bias=True),
    _case("pointwise", "1×1 core: three pointwise stages", "2 10 5 8 3 6 14 1 1"),
    _case("even_kernel", "an even kernel has no middle", "2 3 9 8 2 5 6 2 4", padding=(1, 0, 1, 2)),
    _case("large_kernel", "5×5: no special 3×3 path", "1 6 12 11 4 9 10 5 5", padding=(2, 2, 2, 2)),
    _case("stride", "different strides, an input row left over", "2 6 11 14 4 5 8 3 3", stride=(2, 3), padding=_ONE),
    _case("stride_past_kernel", "pixels that the first stage maps and no tap reads", "2 3 13 21 2 4 7 2 3",
          stride=(4, 5)),
    _case("dilation", "taps apart, differently in the two directions", "2 4 12 15 3 6 7 3 3",
          dilation=(2, 3), padding=(2, 2, 3, 3)),
    _case("asymmetric_padding", "four different paddings", "2 4 8 10 3 6 9 3 3", padding=(0, 3, 2, 1)),
    _case("padding_past_kernel", "output pixels that see no input at all: zeros around the first map",
          "2 3 5 4 2 6 7 3 2", padding=(4, 3, 2, 6), bias=True),
    _case("map_below_kernel", "a map smaller than the kernel", "3 4 2 3 5 6 7 5 5", padding=(2, 2, 2, 3)),
    _case("one_pixel_channels_last", "a 1×1 output that must still say channels_last", "2 6 3 5 2 4 9 3 5",
          channels_last=True),
    _case("channels_last", "the fast layout, with tails", "2 13 9 10 5 7 19 3 3", channels_last=True, padding=_ONE),
    _case("channels_last_stride", "the fast layout, strided", "2 32 10 13 18 20 36 3 3",
          channels_last=True, stride=(2, 2), padding=_ONE, bias=True),
    _case("offset", "data off the alignment", "2 8 7 11 3 5 16 3 3", padding=_ONE, view="offset", **_EPILOGUE),
    _case("sliced", "gaps in all tensors", "2 5 8 9 4 6 11 3 3", padding=_ONE, view="sliced", **_EPILOGUE),
    _case("sliced_channels_last", "gaps between pixels and rows", "2 7 8 9 4 6 12 3 3",
          channels_last=True, padding=_ONE, view="sliced", **_EPILOGUE),
    _case("expanded", "batch stride 0", "3 4 6 9 2 5 8 3 3", padding=_ONE, view="expanded"),
    _case("transposed", "a layout that is neither of the two", "2 4 6 9 3 5 8 3 2", view="transposed", **_EPILOGUE),
    _case("mixed_formats", "residual and input of different memory formats", "2 6 7 8 3 5 9 3 3",
          channels_last=True, padding=_ONE, view="mixed", **_EPILOGUE),
    _case("residual_relu", "the end of a residual block, no bias", "2 6 8 7 3 5 12 3 3",
          padding=_ONE, residual=True, activation="relu"),
    _case("whole_epilogue", "bias, residual and a clip on both sides", "2 9 6 8 5 7 17 3 3",
          padding=_ONE, activation="relu6", **_EPILOGUE),
    _case("precise", "no Winograd, both maps kept in float32", "2 12 8 10 6 9 14 3 3",
          padding=_ONE, precise=True, bias=True),
)  # fmt: skip


def tucker_case(name: str) -> TuckerCase:
    """The case of this name; a ValueError that lists the names where there is none."""
    for found in TUCKER_CASES:
        if found.name == name:
            return found
    raise ValueError(f"testing: no case has the name {name!r}; there are {', '.join(c.name for c in TUCKER_CASES)}")


# --- inputs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TuckerInputs:
    """The tensors of one call, with what is needed to prove that nobody wrote to them or beside them."""

    case: TuckerCase
    input: Tensor
    u_in: Tensor
    core: Tensor
    u_out: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None
    _storages: dict[str, tuple[Tensor, Tensor]] = field(repr=False, default_factory=dict)

    @property
    def tensors(self) -> Tensors:
        """``(input, u_in, core, u_out, bias, residual)``."""
        return self.input, self.u_in, self.core, self.u_out, self.bias, self.residual

    def changed(self) -> list[str]:
        """What a kernel wrote to: tensors, or the sentinels around them."""
        return Inputs.changed(self)  # type: ignore[arg-type]


def make_tucker_inputs(case: TuckerCase, seed: int = 0, values: str = "random") -> TuckerInputs:
    """The tensors of a case on its device; arguments and sentinels are those of ``make_inputs``."""
    p = case.problem
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    storages = {}
    for name, exact in (_on_grid if values == "grid" else _random)(case, generator).items():
        other = name == "residual" and case.view == "mixed"
        strides = _strides(case, exact.shape, p.channels_last != other)
        if case.view == "expanded" and name == "input":
            strides = (0, *strides[1:])
        start = GUARD + (1 if case.view == "offset" else 0)
        tensors[name], storage = _place(exact.to(p.dtype).to(p.device), strides, start)
        storages[name] = (storage, storage.clone())
    return TuckerInputs(case, **tensors, _storages=storages)


def _shapes(p: TuckerConv2dProblem) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "input": (p.N, p.C, p.H, p.W),
        "u_in": (p.C, p.rank_in),
        "core": (p.Q, p.rank_in, p.R, p.S),
        "u_out": (p.K, p.Q),
    }
    if p.bias:
        shapes["bias"] = (p.K,)
    if p.residual:
        shapes["residual"] = (p.N, p.K, *p.output_size)
    return shapes


def _random(case: TuckerCase, generator: torch.Generator) -> dict[str, Tensor]:
    """Normal values: unit maps and outputs; four times as much under relu6, so that it clips on both sides."""
    p = case.problem
    scale = {"u_in": 1 / sqrt(p.C), "core": 1 / sqrt(p.taps), "u_out": 1 / sqrt(p.Q)}
    loud = 4.0 if p.activation == "relu6" else 1.0
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) * scale.get(name, loud)
        for name, shape in _shapes(p).items()
    }


def _wide(p: TuckerConv2dProblem) -> int:
    """Size of a typical M: at the edge of what the dtype holds, with room for Z below the largest float16."""
    return 2 ** min(_SIGNIFICANT_BITS[p.dtype], 10)


def _spread(p: TuckerConv2dProblem) -> float:
    """Size of a typical output on the grid: a map 2^bits large, then sums over taps and maps with weights −1, 0, 1."""
    return _wide(p) * sqrt(p.taps * p.Q) * 2 / 3


def _unit(case: TuckerCase) -> float:
    """What the whole numbers are multiples of: small under relu6, so that not all results clip."""
    return 4.0 / 2 ** round(log2(_spread(case.problem))) if case.problem.activation == "relu6" else 1.0


def _on_grid(case: TuckerCase, generator: torch.Generator) -> dict[str, Tensor]:
    """Whole numbers, times one power of two: sums are exact in float32 in any order, both maps need rounding."""
    p = case.problem
    amplitude = max(1, round(sqrt(3 * _wide(p) / sqrt(p.C))))
    largest = {"input": amplitude, "u_in": amplitude, "core": 1, "u_out": 1}
    values = {}
    for name, shape in _shapes(p).items():
        a = largest.get(name, max(1, round(_spread(p) / 2)))
        unit = 1.0 if name in ("u_in", "core", "u_out") else _unit(case)
        values[name] = torch.randint(-a, a + 1, shape, generator=generator).double() * unit
    for name in ("bias", "residual"):
        if name in values:  # as a tensor of the dtype holds it
            values[name] = values[name].to(p.dtype).double()
    return values


# --- comparison -------------------------------------------------------------------------------------------------------


def plain_tucker(case: TuckerCase, tensors: Tensors) -> Tensor:
    """The op as three convolutions, an addition and an activation of PyTorch, all at the dtype of the tensors."""
    p = case.problem
    input, u_in, core, u_out, bias, residual = tensors
    top, bottom, left, right = p.padding
    reduced = F.pad(F.conv2d(input, u_in.t()[:, :, None, None]), (left, right, top, bottom))
    out = F.conv2d(F.conv2d(reduced, core, None, p.stride, 0, p.dilation), u_out[:, :, None, None], bias)
    out = out if residual is None else out + residual
    if p.activation is not None:
        out = F.relu(out) if p.activation == "relu" else F.relu6(out)
    return out


def _call(candidate: Kernel, inputs: TuckerInputs) -> Tensor:
    return candidate(*inputs.tensors[:5], residual=inputs.residual, **inputs.case.arguments())


def check_tucker(case: TuckerCase, candidate: Kernel, *, seed: int = 0, tf32: bool = False) -> Report:
    """Run a kernel on a case and compare all of its contract, as ``check`` does; ``tf32`` is as there.

    Raises:
        Mismatch: an AssertionError that names the first thing that is wrong.
    """
    inputs = make_tucker_inputs(case, seed)
    with torch.no_grad(), compare.full_float32(tf32):
        with poisoned_allocations():
            got = _call(candidate, inputs)
            compare._form(case, inputs, got)
            first = got.clone()
            again = _call(candidate, inputs)
        compare._untouched(case, inputs)
        compare._own_memory(case, inputs, got, again)
        bound = tucker_conv2d_bounds.forward_bound(case.problem, *inputs.tensors, tf32=tf32)
        error = compare._elements(str(case), first, bound.expected, bound.allowed)
        plain_error = (plain_tucker(case, inputs.tensors).double() - bound.expected).abs()
        if not tf32:
            compare._beside_plain(str(case), case.problem.dtype, error, plain_error, bound)
        compare._same_bits(case, "the results of two runs", first, again)
        if not tf32 and not tolerances.winograd_allowed(case.problem) and exact_in_float32(case, seed):
            check_tucker_rounding(case, candidate, seed=seed)
    if not error.numel():
        return Report(case, 0.0, 0.0, 0.0)
    return Report(case, error.max().item(), plain_error.max().item(), (error / bound.allowed).max().item())


def check_tucker_rounding(case: TuckerCase, candidate: Kernel, *, seed: int = 0) -> None:
    """Compare bit for bit on whole numbers, where only the roundings that the contract names remain.

    Raises:
        Mismatch: a rounding too many, one too few, or a wrong value.
    """
    if not exact_in_float32(case, seed):
        raise ValueError(f"check_tucker_rounding: {case} has sums too long to be exact in float32; use a smaller case")
    inputs = make_tucker_inputs(case, seed, "grid")
    expected = _rounded_once(case.problem, *(None if t is None else t.double() for t in inputs.tensors))  # type: ignore[arg-type]
    with torch.no_grad(), poisoned_allocations():
        got = _call(candidate, inputs)
    zero = torch.zeros_like(expected, dtype=torch.float64)
    compare._elements(f"{case} on whole numbers", got, expected.double(), zero)
    compare._untouched(case, inputs)


def exact_in_float32(case: TuckerCase, seed: int = 0) -> bool:
    """Whether no partial sum of the case's whole numbers can need more than the 24 bits of a float32."""
    p = case.problem
    tensors = make_tucker_inputs(case, seed, "grid").tensors
    x, i, f, o, b, r = (None if t is None else t.double().abs() for t in tensors)
    sums = reference.forward(x, i, f, o, b, r, p.stride, p.padding, p.dilation, None, True)  # type: ignore[arg-type]
    return not sums.numel() or sums.max().item() < _unit(case) / tolerances.UNIT_ROUNDOFF[torch.float32]


def _rounded_once(
    p: TuckerConv2dProblem,
    input: Tensor,
    u_in: Tensor,
    core: Tensor,
    u_out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """The rounding contract in float64 arithmetic that is exact on whole numbers."""
    top, bottom, left, right = p.padding
    reduced = torch.einsum("nchw,ci->nihw", input, u_in)
    reduced = reduced if p.precise else reduced.to(p.dtype).double()
    maps = F.conv2d(F.pad(reduced, (left, right, top, bottom)), core, None, p.stride, 0, p.dilation)
    maps = maps if p.precise else maps.to(p.dtype).double()
    out = torch.einsum("nqyx,kq->nkyx", maps, u_out)
    out = out if bias is None else out + bias[:, None, None]
    out = out if residual is None else out + residual
    if p.activation is not None:
        out = out.clamp(min=0.0, max=6.0 if p.activation == "relu6" else None)
    return out.to(p.dtype)


def check_tucker_gradients(case: TuckerCase, candidate: Kernel, *, seed: int = 0, tf32: bool = False) -> None:
    """Compare the gradients of all tensors of a case with the explicit formulas in float64, as ``check_gradients``.

    Raises:
        Mismatch: a gradient is missing or wrong, or its shape or dtype is not that of its tensor.
    """
    p = case.problem
    inputs = make_tucker_inputs(case, seed)
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs.tensors]
    present = [(name, leaf) for name, leaf in zip(NAMES, leaves, strict=True) if leaf is not None]
    with compare.full_float32(tf32):
        out = candidate(*leaves[:5], residual=leaves[5], **case.arguments())
        compare._form(case, inputs, out)
        if not out.requires_grad:
            raise Mismatch(f"{case}: the result has no gradient although all tensors require one")
        generator = torch.Generator().manual_seed(seed + 1)
        grad_output = torch.randn(out.shape, generator=generator).to(p.dtype).to(p.device)
        got = torch.autograd.grad(out, [leaf for _, leaf in present], grad_output, allow_unused=True)
        compare._untouched(case, inputs)
        bounds = tucker_conv2d_bounds.backward_bound(p, grad_output, out.detach(), *inputs.tensors[:4], tf32)
        beside = _plain_gradients(case, inputs, grad_output, out.detach())
    for (name, leaf), gradient in zip(present, got, strict=True):
        head = f"{case}: gradient of {name}"
        if gradient is None:
            raise Mismatch(f"{head} is missing")
        if gradient.shape != leaf.shape or gradient.dtype != leaf.dtype:
            raise Mismatch(
                f"{head} must be {leaf.dtype} {list(leaf.shape)}, got {gradient.dtype} {list(gradient.shape)}"
            )
        error = compare._elements(head, gradient, bounds[name].expected, bounds[name].allowed, "abcd"[: gradient.dim()])
        if not tf32:
            plain_error = (beside[name].double() - bounds[name].expected).abs()
            compare._beside_plain(head, p.dtype, error, plain_error, bounds[name])


def _plain_gradients(case: TuckerCase, inputs: TuckerInputs, grad_output: Tensor, output: Tensor) -> dict[str, Tensor]:
    """PyTorch's own gradients of the three convolutions, with the activation's slope of ``output``."""
    live = torch.ones_like(output, dtype=torch.bool) if case.problem.activation is None else output > 0
    if case.problem.activation == "relu6":
        live &= output < 6
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs.tensors]
    out = plain_tucker(case.at(activation=None), tuple(leaves))  # type: ignore[arg-type]
    present = {name: leaf for name, leaf in zip(NAMES, leaves, strict=True) if leaf is not None}
    return dict(zip(present, torch.autograd.grad(out, list(present.values()), grad_output * live), strict=True))
