"""One small call of every GPU kernel, for ``compute-sanitizer``: ``python -m bench.gpu.small NAME``.

Exit status 0 where the result is right, 3 where the call cannot run here (the last line says why).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

SIZES: dict[str, Any] = {"N": 2, "C": 24, "H": 9, "W": 11, "Q": 16, "K": 40, "padding": (1, 1, 1, 1)}
FLAGS: dict[str, Any] = {"channels_last": True, "bias": True, "residual": True, "activation": "relu"}


def _basis(backend: str, gradients: bool = False, **changes: Any) -> None:
    import torch

    from basisconv_kernels import basis_conv2d, testing
    from basisconv_kernels.core.problem import Conv2dProblem

    sizes = {**SIZES, **FLAGS, "dtype": torch.bfloat16, "device": "cuda", **changes}
    case = testing.Case("small", "", Conv2dProblem(**sizes))
    kernel = functools.partial(basis_conv2d, backend=backend)
    testing.check(case, kernel)
    if gradients:
        with torch.backends.cudnn.flags(enabled=False):  # with cuDNN the gradients are its own
            testing.check_gradients(case, kernel)


def _tucker(backend: str, **changes: Any) -> None:
    import torch

    from basisconv_kernels import testing, tucker_conv2d
    from basisconv_kernels.core.problem import TuckerConv2dProblem

    sizes = {**SIZES, **FLAGS, "dtype": torch.bfloat16, "device": "cuda", "rank_in": 16, **changes}
    case = testing.TuckerCase("small", "", TuckerConv2dProblem(**sizes))
    testing.check_tucker(case, functools.partial(tucker_conv2d, backend=backend))


def _bits(backend: str = "cuda", **changes: Any) -> None:
    import torch

    from basisconv_kernels import binary_conv2d, bitpack, testing
    from basisconv_kernels.reference.binary_conv2d_problem import BinaryConv2dProblem

    sizes = {**SIZES, "C": 70, "dtype": torch.bfloat16, "device": "cuda", "channels_last": True, **changes}
    sizes.pop("Q")
    case = testing.BinaryCase("small", "", BinaryConv2dProblem(**sizes))
    testing.check_binary(case, functools.partial(binary_conv2d, backend=backend))
    if not case.problem.planes:
        testing.check_pack(case, functools.partial(bitpack, backend=backend))


def _real_and_bits(backend: str, scales: str = "one", **changes: Any) -> None:
    import torch

    from basisconv_kernels import stacked_binary_conv2d, ternary_conv2d, testing
    from basisconv_kernels.reference.stacked_binary_conv2d_problem import StackedBinaryConv2dProblem
    from basisconv_kernels.reference.ternary_conv2d_problem import TernaryConv2dProblem
    from basisconv_kernels.testing import ternary_conv2d as ternary

    sizes = {**SIZES, "C": 72, "dtype": torch.bfloat16, "device": "cuda", "channels_last": True, **changes}
    sizes.pop("Q")
    case = ternary.TernaryCase("small", "", TernaryConv2dProblem(**sizes, scales=scales))
    ternary.check(case, functools.partial(ternary_conv2d, backend=backend))
    stacked = testing.StackedCase("small", "", StackedBinaryConv2dProblem(**sizes, n=7, splits=2))
    testing.check_stacked(stacked, functools.partial(stacked_binary_conv2d, backend=backend))


# The sm_90a kernels want channels_last; NCHW is what sends a call to sm_80's on any device.
CALLS: dict[str, Callable[[], None]] = {
    "cuda": functools.partial(_basis, "cuda"),
    "cuda_sm80": functools.partial(_basis, "cuda", channels_last=False),
    "cuda_strided": functools.partial(_basis, "cuda", stride=(2, 2), Q=33),
    "triton_descriptors": functools.partial(_basis, "triton"),
    "triton_pointers": functools.partial(_basis, "triton", C=20, stride=(2, 1)),
    "triton_gradients": functools.partial(_basis, "triton", gradients=True),
    "binary_cuda": functools.partial(_bits, C=60, K=60, groups=3, channels_last=False),
    "binary_cuda_pieces": functools.partial(_bits, C=256, K=64),
    "binary_cuda_pairs": functools.partial(_bits, C=64, K=72, planes=1),
    "binary_cuda_sm80": functools.partial(_bits, C=256, K=64, channels_last=False),
    "binary_cuda_codes_strided": functools.partial(_bits, K=16, planes=2, unsigned=True, stride=(5, 6)),
    "binary_triton": functools.partial(_bits, "triton", planes=1, C=60, K=60, groups=3),
    "bits_triton": functools.partial(_bits, "triton"),
    "ternary_and_stacked_triton": functools.partial(_real_and_bits, "triton", "two"),
    "ternary_and_stacked_cuda": functools.partial(_real_and_bits, "cuda"),
    "ternary_and_stacked_cuda_strided": functools.partial(_real_and_bits, "cuda", C=200, K=130, stride=(2, 1)),
    "tucker_cuda": functools.partial(_tucker, "cuda"),
    "tucker_cuda_one_pass": functools.partial(_tucker, "cuda_one_pass"),
    "tucker_cuda_one_pass_strided": functools.partial(_tucker, "cuda_one_pass", C=19, Q=100, stride=(2, 2)),
    "tucker_triton": functools.partial(_tucker, "triton"),
}


def main(name: str) -> int:
    """Run one call."""
    from basisconv_kernels import BackendUnavailable
    from bench.gpu import facts

    if (missing := facts.no_device()) is not None:
        print(missing)
        return 3
    try:
        CALLS[name]()
    except BackendUnavailable as reason:
        print(str(reason).replace("\n", " "))
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
