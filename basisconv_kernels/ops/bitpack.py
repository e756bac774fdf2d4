"""The op ``bitpack``: signs or few-bit codes of maps and filters as packed words, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from basisconv_kernels.core import checks, registry
from basisconv_kernels.core.packed import ENCODINGS, PackedTensor, Threshold, check_threshold
from basisconv_kernels.core.problem import dtype_name
from basisconv_kernels.core.registry import Candidate
from basisconv_kernels.ops import bitpack_native as native
from basisconv_kernels.ops import bitpack_triton as triton
from basisconv_kernels.reference import bitpack as reference

OP = "bitpack"
INTEGERS = (torch.int32, torch.uint8)


@dataclass(frozen=True)
class BitpackProblem:
    """What the choice of a backend sees of a call."""

    dtype: torch.dtype
    device: str

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)} {self.device}"


def _cpu_supports(problem: Any) -> list[str]:
    against = []
    if problem.device != "cpu":
        against.append(f"runs on the CPU, the tensor is on {problem.device}")
    if problem.dtype not in native.DTYPES:
        against.append(f"has no {problem.dtype} kernel")
    return against


def _cuda_supports(problem: Any) -> list[str]:
    against = []
    if problem.device != "cuda":
        against.append(f"runs on CUDA devices, the tensor is on {problem.device}")
    if problem.dtype not in native.DTYPES:
        against.append(f"has no {problem.dtype} kernel")
    return against


def _reference_supports(problem: Any) -> list[str]:
    return []


CANDIDATES = (
    Candidate("cpu", "basisconv_kernels.ops.bitpack_native:forward", _cpu_supports),
    Candidate(
        "cuda",
        "basisconv_kernels.ops.bitpack_native:forward",
        _cuda_supports,
        check="basisconv_kernels.ops.bitpack_selfcheck:cuda",
    ),
    Candidate(
        "triton",
        "basisconv_kernels.ops.bitpack_triton:forward",
        triton.supports,
        check="basisconv_kernels.ops.bitpack_selfcheck:triton",
    ),
    Candidate("reference", "basisconv_kernels.reference.bitpack:forward", _reference_supports),
)

_targets: dict[str, Callable[..., Tensor]] = {}


def _choose(dtype: torch.dtype, device: str, asked: str | None) -> str:
    """Name of the backend: a constant in a graph."""
    problem = BitpackProblem(dtype, device)
    chosen = registry.select(OP, CANDIDATES, problem, asked or registry.wish())
    if chosen.name not in _targets:
        _targets[chosen.name] = registry.resolve(chosen)
    return chosen.name


_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def bitpack(
    input: Tensor,
    *,
    threshold: Threshold | None = None,
    bits: int = 1,
    unsigned: bool | None = None,
    backend: str | None = None,
) -> PackedTensor:
    """Pack the signs of maps or filters into words, or unsigned codes of a few bits into planes of words.

    ``bit[n, c, y, x] = input[n, c, y, x] >= 0``, with a threshold ``>= value[c]``, or ``<= value[c]`` where ``flip[c]``

    Args:
        input (Tensor[N, C, H, W]): maps, or filters [K, C, R, S]; any float dtype, int32 or uint8; any strides.
        threshold (Threshold, optional): of each channel, for signs only; int32 thresholds for integers, float32 ones
            for real values. ``Threshold.fold`` makes them of a BatchNorm.
        bits (int): bits a value: 1 to 4.
        unsigned (bool, optional): False packs signs (``bits=1`` only), True the codes
            ``round(clamp(input, 0, 2^bits − 1))``, half to even. None: signs for one bit, codes for more.
        backend (str, optional): run on this backend or raise; None chooses.

    Returns:
        PackedTensor: always packed as a whole, with no regard to groups or splits of a consumer; docs/packed_formats.md
        describes it. Its bits are the same on every backend.

    −0 counts as +0; NaN gives 0, whatever the threshold. There is no gradient: ``binary_conv2d`` has straight-through
    estimators of its own.

    Raises:
        TypeError: a dtype or kind of argument that does not fit.
        ValueError: shapes or values that do not fit; the message names both.
        BackendUnavailable: ``backend`` cannot run this call.

    Example:
        >>> import torch
        >>> from basisconv_kernels import bitpack, unpack
        >>> packed = bitpack(torch.tensor([1.0, -2.0, 0.0]).reshape(1, 3, 1, 1))
        >>> packed.words.shape, packed.words.item()
        (torch.Size([1, 1, 1, 1, 1]), 5)
        >>> unpack(packed).flatten()
        tensor([ 1., -1.,  1.])
    """
    encoding = check_arguments(OP, input, threshold, bits, unsigned)
    chosen = _choose(input.dtype, input.device.type, backend)
    words = _targets[chosen](input.detach(), threshold, bits, encoding)
    made = PackedTensor if torch.compiler.is_compiling() else PackedTensor.of_kernel
    return made(words, int(input.shape[1]), bits, encoding)


def check_arguments(op: str, input: Any, threshold: Any, bits: Any, unsigned: Any) -> str:
    """Check the arguments of ``bitpack`` against each other; returns the encoding."""
    checks.tensor(op, "input", input, 4, "[N, C, H, W]")
    if input.dtype not in (*checks.FLOAT_DTYPES, *INTEGERS):
        raise TypeError(f"{op}: input must be float32, bfloat16, float16, float64, int32 or uint8, got {input.dtype}")
    if input.shape[1] < 1:
        raise ValueError(f"{op}: input must be [N, C, H, W] with at least one channel, got {list(input.shape)}")
    if not isinstance(bits, int) or isinstance(bits, bool):
        raise TypeError(f"{op}: bits must be an int, got {bits!r}")
    most = ENCODINGS["unsigned"][1]
    if not 1 <= bits <= most:
        raise ValueError(f"{op}: bits must be 1 to {most}, got {bits}")
    if unsigned is False and bits > 1:
        raise ValueError(f"{op}: signs take bits=1, got {bits}; use unsigned=True for codes of {bits} bits")
    encoding = "unsigned" if unsigned or bits > 1 else "sign"
    if threshold is not None:
        check_threshold(op, threshold, input.shape[1], input.device, integers=not input.is_floating_point())
        if encoding != "sign":
            raise ValueError(f"{op}: threshold makes signs, which take bits=1 and not unsigned=True, got bits={bits}")
    return encoding


def unpack(
    packed: PackedTensor,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """The values of packed words: ±1 for signs, the codes Σ 2^plane·bit for unsigned planes.

    Args:
        packed (PackedTensor): as ``bitpack`` gives it.
        dtype: of the result.
        memory_format: of the result.

    Returns:
        Tensor[N, C, H, W].
    """
    if not isinstance(packed, PackedTensor):
        raise TypeError(f"unpack: packed must be a PackedTensor, got {type(packed).__name__}")
    values = reference.unpack(packed.words, packed.channels, packed.encoding)
    return values.to(dtype).contiguous(memory_format=memory_format)
