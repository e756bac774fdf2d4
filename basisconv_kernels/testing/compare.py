"""A candidate against the oracle: every element, dtype and memory format, untouched inputs, the same bits twice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from basisconv_kernels.core.problem import Conv2dProblem
from basisconv_kernels.reference import basis_conv2d as reference
from basisconv_kernels.testing import tolerances
from basisconv_kernels.testing.candidates import Kernel
from basisconv_kernels.testing.cases import Case
from basisconv_kernels.testing.inputs import AnyInputs, Inputs, bits, grid_unit, make_inputs, poisoned_allocations


class Mismatch(AssertionError):
    """A candidate broke the contract of the op; the message says where and by how much."""


@dataclass(frozen=True)
class Report:
    """How far a candidate that passed was from the oracle.

    Attributes:
        case: what was run.
        max_error: largest distance to the float64 oracle.
        plain_error: that of two plain PyTorch convolutions at the same dtype.
        share: largest error over what rule 1 of ``tolerances`` allows there, at most 1.
    """

    case: Case
    max_error: float
    plain_error: float
    share: float


def plain(case: Case, tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]) -> Tensor:
    """The op as two convolutions, an addition and an activation of PyTorch, all at the dtype of the tensors."""
    p = case.problem
    input, basis_weight, coefficients, bias, residual = tensors
    top, bottom, left, right = p.padding
    padded = F.pad(input, (left, right, top, bottom))
    maps = F.conv2d(padded, basis_weight, None, p.stride, 0, p.dilation, p.groups)
    out = F.conv2d(maps, coefficients[:, :, None, None], bias, groups=p.groups if p.compact else 1)
    out = out if residual is None else out + residual
    if p.activation is not None:
        out = F.relu(out) if p.activation == "relu" else F.relu6(out)
    return out


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 in this block: an oracle, and a candidate that is compared with one, must not lose digits unasked."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def _call(candidate: Kernel, inputs: Inputs) -> Tensor:
    input, basis_weight, coefficients, bias, residual = inputs.tensors
    return candidate(input, basis_weight, coefficients, bias, residual=residual, **inputs.case.arguments())


def _form(case: Case, inputs: AnyInputs, got: Tensor) -> None:
    """Type, shape, dtype, device and memory format of a result."""
    p = case.problem
    if not isinstance(got, Tensor):
        raise Mismatch(f"{case}: the result must be a Tensor, got {type(got).__name__}")
    shape = (p.N, p.K, *p.output_size)
    for what, expected, found in (
        ("shape", shape, tuple(got.shape)),
        ("dtype", p.dtype, got.dtype),
        ("device", inputs.input.device, got.device),
    ):
        if found != expected:
            raise Mismatch(f"{case}: the result must have {what} {expected}, got {found}")
    layout = reference.memory_format(inputs.input)
    ideal = torch.empty(shape, memory_format=layout)  # one channel, or one pixel: the strides must state the layout too
    stated = reference.memory_format(got) == reference.memory_format(ideal)
    if not (stated and got.is_contiguous(memory_format=layout)):
        raise Mismatch(f"{case}: the result must be dense in {layout}, got strides {got.stride()} of shape {shape}")


def _untouched(case: Case, inputs: AnyInputs) -> None:
    changed = inputs.changed()
    if changed:
        raise Mismatch(f"{case}: the kernel wrote to {', '.join(changed)}")


def _own_memory(case: Case, inputs: AnyInputs, got: Tensor, again: Tensor) -> None:
    others = {"an input": [t for t in inputs.tensors if t is not None], "an earlier result": [got]}
    for what, tensors in others.items():
        if any(_storage(tensor) == _storage(again) for tensor in tensors if again.numel()):
            raise Mismatch(f"{case}: the result lies in the memory of {what}")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _same_bits(case: Case, what: str, first: Tensor, second: Tensor) -> None:
    if not torch.equal(bits(first), bits(second)):
        at = _where(bits(first) != bits(second))
        raise Mismatch(f"{case}: {what} differ first at {_name(at)}: {first[at].item()!r} and {second[at].item()!r}")


def _where(wrong: Tensor) -> tuple[int, ...]:
    return tuple(wrong.nonzero()[0].tolist())


def _name(at: tuple[int, ...], letters: str = "nkyx") -> str:
    return "[" + ", ".join(f"{letter}={i}" for letter, i in zip(letters, at, strict=True)) + "]"


def _elements(head: str, got: Tensor, expected: Tensor, allowed: Tensor, letters: str = "nkyx") -> Tensor:
    """Compare every element; returns the errors. A NaN or an infinity where the oracle has none is a mismatch."""
    error = (got.double() - expected).abs()
    error[got.isinf() & (got == expected.to(got.dtype))] = 0.0  # both left the range of the dtype on the same side
    wrong = ~(error <= allowed)
    if wrong.any():
        at = _where(wrong)
        raise Mismatch(
            f"{head}: first mismatch at {_name(at, letters)}: got {got[at].item():.9g}, expected "
            f"{expected[at].item():.9g} ± {allowed[at].item():.3g}; {int(wrong.sum())} of {wrong.numel()} are wrong"
        )
    return error


def _beside_plain(head: str, dtype: torch.dtype, error: Tensor, plain_error: Tensor, bound: tolerances.Bound) -> None:
    """Rule 2 of ``tolerances``."""
    if not error.numel():
        return
    worst, mean = tolerances.allowed_beside_plain(plain_error, bound, dtype)
    for what, found, beside, limit in (
        ("largest", error.max().item(), plain_error.max().item(), worst),
        ("root mean square", tolerances.mean_square(error), tolerances.mean_square(plain_error), mean),
    ):
        if found > limit:
            raise Mismatch(f"{head}: {what} error {found:.3g}, of plain PyTorch {beside:.3g}; {limit:.3g} is allowed")


def check(case: Case, candidate: Kernel, *, seed: int = 0) -> Report:
    """Run a kernel on a case and compare all of its contract; see the package's docstring for what that is.

    Args:
        case (Case): the problem; ``case.at(dtype=…, device=…)`` varies it.
        candidate (Callable): takes ``(input, basis_weight, coefficients, bias, *, stride, padding, dilation, groups,
            activation, residual, precise)`` and returns the result.
        seed (int): of the values.

    Returns:
        Report: the errors of a candidate that passed.

    Raises:
        Mismatch: an AssertionError that names the first thing that is wrong.
    """
    inputs = make_inputs(case, seed)
    on_grid = make_inputs(case, seed, values="grid")
    with torch.no_grad(), full_float32():
        with poisoned_allocations():
            got = _call(candidate, inputs)
            _form(case, inputs, got)
            first = got.clone()
            again = _call(candidate, inputs)
        _untouched(case, inputs)
        _own_memory(case, inputs, got, again)
        bound = tolerances.forward_bound(case.problem, *inputs.tensors)
        error = _elements(str(case), first, bound.expected, bound.allowed)
        plain_error = (plain(case, inputs.tensors).double() - bound.expected).abs()
        _beside_plain(str(case), case.problem.dtype, error, plain_error, bound)
        _same_bits(case, "the results of two runs", first, again)
        if not tolerances.winograd_allowed(case.problem) and _exact_in_float32(on_grid):
            check_rounding(case, candidate, seed=seed)
    if not error.numel():
        return Report(case, 0.0, 0.0, 0.0)
    return Report(case, error.max().item(), plain_error.max().item(), (error / bound.allowed).max().item())


def check_rounding(case: Case, candidate: Kernel, *, seed: int = 0) -> None:
    """Compare bit for bit on values for which the contract leaves no freedom.

    On whole numbers float32 sums are exact in any order, so only the roundings that the contract names remain: for
    16-bit dtypes one of the basis maps (none if ``precise``) and one of the result. ``check`` includes this, except
    where the contract allows Winograd arithmetic.

    Raises:
        Mismatch: a rounding too many, one too few, or a wrong value.
    """
    inputs = make_inputs(case, seed, values="grid")
    if not _exact_in_float32(inputs):
        raise ValueError(f"check_rounding: {case} has sums too long to be exact in float32; use a smaller case")
    exact = tuple(None if t is None else t.double() for t in inputs.tensors)
    expected = _rounded_once(case.problem, *exact)  # type: ignore[arg-type]
    with torch.no_grad(), poisoned_allocations():
        got = _call(candidate, inputs)
    _elements(f"{case} on whole numbers", got, expected.double(), torch.zeros_like(expected, dtype=torch.float64))
    _untouched(case, inputs)


def _exact_in_float32(inputs: Inputs) -> bool:
    """Whether no partial sum of grid values can need more than the 24 bits of a float32, in whatever order."""
    p = inputs.case.problem
    x, f, a, b, r = (None if t is None else t.double().abs() for t in inputs.tensors)
    sums = reference.forward(x, f, a, b, r, p.stride, p.padding, p.dilation, p.groups, None, True)  # type: ignore[arg-type]
    return not sums.numel() or sums.max().item() < grid_unit(inputs.case) / tolerances.UNIT_ROUNDOFF[torch.float32]


def _rounded_once(
    p: Conv2dProblem,
    input: Tensor,
    basis_weight: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """The rounding contract in float64 arithmetic that is exact on whole numbers."""
    maps = reference.basis_maps(input, basis_weight, p.stride, p.padding, p.dilation, p.groups)
    if not p.precise:
        maps = maps.to(p.dtype).double()
    out = F.conv2d(maps, coefficients[:, :, None, None], bias, groups=p.groups if p.compact else 1)
    out = out if residual is None else out + residual
    if p.activation is not None:
        out = out.clamp(min=0.0, max=6.0 if p.activation == "relu6" else None)
    return out.to(p.dtype)


def check_gradients(case: Case, candidate: Kernel, *, seed: int = 0) -> None:
    """Compare the gradients of all tensors of a case with the explicit formulas in float64.

    The slope of the activation is read off the candidate's own result: near the kink it may lie on either side.

    Raises:
        Mismatch: a gradient is missing or wrong, or its shape or dtype is not that of its tensor.
    """
    p = case.problem
    inputs = make_inputs(case, seed)
    names = ("input", "basis_weight", "coefficients", "bias", "residual")
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs.tensors]
    present = [(name, leaf) for name, leaf in zip(names, leaves, strict=True) if leaf is not None]
    with full_float32():
        out = candidate(*leaves[:4], residual=leaves[4], **case.arguments())
        _form(case, inputs, out)
        if not out.requires_grad:
            raise Mismatch(f"{case}: the result has no gradient although all tensors require one")
        generator = torch.Generator().manual_seed(seed + 1)
        grad_output = torch.randn(out.shape, generator=generator).to(p.dtype).to(p.device)
        # Straight from the graph, so that nothing but the candidate's own backward shapes the gradients.
        got = torch.autograd.grad(out, [leaf for _, leaf in present], grad_output, allow_unused=True)
        _untouched(case, inputs)
        bounds = tolerances.backward_bound(p, grad_output, out.detach(), *inputs.tensors[:3])
        beside = _plain_gradients(case, inputs, grad_output, out.detach())
    for (name, leaf), gradient in zip(present, got, strict=True):
        head = f"{case}: gradient of {name}"
        if gradient is None:
            raise Mismatch(f"{head} is missing")
        if gradient.shape != leaf.shape or gradient.dtype != leaf.dtype:
            raise Mismatch(
                f"{head} must be {leaf.dtype} {list(leaf.shape)}, got {gradient.dtype} {list(gradient.shape)}"
            )
        bound = bounds[name]
        letters = {4: "abcd", 2: "kq", 1: "k"}[gradient.dim()] if name != "input" else "nchw"
        error = _elements(head, gradient, bound.expected, bound.allowed, letters)
        _beside_plain(head, p.dtype, error, (beside[name].double() - bound.expected).abs(), bound)


def _plain_gradients(case: Case, inputs: Inputs, grad_output: Tensor, output: Tensor) -> dict[str, Tensor]:
    """PyTorch's own gradients of the two convolutions, with the activation's slope of ``output``."""
    live = torch.ones_like(output, dtype=torch.bool)
    if case.problem.activation is not None:
        live = output > 0
    if case.problem.activation == "relu6":
        live &= output < 6
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs.tensors]
    out = plain(case.at(activation=None), tuple(leaves))  # type: ignore[arg-type]
    names = ("input", "basis_weight", "coefficients", "bias", "residual")
    present = {name: leaf for name, leaf in zip(names, leaves, strict=True) if leaf is not None}
    return dict(zip(present, torch.autograd.grad(out, list(present.values()), grad_output * live), strict=True))
