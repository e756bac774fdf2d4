"""What must pass on a GPU before ``ternary_conv2d`` chooses a kernel there; see ``core.selfcheck``."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

from basisconv_kernels.core.problem import dtype_name
from basisconv_kernels.core.selfcheck import Check
from basisconv_kernels.ops import binary_conv2d_selfcheck as bits
from basisconv_kernels.reference.ternary_conv2d_problem import TernaryConv2dProblem


def triton(problem: TernaryConv2dProblem) -> Check:
    """The variant that Triton would compile for a problem."""
    words = [
        f"ternary_conv2d triton {dtype_name(problem.dtype)}",
        *(["TF32"] if bits.is_tf32(problem.dtype) else []),
        *(["two scales"] if problem.scales == "two" else []),
        *bits.triton_words(problem),
    ]
    return Check(" ".join(words), functools.partial(against_reference, "triton", problem))


def cuda(problem: TernaryConv2dProblem) -> Check:
    """The variant of the CUDA kernel: what decides template, plan and tails."""
    words = [
        f"ternary_conv2d cuda {dtype_name(problem.dtype)}",
        "channels_last" if problem.channels_last else "NCHW",
        f"{problem.R}×{problem.S} stride {problem.stride[0]},{problem.stride[1]}",
        *([f"dilation {problem.dilation[0]},{problem.dilation[1]}"] if problem.dilation != (1, 1) else []),
        f"slabs {math.ceil(problem.C / 64)}" + (" whole" if problem.C % 64 == 0 else ""),
        f"K≤{max(64, 1 << (problem.K - 1).bit_length())} aligned to {min(problem.K & -problem.K, 8)}",
    ]
    return Check(" ".join(words), functools.partial(against_reference, "cuda", problem))


def against_reference(backend: str, problem: TernaryConv2dProblem) -> None:
    """Run the weights and the geometry of a problem at three sizes, each with another epilogue.

    Raises:
        AssertionError, RuntimeError, ...: a result is wrong, or the kernel does not compile or run.
    """
    from basisconv_kernels.ops.ternary_conv2d import ternary_conv2d
    from basisconv_kernels.testing import ternary_conv2d as testing

    kernel = functools.partial(ternary_conv2d, backend=backend)
    tf32 = bits.is_tf32(problem.dtype)
    for (N, H, W), activation in zip(bits.sizes(problem), ("relu6", "relu", None), strict=True):
        size: dict[str, Any] = {"N": N, "H": H, "W": W, "activation": activation}
        problem = replace(problem, **size, bias=activation != "relu")
        testing.check(testing.TernaryCase("selfcheck", "before the first use", problem), kernel, tf32=tf32)
