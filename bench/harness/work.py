"""The work model: operations and bytes that each form of a problem needs, and the time no machine can beat.

Symbols as in docs/notation.md. One multiply-accumulate is 2 FLOP. Bytes are compulsory traffic: every tensor that
exists outside a kernel is read or written once; caches smaller than that are not modelled. Taps outside the image are
counted, so an engine that skips them, or that uses Winograd's arithmetic, can pass 100 % of this roofline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from basisconv_kernels.core.problem import Conv2dProblem
from bench.harness.case import Form


@dataclass(frozen=True)
class Stage:
    """One kernel: floating-point operations and bytes moved."""

    flops: int
    bytes: int

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """The roofline: the longer of computing and moving, perfectly overlapped."""
        return max(self.flops / flops_per_s, self.bytes / bytes_per_s)


@dataclass(frozen=True)
class Work:
    """The kernels of one call, run one after the other."""

    stages: tuple[Stage, ...]

    @property
    def flops(self) -> int:
        """Operations of all stages."""
        return sum(stage.flops for stage in self.stages)

    @property
    def bytes(self) -> int:
        """Bytes of all stages."""
        return sum(stage.bytes for stage in self.stages)

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Sum of the stages' rooflines: two kernels cannot overlap each other."""
        return sum(stage.seconds(flops_per_s, bytes_per_s) for stage in self.stages)


@dataclass(frozen=True)
class Tensors:
    """Bytes of every tensor of a problem; ``maps`` is Z [N, Q, OH, OW]."""

    input: int
    maps: int
    output: int
    epilogue: int
    basis_weight: int
    coefficients: int
    dense_weight: int


def tensors(problem: Conv2dProblem) -> Tensors:
    """Bytes of the tensors; ``epilogue`` is bias and residual."""
    item = problem.dtype.itemsize
    OH, OW = problem.output_size
    pixels = problem.N * OH * OW
    output = pixels * problem.K
    return Tensors(
        input=item * problem.N * problem.C * problem.H * problem.W,
        maps=item * pixels * problem.Q,
        output=item * output,
        epilogue=item * ((problem.K if problem.bias else 0) + (output if problem.residual else 0)),
        basis_weight=item * problem.Q * problem.taps,
        coefficients=item * problem.K * problem.mixed,
        dense_weight=item * problem.K * problem.taps,
    )


def work(problem: Conv2dProblem, form: Form) -> Work:
    """Work of one forward call.

    ::

        dense     N·OH·OW·K·D multiply-accumulates;            input, W, output
        two_step  N·OH·OW·(Q·D) then N·OH·OW·(K·Q);            input, F, Z written; Z read, A, output
        fused     N·OH·OW·(Q·D + K·Q), one kernel;             input, F, A, output: Z is never moved
    """
    size = tensors(problem)
    OH, OW = problem.output_size
    pixels = problem.N * OH * OW
    basis = 2 * pixels * problem.Q * problem.taps
    mixing = 2 * pixels * problem.K * problem.mixed
    if form == "dense":
        dense = 2 * pixels * problem.K * problem.taps
        return Work((Stage(dense, size.input + size.dense_weight + size.epilogue + size.output),))
    if form == "two_step":
        first = Stage(basis, size.input + size.basis_weight + size.maps)
        return Work((first, Stage(mixing, size.maps + size.coefficients + size.epilogue + size.output)))
    moved = size.input + size.basis_weight + size.coefficients + size.epilogue + size.output
    return Work((Stage(basis + mixing, moved),))


def linear_work(batch: int, inputs: int, outputs: int, item: int = 4) -> Work:
    """Work of a linear layer with bias, ``item`` bytes an element."""
    moved = item * (batch * inputs + inputs * outputs + outputs + batch * outputs)
    return Work((Stage(2 * batch * inputs * outputs, moved),))


def add(works: Sequence[Work]) -> Work:
    """Kernels of several calls, one after the other."""
    return Work(tuple(stage for work in works for stage in work.stages))


def im2col_bytes(problem: Conv2dProblem) -> int:
    """Size of the unfolded input [N·OH·OW, R·S·C/G·G] that a matrix-product convolution would write."""
    OH, OW = problem.output_size
    return problem.dtype.itemsize * problem.N * OH * OW * problem.R * problem.S * problem.C
