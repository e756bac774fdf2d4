"""The Triton backend of ``tucker_conv2d``: core and u_out by the kernels of ``basis_conv2d``, or all in one pass.

The first 1×1 is a convolution of PyTorch, on a GPU cuDNN's, unless ``tucker_conv2d_model`` says that the one-pass
kernel pays. Gradients: M is computed again, the last two stages have those of ``basis_conv2d``, the first PyTorch's.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from basisconv_kernels.core import checks
from basisconv_kernels.core.autograd import refuse_gradients
from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.layout import cast, laid_out, memory_format
from basisconv_kernels.core.problem import TuckerConv2dProblem
from basisconv_kernels.ops import basis_conv2d_triton as basis
from basisconv_kernels.ops import tucker_conv2d_model as model
from basisconv_kernels.ops.tucker_conv2d_native import between, reduced_maps
from basisconv_kernels.reference import tucker_conv2d as reference

OP = "tucker_conv2d"


def supports(problem: TuckerConv2dProblem) -> list[str]:
    """The reasons against a problem: those of the basis kernels."""
    return basis.supports(model.last_two_stages(problem))


def forward(
    input: Tensor,
    u_in: Tensor,
    core: Tensor,
    u_out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    packed: Tensor | None,
    settings: tuple[Any, ...],
    keep_stages: bool = False,
) -> tuple[Tensor, None, None]:
    """``torch.ops.basisconv_triton.tucker_conv2d``. It keeps neither M nor Z: its backward computes them again."""
    arguments = (input, u_in, core, u_out, bias, residual, *settings[:-1])
    if torch.compiler.is_compiling():
        return torch.ops.basisconv_triton.tucker_conv2d.default(*arguments), None, None
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.basisconv_triton.tucker_conv2d.default(*arguments), None, None


def _reduced(input: Tensor, u_in: Tensor, precise: bool = False) -> Tensor:
    """M in the dtype that it has between the stages, and in the memory format of the input."""
    reduced = cast(reduced_maps(input, u_in, precise), between(input.dtype, precise))
    return laid_out(reduced, memory_format(input))


def _fake_reduced(input: Tensor, u_in: Tensor) -> Tensor:
    size = (input.shape[0], u_in.shape[1], *input.shape[2:])
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=memory_format(input))


def _launch(
    input: Tensor,
    u_in: Tensor,
    core: Tensor,
    u_out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Quad,
    dilation: Pair,
    activation: str | None,
    precise: bool,
) -> Tensor:
    """The chain in one pass or in two, as the model says."""
    from basisconv_kernels.triton_kernels import basis_conv2d as last_two
    from basisconv_kernels.triton_kernels import tucker_conv2d as all_three

    geometry: Any = (tuple(stride), tuple(padding), tuple(dilation))
    rank_out, rank_in, R, S = core.shape
    problem = TuckerConv2dProblem(
        C=input.shape[1], rank_in=rank_in, Q=rank_out, K=u_out.shape[0], R=R, S=S, stride=geometry[0],
        dilation=geometry[2], dtype=input.dtype, device=input.device.type, precise=precise,
    )  # fmt: skip
    with torch.cuda.device(input.device) if input.is_cuda else nullcontext():
        if model.one_pass_pays(problem):
            return all_three.forward(input, u_in, core, u_out, bias, residual, *geometry, activation)
        dtype, layout = between(input.dtype, precise), memory_format(input)
        reduced = _reduced(input, u_in, precise)
        tensors = tuple(None if t is None else cast(t, dtype) for t in (core, u_out, bias, residual))
        out = last_two.forward(reduced, *tensors, *geometry, 1, activation, precise)
        return laid_out(cast(out, input.dtype), layout)


def _fake(
    input: Tensor,
    u_in: Tensor,
    core: Tensor,
    u_out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Quad,
    dilation: Pair,
    activation: str | None,
    precise: bool,
) -> Tensor:
    OH, OW = checks.output_size(OP, input.shape[2:], core.shape[2:], stride, padding, dilation)  # type: ignore[arg-type]
    size = (input.shape[0], u_out.shape[0], OH, OW)
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=memory_format(input))


# --- gradients --------------------------------------------------------------------------------------------------------


def backward(
    grad_output: Tensor,
    output: Tensor | None,
    input: Tensor,
    u_in: Tensor,
    core: Tensor,
    u_out: Tensor,
    stride: Pair,
    padding: Quad,
    dilation: Pair,
    activation: str | None,
    wanted: tuple[bool, bool, bool, bool, bool, bool],
    stages: reference.Stages | None = None,
) -> reference.Gradients:
    """``reference.backward``, whose last two stages are those of ``basis_conv2d`` by its kernels."""
    if 0 in input.shape[2:] or not basis._own_gradients(1, input.device.type):
        return reference.backward(
            grad_output, output, input, u_in, core, u_out, stride, padding, dilation, activation, wanted, stages
        )
    reduced = torch.ops.basisconv_triton.tucker_conv2d_reduced.default(input, u_in)
    before_core = wanted[0] or wanted[1]
    found = basis.backward(
        grad_output, output, reduced, core, u_out, stride, padding, dilation, 1, activation, (before_core, *wanted[2:])
    )
    d_input = d_u_in = None
    if before_core:
        weight = u_in.t()[:, :, None, None]
        d_input, d_weight = reference._convolution_backward(found.input, input, weight, wanted[:2])
        d_u_in = None if d_weight is None else d_weight[:, :, 0, 0].t()
    return reference.Gradients(d_input, d_u_in, found.basis_weight, found.coefficients, found.bias, found.residual)


# --- registration -----------------------------------------------------------------------------------------------------


def _flops(input: Any, u_in: Any, core: Any, u_out: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """Two FLOP a multiply-accumulate of the three stages, M once a pixel of the input as in the formula of the op."""
    N, C, H, W = input
    rank_out, rank_in, R, S = core
    _, K, OH, OW = out_shape
    return 2 * N * (H * W * C * rank_in + OH * OW * (rank_out * rank_in * R * S + K * rank_out))


_library = torch.library.Library("basisconv_triton", "FRAGMENT")  # registrations live as long as this
_library.define(
    "tucker_conv2d(Tensor input, Tensor u_in, Tensor core, Tensor u_out, Tensor? bias, Tensor? residual, "
    "int[] stride, int[] padding, int[] dilation, str? activation, bool precise) -> Tensor"
)
_library.define("tucker_conv2d_reduced(Tensor input, Tensor u_in) -> Tensor")  # M, for the backward
for _name, _run, _shapes in (
    ("tucker_conv2d", _launch, _fake),
    ("tucker_conv2d_reduced", _reduced, _fake_reduced),
):
    _library.impl(_name, _run, "CPU" if basis.INTERPRETED else "CUDA")
    torch.library.register_fake(f"basisconv_triton::{_name}", _shapes, lib=_library)
    refuse_gradients(_name, OP)
register_flop_formula(torch.ops.basisconv_triton.tucker_conv2d)(_flops)
