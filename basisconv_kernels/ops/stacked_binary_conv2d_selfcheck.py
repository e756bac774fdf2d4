"""What must pass on a GPU before ``stacked_binary_conv2d`` chooses a kernel there; see ``core.selfcheck``."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

from basisconv_kernels.core.problem import dtype_name
from basisconv_kernels.core.selfcheck import Check
from basisconv_kernels.ops import binary_conv2d_selfcheck as bits
from basisconv_kernels.ops import ternary_conv2d_selfcheck
from basisconv_kernels.reference.stacked_binary_conv2d_problem import StackedBinaryConv2dProblem
from basisconv_kernels.reference.ternary_conv2d_problem import TernaryConv2dProblem


def triton(problem: StackedBinaryConv2dProblem) -> Check:
    """The variant that Triton would compile for a problem."""
    kind = f"{problem.planes}-bit codes" if problem.mode == "codes" else problem.mode
    words = [
        f"stacked_binary_conv2d triton {'packed ' if problem.planes and problem.mode == 'signs' else ''}{kind}",
        dtype_name(problem.dtype),
        *(["TF32"] if problem.mode == "real" and bits.is_tf32(problem.dtype) else []),
        *([f"{problem.splits} splits of {math.gcd(problem.low, 32)} bits"] if problem.splits > 1 else []),
        *bits.triton_words(problem),
    ]
    return Check(" ".join(words), functools.partial(against_reference, "triton", problem))


def cuda(problem: StackedBinaryConv2dProblem) -> Check:
    """The variant of the CUDA kernel for real activations, that of ``ternary_conv2d`` with full filters."""
    p = problem
    full = TernaryConv2dProblem(C=p.C, K=p.K, R=p.R, S=p.S, stride=p.stride, dilation=p.dilation, dtype=p.dtype,
                                channels_last=p.channels_last)  # fmt: skip
    name = ternary_conv2d_selfcheck.cuda(full).variant.replace("ternary", "stacked_binary", 1)
    return Check(name, functools.partial(against_reference, "cuda", problem))


def against_reference(backend: str, problem: StackedBinaryConv2dProblem) -> None:
    """Run the weights and the geometry of a problem at three sizes, each with another epilogue.

    Raises:
        AssertionError, RuntimeError, ...: a result is wrong, or the kernel does not compile or run.
    """
    from basisconv_kernels import testing
    from basisconv_kernels.ops.stacked_binary_conv2d import stacked_binary_conv2d

    kernel = functools.partial(stacked_binary_conv2d, backend=backend)
    tf32 = problem.mode == "real" and bits.is_tf32(problem.dtype)
    for (N, H, W), activation in zip(bits.sizes(problem), ("relu6", "relu", None), strict=True):
        size: dict[str, Any] = {"N": N, "H": H, "W": W, "activation": activation}
        problem = replace(problem, **size, bias=activation != "relu", scale=activation is not None)
        testing.check_stacked(testing.StackedCase("selfcheck", "before the first use", problem), kernel, tf32=tf32)
