"""Tensors of a case: seeded values, the asked strides, and a sentinel in every element around and between them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Protocol

import torch
from torch import Tensor

from basisconv_kernels.testing.cases import Case

GUARD = 64  # elements before and after each tensor: the widest vector load of any dtype

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_SIGNIFICANT_BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 53}


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, so that NaN equals NaN and −0 differs from 0."""
    return tensor.view(_BITS[tensor.element_size()])


class AnyInputs(Protocol):
    """What the comparison needs of the tensors of a call, whatever the op."""

    @property
    def input(self) -> Tensor:
        """The feature maps."""

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors, the feature maps first."""

    def changed(self) -> list[str]:
        """What a kernel wrote to."""


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call, with what is needed to prove that nobody wrote to them or beside them."""

    case: Case
    input: Tensor
    basis_weight: Tensor
    coefficients: Tensor
    bias: Tensor | None
    residual: Tensor | None
    _storages: dict[str, tuple[Tensor, Tensor]] = field(repr=False, default_factory=dict)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """``(input, basis_weight, coefficients, bias, residual)``."""
        return self.input, self.basis_weight, self.coefficients, self.bias, self.residual

    def changed(self) -> list[str]:
        """What a kernel wrote to: tensors, or the sentinels around them."""
        found = []
        for name, (now, before) in self._storages.items():
            if not torch.equal(bits(now), bits(before)):
                at = int((bits(now) != bits(before)).nonzero()[0])
                beside = bool(torch.isnan(before[at]))
                found.append(f"{'memory beside ' if beside else ''}{name} (storage element {at} of {len(now)})")
        return found


def _strides(case: Case, shape: Sequence[int], channels_last: bool) -> tuple[int, ...]:
    """Element strides of a tensor of this shape in the case's view."""
    gaps = case.view == "sliced"
    if len(shape) == 1:
        return (2 if gaps else 1,)
    if len(shape) == 2:
        k, q = shape
        return {"sliced": (q + 3, 1), "transposed": (1, k)}.get(case.view, (q, 1))
    order: tuple[int, ...] = (1, 3, 2) if channels_last else (3, 2, 1)  # fastest first, the batch comes last
    if case.view == "transposed":
        order = (2, 3, 1)
    strides = [0, 0, 0, 0]
    pitch = 2 if gaps and not channels_last else 1
    for dim in order:
        strides[dim] = pitch
        pitch *= shape[dim] + (dim if gaps else 0)
    strides[0] = pitch
    return tuple(strides)


def _place(values: Tensor, strides: tuple[int, ...], start: int) -> tuple[Tensor, Tensor]:
    """Copy values into NaN-filled memory at these strides; returns the view and the whole storage."""
    span = 0 if values.numel() == 0 else 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True))
    storage = torch.full((start + span + GUARD,), torch.nan, dtype=values.dtype, device=values.device)
    view = storage.as_strided(values.shape, strides, start)
    (view[:1] if strides[0] == 0 else view).copy_(values[:1] if strides[0] == 0 else values)
    return view, storage


def _shapes(case: Case) -> dict[str, tuple[int, ...]]:
    p = case.problem
    shapes: dict[str, tuple[int, ...]] = {
        "input": (p.N, p.C, p.H, p.W),
        "basis_weight": (p.Q, p.C // p.groups, p.R, p.S),
        "coefficients": (p.K, p.mixed),
    }
    if p.bias:
        shapes["bias"] = (p.K,)
    if p.residual:
        shapes["residual"] = (p.N, p.K, *p.output_size)
    return shapes


def _random(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """Normal values: unit basis maps and outputs; four times as much under relu6, so that it clips on both sides."""
    p = case.problem
    scale = {"basis_weight": 1 / sqrt(p.taps), "coefficients": 1 / sqrt(p.mixed)}
    loud = 4.0 if p.activation == "relu6" else 1.0
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) * scale.get(name, loud)
        for name, shape in _shapes(case).items()
    }


def grid_unit(case: Case) -> float:
    """What the whole numbers of ``values="grid"`` are multiples of: small under relu6, so that not all results clip."""
    p = case.problem
    return 4.0 / 2 ** min(_SIGNIFICANT_BITS[p.dtype], 11) if p.activation == "relu6" else 1.0


def _on_grid(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """Whole numbers, times one power of two: every sum is exact in float32 in any order, basis maps need rounding.

    The amplitudes make a typical basis map 2^bits large, so about every third must be rounded to the dtype.
    """
    p = case.problem
    wide = 2 ** min(_SIGNIFICANT_BITS[p.dtype], 11)
    amplitude = max(1, round(sqrt(3 * wide / sqrt(p.taps))))
    largest = {"input": amplitude, "basis_weight": amplitude, "coefficients": 1}
    unit = grid_unit(case)
    units = {"basis_weight": 1.0, "coefficients": 1.0}
    values = {}
    for name, shape in _shapes(case).items():
        a = largest.get(name, wide // 2)
        values[name] = torch.randint(-a, a + 1, shape, generator=generator).double() * units.get(name, unit)
    return values


def make_inputs(case: Case, seed: int = 0, *, values: str = "random") -> Inputs:
    """The tensors of a case, the same for the same seed on every device.

    Args:
        case: what to make.
        seed (int): of the values.
        values (str): ``"random"``, normal and well scaled, or ``"grid"``, whole numbers for which float32 is exact.

    Returns:
        Inputs: tensors with the strides of ``case.view``, NaN in all memory around and between their elements.
    """
    p = case.problem
    generator = torch.Generator().manual_seed(seed)
    made = (_on_grid if values == "grid" else _random)(case, generator)
    tensors: dict[str, Tensor | None] = {"bias": None, "residual": None}
    storages = {}
    start = GUARD + (1 if case.view == "offset" else 0)
    for name, exact in made.items():
        other = name == "residual" and case.view == "mixed"
        strides = _strides(case, exact.shape, p.channels_last != other)
        if case.view == "expanded" and name == "input":
            strides = (0, *strides[1:])
        view, storage = _place(exact.to(p.dtype).to(p.device), strides, start)
        tensors[name] = view
        storages[name] = (storage, storage.clone())
    return Inputs(case, **tensors, _storages=storages)  # type: ignore[arg-type]


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fill what ``torch.empty`` returns with NaN (integers: the largest value), so that unwritten elements show.

    PyTorch itself does the filling in its deterministic mode, inside native ops too.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]
