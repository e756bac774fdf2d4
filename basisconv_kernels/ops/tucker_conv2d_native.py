"""The native form of ``tucker_conv2d``, on the CPU and on CUDA: the first 1×1, then the basis kernel for the rest.

The last two stages *are* ``basis_conv2d`` with the core as basis and u_out as coefficients. The first one stays a call
of its own: docs/architecture.md has the times that say why, and which of the ways below is fastest where.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from basisconv_kernels.core.checks import Pair
from basisconv_kernels.core.layout import laid_out, memory_format
from basisconv_kernels.core.problem import TuckerConv2dProblem
from basisconv_kernels.ops import basis_conv2d_native as basis
from basisconv_kernels.ops.tucker_conv2d_model import last_two_stages
from basisconv_kernels.reference.tucker_conv2d import HALF, reduce_channels

OP = "tucker_conv2d"
DTYPES = basis.DTYPES


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
    """The result, and M and Z if asked."""
    stride, padding, dilation, activation, precise, backend = settings
    layout, dtype = memory_format(input), between(input.dtype, precise)
    reduced = laid_out(first_stage(input, u_in, layout, precise).to(dtype), layout)
    tensors = (core, u_out, bias, residual)
    if dtype != input.dtype:
        tensors = tuple(None if t is None else t.to(dtype) for t in tensors)  # type: ignore[assignment]
    rest = (stride, padding, dilation, 1, activation, precise, backend)
    out, maps = basis.forward(reduced, *tensors, packed, rest, keep_stages)
    if dtype != input.dtype:
        out = laid_out(out.to(input.dtype), layout)
    if not keep_stages or maps is None:
        return out, None, None
    return out, reduced.to(input.dtype), maps.to(input.dtype)


def cuda_supports(problem: TuckerConv2dProblem) -> list[str]:
    """The reasons against the CUDA kernels: those of the basis kernel, and M in float32, which it does not take."""
    against = basis.cuda_supports(last_two_stages(problem))
    if problem.precise and problem.dtype in HALF:
        against.append("keeps the first map in the dtype of the input, not in float32 as precise asks")
    return against


def reduced_maps(input: Tensor, u_in: Tensor, precise: bool) -> Tensor:
    """M = u_inᵀ · input by PyTorch's own kernels, on a GPU cuDNN's; in 16 bits, if ``precise``, in float32."""
    if input.device.type == "cuda" and 0 not in input.shape and not (precise and input.dtype in HALF):
        return F.conv2d(input, u_in.t()[:, :, None, None])
    return reduce_channels(input, u_in)


def first_stage(input: Tensor, u_in: Tensor, layout: torch.memory_format, precise: bool) -> Tensor:
    """M = u_inᵀ · input in the dtype that it has between the stages, rounded once."""
    if 0 in input.shape[2:] or input.device.type == "cuda":  # no pixel, though the padding around may have some
        return reduced_maps(input, u_in, precise)
    if input.dtype in HALF and not precise:
        # The basis kernel's own first stage, whose maps it also returns: PyTorch has no fast 16-bit 1×1 on processors
        # without 16-bit arithmetic. The second stage is one output that nobody reads.
        unread = u_in.new_zeros(1, u_in.shape[1])
        fixed = ((1, 1), (0, 0, 0, 0), (1, 1), 1, None, False, "cpu")
        _, maps = basis.forward(input, u_in.t()[:, :, None, None], unread, None, None, None, fixed, True)
        return maps  # type: ignore[return-value]  # it was asked for
    if input.dtype in HALF:
        return reduce_channels(input, u_in)
    # Matrix products: PyTorch's convolution would first rearrange a weight that lies by input channels.
    N, C, H, W = input.shape
    if layout == torch.channels_last:
        rows = input.permute(0, 2, 3, 1).reshape(N * H * W, C)
        return (rows @ u_in).reshape(N, H, W, u_in.shape[1]).permute(0, 3, 1, 2)
    return torch.matmul(u_in.t(), input.reshape(N, C, H * W)).reshape(N, u_in.shape[1], H, W)


def between(dtype: torch.dtype, precise: bool) -> torch.dtype:
    """The dtype of M and of what runs after it: float32 where ``precise`` forbids to round M."""
    return torch.float32 if precise and dtype in HALF else dtype


def tucker_conv2d_pack(
    core: Tensor, u_out: Tensor, *, stride: int | Pair = 1, dilation: int | Pair = 1, precise: bool = False
) -> Tensor | None:
    """Rearrange weights once for the native kernel, for the ``packed`` argument of ``tucker_conv2d``.

    Args:
        core (Tensor[rank_out, rank_in, R, S]), u_out (Tensor[K, rank_out]): as for ``tucker_conv2d``.
        stride, dilation, precise: as they will be given to ``tucker_conv2d``.

    Returns:
        Tensor[bytes] (uint8), good for this instruction set and geometry only and checked on use; None where the native
        kernel does not take these tensors, and then ``packed=None`` is right.
    """
    dtype = between(core.dtype, precise)
    return basis.basis_conv2d_pack(core.to(dtype), u_out.to(dtype), stride=stride, dilation=dilation, precise=precise)
