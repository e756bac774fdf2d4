"""What must pass on a GPU before ``basis_conv2d`` chooses a backend there by itself; see ``core.selfcheck``."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import torch

from basisconv_kernels.core.problem import Conv2dProblem, dtype_name
from basisconv_kernels.core.selfcheck import Check

PIXELS_A_CORE = 256  # two tiles of the largest kind


def triton(problem: Conv2dProblem) -> Check:
    """The variant that Triton would compile for a problem: its dtype, tile and path."""
    from basisconv_kernels.triton_kernels import configs

    arithmetic = configs.arithmetic_of(problem.dtype, problem.precise)
    Q, C = problem.Q // problem.groups, problem.C // problem.groups
    K = problem.K // problem.groups if problem.compact else problem.K
    tile, split = configs.pointer_tile(arithmetic, Q, C, K, 1, configs.HOPPER)
    words = [
        f"basis_conv2d triton {dtype_name(problem.dtype)}",
        *(["precise"] if problem.precise else ["TF32"] if arithmetic == configs.TF32 else []),
        f"{problem.R}×{problem.S} stride {problem.stride[0]},{problem.stride[1]}",
        f"C≤{configs.power_of_two(C)}" if C <= tile.BK else "C>64",
        f"aligned to {min(C & -C, 64)}",
        f"Q≤{configs.power_of_two(Q)} K≤{configs.power_of_two(K)}",
        *(["in parts"] if split or problem.groups > 1 else []),
        *(["compact"] if problem.compact else []),
    ]
    return Check(" ".join(words), functools.partial(against_reference, "triton", problem))


def cuda(problem: Conv2dProblem) -> Check:
    """The variant of the CUDA kernels: dtype, weights and geometry, which decide template and plan, and the layout.

    The kernel for compute capability 9.0 takes channels_last alone, so the two layouts run different code.
    """
    Q, C = problem.Q // problem.groups, problem.C // problem.groups
    K = problem.K // problem.groups
    words = [
        f"basis_conv2d cuda {dtype_name(problem.dtype)}",
        *(["precise"] if problem.precise else []),
        "channels_last" if problem.channels_last else "NCHW",
        f"{problem.R}×{problem.S} stride {problem.stride[0]},{problem.stride[1]}",
        *([f"dilation {problem.dilation[0]},{problem.dilation[1]}"] if problem.dilation != (1, 1) else []),
        f"C≤{_power_of_two(C)} aligned to {min(C & -C, 8)}",
        f"Q≤{_power_of_two(Q)} K≤{_power_of_two(K)}",
        *(["compact"] if problem.groups > 1 else []),
    ]
    return Check(" ".join(words), functools.partial(against_reference, "cuda", problem))


def sizes(problem: Conv2dProblem) -> list[tuple[int, int, int]]:
    """N, H, W: odd; even, which alone take the descriptor path at stride 2; pixels enough for the largest tile."""
    cores = torch.cuda.get_device_properties(None).multi_processor_count if torch.cuda.is_available() else 1
    side = math.isqrt(PIXELS_A_CORE * cores) + 1
    down, right = ((n - 1) * d // 2 * 2 for n, d in zip((problem.R, problem.S), problem.dilation, strict=True))
    large = (1, side * problem.stride[0] // 2 * 2, side * problem.stride[1] // 2 * 2)
    return [(N, H + down, W + right) for N, H, W in ((2, 9, 13), (3, 8, 10), large)]


def _is_tf32(problem: Conv2dProblem) -> bool:
    from basisconv_kernels.triton_kernels import configs

    return problem.dtype == torch.float32 and configs.arithmetic_of(problem.dtype, problem.precise) == configs.TF32


def _power_of_two(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def against_reference(backend: str, problem: Conv2dProblem) -> None:
    """Run the weights and the geometry of a problem at three sizes, each with another epilogue; once the gradients.

    Raises:
        AssertionError, RuntimeError, ...: a result is wrong, or the kernel does not compile or run.
    """
    from basisconv_kernels import testing
    from basisconv_kernels.ops.basis_conv2d import basis_conv2d

    kernel = functools.partial(basis_conv2d, backend=backend)
    tf32 = _is_tf32(problem)
    for (N, H, W), activation in zip(sizes(problem), ("relu6", "relu", None), strict=True):
        size: dict[str, Any] = {"N": N, "H": H, "W": W, "activation": activation}
        problem = replace(problem, **size, bias=activation != "relu", residual=activation is not None)
        case = testing.Case("selfcheck", "before the first use", problem)
        testing.check(case, kernel, tf32=tf32)
        if activation == "relu6":
            testing.check_gradients(case, kernel, tf32=tf32)
