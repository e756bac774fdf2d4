"""What must pass on a GPU before ``tucker_conv2d`` chooses a backend there by itself; see ``core.selfcheck``."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from basisconv_kernels.core.problem import TuckerConv2dProblem
from basisconv_kernels.core.selfcheck import Check
from basisconv_kernels.ops import basis_conv2d_selfcheck as basis
from basisconv_kernels.ops import tucker_conv2d_model as model

OP = "tucker_conv2d"


def triton(problem: TuckerConv2dProblem) -> Check:
    """The variant of the basis kernel behind the first 1×1, or of the chain in one pass."""
    inner = basis.triton(model.last_two_stages(problem)).variant.replace("basis_conv2d", "tucker_conv2d", 1)
    words = f"{inner} in one pass C≤{max(16, 1 << (problem.C - 1).bit_length())}"
    variant = words if model.one_pass_pays(problem) else inner
    return Check(variant, functools.partial(against_reference, "triton", problem))


def cuda(problem: TuckerConv2dProblem) -> Check:
    """The variant of the basis kernel behind the first 1×1."""
    variant = basis.cuda(model.last_two_stages(problem)).variant.replace("basis_conv2d", "tucker_conv2d", 1)
    return Check(variant, functools.partial(against_reference, "cuda", problem))


def cuda_one_pass(problem: TuckerConv2dProblem) -> Check:
    """The variant of the kernel of the whole chain: its ranks, and what the channels of the input are read by."""
    inner = basis.cuda(model.last_two_stages(problem)).variant.replace("basis_conv2d cuda", f"{OP} cuda_one_pass", 1)
    variant = f"{inner} of channels aligned to {min(problem.C & -problem.C, 8)}"
    return Check(variant, functools.partial(against_reference, "cuda_one_pass", problem))


def against_reference(backend: str, problem: TuckerConv2dProblem) -> None:
    """Run the weights and the geometry of a problem at three sizes, each with another epilogue; once the gradients.

    Raises:
        AssertionError, RuntimeError, ...: a result is wrong, or the kernel does not compile or run.
    """
    from basisconv_kernels import testing
    from basisconv_kernels.ops.tucker_conv2d import tucker_conv2d

    kernel = functools.partial(tucker_conv2d, backend=backend)
    tf32 = basis._is_tf32(problem)
    for (N, H, W), activation in zip(basis.sizes(problem), ("relu6", "relu", None), strict=True):
        size: dict[str, Any] = {"N": N, "H": H, "W": W, "activation": activation}
        problem = replace(problem, **size, bias=activation != "relu", residual=activation is not None)
        case = testing.TuckerCase("selfcheck", "before the first use", problem)
        testing.check_tucker(case, kernel, tf32=tf32)
        if activation == "relu6":
            testing.check_tucker_gradients(case, kernel, tf32=tf32)
