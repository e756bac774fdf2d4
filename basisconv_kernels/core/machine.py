"""The processor and the GPU that this process runs on, in words: what a measured time belongs to."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch

from basisconv_kernels.core import extension


@functools.cache
def cpu_name() -> str:
    """The processor's model as the operating system names it."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cuda_device() -> dict[str, str] | None:
    """Name and compute capability of the current CUDA device; None where there is none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {"name": properties.name, "capability": f"{properties.major}.{properties.minor}"}


def against_capability(least: int = 8, most: int | None = None) -> list[str]:
    """Why kernels for compute capability ``least``.0 cannot run on the current device; empty where there is none.

    ``most`` is the last major version that they run on, None if there is none.
    """
    device = cuda_device()
    if device is None:
        return []
    major = int(device["capability"].partition(".")[0])
    if least <= major <= (major if most is None else most):
        return []
    return [f"needs compute capability {least}.0, {device['name']} has {device['capability']}"]


def isa() -> str:
    """The instruction set that the native kernels use; ``none`` where there are none."""
    return str(extension.facts().get("cpu", {}).get("in_use", "none"))
