"""The Triton backend of ``bitpack``: what it can run, its torch op, and what torch must know about that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from basisconv_kernels.core import triton_devices
from basisconv_kernels.core.autograd import refuse_gradients
from basisconv_kernels.core.packed import Threshold
from basisconv_kernels.ops.bitpack_native import DTYPES
from basisconv_kernels.ops.bitpack_native import _fake as fake

OP = "bitpack"


def supports(problem: Any) -> list[str]:
    """The reasons against a problem."""
    return triton_devices.against(problem.device, problem.dtype, DTYPES)


def forward(input: Tensor, threshold: Threshold | None, planes: int, encoding: str) -> Tensor:
    """``torch.ops.basisconv_triton.bitpack``."""
    value, flip = (None, None) if threshold is None else (threshold.value, threshold.flip)
    arguments = (input, value, flip, planes, encoding == "unsigned")
    if torch.compiler.is_compiling():
        return torch.ops.basisconv_triton.bitpack.default(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.basisconv_triton.bitpack.default(*arguments)


def _launch(input: Tensor, value: Tensor | None, flip: Tensor | None, bits: int, codes: bool) -> Tensor:
    from basisconv_kernels.triton_kernels import bitpack as kernels

    value, flip = (None if t is None else t.contiguous() for t in (value, flip))
    with triton_devices.on(input.device):
        return kernels.forward(input, value, flip, bits, codes)


_library = torch.library.Library("basisconv_triton", "FRAGMENT")  # registrations live as long as this
_library.define("bitpack(Tensor input, Tensor? value, Tensor? flip, int bits, bool codes) -> Tensor")
_library.impl("bitpack", _launch, triton_devices.KEY)
torch.library.register_fake("basisconv_triton::bitpack", fake, lib=_library)
refuse_gradients("bitpack", OP)
