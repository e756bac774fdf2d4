"""The Triton backend of ``basis_conv2d``: what it can run, its torch op, and what torch must know about that.

Triton and the kernels are imported by the first call. Under ``TRITON_INTERPRET=1`` the kernels run on CPU tensors, to
test them without a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from basisconv_kernels.core import env
from basisconv_kernels.core.autograd import refuse_gradients
from basisconv_kernels.core.problem import Conv2dProblem, dtype_name
from basisconv_kernels.ops.basis_conv2d_native import fake_forward, flops

OP = "basis_conv2d"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (8, 0)  # compute capability: bfloat16 and TF32 matrix instructions
INTERPRETED = env.triton_interprets()


def supports(problem: Conv2dProblem) -> list[str]:
    """The reasons against a problem."""
    against = []
    device = "cpu" if INTERPRETED else "cuda"
    if problem.device != device:
        against.append(
            f"runs on {'the CPU under TRITON_INTERPRET=1' if INTERPRETED else 'CUDA devices'}, "
            f"the tensors are on {problem.device}"
        )
    if problem.dtype not in DTYPES:
        against.append(f"has no {dtype_name(problem.dtype)} kernel")
    elif problem.dtype == torch.bfloat16 and INTERPRETED:
        against.append("Triton's interpreter multiplies bfloat16 wrongly")
    if problem.device == device == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability < OLDEST:
            against.append("needs compute capability {}.{}, this device has {}.{}".format(*OLDEST, *capability))
    return against


def forward(
    input: Tensor,
    basis_weight: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    packed: Tensor | None,
    settings: tuple[Any, ...],
    keep_maps: bool = False,
) -> tuple[Tensor, None]:
    """``torch.ops.basisconv_triton.basis_conv2d``. It never keeps Z: its backward computes it again."""
    arguments = (input, basis_weight, coefficients, bias, residual, *settings[:-1])
    if torch.compiler.is_compiling():
        return torch.ops.basisconv_triton.basis_conv2d.default(*arguments), None
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.basisconv_triton.basis_conv2d.default(*arguments), None


def _launch(input: Tensor, *arguments: Any) -> Tensor:
    from basisconv_kernels.triton_kernels import basis_conv2d as kernels

    if input.device.type == "cpu":
        return kernels.forward(input, *arguments)
    with torch.cuda.device(input.device):  # Triton launches on the current device
        return kernels.forward(input, *arguments)


def _fake(
    input: Tensor,
    basis_weight: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *arguments: Any,
) -> Tensor:
    return fake_forward(input, basis_weight, coefficients, bias, residual, None, *arguments)


_library = torch.library.Library("basisconv_triton", "DEF")  # registrations live as long as this
_library.define(
    "basis_conv2d(Tensor input, Tensor basis_weight, Tensor coefficients, Tensor? bias, Tensor? residual, "
    "int[] stride, int[] padding, int[] dilation, int groups, str? activation, bool precise) -> Tensor"
)
_library.impl("basis_conv2d", _launch, "CPU" if INTERPRETED else "CUDA")
torch.library.register_fake("basisconv_triton::basis_conv2d", _fake, lib=_library)
refuse_gradients("basis_conv2d", OP, "basisconv_triton")
register_flop_formula(torch.ops.basisconv_triton.basis_conv2d)(flops)
