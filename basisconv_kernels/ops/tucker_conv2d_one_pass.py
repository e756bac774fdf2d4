"""The backend ``cuda_one_pass`` of ``tucker_conv2d``: the whole chain in one CUDA kernel, M never in memory.

It reduces the pixels that neighbouring tiles share once for each of them, so whether it beats the two passes of the
backend ``cuda`` is a matter of measurement: automatic choice takes it only where the table of the device says so.
Gradients of the core and of u_out need M and Z, which only two passes keep; those run then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from basisconv_kernels.core import checks
from basisconv_kernels.core.autograd import call_raw, register_without_gradient
from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.layout import memory_format
from basisconv_kernels.core.problem import TuckerConv2dProblem
from basisconv_kernels.ops import basis_conv2d_native as basis
from basisconv_kernels.ops import tucker_conv2d_native as two_passes

OP = "tucker_conv2d"
HOPPER = (90, 227 * 1024)  # capability and shared memory of a block, where there is no device to ask


def supports(problem: TuckerConv2dProblem) -> list[str]:
    """The reasons against the kernel: those of the other passes, and what its tiles cannot hold."""
    against = two_passes.cuda_supports(problem)
    if against or "cuda" not in basis.extension.facts():
        return against
    told = torch.ops.basisconv.tucker_conv2d_one_pass_reason.default(
        [problem.Q, problem.rank_in, problem.R, problem.S], problem.C, problem.stride, problem.dilation, *_device()
    )
    return [told] if told else []


def _device() -> tuple[int, int]:
    if not torch.cuda.is_available():
        return HOPPER
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return found.major * 10 + found.minor, getattr(found, "shared_memory_per_block_optin", HOPPER[1])


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
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``torch.ops.basisconv.tucker_conv2d_one_pass``; two passes where M and Z are asked for."""
    if keep_stages:
        return two_passes.forward(input, u_in, core, u_out, bias, residual, packed, settings, True)
    stride, padding, dilation, activation, *_ = settings
    if packed is None:
        packed = basis.basis_conv2d_pack(core, u_out, stride=stride, dilation=dilation)
    arguments = (input, u_in, core, u_out, bias, residual, packed, stride, padding, dilation, activation)
    return call_raw(torch.ops.basisconv.tucker_conv2d_one_pass.default, *arguments), None, None


def _fake(
    input: Tensor,
    u_in: Tensor,
    core: Tensor,
    u_out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    packed: Tensor,
    stride: Pair,
    padding: Quad,
    dilation: Pair,
    activation: str | None,
) -> Tensor:
    OH, OW = checks.output_size(OP, input.shape[2:], core.shape[2:], stride, padding, dilation)  # type: ignore[arg-type]
    size = (input.shape[0], u_out.shape[0], OH, OW)
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=memory_format(input))


def _flops(input: Any, u_in: Any, core: Any, u_out: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """Two FLOP a multiply-accumulate of the three stages, M once a pixel of the input as in the formula of the op."""
    N, C, H, W = input
    rank_out, rank_in, R, S = core
    _, K, OH, OW = out_shape
    return 2 * N * (H * W * C * rank_in + OH * OW * (rank_out * rank_in * R * S + K * rank_out))


if "cuda" in basis.extension.facts():
    register_without_gradient("tucker_conv2d_one_pass", OP, _fake)
    register_flop_formula(torch.ops.basisconv.tucker_conv2d_one_pass)(_flops)
