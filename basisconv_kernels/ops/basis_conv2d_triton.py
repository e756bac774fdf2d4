"""The Triton backend of ``basis_conv2d``: what it can run, its torch op, and what torch must know about that.

Triton and the kernels are imported by the first call. Under ``TRITON_INTERPRET=1`` the kernels run on CPU tensors, to
test them without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from basisconv_kernels.core import env
from basisconv_kernels.core.autograd import refuse_gradients
from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.problem import Conv2dProblem, dtype_name
from basisconv_kernels.ops.basis_conv2d_native import fake_forward, flops
from basisconv_kernels.reference import basis_conv2d as reference

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

    with _on(input.device):
        return kernels.forward(input, *arguments)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device; nothing to do in most calls, and nothing is what costs least."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _fake(
    input: Tensor,
    basis_weight: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *arguments: Any,
) -> Tensor:
    return fake_forward(input, basis_weight, coefficients, bias, residual, None, *arguments)


# --- gradients --------------------------------------------------------------------------------------------------------


def backward(
    grad_output: Tensor,
    output: Tensor | None,
    input: Tensor,
    basis_weight: Tensor,
    coefficients: Tensor,
    stride: Pair,
    padding: Quad,
    dilation: Pair,
    groups: int,
    activation: str | None,
    wanted: tuple[bool, bool, bool, bool, bool],
    maps: Tensor | None = None,
) -> reference.Gradients:
    """``reference.backward``, or the same by our kernels where there is no cuDNN: Z is computed again tile by tile."""
    arguments = (grad_output, output, input, basis_weight, coefficients, stride, padding, dilation)
    if not _own_gradients(groups, input.device.type):
        return reference.backward(*arguments, groups, activation, wanted, maps)
    found = torch.ops.basisconv_triton.basis_conv2d_backward.default(*arguments, activation, wanted[:4])
    d_input, d_basis, d_coefficients, d_bias = (
        gradient if want else None for gradient, want in zip(found, wanted, strict=False)
    )
    d_residual = reference.sloped(grad_output, output, activation) if wanted[4] else None
    return reference.Gradients(d_input, d_basis, d_coefficients, d_bias, d_residual)


def _own_gradients(groups: int, device: str) -> bool:
    from basisconv_kernels.triton_kernels import configs

    cudnn = device == "cuda" and torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled
    return configs.own_gradients(groups, cudnn)


_own_gradients._dynamo_marked_constant = True  # type: ignore[attr-defined]  # it reads flags that no graph can trace


def _launch_backward(
    grad_output: Tensor,
    output: Tensor | None,
    input: Tensor,
    basis_weight: Tensor,
    coefficients: Tensor,
    stride: Pair,
    padding: Quad,
    dilation: Pair,
    activation: str | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    from basisconv_kernels.triton_kernels import basis_conv2d_gradients as kernels

    with _on(input.device):
        found = kernels.backward(
            grad_output, output, input, basis_weight, coefficients, stride, padding, dilation, activation, wanted
        )
    shaped = (input, basis_weight)
    laid_out = [
        gradient if gradient is None else reference.laid_out(gradient, reference.memory_format(like))
        for gradient, like in zip(found, shaped, strict=False)
    ]
    return tuple(input.new_empty(0) if gradient is None else gradient for gradient in (*laid_out, *found[2:]))


def _fake_backward(
    grad_output: Tensor,
    output: Tensor | None,
    input: Tensor,
    basis_weight: Tensor,
    coefficients: Tensor,
    stride: Pair,
    padding: Quad,
    dilation: Pair,
    activation: str | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    def like(tensor: Tensor) -> Tensor:
        layout = reference.memory_format(tensor) if tensor.dim() == 4 else torch.contiguous_format
        return torch.empty(tensor.shape, dtype=input.dtype, device=input.device, memory_format=layout)

    shapes = (input, basis_weight, coefficients, coefficients[:, 0])
    return tuple(like(t) if want else input.new_empty(0) for t, want in zip(shapes, wanted, strict=True))


# --- registration -----------------------------------------------------------------------------------------------------

_library = torch.library.Library("basisconv_triton", "DEF")  # registrations live as long as this
_library.define(
    "basis_conv2d(Tensor input, Tensor basis_weight, Tensor coefficients, Tensor? bias, Tensor? residual, "
    "int[] stride, int[] padding, int[] dilation, int groups, str? activation, bool precise) -> Tensor"
)
_library.define(
    "basis_conv2d_backward(Tensor grad_output, Tensor? output, Tensor input, Tensor basis_weight, Tensor coefficients, "
    "int[] stride, int[] padding, int[] dilation, str? activation, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)"
)
for _name, _run, _shapes in (
    ("basis_conv2d", _launch, _fake),
    ("basis_conv2d_backward", _launch_backward, _fake_backward),
):
    _library.impl(_name, _run, "CPU" if INTERPRETED else "CUDA")
    torch.library.register_fake(f"basisconv_triton::{_name}", _shapes, lib=_library)
    refuse_gradients(_name, OP)
register_flop_formula(torch.ops.basisconv_triton.basis_conv2d)(flops)
