"""Where the Triton kernels of this package run: on CUDA devices, and under ``TRITON_INTERPRET=1`` on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from basisconv_kernels.core import env
from basisconv_kernels.core.problem import dtype_name

OLDEST = (8, 0)  # compute capability: bfloat16 and TF32 matrix instructions
INTERPRETED = env.triton_interprets()
KEY = "CPU" if INTERPRETED else "CUDA"  # what the torch ops are registered for


def against(device: str, dtype: torch.dtype, dtypes: Sequence[torch.dtype]) -> list[str]:
    """The reasons against tensors of a dtype on a device, for a kernel that takes ``dtypes``."""
    found = []
    wanted = "cpu" if INTERPRETED else "cuda"
    if device != wanted:
        where = "the CPU under TRITON_INTERPRET=1" if INTERPRETED else "CUDA devices"
        found.append(f"runs on {where}, the tensors are on {device}")
    if dtype not in dtypes:
        found.append(f"has no {dtype_name(dtype)} kernel")
    elif dtype == torch.bfloat16 and INTERPRETED:
        found.append("Triton's interpreter computes with bfloat16 wrongly")
    if device == wanted == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability < OLDEST:
            found.append("needs compute capability {}.{}, this device has {}.{}".format(*OLDEST, *capability))
    return found


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device; nothing to do in most calls, and nothing is what costs least."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
