"""The backends of ``basis_conv2d`` in order of preference, and what a call of one is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from basisconv_kernels.core import registry
from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.registry import Candidate
from basisconv_kernels.ops import basis_conv2d_native as native
from basisconv_kernels.ops import basis_conv2d_triton as triton
from basisconv_kernels.ops import basis_conv2d_unfused as unfused
from basisconv_kernels.reference import basis_conv2d as reference


class Settings(NamedTuple):
    """The arguments of a call that are no tensors, in normal form; ``backend`` is the one chosen."""

    stride: Pair
    padding: Quad
    dilation: Pair
    groups: int
    activation: str | None
    precise: bool
    backend: str


CANDIDATES = (
    Candidate("cpu", "basisconv_kernels.ops.basis_conv2d_native:forward", native.cpu_supports),
    Candidate(
        "cuda",
        "basisconv_kernels.ops.basis_conv2d_native:forward",
        native.cuda_supports,
        check="basisconv_kernels.ops.basis_conv2d_selfcheck:cuda",
    ),
    Candidate(
        "triton",
        "basisconv_kernels.ops.basis_conv2d_triton:forward",
        triton.supports,
        backward="basisconv_kernels.ops.basis_conv2d_triton:backward",
        check="basisconv_kernels.ops.basis_conv2d_selfcheck:triton",
    ),
    Candidate("reference", "basisconv_kernels.ops.basis_conv2d_unfused:forward", unfused.supports),
)


_targets: dict[str, tuple[Callable[..., tuple[Tensor, Tensor | None]], Callable[..., reference.Gradients]]] = {}


def targets_of(backend: str) -> tuple[Callable[..., tuple[Tensor, Tensor | None]], Callable[..., reference.Gradients]]:
    """The functions of a backend, forward and backward."""
    found = _targets.get(backend)
    if found is None:
        candidate = next(c for c in CANDIDATES if c.name == backend)
        backward = reference.backward if candidate.backward is None else registry.load(candidate.backward)
        found = _targets[backend] = registry.resolve(candidate), backward
    return found
