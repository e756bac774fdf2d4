"""What must pass on a GPU before ``binary_conv2d`` chooses a backend there by itself; see ``core.selfcheck``."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import torch

from basisconv_kernels.core.packed import words_for
from basisconv_kernels.core.problem import dtype_name
from basisconv_kernels.core.selfcheck import Check
from basisconv_kernels.reference.binary_conv2d_problem import BinaryConv2dProblem

PIXELS_A_CORE = 256  # two tiles of the larger kind
FILTERS = 64  # in a tile


def cuda(problem: BinaryConv2dProblem) -> Check:
    """The variant of the CUDA kernels: what decides template, plan and the way in which pixels are fetched.

    Outputs are no variants: each check runs all of them.
    """
    C, K = problem.C // problem.groups, problem.K // problem.groups
    kind = f"{problem.planes}-bit codes" if problem.unsigned else "packed signs" if problem.planes else "signs"
    words = [
        f"binary_conv2d cuda {kind} {dtype_name(problem.dtype)}",
        "channels_last" if problem.channels_last else "NCHW",
        f"{problem.R}×{problem.S} stride {problem.stride[0]},{problem.stride[1]}",
        *([f"dilation {problem.dilation[0]},{problem.dilation[1]}"] if problem.dilation != (1, 1) else []),
        f"words {words_for(C)}" + (" whole" if C % 32 == 0 else ""),
        f"K≤{max(16, 1 << (K - 1).bit_length())} aligned to {min(K & -K, 8)}",
        *(["groups"] if problem.groups > 1 else []),
    ]
    return Check(" ".join(words), functools.partial(against_reference, "cuda", problem))


def triton(problem: BinaryConv2dProblem) -> Check:
    """The variant of the Triton kernels: popcounts of packed input, products of matrix instructions of real one."""
    kind = f"{problem.planes}-bit codes" if problem.unsigned else "packed signs" if problem.planes else "signs"
    words = [f"binary_conv2d triton {kind} {dtype_name(problem.dtype)}", *triton_words(problem)]
    return Check(" ".join(words), functools.partial(against_reference, "triton", problem))


def triton_words(problem: Any) -> list[str]:
    """What decides the code of a Triton kernel with filters of bits, beside its kind and dtype, and its geometry."""
    C, K = problem.C // problem.groups, problem.K // problem.groups
    return [
        "channels_last" if problem.channels_last else "NCHW",
        f"{problem.R}×{problem.S} stride {problem.stride[0]},{problem.stride[1]}",
        f"C≤{max(32, 1 << (C - 1).bit_length())} aligned to {min(C & -C, 64)}",
        f"K≤{max(16, 1 << (K - 1).bit_length())} aligned to {min(K & -K, 16)}",
        *(["groups"] if problem.groups > 1 else []),
    ]


def is_tf32(dtype: torch.dtype) -> bool:
    """Whether Triton's products of real numbers of a dtype use TF32 now: where cuDNN's convolutions would."""
    from basisconv_kernels.triton_kernels import configs

    return configs.arithmetic_of(dtype, False) == configs.TF32


def sizes(problem: Any) -> list[tuple[int, int, int]]:
    """N, H, W: odd, even, and pixels enough for the larger tile, of which each 64 filters make blocks of their own."""
    cores = torch.cuda.get_device_properties(None).multi_processor_count if torch.cuda.is_available() else 1
    blocks = problem.groups * math.ceil(problem.K // problem.groups / FILTERS)
    side = math.isqrt(PIXELS_A_CORE * cores // blocks) + 1
    down, right = ((n - 1) * d for n, d in zip((problem.R, problem.S), problem.dilation, strict=True))
    large = (1, side * problem.stride[0], side * problem.stride[1])
    return [(N, H + down, W + right) for N, H, W in ((2, 9, 13), (3, 8, 10), large)]


def against_reference(backend: str, problem: BinaryConv2dProblem) -> None:
    """Run the weights and the geometry of a problem at three sizes, with every output.

    Raises:
        AssertionError, RuntimeError, ...: a result is wrong, or the kernel does not compile or run.
    """
    from basisconv_kernels import testing
    from basisconv_kernels.ops.binary_conv2d import binary_conv2d

    kernel = functools.partial(binary_conv2d, backend=backend)
    for N, H, W in sizes(problem):
        size: dict[str, Any] = {"N": N, "H": H, "W": W}
        testing.check_binary(testing.BinaryCase("selfcheck", "before the first use", replace(problem, **size)), kernel)
