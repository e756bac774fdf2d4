"""``wrappers.cu`` as a library for ctypes: by nvcc for the device, or by the C++ compiler for ``tests/cuda_on_cpu``."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cuda_on_cpu import building

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "wrappers.cu"
KEPT = building.ROOT / "build" / "wrappers"


class Wrappers:
    """The C functions of ``wrappers.cu``; tensors go as addresses, an error raises."""

    def __init__(self, library: Path, device: str):
        self.library, self.device = ctypes.CDLL(str(library)), device

    def __call__(self, name: str, *arguments: int | Tensor) -> None:
        """Run one, and wait for it."""
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        passed = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int(a) for a in arguments]
        wrong = function(*passed)
        assert wrong is None, wrong.decode()
        if self.device == "cuda":
            torch.cuda.synchronize()


def compile_wrappers(device: str) -> Wrappers:
    """For "cuda" with the code of this device, "sm_90a" that code without loading it, or "cpu"."""
    if device == "cpu":
        command = [*building.compiler(), *building.FLAGS, f"-I{building.HERE}", "-x", "c++", "-shared"]
    else:
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            pytest.skip("nvcc is not on the path")
        command = [nvcc, "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC"]
        command += ["-gencode", "arch=compute_90a,code=sm_90a"]
    digest = hashlib.sha256(repr(command[1:]).encode())
    headers = [
        p
        for part in ("csrc/cuda", "csrc/common", "tests/cuda_on_cpu")
        for p in sorted((building.ROOT / part).glob("*.h"))
    ]
    for path in (SOURCE, *headers):
        digest.update(path.read_bytes())
    made = KEPT / f"{device}_{digest.hexdigest()[:16]}.so"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        beside = made.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, SOURCE, "-o", beside], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "C75" not in done.stderr, done.stderr
        beside.replace(made)
    return Wrappers(made, device)
