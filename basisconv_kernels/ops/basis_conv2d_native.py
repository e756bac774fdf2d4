"""The native torch ops of ``basis_conv2d``: calling them, packing for them, and what torch must know about them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from basisconv_kernels.core import checks, extension, machine
from basisconv_kernels.core.autograd import call_raw, register_without_gradient
from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.problem import Conv2dProblem
from basisconv_kernels.reference import basis_conv2d as reference

OP = "basis_conv2d"
BACKENDS = ("cpu", "cuda")  # by device; what `forward` runs on
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA_DTYPES = (torch.bfloat16, torch.float16)
CUDA_LARGEST_Q = 256
# Constants, because graphs are traced through the functions that ask. The format of packed weights is part of such a
# graph: one that was cached for another layout is then not used again.
PRESENT = extension.load() is None
FORMAT = extension.facts().get("pack_format", 0)


def forward(
    input: Tensor,
    basis_weight: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    packed: Tensor | None,
    settings: tuple[Any, ...],
    keep_maps: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The torch ops that C++ registers for the CPU and for CUDA."""
    if packed is not None and (packed.device != input.device or packed.dtype != torch.uint8):
        raise ValueError(
            f"{OP}: packed must be what basis_conv2d_pack gives, uint8 on {input.device}, "
            f"got {packed.dtype} on {packed.device}; pack the weights again"
        )
    arguments = (input, basis_weight, coefficients, bias, residual, packed, *settings[:-1])
    if keep_maps:
        return call_raw(torch.ops.basisconv.basis_conv2d_maps.default, *arguments)
    return call_raw(torch.ops.basisconv.basis_conv2d.default, *arguments), None


def cpu_supports(problem: Conv2dProblem) -> list[str]:
    """Why the CPU kernel cannot do a problem; empty where it can."""
    against = []
    if problem.device != "cpu":
        against.append(f"runs on the CPU, the tensors are on {problem.device}")
    if problem.dtype not in DTYPES:
        against.append(f"has no {problem.dtype} kernel")
    return against


def cuda_supports(problem: Conv2dProblem) -> list[str]:
    """The reasons against the CUDA kernels; those of this machine's device count where there is one."""
    against = []
    if problem.device != "cuda":
        against.append(f"runs on CUDA devices, the tensors are on {problem.device}")
    if problem.dtype not in CUDA_DTYPES:
        against.append(f"has no {problem.dtype} kernel")
    if problem.groups > 1 and not problem.compact:
        against.append("has no kernel for groups with coefficients [K, Q]; [K, Q/groups] it takes")
    filters = problem.Q // problem.groups
    if filters > CUDA_LARGEST_Q:
        against.append(f"takes at most {CUDA_LARGEST_Q} basis filters a group, here are {filters}")
    against += machine.against_capability()
    if not torch.cuda.is_available():
        return against
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    # Twice 128 filters: two taps of the basis, two chunks of coefficients and the pixels, see basis_conv2d_sm80.cu.
    wanted = 160 * 1024
    if filters > 128 and getattr(device, "shared_memory_per_block_optin", wanted) < wanted:
        against.append(f"more than 128 basis filters a group need more shared memory than {device.name} has")
    return against


def basis_conv2d_pack(
    basis_weight: Tensor,
    coefficients: Tensor,
    *,
    stride: int | Pair = 1,
    dilation: int | Pair = 1,
    groups: int = 1,
    precise: bool = False,
) -> Tensor | None:
    """Rearrange weights once for the native kernel, for the ``packed`` argument of ``basis_conv2d``.

    Args:
        basis_weight (Tensor[Q, C/groups, R, S]): as for ``basis_conv2d``.
        coefficients (Tensor[K, Q] or [K, Q/groups]): as for ``basis_conv2d``.
        stride, dilation, groups, precise: as they will be given to ``basis_conv2d``.

    Returns:
        Tensor[bytes] (uint8), good for this instruction set and geometry only and checked on use; None where the native
        kernel does not take these tensors, and then ``packed=None`` is right.
    """
    if not PRESENT or not _packs(basis_weight, coefficients, groups):
        return None
    return torch.ops.basisconv.basis_conv2d_pack.default(
        basis_weight,
        coefficients,
        checks.pair(OP, "stride", stride, at_least=1),
        checks.pair(OP, "dilation", dilation, at_least=1),
        groups,
        precise,
        FORMAT,
    )


def _packs(basis_weight: Tensor, coefficients: Tensor, groups: int) -> bool:
    """Whether a native kernel takes these weights, and so has a form of its own for them."""
    if basis_weight.device.type == "cpu":
        return basis_weight.dtype in DTYPES
    compact = groups == 1 or coefficients.shape[1] != basis_weight.shape[0]
    known = basis_weight.dtype in CUDA_DTYPES and compact and basis_weight.shape[0] // groups <= CUDA_LARGEST_Q
    return basis_weight.device.type == "cuda" and "cuda" in extension.facts() and known


def fake_forward(
    input: Tensor,
    basis_weight: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    packed: Tensor | None,
    stride: Pair,
    padding: Quad,
    dilation: Pair,
    groups: int,
    activation: str | None,
    precise: bool,
) -> Tensor:
    """Shape, dtype and strides of the result, for tracing."""
    kernel = (basis_weight.shape[2], basis_weight.shape[3])
    OH, OW = checks.output_size(OP, (input.shape[2], input.shape[3]), kernel, stride, padding, dilation)
    return torch.empty(
        (input.shape[0], coefficients.shape[0], OH, OW),
        dtype=input.dtype,
        device=input.device,
        memory_format=reference.memory_format(input),
    )


def _fake_forward_maps(input: Tensor, basis_weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    out = fake_forward(input, basis_weight, *arguments)
    size = (out.shape[0], basis_weight.shape[0], *out.shape[2:])
    return out, torch.empty(size, dtype=out.dtype, device=out.device, memory_format=reference.memory_format(input))


def _fake_pack(
    basis_weight: Tensor,
    coefficients: Tensor,
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    precise: bool,
    format: int,
) -> Tensor:
    shapes = ([int(size) for size in basis_weight.shape], [int(size) for size in coefficients.shape])
    if basis_weight.device.type == "cuda":
        size = torch.ops.basisconv.basis_conv2d_cuda_packed_bytes.default(*shapes, groups)
    else:
        size = torch.ops.basisconv.basis_conv2d_packed_bytes.default(*shapes, stride, dilation, groups, precise)
    return basis_weight.new_empty(size, dtype=torch.uint8)


def flops(
    input: Sequence[int],
    basis_weight: Sequence[int],
    coefficients: Sequence[int],
    *_: Any,
    out_shape: Sequence[int],
    **__: Any,
) -> int:
    """Two FLOP a multiply-accumulate of both stages; activation, bias and residual count nothing, as in torch."""
    Q, taps_in, R, S = basis_weight
    N, K, OH, OW = out_shape if isinstance(out_shape[0], int) else out_shape[0]  # the maps variant has two outputs
    return 2 * N * OH * OW * (Q * taps_in * R * S + K * coefficients[1])


def _register() -> None:
    """Teach torch what the native op does to shapes, gradients and FLOP counts."""
    for native, fake in (
        ("basis_conv2d", fake_forward),
        ("basis_conv2d_maps", _fake_forward_maps),
        ("basis_conv2d_pack", _fake_pack),
    ):
        register_without_gradient(native, OP, fake)
    register_flop_formula(torch.ops.basisconv.basis_conv2d)(flops)
    register_flop_formula(torch.ops.basisconv.basis_conv2d_maps)(flops)


if PRESENT:
    _register()
